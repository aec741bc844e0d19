"""A solver in a greenlet: what it asks for, how it resumes, how it ends."""

from __future__ import annotations

import copy
import gc
import io
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.optim.gradient_free.driven import Array, Driven, Ending, Evaluate, Solver, differences

INFINITE = np.full(3, np.inf)
RUNNING: list[int] = []
"""An entry for each solver that has begun and not ended."""


def rosenbrock(theta: Tensor) -> Tensor:
    return (100 * (theta[..., 1:] - theta[..., :-1] ** 2) ** 2 + (1 - theta[..., :-1]) ** 2).sum(-1)


class Walk(Driven):
    """A solver of our own: differences, then a random move from a stream of its own, for some rounds."""

    def __init__(self, params: Any, rounds: int = 5, fail: int | None = None, rate: float = 1e-4) -> None:
        super().__init__(params, {"rounds": rounds, "fail": fail, "rate": rate})

    def solver(self, start: Array) -> Solver:
        rounds, fail, rate = (self.hyper(name) for name in ("rounds", "fail", "rate"))

        def walk(evaluate: Evaluate) -> Ending:
            x, stream, value = start, np.random.RandomState(3), math.inf
            RUNNING.append(rounds)
            try:
                for number in range(rounds):
                    if number == fail:
                        raise ZeroDivisionError("the solver's own")
                    value = float(evaluate(x[None])[0][0])
                    slope = differences(evaluate, x, value, 1e-6, -INFINITE[: len(x)], INFINITE[: len(x)])
                    x = x - rate * slope + rate * stream.normal(size=len(x))
                return Ending("walked", x, value)
            finally:
                RUNNING.pop()

        return walk


def weights() -> nn.Parameter:
    return nn.Parameter(torch.tensor([-1.2, 1.0, 0.5], dtype=torch.float64))


def run(search: Driven, tells: int | None = None) -> list[Tensor]:
    """What was asked for in the next `tells` steps, or until the end."""
    asked = []
    while (tells is None or len(asked) < tells) and not search.finished:
        asked.append(search.ask())
        search.tell(rosenbrock(asked[-1]))
    return asked


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_asks_for_points_and_differences_together() -> None:
    search = Walk([weights()], rounds=2)
    asked = run(search)
    assert [list(theta.shape) for theta in asked] == [[1, 3], [3, 3]] * 2
    assert search.finished == "walked"
    assert search.solution is not None
    assert search.generation == 4
    with pytest.raises(SpecError, match=r"has finished \(walked\)"):
        search.ask()


def test_asks_for_the_same_until_told_and_wants_one_loss_each() -> None:
    search = Walk([weights()])
    first = search.ask()
    first.zero_()  # a copy: harmless
    assert search.ask().equal(weights().detach()[None])
    with pytest.raises(ValueError, match="need 1 losses"):
        search.tell(torch.zeros(2))
    with pytest.raises(ValueError, match="need the gradient"):
        search.tell(torch.zeros(1), torch.zeros(2))
    assert search.generation == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 11), st.sampled_from(["state", "deepcopy", "pickle"]))
def test_resumes_at_any_point(tells: int, way: str) -> None:
    whole = run(Walk([weights()], rounds=6))
    search = Walk([weights()], rounds=6)
    before = run(search, tells)
    if way == "state":
        buffer = io.BytesIO()
        torch.save(search.state_dict(), buffer)
        buffer.seek(0)
        other = Walk([weights()], rounds=6)
        other.load_state_dict(torch.load(buffer, weights_only=True))
    else:
        other = copy.deepcopy(search) if way == "deepcopy" else pickle.loads(pickle.dumps(search))
    assert other.best_value == search.best_value
    assert same(before + run(other), whole)
    assert same(before + run(search), whole)  # and the original is none the worse


def test_rewinds() -> None:
    search = Walk([weights()], rounds=4)
    run(search, 2)
    state = search.state_dict()
    rest = run(search)
    search.load_state_dict(state)
    assert same(run(search), rest)


