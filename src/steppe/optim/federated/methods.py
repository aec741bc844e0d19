"""The federated methods: what a client does in a local step, what it keeps and sends, what the server does.

Words: w^t server weights of round t; w_k a client's weights after k of its K local steps, w_i after the last; N
clients, of which S take part in a round; mean_S, mean_N averages over them; eta the round's learning rate. With
g = ∇L(w_k) on the step's batch, the *sharp gradient* is ∇L(w_k + e), e = rho · g / (‖g‖ + 1e-7).

The rules are those of FL-Simulator (github.com/woodenchild95/FL-Simulator, commit 502bec6, by the author of FedSpeed
and FedSMOO), from which the comparable published numbers come. Each docstring says where they differ from its paper.
Defaults are that code's: rho 0.1, alpha 0.1, lmbda 0.1, server_lr 1.

In all of them the mean over clients is a plain one, also in FedAvg, whose paper weights client i by its share of the
samples. Everything is kept in the dtype of the weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, TypeAlias

from steppe.core.errors import SpecError
from steppe.optim.federated.local import Local
from steppe.optim.federated.vector import Vector

__all__ = [
    "EPS",
    "FedAvg",
    "FedGAMMA",
    "FedSAM",
    "FedSMOO",
    "FedSpeed",
    "Method",
    "MoFedSAM",
    "State",
    "within",
]

EPS = 1e-7
"""Added to norms before a division, as in the official code: a zero vector stays one."""

State: TypeAlias = dict[str, Vector]
"""Vectors by name: the server's (its weights are ``"w"``), one client's, or those on their way to the server."""


def steepest(d: Vector, rho: float) -> Vector:
    """rho · d / (‖d‖ + 1e-7), written over d."""
    d *= rho / (d.norm() + EPS)
    return d


def sharp_gradient(local: Local, rho: float) -> Vector:
    """∇L(w_k + e), e = rho · g / (‖g‖ + 1e-7). Two passes."""
    return local.gradient(steepest(local.gradient(), rho))


class Method(ABC):
    """A federated method in three places. It holds hyper-parameters only; what it remembers is in the states.

    Attributes:
        keeps: names of what every client keeps between its rounds, zero at first.
        shares: names of what the server keeps and sends to the clients besides ``"w"``, zero at first.

    Raises:
        SpecError: rho or lmbda is negative, server_lr is not positive, alpha is not in (0, 1], or one is not finite.
    """

    keeps: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        owner, own = type(self).__name__, vars(self)
        for name in own.keys() & {"rho", "lmbda"}:
            within(owner, name, own[name], zero=True)
        for name in own.keys() & {"server_lr", "alpha"}:
            within(owner, name, own[name], high=1.0 if name == "alpha" else math.inf)

    def decay(self, weight_decay: float) -> float:
        """The factor of w_k that is added to the clipped direction of a local step."""
        return weight_decay

    @abstractmethod
    def direction(self, local: Local, mine: State, server: State) -> Vector:
        """At the client: the direction of one local step, before it is clipped. `mine` may be changed."""

    def finish(self, local: Local, mine: State, server: State) -> State:
        """At the client, after its last step: bring `mine` up to date; return what to average besides the update."""
        return {}

    @abstractmethod
    def serve(self, server: State, mean: State, share: float) -> None:
        """At the server: turn w^t, and what it shares, into those of the next round.

        Args:
            server: ``"w"`` and `shares`, changed in place.
            mean: mean_S of ``"update"`` = w_i − w^t and of what `finish` returned; may be used up.
            share: S / N.
        """


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method):
    """Federated averaging (McMahan et al. 2017, arXiv:1602.05629).

    direction: ∇L(w_k). Server: w^{t+1} = w^t + server_lr · mean_S(w_i − w^t); with server_lr = 1 the mean of the w_i.

    Cost: one pass per local step; nothing is kept.

    Args:
        server_lr: eta_g, of the server's step along the averaged update. The paper has none, that is 1.
    """

    server_lr: float = 1.0

    def direction(self, local: Local, mine: State, server: State) -> Vector:
        """∇L(w_k)."""
        return local.gradient()

    def serve(self, server: State, mean: State, share: float) -> None:
        """Step along the averaged update."""
        server["w"].add(mean["update"], self.server_lr)


@dataclass(frozen=True, kw_only=True)
class FedSAM(Method):
    """Local SAM, averaged (Qu et al. 2022, arXiv:2206.02618).

    direction: the sharp gradient. Server: as FedAvg. The paper has neither the 1e-7 nor the clipping.

    Cost: two passes per local step; nothing is kept.

    Args:
        rho: radius of the perturbation. With 0 this is FedAvg, bit for bit, at twice the passes.
        server_lr: eta_g, of the server's step.
    """

    rho: float = 0.1
    server_lr: float = 1.0

    def direction(self, local: Local, mine: State, server: State) -> Vector:
        """∇L(w_k + e)."""
        return sharp_gradient(local, self.rho)

    def serve(self, server: State, mean: State, share: float) -> None:
        """Step along the averaged update."""
        server["w"].add(mean["update"], self.server_lr)


@dataclass(frozen=True, kw_only=True)
class MoFedSAM(Method):
    """FedSAM with the last round's mean direction as momentum of local steps (Qu et al. 2022, arXiv:2206.02618).

    direction: alpha · sharp gradient + (1 − alpha) · m.
    Server: as FedAvg, and m = mean_S((w^t − w_i) / (K · eta)), which is zero in the first round.

    alpha is the paper's beta. K is each client's own number of local steps; the official code divides by
    epochs · (samples of client 0) / (batch size) for all, the same when clients are of one size. m holds weight decay
    and clipping, as it does there, but not server_lr.

    Cost: two passes per local step; the server keeps one copy of the weights, clients nothing.

    Args:
        rho: radius of the perturbation.
        alpha: weight of the present gradient, in (0, 1]; with 1 this is FedSAM.
        server_lr: eta_g, of the server's step.
    """

    rho: float = 0.1
    alpha: float = 0.1
    server_lr: float = 1.0
    shares = ("m",)

    def direction(self, local: Local, mine: State, server: State) -> Vector:
        """The sharp gradient and the momentum, mixed."""
        g = sharp_gradient(local, self.rho)
        g *= self.alpha
        return g.add(server["m"], 1 - self.alpha)

    def finish(self, local: Local, mine: State, server: State) -> State:
        """The client's mean direction."""
        return {"m": mean_direction(local)}

    def serve(self, server: State, mean: State, share: float) -> None:
        """Step along the averaged update; the mean direction is the next momentum."""
        server["w"].add(mean["update"], self.server_lr)
        server["m"] = mean["m"]


