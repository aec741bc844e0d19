"""A pole on a cart (Barto, Sutton & Anderson 1983, IEEE Trans. SMC 13:834), and a small policy that balances it.

Equations and constants are the paper's without friction, as usual since. The cart is pushed left or right with 10 N, so
the return (steps balanced) is a step function of the policy's weights: its gradient is zero. Beside it stands a smooth
relative, a continuous force and a bounded cost, which has one through the simulator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from steppe.core.seeding import generator
from steppe.problems.small import Small

__all__ = ["Player", "cart_pole", "cart_pole_smooth", "starts", "step"]

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
"""m/s^2, kg, kg, m (half of the pole), N, s (Euler's step)."""

TRACK, ANGLE = 2.4, 12 * math.pi / 180
"""The episode ends when the cart is farther from the middle (m), or the pole from upright (rad)."""

HORIZON, SMOOTH_HORIZON = 500, 100
"""Steps of an episode: 10 s, and of the smooth one 2 s, through which gradients still carry."""


def starts(episodes: int, seed: int, spread: float = 0.05) -> Tensor:
    """Initial states ``[episodes, 4]``, uniform in [-spread, spread] (m, m/s, rad, rad/s)."""
    drawn = torch.rand(episodes, 4, generator=generator(seed, "cart_pole"), dtype=torch.float64)
    return spread * (2 * drawn - 1)


def step(state: Tensor, force: Tensor, seconds: float = SECONDS) -> Tensor:
    """The state ``[..., 4]`` (position, speed, angle, angular speed) after one Euler step under ``force [...]`` (N)."""
    x, v, angle, spin = state.unbind(-1)
    sin, cos = angle.sin(), angle.cos()
    push = (force + POLE * HALF_LENGTH * spin.square() * sin) / (CART + POLE)
    turn = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE * cos.square() / (CART + POLE)))
    pull = push - POLE * HALF_LENGTH * turn * cos / (CART + POLE)
    return torch.stack(
        [x + seconds * v, v + seconds * pull, angle + seconds * spin, spin + seconds * turn], -1
    )


class Player(nn.Module):
    """A policy 4-8-2 (58 weights, float64) that plays: initial states ``[episodes, 4]`` to its losses ``[episodes]``.

    Args:
        smooth: whether the loss is the smooth cost in place of minus the return.
        horizon: steps of an episode.
    """

    scale: Tensor

    def __init__(self, smooth: bool = False, horizon: int | None = None) -> None:
        super().__init__()
        self.smooth = smooth
        self.horizon = horizon or (SMOOTH_HORIZON if smooth else HORIZON)
        # not initialised by torch, which would draw from the global generator
        first, second = (
            nn.utils.skip_init(nn.Linear, *size, dtype=torch.float64) for size in ((4, 8), (8, 2))
        )
        self.policy = nn.Sequential(first, nn.Tanh(), second)
        self.register_buffer("scale", torch.tensor([TRACK, 1.0, ANGLE, 1.0], dtype=torch.float64))

    def forward(self, states: Tensor) -> Tensor:
        """The cost of each episode, or minus its return."""
        if self.smooth:
            return self.cost(states)
        # of a step function the gradient is zero wherever there is one: optimizers that ask for it are given that
        return 0.0 * self._preference(states) - self.returns(states)

    @torch.no_grad()
    def returns(self, states: Tensor) -> Tensor:
        """Steps balanced in each episode: 1 to `horizon`; the larger of the two outputs says where to push."""
        alive = torch.ones_like(states[..., 0])
        total = torch.zeros_like(alive)
        for _ in range(self.horizon):
            states = step(states, torch.where(self._preference(states) > 0, FORCE, -FORCE))
            total = total + alive
            inside = (states[..., 0].abs() <= TRACK) & (states[..., 2].abs() <= ANGLE)
            alive = alive * inside
            # those that fell stay where they are: they would soon be at infinity
            states = torch.where(inside.unsqueeze(-1), states, states.clamp(-10.0, 10.0))
        return total

    def cost(self, states: Tensor) -> Tensor:
        """The mean over time of 1 - exp(-(x / 2.4 m)^2 - (angle / 12 degrees)^2) under 10 N times a tanh."""
        total = torch.zeros_like(states[..., 0])
        for _ in range(self.horizon):
            states = step(states, FORCE * self._preference(states).tanh())
            total = total - torch.expm1(
                -(states[..., 0] / TRACK).square() - (states[..., 2] / ANGLE).square()
            )
        return total / self.horizon

    @torch.no_grad()
    def scores(self, states: Tensor) -> dict[str, float]:
        """``return``: the mean steps balanced of 500, whatever the loss is."""
        horizon, self.horizon = self.horizon, HORIZON if self.smooth else self.horizon
        try:
            return {"return": float(self.returns(states).mean())}
        finally:
            self.horizon = horizon

    def _preference(self, states: Tensor) -> Tensor:
        """How much the policy prefers to push right."""
        outputs: Tensor = self.policy(states / self.scale)
        return outputs[..., 1] - outputs[..., 0]


def cart_pole(episodes: int = 16, horizon: int | None = None) -> Small:
    """Minus the mean return over fixed initial states; a step function of the weights."""
    return _task("cart_pole", False, episodes, horizon)


def cart_pole_smooth(episodes: int = 16, horizon: int | None = None) -> Small:
    """The smooth relative, for gradients; its metric ``return`` is the true one."""
    return _task("cart_pole_smooth", True, episodes, horizon)


def _task(name: str, smooth: bool, episodes: int, horizon: int | None) -> Small:
    player = Player(smooth, horizon)
    dim = sum(parameter.numel() for parameter in player.parameters())
    start = 0.1 * torch.randn(dim, generator=generator(0, "cart_pole", "start"), dtype=torch.float64)
    states = starts(episodes, seed=0)
    return Small(
        name,
        states,
        states[:, 0],  # there is no target
        lambda: Player(smooth, horizon),
        start,
        lambda losses, _: losses.mean(),
        bounds=(-3.0, 3.0),
        floor=None if smooth else -float(player.horizon),
        title="Cart-pole, smooth cost" if smooth else "Cart-pole, return",
        formula="mean over 2 s of 1 − exp(−(x/2.4)² − (θ/12°)²)"
        if smooth
        else "− mean steps balanced, at most 500",
        source="Barto, Sutton & Anderson 1983",
    )
