"""The simulation: clients that train in turn, and a server that averages."""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import DataError, SpecError
from steppe.core.objective import Cost
from steppe.core.seeding import derive, generator
from steppe.optim.federated.local import Local, Noise, buffers_of, set_buffers, weights_of
from steppe.optim.federated.methods import Method, State, within
from steppe.optim.federated.vector import NotFinite, Vector

__all__ = ["Federation", "Round"]


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: counts from 1.
        selected: the clients that trained, ascending.
        left_out: those of them whose numbers were not finite, and which the server therefore left out.
        lr: the local learning rate.
        loss: mean over the other clients of their local steps' losses at w_k; nan if there is none.
    """

    number: int
    selected: tuple[int, ...]
    left_out: tuple[int, ...]
    lr: float
    loss: float


class Federation:
    """Federated learning on one machine: every `round`, some clients train `model` in turn and the server averages.

    A client starts at the server's weights w^t and takes K local steps of SGD: the method's direction, clipped to the
    global norm `clip`, plus weight decay, times ``lr * lr_decay**t``, t the rounds done before. Between rounds the
    server's weights are the model's. ::

        federation = Federation(model, loss, loaders, FedSMOO(rho=0.1), lr=0.1)
        for _ in range(100):
            print(federation.round().loss)

    Rounds are all or nothing: when one raises, whatever raised it, the federation is as it was before. A client whose
    gradients or weights are not finite (or overflow in their norm) is left out of its round: neither the server nor
    what the client keeps sees anything of it. `left_out` counts this, and the first time a warning tells.

    Buffers, such as the running statistics of BatchNorm, start at the server's for each client, change in the clean
    passes only, and are averaged over the round's clients as the weights are in FedAvg; of those that are not
    floating-point (counters, masks) the server takes the largest. FL-Simulator leaves buffers out, with models that
    have none.

    What clients draw from torch's generators (the order of a shuffling DataLoader, dropout) is a function of the
    seed, the round, the client and the epoch or step; the passes of a step draw the same, and the generators are left
    as they were found. So a federation that goes on from a `state_dict` goes on to the same bits.

    The model trains in the mode (``train()`` or ``eval()``) it is in. Frozen parameters stay. Weights should be
    float32 or float64; for mixed precision use autocast inside `loss`.

    Args:
        model: the module; trained in place.
        loss: ``loss(model, batch) -> scalar mean``; moves the batch to the model's device if need be.
        clients: the batches of each client: any iterable that can be gone through once per local epoch, such as a
            list of batches or a DataLoader.
        method: one of `METHODS`, built: ``FedSMOO(rho=0.1)``.
        lr: local learning rate of the first round (default 0.1, as those below that of FL-Simulator).
        weight_decay: coefficient of w_k in local steps (default 1e-3).
        lr_decay: factor of the learning rate per round (default 0.998).
        clip: largest norm of a local direction, over all weights, before decay (default 10); None for no clipping.
        local_epochs: times a client goes through its batches in a round (default 5).
        local_steps: K; given, it holds instead of `local_epochs`, and clients start anew when their batches end.
        participation: share of the clients in a round, in (0, 1] (default 1, ours): share · N of them, rounded and at
            least one, drawn without replacement. FL-Simulator draws each client with that probability (default 0.1).
        seed: of the choice of clients and of what they draw.
        keep_on: device that holds what clients keep between rounds; None for where their weights are.

    Attributes:
        rounds: rounds done.
        left_out: times a client was left out.
        cost: passes so far, those of clients left out included.
        shared: what the server keeps besides the weights, by name.
        kept: client -> what it keeps, by name; of clients that have taken part, the others' are zero.

    Raises:
        SpecError: a hyper-parameter out of its range, or a model with nothing to train.
        DataError: no clients, or an empty one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        clients: Sequence[Iterable[Any]],
        method: Method,
        *,
        lr: float = 0.1,
        weight_decay: float = 1e-3,
        lr_decay: float = 0.998,
        clip: float | None = 10.0,
        local_epochs: int = 5,
        local_steps: int | None = None,
        participation: float = 1.0,
        seed: int = 0,
        keep_on: torch.device | str | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise SpecError(
                f"Federation: method={method!r} is not a method; give one that is built: FedAvg()."
            )
        within("Federation", "lr", lr)
        within("Federation", "weight_decay", weight_decay, zero=True)
        within("Federation", "lr_decay", lr_decay)
        within("Federation", "participation", participation, high=1.0)
        if clip is not None:
            within("Federation", "clip", clip)
        for name, count in {"local_epochs": local_epochs, "local_steps": local_steps}.items():
            if count is not None and (not isinstance(count, int) or count < 1):
                raise SpecError(f"Federation: {name}={count!r}, but it must be a whole number >= 1.")
        if not weights_of(model).tensors:
            raise SpecError("Federation: the model has no parameter that requires a gradient.")
        if not len(clients):
            raise DataError("Federation: there are no clients.")
        for i, client in enumerate(clients):
            if operator.length_hint(client, 1) == 0:
                raise DataError(f"Federation: client {i} has no batches; leave it out.")
        self.model, self.loss, self.clients, self.method = model, loss, clients, method
        self.lr, self.weight_decay, self.lr_decay, self.clip = lr, weight_decay, lr_decay, clip
        self.local_epochs, self.local_steps = local_epochs, local_steps
        self.participation, self.seed, self.keep_on = participation, seed, keep_on
        self.rounds, self.left_out, self.cost = 0, 0, Cost()
        self.shared: State = {name: weights_of(model).zeros() for name in method.shares}
        self.kept: dict[int, State] = {}

    @torch.no_grad()
    def round(self, selected: Iterable[int] | None = None) -> Round:
        """Train the clients of one round and bring the server up to date.

        Args:
            selected: the clients, in place of those drawn by `participation` and `seed`.

        Raises:
            DataError: a client in `selected` does not exist, or gives no batch.
        """
        chosen = self._drawn() if selected is None else self._checked(selected)
        lr = self.lr * self.lr_decay**self.rounds
        weights, buffers, noise = weights_of(self.model), buffers_of(self.model), Noise(self.model)
        server: State = {"w": weights.copy(), **{name: vector.copy() for name, vector in self.shared.items()}}
        mean, losses = _Mean(), []
        kept: dict[int, State] = {}
        try:
            with noise.borrowed():
                for i in chosen:
                    weights.fill(server["w"])
                    set_buffers(self.model, buffers)
                    local = Local(self.model, self.loss, lr, self.cost, noise)
                    try:
                        mine, sent = self._train(i, local, server)
                    except NotFinite:
                        continue
                    mean.add({"update": local.update, **sent}, buffers_of(self.model))
                    losses.append(torch.stack(local.losses).mean().item())
                    kept[i] = {name: vector.on(self.keep_on) for name, vector in mine.items()}
        finally:
            weights.fill(server["w"])
            set_buffers(self.model, buffers)
            self.model.zero_grad()
        if kept:
            self.method.serve(server, mean.vectors(), len(kept) / len(self.clients))
            weights.fill(server.pop("w"))
            set_buffers(self.model, mean.buffers())
            self.shared = server
            self.kept.update(kept)
        self.rounds += 1
        left_out = tuple(i for i in chosen if i not in kept)
        loss = math.fsum(losses) / len(losses) if losses else math.nan
        self._leave_out(left_out)
        return Round(self.rounds, tuple(chosen), left_out, lr, loss)

    def state_dict(self) -> dict[str, Any]:
        """All that the next rounds depend on, the model included, as tensors and plain values (`save_tree` stores it).

        It is a snapshot: later rounds do not change it. Hyper-parameters are not in it, nor is what the clients'
        iterables remember themselves.
        """
        model = self.model.state_dict()
        return {
            "method": type(self.method).__name__,
            "clients": len(self.clients),
            "rounds": self.rounds,
            "left_out": self.left_out,
            "cost": dict(vars(self.cost)),
            "model": {k: v.clone() if isinstance(v, Tensor) else v for k, v in model.items()},
            "shared": _plain(self.shared),
            "kept": {i: _plain(state) for i, state in self.kept.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, whatever device it is on.

        Raises:
            SpecError: it is of another method or of another number of clients.
        """
        for name, here in {"method": type(self.method).__name__, "clients": len(self.clients)}.items():
            if state.get(name) != here:
                raise SpecError(
                    f"Federation: the state is of {name}={state.get(name)!r}, this one of {here!r}."
                )
        self.model.load_state_dict(state["model"])
        self.rounds, self.left_out, self.cost = state["rounds"], state["left_out"], Cost(**state["cost"])
        self.shared = self._vectors(state["shared"])
        self.kept = {
            i: {name: vector.on(self.keep_on) for name, vector in self._vectors(kept).items()}
            for i, kept in state["kept"].items()
        }

    def _train(self, i: int, local: Local, server: State) -> tuple[State, State]:
        """The local training of client i: what it keeps from now on, and what it sends besides its update."""
        mine = {name: local.weights.zeros() for name in self.method.keeps}
        for name, vector in self.kept.get(i, {}).items():
            mine[name].fill(vector)
        decay = self.method.decay(self.weight_decay)
        for k, batch in enumerate(itertools.islice(self._batches(i, local.noise), self.local_steps)):
            local.begin(batch, derive(self.seed, "step", self.rounds, i, k))
            local.step(self.method.direction(local, mine, server), self.clip, decay)
        local.update = local.weights.copy()
        local.update -= server["w"]
        local.update.norm()  # the last step may have overflowed
        return mine, self.method.finish(local, mine, server)

    def _batches(self, i: int, noise: Noise) -> Iterator[Any]:
        """The batches of client i, epoch after epoch: without end if `local_steps` says when to stop."""
        for epoch in range(self.local_epochs) if self.local_steps is None else itertools.count():
            noise.seed(derive(self.seed, "epoch", self.rounds, i, epoch))
            empty = True
            for batch in self.clients[i]:
                empty = False
                yield batch
            if empty:
                raise DataError(
                    f"Federation: client {i} gave no batch in local epoch {epoch + 1} of round {self.rounds + 1}. It "
                    "must be an iterable that can be gone through again and again, not an iterator."
                )

    def _drawn(self) -> list[int]:
        """The clients of this round: a function of the seed and the round alone."""
        count = max(1, round(self.participation * len(self.clients)))
        order = torch.randperm(len(self.clients), generator=generator(self.seed, "clients", self.rounds))
        return sorted(order[:count].tolist())

    def _checked(self, selected: Iterable[int]) -> list[int]:
        chosen = sorted(set(selected))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(self.clients):
            raise DataError(f"Federation: selected={chosen}, but clients are 0 to {len(self.clients) - 1}.")
        return chosen

    def _leave_out(self, clients: Sequence[int]) -> None:
        told = self.left_out > 0
        self.left_out += len(clients)
        if clients and not told:
            warnings.warn(
                f"client {clients[0]} was left out of round {self.rounds}: its gradients or weights are not finite. "
                "Further ones are counted in left_out; if they are many, lower lr or clip.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _vectors(self, plain: Mapping[str, Sequence[Tensor]]) -> State:
        vectors = {name: weights_of(self.model).zeros() for name in plain}
        for name, tensors in plain.items():
            vectors[name].fill(Vector(tensors))
        return vectors


def _plain(state: State) -> dict[str, list[Tensor]]:
    return {name: list(vector.tensors) for name, vector in state.items()}


class _Mean:
    """Means over the clients of a round, of which only the sums are held."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: State = {}
        self._buffers: list[Tensor] = []

    def add(self, vectors: State, buffers: list[Tensor]) -> None:
        """One client's; `buffers` is used up."""
        if not self._count:
            self._sums, self._buffers = {name: vector.zeros() for name, vector in vectors.items()}, buffers
        else:
            pairs = zip(self._buffers, buffers, strict=True)
            self._buffers = [a + b if _continuous(a) else torch.maximum(a, b) for a, b in pairs]
        for name, vector in vectors.items():
            self._sums[name] += vector
        self._count += 1

    def vectors(self) -> State:
        for vector in self._sums.values():
            vector *= 1 / self._count
        return self._sums

    def buffers(self) -> list[Tensor]:
        """Of counters and the like the largest."""
        return [total / self._count if _continuous(total) else total for total in self._buffers]


def _continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
