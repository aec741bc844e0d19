"""Largest eigenvalue and trace of a GRU's Hessian: steppe beside other tools, CPU seconds of one thread in one run.

GRU 6 -> 64 x 2, window 30, a linear head (38,849 weights), mean squared error over 4,000 samples in chunks, after a
short training. λmax to a relative residual of 1e-3 (each tool by its own stop), trace to a standard error of 10 %; the
tools that know no such stop get the number of probes that steppe needed. The peers differentiate nn.GRU twice; steppe's
default takes central differences of its gradient, by the native GRU where that is installed.

The peers are optional; what is missing is skipped. curvlinops and PyHessian pull torchvision, so:

    pip install --no-deps -c constraints.txt curvlinops-for-pytorch==3.0.1 backpack-for-pytorch einops einconv \
        linear_operator opt_einsum jaxtyping wadler_lindig hessian-eigenthings==1.0.0a5 pyhessian tqdm
    python benchmarks/curvature.py [--samples 4000] [--chunk 500] [--train 100]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.seeding import generator
from steppe.landscape.hvp import hessian
from steppe.landscape.point import Point
from steppe.landscape.spectrum import lanczos, trace
from steppe.quant.factor_model import GRUFactor
from steppe.quant.gru import path

WINDOW, FIELDS, TOL = 30, 6, 1e-3
Result = tuple[float, str]  # value, what it took


class Net(nn.Module):
    """The factor's GRU with the samples first, as the peers want them: ``[n, window, fields] -> [n]``."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.factor = GRUFactor()

    def forward(self, x: Tensor) -> Tensor:
        return self.factor(x.transpose(0, 1))


def made(samples: int, chunk: int, steps: int) -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    """A trained net and its data: noisy momentum and reversal of the first field."""
    draw = generator(0, "data")
    x = torch.randn(samples, WINDOW, FIELDS, generator=draw)
    y = x[:, -10:, 0].mean(1) - x[:, :10, 1].mean(1).tanh() + 0.3 * torch.randn(samples, generator=draw)
    net, batches = Net(), list(zip(x.split(chunk), y.split(chunk), strict=True))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        inputs, target = batches[step % len(batches)]
        nn.functional.mse_loss(net(inputs), target).backward()
        optimizer.step()
    return net, batches


def ours(point: Point, method: Any, precision: Any) -> tuple[Callable[[], Result], Callable[[], Result]]:
    def use() -> Any:
        point.model.factor.gru.precision = precision
        return hessian(point, method)

    def top() -> Result:
        found = lanczos(point, generator(1, "lanczos"), tol=TOL, operator=use())
        return float(found.values[0]), f"{found.hvps} products, residual {float(found.residuals[0]):.1e}"

    def whole() -> Result:
        found = trace(point, generator(1, "trace"), operator=use())
        return found.value, f"{found.note}, stderr {found.stderr:.2g}"

    return top, whole


def curvlinops(net: Net, batches: Any, probes: int) -> tuple[Callable[[], Result], Callable[[], Result]]:
    from curvlinops import HessianLinearOperator, hutchinson_trace
    from scipy.sparse.linalg import LinearOperator, eigsh

    def operator() -> Any:
        return HessianLinearOperator(
            net, nn.MSELoss(), list(net.parameters()), batches, check_deterministic=False
        )

    def top() -> Result:
        inner, calls = operator().to_scipy(), []

        def product(v: Any) -> Any:
            calls.append(1)
            return inner @ v

        counted = LinearOperator(inner.shape, matvec=product, dtype=inner.dtype)
        values, _ = eigsh(counted, k=1, which="LA", tol=TOL)
        return float(values[0]), f"{len(calls)} products"

    def whole() -> Result:
        return float(hutchinson_trace(operator(), probes)), f"{probes} probes, no stderr"

    return top, whole


def eigenthings(
    net: Net, batches: Any, probes: int, method: Any
) -> tuple[Callable[[], Result], Callable[[], Result]]:
    import hessian_eigenthings as he

    def operator() -> Any:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return nn.functional.mse_loss(model(batch[0]), batch[1])

        return he.HessianOperator(net, batches, loss, method=method)

    def top() -> Result:
        found = he.lanczos(operator(), k=1, max_iter=20, tol=TOL, which="LA", seed=0)
        return float(found.eigenvalues[0]), f"{found.iterations} products"

    def whole() -> Result:
        found = he.hutchinson(operator(), num_samples=probes, seed=0)
        return float(found.estimate), f"{probes} probes, stderr {float(found.stderr):.2g}"

    return top, whole


def pyhessian(net: Net, batches: Any, probes: int) -> tuple[Callable[[], Result], Callable[[], Result]]:
    from pyhessian import hessian as Hessian

    def operator() -> Any:
        return Hessian(net, nn.MSELoss(), dataloader=batches, cuda=False)

    def top() -> Result:
        values, _ = operator().eigenvalues(maxIter=100, tol=TOL, top_n=1)
        return float(values[0]), "power iteration"

    def whole() -> Result:
        found = operator().trace(maxIter=probes, tol=0.0)
        return sum(float(v) for v in found) / len(found), f"{len(found)} probes, no stderr"

    return top, whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--chunk", type=int, default=500)
    parser.add_argument("--train", type=int, default=100)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers'
    torch.set_num_threads(1)
    net, batches = made(args.samples, args.chunk, args.train)
    point = Point.from_loader(net, nn.MSELoss(), batches)
    print(
        f"{point.dim} weights, {args.samples} samples, loss {point.value():.4f}, GRU by {path('fp32')}",
        flush=True,
    )

    def timed(name: str, what: str, call: Callable[[], Result]) -> float:
        started = time.process_time()
        try:
            value, note = call()
        except Exception as error:  # a peer that does not run is a result
            value, note = float("nan"), f"{type(error).__name__}: {error}"[:90]
        seconds = time.process_time() - started
        print(f"{name:34} {what:6} {value:10.5f} {seconds:8.2f} CPU-s  {note}", flush=True)
        return seconds

    mine, spent = {}, {}
    for method, precision in (("central", "fp32"), ("central", "torch"), ("autograd", "torch")):
        name = f"steppe {method}, {'nn.GRU' if precision == 'torch' else path('fp32')}"
        top, whole = ours(point, method, precision)
        mine[name] = timed(name, "λmax", top)
        before = point.cost
        spent[name] = timed(name, "trace", whole)
        probes = int((point.cost - before).gradient / 2)
    net.factor.gru.precision = "torch"
    peers: dict[str, Callable[[], tuple[Callable[[], Result], Callable[[], Result]]]] = {
        "curvlinops + eigsh": lambda: curvlinops(net, batches, probes),
        "hessian-eigenthings": lambda: eigenthings(net, batches, probes, "autograd"),
        "hessian-eigenthings, differences": lambda: eigenthings(net, batches, probes, "finite_difference"),
        "PyHessian": lambda: pyhessian(net, batches, probes),
    }
    for name, make in peers.items():
        try:
            top, whole = make()
        except ImportError as error:
            print(f"{name:34} skipped: {error}")
            continue
        theirs, traced = timed(name, "λmax", top), timed(name, "trace", whole)
        for own in mine:
            print(f"    {name} / {own}: λmax {theirs / mine[own]:.1f}, trace {traced / spent[own]:.1f}")


if __name__ == "__main__":
    main()
