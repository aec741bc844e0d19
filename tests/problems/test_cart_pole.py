import math

import numpy as np
import pytest
import torch

from steppe.core.objective import Cost, Objective
from steppe.optim import create
from steppe.problems.cart_pole import Player, cart_pole, cart_pole_smooth, starts, step


def slow_step(state, force, tau=0.02):
    """The equations of motion solved as a linear system: the cart's and the pole's balance of forces."""
    x, v, angle, spin = state
    m, cart, length, g = 0.1, 1.0, 0.5, 9.8
    matrix = np.array(
        [[cart + m, m * length * np.cos(angle)], [m * length * np.cos(angle), 4 / 3 * m * length**2]]
    )
    right = np.array([force + m * length * spin**2 * np.sin(angle), m * g * length * np.sin(angle)])
    pull, turn = np.linalg.solve(matrix, right)
    return np.array([x + tau * v, v + tau * pull, angle + tau * spin, spin + tau * turn])


def energy(state):
    _, v, angle, spin = state.unbind(-1)
    return 0.55 * v**2 + 0.05 * v * spin * angle.cos() + spin**2 / 60 + 0.49 * angle.cos()


def test_a_step_solves_the_equations_of_motion():
    drawn = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = step(drawn[:, :4], 10 * drawn[:, 4])
    for row, state in zip(drawn.numpy(), got.numpy(), strict=True):
        np.testing.assert_allclose(state, slow_step(row[:4], 10 * row[4]), rtol=1e-12, atol=1e-14)


def test_without_a_force_energy_is_conserved():
    state = torch.tensor([0.0, 0.3, 0.5, -0.2], dtype=torch.float64)
    before = energy(state)
    for _ in range(1000):
        state = step(state, torch.zeros((), dtype=torch.float64), 1e-4)
    assert math.isclose(float(energy(state)), float(before), rel_tol=1e-4)
    assert abs(float(state[2]) - 0.5) > 0.01


def test_returns_are_those_of_one_episode_after_the_other():
    task = cart_pole(episodes=5, horizon=60)
    player = task.model()
    with torch.no_grad():
        player.policy[2].weight.mul_(5)
    slow = []
    for state in task.x.numpy():
        steps = 0
        while steps < 60:
            outputs = player.policy(torch.from_numpy(state) / player.scale)
            state = slow_step(state, 10.0 if outputs[1] > outputs[0] else -10.0)
            steps += 1
            if abs(state[0]) > 2.4 or abs(state[2]) > math.radians(12):
                break
        slow.append(steps)
    assert player.returns(task.x).tolist() == slow
    assert len(set(slow)) > 1 or slow[0] < 60


def test_starts_are_a_function_of_the_seed():
    assert torch.equal(starts(4, 1), starts(4, 1))
    assert not torch.equal(starts(4, 1), starts(4, 2))
    assert starts(100, 0).abs().max() <= 0.05


@pytest.mark.parametrize("make", [cart_pole, cart_pole_smooth])
def test_a_population_is_evaluated_like_its_members(make):
    task = make(episodes=3, horizon=25)
    model, batch = task.model(), (task.x, task.y)
    objective = Objective(model, task.loss, batch)
    theta = torch.randn(7, task.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = objective.values(theta)
    single = torch.cat([objective.values(row.unsqueeze(0)) for row in theta])
    torch.testing.assert_close(together, single, rtol=1e-9, atol=1e-9)


def test_the_return_has_no_gradient_and_the_smooth_cost_the_right_one():
    for make in (cart_pole, cart_pole_smooth):
        task = make(episodes=2, horizon=15)
        model = task.model()
        Objective(model, task.loss, (task.x, task.y))()
        weight = model.policy[2].bias
        if not model.smooth:
            assert not weight.grad.any()
            continue
        losses = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                weight[0] += shift
                losses.append(float(task.loss(model, (task.x, task.y))))
                weight[0] -= shift
        assert math.isclose(float(weight.grad[0]), (losses[0] - losses[1]) / 2e-6, rel_tol=1e-5)


def test_cma_es_balances_the_pole_within_300_evaluations():
    task = cart_pole(episodes=4, horizon=150)
    model, cost = task.model(), Cost()
    objective = Objective(model, task.loss, (task.x, task.y), cost)
    optimizer = create("cma_es", model.parameters(), sigma=0.5, seed=0)
    while optimizer.best_value > task.floor and cost.evaluations < 300:
        optimizer.step(objective)
    assert optimizer.best_value == task.floor == -150
    assert model.scores(task.x) == {"return": 150.0}


def test_the_metric_is_the_return_whatever_is_minimised():
    task = cart_pole_smooth(episodes=2, horizon=10)
    model = task.model()
    assert model.scores(task.x)["return"] == float(Player.returns(_discrete(model), task.x).mean())
    assert model.horizon == 10


def _discrete(model):
    other = Player()
    other.load_state_dict(model.state_dict())
    return other