@dataclass(frozen=True, kw_only=True)
class FedGAMMA(Method):
    """FedSAM with SCAFFOLD's control variates (Dai et al. 2023, IEEE TNNLS, doi:10.1109/TNNLS.2023.3304453).

    direction: sharp gradient + c − c_i.
    Client: c_i' = c_i − c + (w^t − w_i) / (K · eta). Server: as FedAvg, and c += S/N · mean_S(c_i' − c_i).

    K is the client's own number of local steps; for the official code's see `MoFedSAM`.

    Cost: two passes per local step; each client keeps one copy of the weights (c_i), the server one (c).

    Args:
        rho: radius of the perturbation.
        server_lr: eta_g, of the server's step.
    """

    rho: float = 0.1
    server_lr: float = 1.0
    keeps = ("c",)
    shares = ("c",)

    def direction(self, local: Local, mine: State, server: State) -> Vector:
        """The sharp gradient, corrected for the client's drift."""
        g = sharp_gradient(local, self.rho)
        g += server["c"]
        g -= mine["c"]
        return g

    def finish(self, local: Local, mine: State, server: State) -> State:
        """The client's new control variate and how it changed."""
        change = mean_direction(local)
        change -= server["c"]
        mine["c"] += change
        return {"c": change}

    def serve(self, server: State, mean: State, share: float) -> None:
        """Step along the averaged update; bring the server's control variate up to date."""
        server["w"].add(mean["update"], self.server_lr)
        server["c"].add(mean["c"], share)


class _Proximal(Method):
    """What FedSpeed and FedSMOO share: the term lmbda/2 · ‖w_k − w^t‖² and the dual h_i that removes its bias.

    The server keeps h = mean_N(h_i), brought up to date from the clients that took part.
    """

    rho: float
    lmbda: float

    def decay(self, weight_decay: float) -> float:
        """With the part lmbda · w_k of the term's gradient, which as in the official code is not clipped."""
        return weight_decay + self.lmbda

    def corrected(self, g: Vector, mine: State, server: State) -> Vector:
        """g + lmbda · (h_i − w^t), over g: the rest of the term's gradient, which is clipped together with g."""
        return g.add(mine["h"], self.lmbda).add(server["w"], -self.lmbda)

    def finish(self, local: Local, mine: State, server: State) -> State:
        """h_i += w_i − w^t."""
        mine["h"] += local.update
        return {}

    def serve(self, server: State, mean: State, share: float) -> None:
        """w^{t+1} = mean_S(w_i) + mean_N(h_i)."""
        server["h"].add(mean["update"], share)
        server["w"] += mean["update"]
        server["w"] += server["h"]


