"""The federated methods: the official trajectories, a slow oracle in numpy, and what a simulation must not do."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import DataError, SpecError
from steppe.optim import federated
from steppe.optim.federated import (
    METHODS,
    FedAvg,
    Federation,
    FedGAMMA,
    FedSAM,
    FedSMOO,
    FedSpeed,
    Method,
    MoFedSAM,
)

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"

ALL = [
    FedAvg(server_lr=0.7),
    FedSAM(rho=0.2, server_lr=0.7),
    MoFedSAM(rho=0.2, alpha=0.3, server_lr=0.7),
    FedGAMMA(rho=0.2, server_lr=0.7),
    FedSpeed(rho=0.2, lmbda=0.3),
    FedSMOO(rho=0.2, lmbda=0.3),
]
each_method = pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def lists(batches: tuple[int, ...] = (2, 3, 1, 2, 4), size: int = 5) -> list:
    """Clients with as many batches as said."""
    return [
        [samples(size, 10 * client + batch) for batch in range(count)] for client, count in enumerate(batches)
    ]


def flat(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def numbers(vector: object) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in vector.tensors])


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts agree to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Watched(Method):
    """Another method, and a note of every client's last weights."""

    def __init__(self, inner: Method) -> None:
        self.inner, self.weights = inner, []
        self.keeps, self.shares = inner.keeps, inner.shares
        self.decay, self.direction, self.serve = inner.decay, inner.direction, inner.serve

    def direction(self, local, mine, server): ...

    def serve(self, server, mean, share): ...

    def finish(self, local, mine, server):
        self.weights.append(numbers(local.weights).clone())
        return self.inner.finish(local, mine, server)


# -- official trajectories ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no shared/golden beside the repository")
@pytest.mark.parametrize("name", ["fedsam", "fedsmoo"])
def test_official_trajectory(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}_sgd.json").read_text())
    hyper, problem = golden["hyperparameters"], golden["problem"]
    model = network()
    tensors = [torch.tensor(w, dtype=torch.float64) for w in problem["initial_weights"].values()]
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    x, y = torch.tensor(problem["client_inputs"], dtype=torch.float64), torch.tensor(problem["client_labels"])
    method = Watched(
        FedSAM(rho=hyper["rho"], server_lr=hyper["global_learning_rate"])
        if name == "fedsam"
        else FedSMOO(rho=hyper["rho"], lmbda=hyper["lamb"])
    )
    federation = Federation(
        model,
        cross_entropy,
        [[batch] for batch in zip(x, y, strict=True)],
        method,
        lr=hyper["local_learning_rate"],
        weight_decay=hyper["weight_decay"],
        lr_decay=hyper["lr_decay"],
        local_epochs=hyper["local_epochs"],
        participation=hyper["active_ratio"],
    )
    for expected in golden["rounds"]:
        method.weights.clear()
        done = federation.round()
        assert list(done.selected) == expected["selected"]
        assert done.lr == pytest.approx(expected["lr"], rel=1e-14)
        close(flat(model), expected["server_weights"])
        close(torch.stack(method.weights), expected["client_weights"])
        for what in federation.method.keeps:
            close(torch.stack([numbers(federation.kept[i][what]) for i in range(4)]), expected[what])
        if "s" in federation.shared:
            close(numbers(federation.shared["s"]), expected["s"])
    assert federation.cost.gradient == 2 * 3 * 4 * 5


def close(got: torch.Tensor, want: object, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=torch.float64), rtol=0, atol=atol)


# -- the oracle --------------------------------------------------------------------------------------------------


def numpy_gradient(w: np.ndarray, batch: tuple) -> np.ndarray:
    """Of the cross-entropy of the network above, by hand."""
    x, y = batch[0].numpy(), batch[1].numpy()
    a, b, c, d = w[:32].reshape(8, 4), w[32:40], w[40:64].reshape(3, 8), w[64:]
    hidden = np.tanh(x @ a.T + b)
    scores = hidden @ c.T + d
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    back = (p @ c) * (1 - hidden**2)
    return np.concatenate([(back.T @ x).ravel(), back.sum(0), (p.T @ hidden).ravel(), p.sum(0)])


def unit(d: np.ndarray) -> np.ndarray:
    return d / (np.linalg.norm(d) + 1e-7)


