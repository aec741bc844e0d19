"""The kernels against nn.GRU in float64, and what must not crash, race or drift."""

import copy
import multiprocessing
import os
import pickle
import threading

import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st
from torch import Tensor, nn

from steppe.core.errors import DataError, SpecError
from steppe.optim.registry import create
from steppe.quant import gru
from steppe.quant.factor_model import GRUFactor, ic_loss
from steppe.quant.gru import GRU

# every path: those that this CPU lacks in instructions that it has
PATHS = ["avx2", "avx512-emulated", "amx-emulated"]
PATHS += [path for path in ("avx512", "amx") if gru.native and path in gru.native.paths()]


# relative error against float64
BOUND = {"fp32": 1e-5, "bf16": 5e-3}


def model(features: int = 6, hidden: int = 32, layers: int = 2, seed: int = 0) -> GRU:
    torch.manual_seed(seed)
    return GRU(features, hidden, layers, precision="auto")


def last_state(module: nn.GRU, windows: Tensor) -> Tensor:
    states, _ = nn.GRU.forward(module, windows)
    return states[-1]


def gradients(output: Tensor, weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((output * weights).sum(), inputs))


def off(a: Tensor, b: Tensor) -> float:
    """Relative error; 0 where both are 0."""
    return float(((a - b).norm() / b.norm().clamp_min(1e-30)).detach())


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=15)
@given(
    steps=st.integers(1, 8),
    rows=st.integers(1, 110),
    features=st.integers(1, 32),
    hidden=st.sampled_from(range(16, 129, 16)),
    layers=st.integers(1, 3),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
@example(steps=30, rows=101, features=6, hidden=64, layers=2, scale=1.0, seed=0)
def test_output_and_gradients_are_those_of_float64(path, steps, rows, features, hidden, layers, scale, seed):
    os.environ["STEPPE_GRU_PATHS"] = path  # hypothesis keeps function-scoped fixtures out
    precision = gru._precision_of(path)
    bound = BOUND[precision]
    assume(precision == "fp32" or scale <= 1)  # inputs are standardised; bfloat16 rounds them to 0.4 %
    try:
        fast = model(features, hidden, layers, seed)
        exact = copy.deepcopy(fast).double()
        windows = (scale * torch.randn(steps, rows, features)).requires_grad_()
        doubled = windows.detach().double().requires_grad_()
        weights = torch.randn(rows, hidden)
        output, truth = fast(windows), last_state(exact, doubled)
        assert output.grad_fn.name().startswith("_LastState")
        assert off(output, truth) < bound
        with torch.no_grad():
            assert torch.equal(fast(windows), output), "inference differs from training"
        found = gradients(output, weights, [windows, *fast.parameters()])
        wanted = gradients(truth, weights.double(), [doubled, *exact.parameters()])
        joint = [torch.cat([g.double().flatten() for g in some[1:]]) for some in (found, wanted)]
        assert off(*joint) < bound
        for a, b in zip(
            found, wanted, strict=True
        ):  # a single number's rounding error has nothing to average with
            assert off(a, b) < (bound if precision == "fp32" else 4 * bound)
    finally:
        del os.environ["STEPPE_GRU_PATHS"]


@pytest.mark.parametrize("path", PATHS)
def test_saturated_gates(only, path):
    only(path)
    fast = model()
    windows = torch.randn(5, 7, 6) * torch.tensor([1e-6, 1e-3, 1, 1e2, 1e4, 1e8, 1e38]).view(1, 7, 1)
    truth = last_state(copy.deepcopy(fast).double(), windows.double())
    # gates that are nearly open or closed: bfloat16 rounds what goes into them by up to 0.4 %
    exact = slice(None) if gru._precision_of(path) == "fp32" else [0, 1, 2]
    output = fast(windows)
    assert output.isfinite().all()
    assert off(output[exact], truth[exact]) < BOUND[gru._precision_of(path)]


@pytest.mark.parametrize("path", PATHS)
def test_windows_may_be_strided(only, path):
    only(path)
    fast = model()
    panel = torch.randn(40, 90, 8)
    for windows in (panel[3:9, 5:65, 1:7], panel[::7, ::2, :6], panel.permute(1, 2, 0)[:5, :, :6]):
        assert torch.equal(fast(windows), fast(windows.contiguous()))


@pytest.mark.parametrize("path", PATHS)
def test_a_sample_with_nan_is_nan_and_no_other_is(only, path):
    only(path)
    fast = model()
    windows = torch.randn(4, 60, 6)
    clean = fast(windows)
    windows[1, 17, 3] = torch.nan
    windows[0, 59, 0] = torch.inf
    windows[2, 58, 0] = torch.nan
    output = fast(windows)
    output.sum().backward()
    assert output[[17, 58]].isnan().all()
    kept = torch.ones(60, dtype=torch.bool)
    kept[[17, 58, 59]] = False
    assert torch.equal(output[kept], clean[kept])
    assert torch.equal(output[59].isnan(), last_state(fast, windows)[59].isnan())


def test_nan_weights(only):
    only("avx2")
    fast = model()
    with torch.no_grad():
        fast.weight_hh_l0[0, 0] = torch.nan
    assert fast(torch.randn(4, 60, 6)).isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_from_any_number_of_threads(only, path):
    only(path)
    fast = model()
    windows, weights = torch.randn(6, 101, 6), torch.randn(101, 32)
    output = fast(windows)
    wanted = [output, *gradients(output, weights, list(fast.parameters()))]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            output = fast(windows)
            found = [output, *gradients(output, weights, list(fast.parameters()))]
            if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_graphs_at_once_and_a_graph_twice():
    fast = model()
    a, b, weights = torch.randn(3, 50, 6), torch.randn(3, 50, 6), torch.randn(50, 32)
    alone = [gradients(fast(x), weights, list(fast.parameters())) for x in (a, b)]
    one, two = fast(a), fast(b)
    (one * weights).sum().backward(retain_graph=True)
    (one * weights).sum().backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(fast.parameters(), alone[0], strict=True))
    fast.zero_grad()
    (two * weights).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(fast.parameters(), alone[1], strict=True))


