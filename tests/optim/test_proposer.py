import json
import sys

import pytest
import torch
from hypothesis import given, strategies as st

from steppe.core.errors import DataError, SpecError
from steppe.core.objective import Cost, Objective
from steppe.optim.gradient_free.proposer import (
    Command,
    Jitter,
    QuadraticFit,
    RandomRestart,
    Replay,
    Trial,
    key_of,
    parse,
    prompt_of,
    render,
)
from steppe.optim.gradient_free.stages import Proposed
from steppe.problems.function_parts import Point

TRACE = [
    Trial(torch.tensor([1.0, 2.0], dtype=torch.float64), 5.0),
    Trial(torch.zeros(2, dtype=torch.float64), 0.5),
]
ECHO = [sys.executable, "-c", "print('0.5 0.25\\n\\n[1, -1]')"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_what_is_rendered_is_parsed_to_four_digits(numbers):
    weights = torch.tensor(numbers, dtype=torch.float64)
    torch.testing.assert_close(parse(render(weights), len(numbers)), weights, rtol=5.1e-4, atol=1e-300)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1 two", "'two' is not a number"),
        ("1 nan", "'nan' is not finite"),
        ("1 2 3", "need 2 numbers, got 3"),
    ],
)
def test_a_line_that_does_not_parse_says_why(line, said):
    with pytest.raises(DataError, match=said):
        parse(line, 2)


@pytest.mark.parametrize("control", [RandomRestart(-2, 3), Jitter(), QuadraticFit()])
def test_controls_propose_the_same_when_asked_again(control):
    first, again = (control.propose("", TRACE, 3) for _ in range(2))
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_random_restarts_stay_inside_and_jitter_near_the_best():
    rows = torch.stack(RandomRestart(-2, 3).propose("", TRACE, 200))
    assert -2 <= rows.min() < -1.5
    assert 2.5 < rows.max() <= 3
    near = torch.stack(Jitter(scale=0.01).propose("", TRACE, 200))
    assert near.abs().max() < 0.06


def test_a_quadratic_is_fitted_exactly():
    stream = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=stream, dtype=torch.float64)
    minimum = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    points = torch.randn(12, 3, generator=stream, dtype=torch.float64)
    trace = [Trial(x, float((root @ (x - minimum)).square().sum()) + 7) for x in points]
    (first, half) = QuadraticFit(reach=10.0).propose("", trace, 2)
    torch.testing.assert_close(first, minimum, rtol=1e-7, atol=1e-7)
    best = min(trace, key=lambda trial: trial.value).weights
    torch.testing.assert_close(half, (first + best) / 2)


def test_a_command_is_asked_once_and_replayed_from_its_transcript(tmp_path):
    command = Command(ECHO)
    answers = command.propose("task", TRACE, 2)
    assert [row.tolist() for row in answers] == [[0.5, 0.25], [1.0, -1.0]]
    command.argv = ["no-such-program"]
    assert [row.tolist() for row in command.propose("task", TRACE, 2)] == [[0.5, 0.25], [1.0, -1.0]]
    command.write(tmp_path / "answers.jsonl")
    replay = Replay(tmp_path / "answers.jsonl")
    assert [row.tolist() for row in replay.propose("task", TRACE, 2)] == [[0.5, 0.25], [1.0, -1.0]]
    with pytest.raises(DataError, match="no answer to prompt"):
        replay.propose("another task", TRACE, 2)


def test_a_prompt_shows_the_best_last():
    prompt = prompt_of("Balance it.", TRACE, 2)
    assert prompt.index("5: 1 2") < prompt.index("0.5: 0 0")
    assert key_of(prompt) == key_of(prompt)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('1 2\\noops 3')", "line 2 of the answer .*'oops'"),
        ("", "is empty"),
        ("import sys; sys.exit('no idea')", "status 1: no idea"),
        ("import time; time.sleep(60)", "no answer in 0.5 s"),
    ],
)
def test_a_command_that_fails_says_how(code, said):
    timeout = 0.5 if "sleep" in code else 60
    command = Command([sys.executable, "-c", code], timeout)
    with pytest.raises(DataError, match=said):
        command.propose("", TRACE, 1)
    assert not command.answers


def test_a_program_that_does_not_exist_and_a_bad_transcript(tmp_path):
    with pytest.raises(SpecError, match="cannot run the proposer 'no-such-program'"):
        Command(["no-such-program"]).propose("", TRACE, 1)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"key": "k"}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        Replay(tmp_path / "bad.jsonl")


def bowl(cost, proposer, **settings):
    model = Point(torch.tensor([2.0, -1.0], dtype=torch.float64))
    objective = Objective(model, lambda m, _: (m() * torch.tensor([1.0, 3.0])).square().sum(), None, cost)
    return model, objective, Proposed(model.parameters(), "sgd", proposer, every=3, lr=0.01, **settings)


def test_every_probe_is_charged_and_the_best_one_restarts():
    cost = Cost()
    _model, objective, optimizer = bowl(cost, {"kind": "command", "argv": ECHO}, candidates=2)
    for _ in range(3):
        optimizer.step(objective)
    assert (cost.forward, cost.gradient) == (0, 3)
    optimizer.step(objective)
    assert (cost.forward, cost.gradient) == (3, 4)  # the stage's end and two probes
    assert optimizer.trace[-1].weights.tolist() == [0.5, 0.25]
    assert [trial.weights.tolist() for trial in optimizer.trace[-3:-1]] == [[0.5, 0.25], [1.0, -1.0]]


def test_one_candidate_is_not_probed_and_the_trace_keeps_the_best():
    cost = Cost()
    _, objective, optimizer = bowl(
        cost, {"kind": "random_restart", "low": 5.0, "high": 6.0}, candidates=1, keep=4
    )
    for _ in range(20):
        optimizer.step(objective)
    assert cost.forward == 6
    assert len(optimizer.trace) == 4
    assert min(trial.value for trial in optimizer.trace) == optimizer.best_value


def test_a_saved_run_does_not_ask_again():
    _, objective, optimizer = bowl(Cost(), {"kind": "command", "argv": ECHO}, candidates=2)
    for _ in range(4):
        optimizer.step(objective)
    state = optimizer.state_dict()
    _, _, other = bowl(Cost(), {"kind": "command", "argv": ["no-such-program"]}, candidates=2)
    other.load_state_dict(state)
    assert other.proposer.answers == optimizer.proposer.answers
    assert len(other.proposer.answers) == 1


def test_an_adviser_that_fails_leaves_no_trace():
    model, objective, optimizer = bowl(Cost(), {"kind": "command", "argv": ["no-such-program"]})
    for _ in range(3):
        optimizer.step(objective)
    before, steps = model.x.detach().clone(), optimizer.steps
    with pytest.raises(SpecError):
        optimizer.step(objective)
    assert torch.equal(before, model.x.detach())
    assert optimizer.steps == steps
    optimizer.proposer = Jitter()
    optimizer.step(objective)


def test_unknown_proposers_are_named():
    with pytest.raises(SpecError, match="Did you mean 'jitter'"):
        bowl(Cost(), "jiter")
    with pytest.raises(SpecError, match="proposer 'jitter'"):
        bowl(Cost(), {"kind": "jitter", "size": 1})