def test_another_request_than_the_recorded_one_is_an_error() -> None:
    search = Walk([weights()])
    run(search, 5)
    search.param_groups[0]["rate"] = 1e-3  # the present run goes on, a new one asks elsewhere
    run(search, 1)
    with pytest.raises(SpecError, match="asks for another point than the one on record"):
        copy.deepcopy(search).ask()


def test_the_solvers_exception_surfaces_and_again() -> None:
    search = Walk([weights()], fail=1)
    run(search, 2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="the solver's own"):
            search.ask()
    assert not RUNNING


def test_an_interrupted_wait_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(Walk([weights()]))
    search = Walk([weights()])
    before = run(search, 3)
    search.tell(rosenbrock(search.ask()))
    before.append(whole[3])
    with monkeypatch.context() as patched:
        patched.setattr("steppe.optim.gradient_free.driven._Run.advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            search.ask()
    assert same(before + run(search), whole)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_infinite_losses_are_ordinary() -> None:
    search = Walk([weights()], rounds=2)
    while not search.finished:
        search.tell(torch.full(search.ask().shape[:1], math.nan))
    assert search.best is None


def test_solvers_end_with_the_optimizer() -> None:
    searches = [Walk([weights()]) for _ in range(3)]
    for search in searches:
        search.ask()
    assert len(RUNNING) == 3
    del search, searches
    gc.collect()
    assert not RUNNING


def test_solvers_end_with_their_search() -> None:
    search = Walk([weights()])
    run(search)
    assert not RUNNING


def test_goes_on_in_another_thread() -> None:
    whole = run(Walk([weights()]))
    search = Walk([weights()])
    before = run(search, 2)
    with ThreadPoolExecutor(1) as elsewhere:
        before += elsewhere.submit(run, search, 3).result()
    assert same(before + run(search), whole)


def test_a_solver_may_drive_another() -> None:
    whole = run(Walk([weights()]))
    outer, inner, seen = Walk([weights()]), Walk([weights()]), []
    while not outer.finished:
        theta = outer.ask()
        seen += run(inner, 1)
        outer.tell(rosenbrock(theta))
    assert same(seen, whole)


def test_the_global_streams_are_not_touched() -> None:
    numbers, tensors = np.random.get_state()[1].copy(), torch.get_rng_state()
    run(Walk([weights()]))
    assert (np.random.get_state()[1] == numbers).all()
    assert torch.get_rng_state().equal(tensors)


def test_the_process_ends_while_a_solver_waits() -> None:
    code = (
        "import torch; from steppe.optim.gradient_free.slsqp import SLSQP\n"
        "search = SLSQP([torch.nn.Parameter(torch.ones(2))], gradient='difference'); print(len(search.ask()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_goes_on_in_a_forked_process() -> None:
    whole = run(Walk([weights()]))
    search = Walk([weights()])
    run(search, 3)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        there.send([theta.tolist() for theta in run(search)])

    process = context.Process(target=child)
    process.start()
    assert here.poll(30)
    assert here.recv() == [theta.tolist() for theta in whole[3:]]
    process.join()
    assert same(run(search), whole[3:])


def test_differences_are_scipys() -> None:
    numdiff = pytest.importorskip("scipy.optimize._numdiff")
    stream = np.random.RandomState(0)

    def value(x: Array) -> float:
        return float(np.sum(np.sin(3 * x)) + x[0] * x[1])

    def evaluate(points: Array, gradient: bool = False) -> tuple[Array, None]:
        return np.array([value(x) for x in points]), None

    for eps in (1e-8, 1e-3, 0.7, 1e-30):
        for _ in range(20):
            low = -stream.uniform(0, 1, 6) * (stream.uniform(size=6) < 0.8)
            high = stream.uniform(0.01, 1, 6)
            x = np.clip(stream.normal(size=6), low, high)
            want = numdiff.approx_derivative(value, x, method="2-point", abs_step=eps, bounds=(low, high))
            if np.isfinite(want).all():
                assert (differences(evaluate, x, value(x), eps, low, high) == want).all()