def test_memory_comes_back():
    fast = model()
    windows = torch.randn(3, 50, 6)
    fast(windows).sum().backward()
    (memory,) = fast._spare.free
    loss = fast(windows).sum()
    assert not fast._spare.free
    loss.backward()
    assert fast._spare.free[0] is memory
    graphs = [fast(windows) for _ in range(5)]
    del graphs
    assert len(fast._spare.free) == fast._spare.limit


def test_frozen_parameters_get_no_gradient():
    fast = model()
    fast.weight_ih_l0.requires_grad_(False)
    fast(torch.randn(3, 5, 6)).sum().backward()
    assert fast.weight_ih_l0.grad is None
    assert fast.weight_hh_l0.grad is not None


def test_checkpoints_interchange_with_nn_gru():
    fast, plain = model(), nn.GRU(6, 32, 2)
    plain.load_state_dict(fast.state_dict())
    fast.load_state_dict(plain.state_dict())
    assert [*plain.state_dict()] == [*fast.state_dict()]
    windows = torch.randn(5, 9, 6)
    assert off(fast(windows), plain(windows)[0][-1]) < 1e-6


def test_copies_share_no_memory():
    fast = model()
    fast(torch.randn(3, 5, 6)).sum().backward()
    assert fast._spare.free
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not copied._spare.free
        assert torch.equal(copied.weight_hh_l1, fast.weight_hh_l1)


def test_wrong_input_is_an_error_before_native_code():
    fast = model()
    for windows in (torch.randn(5, 6), torch.randn(3, 5, 7), torch.randn(0, 5, 6)):
        with pytest.raises(DataError, match="needs \\[window, stocks, 6\\]"):
            fast(windows)
    for windows in (torch.randn(3, 5, 6).double(), torch.randn(3, 5, 6, device="meta")):
        with pytest.raises(DataError, match=r"weights torch\.float32 on cpu"):
            fast(windows)
    with pytest.raises(SpecError, match="unknown precision"):
        GRU(6, 32, precision="fp64")  # type: ignore[arg-type]


def test_native_code_checks_for_itself():
    native = gru.native
    weights = [p.detach() for p in model().parameters()]
    windows, out = torch.randn(3, 5, 6), torch.empty(5, 32)
    native.forward("avx2", windows, weights, out)
    with pytest.raises(ValueError, match="cannot run on this CPU"):
        native.forward("neon", windows, weights, out)
    with pytest.raises(ValueError, match="weight_ih"):
        native.forward("avx2", windows[..., :5], weights, out)
    with pytest.raises(ValueError, match="four arrays"):
        native.forward("avx2", windows, weights[:-1], out)
    with pytest.raises(ValueError, match="out must be"):
        native.forward("avx2", windows, weights, out[:4])
    with pytest.raises(ValueError, match="tape"):
        native.forward("avx2", windows, weights, out, torch.empty(100))
    with pytest.raises(ValueError, match="hidden"):
        native.tape_size("avx2", 3, 5, 6, 24, 1)
    for wrong in (windows.double(), windows[0]):
        with pytest.raises(TypeError):
            native.forward("avx2", wrong, weights, out)
    with pytest.raises(TypeError):  # a converted copy would take the result
        native.forward("avx2", windows, weights, out.double())
    with pytest.raises(TypeError):
        native.backward("avx2", windows, weights, torch.empty(10**6), out, [w.double() for w in weights])