@dataclass(frozen=True, kw_only=True)
class FedSpeed(_Proximal):
    """Local SAM with a proximal term and its correction (Sun et al. 2023, arXiv:2302.10429).

    direction: sharp gradient + lmbda · (h_i − w^t), to which the step's decay adds lmbda · w_k.
    Client: h_i += w_i − w^t. Server: w^{t+1} = mean_S(w_i) + mean_N(h_i).

    The paper writes 1/lambda for lmbda and has −lmbda · h_i as its prox-correction; it mixes the gradients at w_k and
    at w_k + e, of which the code takes the latter alone, and averages w_i + h_i over the clients of the round, where
    the code takes the mean of h_i over all.

    Cost: two passes per local step; each client keeps one copy of the weights (h_i), the server one (their mean).

    Args:
        rho: radius of the perturbation.
        lmbda: strength of the proximal term.
    """

    rho: float = 0.1
    lmbda: float = 0.1
    keeps = ("h",)
    shares = ("h",)

    def direction(self, local: Local, mine: State, server: State) -> Vector:
        """The sharp gradient, corrected towards agreement of the weights."""
        return self.corrected(sharp_gradient(local, self.rho), mine, server)


@dataclass(frozen=True, kw_only=True)
class FedSMOO(_Proximal):
    """FedSpeed whose clients also agree on the perturbation (Sun et al. 2023, arXiv:2305.11584).

    direction: with d = ∇L(w_k) − mu_i − s and e = rho · d / (‖d‖ + 1e-7), first mu_i += e − s, then
    ∇L(w_k + e) + lmbda · (h_i − w^t), to which the step's decay adds lmbda · w_k.
    Client: h_i += w_i − w^t. Server: w^{t+1} = mean_S(w_i) + mean_N(h_i), and
    s = rho · mean_S(mu_i) / (‖mean_S(mu_i)‖ + 1e-7).

    The paper's s also has the clients' last perturbations in the mean; the official code leaves them out because they
    are small, and so does this. The paper writes 1/beta for lmbda.

    Cost: two passes per local step; each client keeps two copies of the weights (h_i, mu_i), the server two.

    Args:
        rho: radius of the perturbation.
        lmbda: strength of the proximal term.
    """

    rho: float = 0.1
    lmbda: float = 0.1
    keeps = ("h", "mu")
    shares = ("h", "s")

    def direction(self, local: Local, mine: State, server: State) -> Vector:
        """The gradient at the agreed perturbation, corrected towards agreement of the weights."""
        d = local.gradient()
        d -= mine["mu"]
        d -= server["s"]
        e = steepest(d, self.rho)
        mine["mu"] += e
        mine["mu"] -= server["s"]
        return self.corrected(local.gradient(e), mine, server)

    def finish(self, local: Local, mine: State, server: State) -> State:
        """h_i += w_i − w^t; mu_i goes to the server."""
        super().finish(local, mine, server)
        return {"mu": mine["mu"]}

    def serve(self, server: State, mean: State, share: float) -> None:
        """The weights as in FedSpeed, and s from the mean of the mu_i."""
        super().serve(server, mean, share)
        server["s"] = steepest(mean["mu"], self.rho)


def mean_direction(local: Local) -> Vector:
    """(w^t − w_i) / (K · eta): the mean direction of the client's local steps."""
    direction = local.update.copy()
    direction *= -1 / (local.steps * local.lr)
    return direction


def within(owner: str, name: str, value: object, *, zero: bool = False, high: float = math.inf) -> None:
    """Raise a `SpecError` unless `value` is a finite number, positive (or `zero` allowed) and at most `high`."""
    number = type(value) is not bool and isinstance(value, Real) and math.isfinite(value)
    if number and (0 < value <= high or (zero and value == 0)):  # type: ignore[operator]
        return
    most = "" if high == math.inf else f" and <= {high:g}"
    raise SpecError(
        f"{owner}: {name}={value!r}, but it must be a finite number {'>=' if zero else '>'} 0{most}."
    )