def oracle(method: Method, w: np.ndarray, clients: list, rounds: list, *, lr, wd, lr_decay, clip, epochs):
    """The server's weights after each round, and all duals; nothing is shared with the code under test."""
    name, h = type(method).__name__, dict(vars(method))
    zeros = np.zeros((len(clients), len(w)))
    c_i, h_i, mu_i, c, m, s = zeros.copy(), zeros.copy(), zeros.copy(), 0 * w, 0 * w, 0 * w
    for t, selected in enumerate(rounds):
        eta = lr * lr_decay**t
        ends, steps, c_change = {}, {}, 0 * w
        for i in selected:
            v, k = w.copy(), 0
            for batch in clients[i] * epochs:
                g = numpy_gradient(v, batch)
                if name == "FedSMOO":
                    e = h["rho"] * unit(g - mu_i[i] - s)
                    mu_i[i] = mu_i[i] + e - s
                    g = numpy_gradient(v + e, batch)
                elif name != "FedAvg":
                    g = numpy_gradient(v + h["rho"] * unit(g), batch)
                decay = wd
                if name == "MoFedSAM":
                    g = h["alpha"] * g + (1 - h["alpha"]) * m
                if name == "FedGAMMA":
                    g = g + c - c_i[i]
                if name in ("FedSpeed", "FedSMOO"):
                    g, decay = g + h["lmbda"] * (h_i[i] - w), wd + h["lmbda"]
                g = g * min(1.0, clip / (np.linalg.norm(g) + 1e-6))
                v, k = v - eta * (g + decay * v), k + 1
            ends[i], steps[i] = v, k
        mean = np.mean([ends[i] for i in selected], axis=0)
        for i in selected:
            h_i[i] += ends[i] - w
            new = c_i[i] - c - (ends[i] - w) / (steps[i] * eta)
            c_change = c_change + (new - c_i[i]) / len(clients)
            c_i[i] = new
        c = c + c_change
        m = -np.mean([(ends[i] - w) / (steps[i] * eta) for i in selected], axis=0)
        s = h.get("rho", 0.0) * unit(np.mean(mu_i[selected], axis=0))
        w = mean + h_i.mean(0) if name in ("FedSpeed", "FedSMOO") else w + h["server_lr"] * (mean - w)
    return w, {"c": c_i, "h": h_i, "mu": mu_i}, {"c": c, "m": m, "s": s, "h": h_i.mean(0)}


@each_method
@pytest.mark.parametrize("clip", [0.15, 10.0], ids=["clipped", "unclipped"])
def test_oracle(method: Method, clip: float) -> None:
    model, clients = network(), lists()
    start = flat(model).numpy()
    federation = Federation(
        model,
        cross_entropy,
        clients,
        method,
        lr=0.2,
        weight_decay=0.01,
        lr_decay=0.9,
        clip=clip,
        local_epochs=2,
        participation=0.6,
        seed=3,
    )
    rounds = [list(federation.round().selected) for _ in range(5)]
    assert {len(selected) for selected in rounds} == {3}
    assert len(set(map(tuple, rounds))) > 2
    w, kept, shared = oracle(
        method, start, clients, rounds, lr=0.2, wd=0.01, lr_decay=0.9, clip=clip, epochs=2
    )
    close(flat(model), w, 1e-12)
    for i, state in federation.kept.items():
        for name, vector in state.items():
            close(numbers(vector), kept[name][i], 1e-11)
    assert federation.shared.keys() == set(method.shares)
    for name, vector in federation.shared.items():
        close(numbers(vector), shared[name], 1e-11)
    passes = 1 if isinstance(method, FedAvg) else 2
    assert federation.cost.gradient == passes * 2 * sum(len(clients[i]) for chosen in rounds for i in chosen)


# -- what the methods have to do with each other -----------------------------------------------------------------