@pytest.mark.parametrize(
    "build",
    [
        lambda: (GRU(6, 24, 2), torch.randn(3, 5, 6)),
        lambda: (GRU(40, 32, 2), torch.randn(3, 5, 40)),
        lambda: (GRU(6, 32, 4), torch.randn(3, 5, 6)),
        lambda: (GRU(6, 32, 2).double(), torch.randn(3, 5, 6).double()),
        lambda: (GRU(6, 32, 2, precision="torch"), torch.randn(3, 5, 6)),
        lambda: (GRU(6, 32, 2), torch.randn(3, 0, 6)),
    ],
    ids=["hidden", "features", "layers", "float64", "torch", "nobody"],
)
def test_what_the_kernels_do_not_cover_goes_to_nn_gru(build):
    module, windows = build()
    assert torch.equal(module(windows), last_state(module, windows))


def test_a_machine_without_paths(only, monkeypatch):
    fast, windows = model(), torch.randn(3, 5, 6)
    only("")
    assert gru.path("fp32") == "torch"
    assert torch.equal(fast(windows), last_state(fast, windows))
    assert gru.path_in_words("fp32") == "GRU: torch's nn.GRU, since this CPU lacks what steppe-kernels need."
    only("avx2")
    assert gru.path_in_words("fp32") == "GRU: steppe-kernels, fp32 on avx2."
    monkeypatch.setattr(gru, "native", None)
    assert torch.equal(fast(windows), last_state(fast, windows))
    assert gru.path_in_words("fp32") == "GRU: torch's nn.GRU, since steppe-kernels is not installed."


def test_emulated_paths_are_never_chosen(monkeypatch):
    monkeypatch.delenv("STEPPE_GRU_PATHS", raising=False)
    assert not gru.path("fp32").endswith("-emulated")
    assert not gru.path("auto").endswith("-emulated")


def test_what_each_precision_takes(only):
    only("amx-emulated,avx2")
    assert [gru.path(p) for p in ("fp32", "bf16", "torch")] == ["avx2", "amx-emulated", "torch"]
    only("avx2")
    assert gru.path("auto") == "avx2"
    with pytest.raises(SpecError, match="bf16 needs"):
        gru.path("bf16")
    only("amx-emulated")
    with pytest.raises(SpecError, match="in steps of 16"):  # nn.GRU would compute in fp32 under bf16's name
        GRU(6, 24, 2, precision="bf16")
    assert gru.path("auto") == "amx-emulated"
    assert gru.path("fp32") == "torch"


def test_second_derivatives_are_a_clear_error():
    fast, windows, weights = model(), torch.randn(3, 5, 6), torch.randn(5, 32)
    first = torch.autograd.grad((fast(windows) * weights).sum(), fast.weight_hh_l0, create_graph=True)[0]
    assert torch.equal(first, gradients(fast(windows), weights, [fast.weight_hh_l0])[0])
    with pytest.raises(RuntimeError, match="precision to 'torch'"):
        first.sum().backward()
    fast.precision = "torch"
    first = torch.autograd.grad((fast(windows) * weights).sum(), fast.weight_hh_l0, create_graph=True)[0]
    first.sum().backward()


def test_transforms_of_torch_func_take_nn_gru():
    fast, windows = model(), torch.randn(3, 5, 6)
    weights = {name: p.detach() for name, p in fast.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(fast, weights, (windows,)).square().sum()

    found = torch.func.grad(loss)(weights)
    loss_now = fast(windows).square().sum()
    for name, wanted in zip(weights, torch.autograd.grad(loss_now, list(fast.parameters())), strict=True):
        assert off(found[name], wanted) < 1e-5


@pytest.mark.parametrize(("path", "bound"), [("avx2", 1e-3), ("amx-emulated", 1e-2)])
@pytest.mark.parametrize("key", ["adamw", "sam", "asam", "gsam", "gam", "friendly_sam"])
def test_optimizers_train_alike_through_both(only, key, path, bound):
    only(path)

    def train(precision: gru.Precision) -> GRUFactor:
        torch.manual_seed(0)
        module = GRUFactor(32, 2)
        module.gru.precision = precision
        optimizer = create(key, module.named_parameters(), base=None if key == "adamw" else "adamw", lr=1e-3)
        draw = torch.Generator().manual_seed(1)
        for _ in range(4):
            windows, labels = torch.randn(6, 60, 6, generator=draw), torch.randn(60, generator=draw)

            def closure(windows=windows, labels=labels):
                optimizer.zero_grad()
                loss = ic_loss(module(windows), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
        return module

    fast, plain = train("auto"), train("torch")
    start = torch.cat([p.detach().flatten() for p in GRUFactor(32, 2).parameters()])
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (fast, plain))
    assert not torch.equal(b, start)
    # AdamW's first steps are signs of gradients: where one is all rounding, the weight moves by lr either way
    assert float((a - b).abs().median()) < 1e-3 * bound
    assert off(a, b) < bound


def _output(queue) -> None:
    queue.put(model()(torch.linspace(-1, 1, 3 * 50 * 6).view(3, 50, 6)).detach().numpy())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_in_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    here = model()(torch.linspace(-1, 1, 3 * 50 * 6).view(3, 50, 6)).detach()
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=_output, args=(queue,))
    process.start()
    there = queue.get()
    process.join()
    assert torch.equal(torch.from_numpy(there), here)
