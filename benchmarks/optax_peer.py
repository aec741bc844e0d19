"""Times optax.contrib.sam for `peers.Optax`: a script of its own, because JAX may live in another environment.

Reads JSON lines: first the shapes, then numbers of steps to take, answered by [[seconds, page faults], ...]. The base
does nothing. Updates are compiled and get the memory of weights and state (donated); gradients are handed over.
"""

import functools
import json
import os
import resource
import sys
import time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

RHO = 0.05


def main() -> None:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    optimizer = optax.contrib.sam(optax.set_to_zero(), ascent)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    shapes = json.loads(sys.stdin.readline())
    params = [jnp.asarray(rng.normal(0, 0.05, shape).astype(np.float32)) for shape in shapes]
    passes = [
        [jnp.asarray(rng.normal(0, 1e-3, shape).astype(np.float32)) for shape in shapes] for _ in range(2)
    ]
    # the state starts with the weights themselves, which cannot be given away twice
    state = jax.tree.map(jnp.copy, optimizer.init(params))
    for grads in passes:
        params, state = update(params, state, grads)
    jax.block_until_ready(params)
    print("null", flush=True)
    for line in sys.stdin:
        samples = []
        for _ in range(json.loads(line)):
            faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
            for grads in passes:
                params, state = update(params, state, grads)
            jax.block_until_ready((params, state))
            seconds = time.process_time() - started
            samples.append((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
        print(json.dumps(samples), flush=True)


if __name__ == "__main__":
    main()