def noisy_network() -> nn.Module:
    """Everything that remembers or draws: dropout, running statistics of two kinds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm = nn.InstanceNorm1d(2, track_running_stats=True)
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Unflatten(1, (2, 4)), norm, nn.Flatten(), nn.Dropout(0.3)
        ).append(nn.Linear(8, 3))


def loaders(batch_size: int = 4) -> list[DataLoader]:
    data = [samples(10, client) for client in range(4)]
    return [
        DataLoader(TensorDataset(x.float(), y), batch_size=batch_size, shuffle=True, drop_last=True)
        for x, y in data
    ]


def ran(method: Method, rounds: int = 3, **options: object) -> Federation:
    federation = Federation(noisy_network(), cross_entropy, loaders(), method, local_epochs=2, **options)
    for _ in range(rounds):
        federation.round()
    return federation


@pytest.mark.parametrize(
    ("one", "other"),
    [(FedSAM(rho=0.0), FedAvg()), (MoFedSAM(rho=0.3, alpha=1.0), FedSAM(rho=0.3))],
    ids=["FedSAM with rho 0 is FedAvg", "MoFedSAM with alpha 1 is FedSAM"],
)
def test_special_case_to_the_bit(one: Method, other: Method) -> None:
    a, b = ran(one, participation=0.5), ran(other, participation=0.5)
    assert same(a.model.state_dict(), b.model.state_dict())


def test_one_client_with_one_step_is_sgd() -> None:
    model, (client,) = network(), lists((3,))
    reference = copy.deepcopy(model)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, weight_decay=0.01)
    federation = Federation(
        model, cross_entropy, [[client[0]]], FedAvg(), weight_decay=0.01, lr_decay=1.0, local_steps=1
    )
    for _ in range(10):
        sgd.zero_grad()
        cross_entropy(reference, client[0]).backward()
        sgd.step()
        federation.round()
    close(flat(model), flat(reference), 1e-15)


@each_method
@settings(max_examples=5)
@given(order=st.permutations(range(5)))
def test_order_of_clients_is_rounding(method: Method, order: list[int]) -> None:
    clients = lists()
    ends = []
    for arranged in (clients, [clients[i] for i in order]):
        model = network()
        federation = Federation(model, cross_entropy, arranged, method, local_epochs=1)
        for _ in range(2):
            federation.round()
        ends.append(flat(model))
    close(ends[0], ends[1], 1e-14)


def test_server_keeps_the_mean_of_all_duals() -> None:
    federation = ran(FedSMOO(), rounds=4, participation=0.5)
    total = sum(numbers(state["h"]) for state in federation.kept.values())
    torch.testing.assert_close(numbers(federation.shared["h"]), total / 4, rtol=0, atol=1e-6)


# -- resuming, drawing, counting ---------------------------------------------------------------------------------


@each_method
def test_resumes_to_the_same_bits(method: Method, tmp_path: Path) -> None:
    through = ran(method, rounds=4, participation=0.5)
    half = ran(method, rounds=2, participation=0.5)
    save_tree(tmp_path / "state", half.state_dict())
    torch.rand(3)  # what else draws does not matter
    resumed = ran(method, rounds=0, participation=0.5)
    resumed.load_state_dict(load_tree(tmp_path / "state"))
    assert same(resumed.state_dict(), half.state_dict())
    for _ in range(2):
        last = resumed.round()
    assert last.number == 4
    assert same(resumed.state_dict(), through.state_dict())


def test_place_of_what_clients_keep_changes_nothing() -> None:
    assert same(ran(FedSMOO(), keep_on="cpu").state_dict(), ran(FedSMOO()).state_dict())


def test_state_is_a_snapshot() -> None:
    federation = ran(FedSMOO())
    state = federation.state_dict()
    before = copy.deepcopy(state)
    federation.round()
    assert same(state, before)


def test_state_of_another_federation() -> None:
    state = ran(FedSpeed(), rounds=1).state_dict()
    with pytest.raises(SpecError, match="method='FedSpeed'"):
        ran(FedSMOO(), rounds=0).load_state_dict(state)
    with pytest.raises(SpecError, match="clients=3"):
        ran(FedSpeed(), rounds=0).load_state_dict({**state, "clients": 3})


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ran(FedSAM())
    assert torch.equal(torch.get_rng_state(), before)


def test_choice_of_clients_depends_on_seed_and_round_alone() -> None:
    federation = Federation(network(), cross_entropy, lists((1,) * 20), FedAvg(), participation=0.2, seed=5)
    drawn = [federation.round().selected for _ in range(6)]
    assert all(len(set(chosen)) == 4 and chosen == tuple(sorted(chosen)) for chosen in drawn)
    assert len(set(drawn)) > 3
    later = Federation(network(), cross_entropy, lists((1,) * 20), FedSAM(), participation=0.2, seed=5)
    later.rounds = 4
    assert later.round().selected == drawn[4]
    few = Federation(network(), cross_entropy, lists(), FedAvg(), participation=0.01)
    assert len(few.round().selected) == 1


def test_local_steps_start_anew_when_batches_end() -> None:
    seen = []

    def loss(model, batch):
        seen.append(int(batch[2]))
        return cross_entropy(model, batch[:2])

    client = [(*samples(3, batch), batch) for batch in range(3)]
    federation = Federation(network(), loss, [client], FedAvg(), local_steps=7)
    federation.round()
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert federation.cost.gradient == 7


def test_round_tells_the_loss_at_clean_weights() -> None:
    model, clients = network(), lists((1, 1))
    expected = sum(cross_entropy(model, client[0]).item() for client in clients) / 2
    done = Federation(model, cross_entropy, clients, FedSAM(), local_steps=1).round()
    assert done.loss == pytest.approx(expected, rel=1e-14)
    assert (done.number, done.selected, done.left_out, done.lr) == (1, (0, 1), (), 0.1)


# -- buffers, frozen and unused parameters -----------------------------------------------------------------------


def test_statistics_are_averaged_and_come_from_clean_passes() -> None:
    model = noisy_network()
    data = [[(x.float(), y)] for x, y in (samples(8, 0), samples(8, 1))]
    states = []
    for client in data:
        alone = copy.deepcopy(model)
        alone(client[0][0])
        states.append(alone.state_dict())
    Federation(model, cross_entropy, data, FedSAM(rho=0.5), local_steps=1).round()
    tracked = [name for name in states[0] if "running" in name]
    assert len(tracked) == 4
    for name in tracked:
        expected = (states[0][name] + states[1][name]) / 2
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=1e-7)
        assert not torch.equal(states[0][name], states[1][name])


def test_counters_become_the_largest() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    Federation(model, cross_entropy, lists((1, 3, 2)), FedSpeed(), local_epochs=2).round()
    assert model[1].num_batches_tracked == 6


@each_method
def test_frozen_unused_and_sparse_parameters(method: Method) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(6, 4, sparse=True)
            self.head, self.frozen, self.unused = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.head(self.frozen(self.words(x)))

    model = Odd()
    before = copy.deepcopy(model.state_dict())
    clients = [[(torch.tensor([i, i + 1, 0]), torch.tensor([0, 1, 2]))] for i in range(4)]
    Federation(model, cross_entropy, clients, method, weight_decay=0.0, local_steps=2).round()
    after = model.state_dict()
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])
    torch.testing.assert_close(before["unused.weight"], after["unused.weight"], rtol=0, atol=1e-6)
    assert not torch.equal(before["words.weight"], after["words.weight"])
    assert torch.isfinite(after["words.weight"]).all()
    assert all(param.grad is None for param in model.parameters())


# -- what goes wrong ---------------------------------------------------------------------------------------------


def spoil(clients: list, client: int, value: float) -> list:
    spoilt = list(clients)
    x, y = clients[client][-1]
    spoilt[client] = [*clients[client][:-1], (torch.full_like(x, value), y)]
    return spoilt


@each_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_client_that_is_not_finite_is_left_out(method: Method, value: float) -> None:
    clients = lists()
    models = [nn.Sequential(network(), nn.BatchNorm1d(3).double()) for _ in range(2)]
    sound = Federation(models[0], cross_entropy, clients, method, local_epochs=1)
    ailing = Federation(models[1], cross_entropy, clients, method, local_epochs=1)
    sound.round()
    ailing.round()
    ailing.clients = spoil(clients, 2, value)
    with pytest.warns(RuntimeWarning, match="client 2 was left out of round 2"):
        done = ailing.round()
    assert done.left_out == (2,)
    assert done.loss == sound.round(selected=[0, 1, 3, 4]).loss
    ailing.round()  # warned once
    sound.round(selected=[0, 1, 3, 4])
    a, b = sound.state_dict(), ailing.state_dict()
    assert (a.pop("left_out"), b.pop("left_out")) == (0, 2)
    a.pop("cost"), b.pop("cost")
    assert same(a, b)


def test_all_clients_not_finite() -> None:
    clients = spoil(lists((1,)), 0, float("nan"))
    federation = Federation(network(), cross_entropy, clients, MoFedSAM())
    before = federation.state_dict()
    with pytest.warns(RuntimeWarning, match="left out"):
        done = federation.round()
    assert done.loss != done.loss
    after = federation.state_dict()
    assert (after["rounds"], after["left_out"]) == (1, 1)
    assert same(before["model"], after["model"])
    assert same(before["shared"], after["shared"])


def test_overflow_in_the_last_step() -> None:
    x, y = samples(4, 0)
    federation = Federation(
        network().float(), cross_entropy, [[(x.float(), y)]], FedAvg(), lr=1e38, local_steps=1
    )
    with pytest.warns(RuntimeWarning, match="left out"):
        federation.round()
    assert flat(federation.model).abs().max() < 1


@each_method
@pytest.mark.parametrize("passes", [3, 4])
def test_round_that_raises_did_not_happen(method: Method, passes: int) -> None:
    federation = ran(method, rounds=2)
    before = federation.state_dict()
    generator = torch.get_rng_state()
    start = federation.cost.gradient

    def failing(model, batch):
        if federation.cost.gradient - start > 8 + passes:  # in the second client, after the first is done
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    federation.loss = failing
    with pytest.raises(KeyboardInterrupt):
        federation.round()
    after = federation.state_dict()
    assert before.pop("cost") != after.pop("cost")
    assert same(before, after)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"participation": 0.0}, "participation=0.0.*> 0 and <= 1"),
        ({"participation": 1.5}, "participation=1.5"),
        ({"participation": float("nan")}, "participation=nan"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"lr": True}, "lr=True"),
        ({"lr_decay": float("inf")}, "lr_decay=inf"),
        ({"weight_decay": -1e-3}, "weight_decay=-0.001.*>= 0"),
        ({"clip": 0}, "clip=0"),
        ({"local_epochs": 0}, "local_epochs=0"),
        ({"local_steps": 1.5}, "local_steps=1.5"),
        ({"method": FedAvg}, "is not a method"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Federation(network(), cross_entropy, lists(), **{"method": FedAvg(), **options})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FedSAM(rho=-0.1), "FedSAM: rho=-0.1.*>= 0"),
        (lambda: MoFedSAM(alpha=0.0), "MoFedSAM: alpha=0.0.*> 0 and <= 1"),
        (lambda: MoFedSAM(alpha=1.1), "alpha=1.1"),
        (lambda: FedSMOO(lmbda=float("nan")), "FedSMOO: lmbda=nan"),
        (lambda: FedAvg(server_lr=0), "server_lr=0"),
    ],
)
def test_bad_hyper_parameters(build: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build()


def test_bad_clients() -> None:
    with pytest.raises(DataError, match="no clients"):
        Federation(network(), cross_entropy, [], FedAvg())
    with pytest.raises(DataError, match="client 1 has no batches"):
        Federation(network(), cross_entropy, [lists()[0], []], FedAvg())
    once = Federation(network(), cross_entropy, [iter(lists()[0])], FedAvg(), local_epochs=2)
    before = once.state_dict()
    with pytest.raises(DataError, match="client 0 gave no batch in local epoch 2 of round 1"):
        once.round()
    assert same(before["model"], once.state_dict()["model"])
    for selected in ([], [5], [-1]):
        with pytest.raises(DataError, match="clients are 0 to 4"):
            Federation(network(), cross_entropy, lists(), FedAvg()).round(selected)


def test_model_with_nothing_to_train() -> None:
    with pytest.raises(SpecError, match="no parameter"):
        Federation(network().requires_grad_(False), cross_entropy, lists(), FedAvg())


# -- names -------------------------------------------------------------------------------------------------------


def test_registry_and_lazy_names() -> None:
    assert {spec.load() for spec in METHODS.values()} == {type(method) for method in ALL}
    for key, spec in METHODS.items():
        assert spec.load().__name__.lower() == key
        for demo in spec.demos:
            ran(spec.load()(**demo), rounds=1)
    with pytest.raises(SpecError, match="Did you mean 'fedsmoo'"):
        METHODS["fedsmo"]
    assert all(getattr(federated, name) is not None for name in federated.__all__)
    assert dir(federated) == sorted(federated.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        federated.nothing
    code = "import sys; from steppe.optim.federated import METHODS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
