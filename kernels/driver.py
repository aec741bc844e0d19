"""Every path over shapes that have ragged blocks and panels, on numpy arrays alone: what the sanitizers watch."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import steppe_kernels


def run(path: str, steps: int, rows: int, features: int, hidden: int, layers: int) -> None:
    """Forward and backward once with and once without what is optional, on strided input with a NaN and an infinity."""
    rng = np.random.default_rng(rows)

    def array(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    parameters = []
    for layer in range(layers):
        inputs = hidden if layer else features
        parameters += [
            array(3 * hidden, inputs),
            array(3 * hidden, hidden),
            array(3 * hidden),
            array(3 * hidden),
        ]
    x = array(steps, rows * 2, features + 1)[:, ::2, :features]
    x[0, -1, -1] = np.inf
    x[-1, 0, 0] = np.nan
    out, grad = np.empty((rows, hidden), np.float32), array(rows, hidden)
    tape = np.empty(steppe_kernels.tape_size(path, steps, rows, features, hidden, layers), np.float32)
    grads, grad_x = [np.empty_like(p) for p in parameters], np.empty(x.shape, np.float32)
    steppe_kernels.forward(path, x, parameters, out)
    steppe_kernels.forward(path, x, parameters, out, tape)
    steppe_kernels.backward(path, x, parameters, tape, grad, grads, grad_x)
    steppe_kernels.backward(path, x, parameters, tape, grad, grads)
    assert np.isnan(out[0]).all()


SHAPES = [
    (1, 1, 1, 16, 1),
    (3, 5, 6, 64, 2),
    (2, 48, 7, 32, 3),
    (4, 49, 32, 128, 2),
    (5, 101, 9, 48, 3),
    (2, 97, 17, 112, 1),
]

if __name__ == "__main__":
    for path in steppe_kernels.paths():
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(run, path, *shape) for shape in SHAPES]:
                done.result()
        print(f"{path}: {len(SHAPES)} shapes, clean")
