"""The peers of `gradient_free.py`. Each imports its package inside: ImportError says that it is not installed."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from gradient_free_losses import POPULATION, Array, Counted

from steppe.optim.gradient_free.strategy import default_population

Runner = Callable[[Counted], None]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: begins with "steppe" where it is ours.
        family: what it is compared within; empty for what has no peer here.
        run: spends the budget.
        full: whether it keeps a full covariance.
    """

    name: str
    family: str
    run: Runner
    full: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith("steppe")


def pycmas() -> Iterator[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses matplotlib
        import cma

    def settings(counted: Counted) -> dict[str, Any]:
        return {"verbose": -9, "seed": counted.seed % 2**31 + 1, "maxfevals": counted.budget}

    def single(counted: Counted, **options: Any) -> None:
        sigma = counted.problem.sigma
        search = cma.CMAEvolutionStrategy(counted.start, sigma, {**settings(counted), **options})
        while not search.stop():
            x = search.ask()
            search.tell(x, counted.many(x).tolist())

    def bipop(counted: Counted) -> None:
        rng, begun = counted.rng, []
        sigma = counted.problem.sigma

        def somewhere() -> Array:  # where ours restarts
            begun.append(counted.start + sigma * rng.standard_normal(len(counted.start)))
            return begun[-1] if len(begun) > 1 else counted.start

        cma.fmin2(
            counted.one,
            somewhere,
            sigma,
            settings(counted),
            restarts=9,
            bipop=True,
            parallel_objective=lambda x: counted.many(x).tolist(),
        )

    yield Row("pycma", "CMA-ES", single, full=True)
    yield Row("pycma bipop", "CMA-ES, restarts", bipop, full=True)
    yield Row("pycma diagonal", "CMA-ES, separable", partial(single, CMA_diagonal=True))


def cmaess() -> Iterator[Row]:
    from cmaes import CMA, SepCMA

    def run(counted: Counted, kind: Any) -> None:
        search = kind(mean=counted.start.copy(), sigma=counted.problem.sigma, seed=counted.seed % 2**32)
        while not search.should_stop():
            x = [search.ask() for _ in range(search.population_size)]
            search.tell(list(zip(x, counted.many(x).tolist(), strict=True)))

    yield Row("cmaes CMA", "CMA-ES", partial(run, kind=CMA), full=True)
    yield Row("cmaes SepCMA", "CMA-ES, separable", partial(run, kind=SepCMA))


def swarms() -> Iterator[Row]:
    logs = tempfile.TemporaryDirectory()  # it leaves a report.log where it is imported and run
    with contextlib.chdir(logs.name):
        from pyswarms.single import GlobalBestPSO

    def run(counted: Counted) -> None:
        low, high = (np.full(counted.problem.dim, side) for side in counted.problem.box)
        np.random.seed(counted.seed % 2**32)  # it has no other way
        with contextlib.chdir(logs.name):
            search = GlobalBestPSO(
                POPULATION,
                counted.problem.dim,
                {"w": 0.7298, "c1": 1.49618, "c2": 1.49618},  # it has no defaults: ours
                bounds=(low, high),
                init_pos=counted.scattered(),
            )
            search.optimize(counted.many, iters=counted.budget, verbose=False)

    yield Row("pyswarms", "PSO", run)


def evosaxs() -> Iterator[Row]:
    import jax

    jax.config.update("jax_enable_x64", True)
    from evosax.algorithms import CMA_ES, PSO, DifferentialEvolution, Sep_CMA_ES

    @cache
    def made(kind: Any, population: int, dim: int) -> Any:
        return kind(population_size=population, solution=jax.numpy.zeros(dim))

    def generations(counted: Counted, search: Any, params: Any, state: Any, key: Any) -> None:
        while True:
            key, asked, told = jax.random.split(key, 3)
            x, state = search.ask(asked, state, params)
            losses = counted.many(x)
            state, _ = search.tell(told, x, jax.numpy.asarray(losses), state, params)

    def distribution(counted: Counted, kind: Any) -> None:
        dim = counted.problem.dim
        search = made(kind, default_population(dim), dim)
        params = search.default_params.replace(std_init=jax.numpy.asarray(counted.problem.sigma))
        first, key = jax.random.split(jax.random.key(counted.seed % 2**31))
        state = search.init(first, jax.numpy.asarray(counted.start), params)
        generations(counted, search, params, state, key)

    def population(counted: Counted, kind: Any) -> None:
        search = made(kind, POPULATION, counted.problem.dim)
        params = search.default_params
        x = counted.scattered()
        first, key = jax.random.split(jax.random.key(counted.seed % 2**31))
        losses = jax.numpy.asarray(counted.many(x))
        state = search.init(first, jax.numpy.asarray(x), losses, params)
        generations(counted, search, params, state, key)

    yield Row("evosax CMA_ES", "CMA-ES", partial(distribution, kind=CMA_ES), full=True)
    yield Row("evosax Sep_CMA_ES", "CMA-ES, separable", partial(distribution, kind=Sep_CMA_ES))
    yield Row("evosax PSO", "PSO", partial(population, kind=PSO))
    yield Row("evosax DE", "DE", partial(population, kind=DifferentialEvolution))


def scipys() -> Iterator[Row]:
    from scipy.optimize import differential_evolution, dual_annealing

    def evolution(counted: Counted) -> None:
        dim = counted.problem.dim
        own = 15 * dim <= counted.budget // 10
        differential_evolution(
            lambda x: counted.many(x.T),  # [dim, population]
            [counted.problem.box] * dim,
            maxiter=10**6,
            tol=0,
            rng=counted.rng,
            polish=False,
            init="latinhypercube" if own else counted.scattered(),
            updating="deferred",
            vectorized=True,
            x0=counted.start.clip(*counted.problem.box),
        )

    def annealing(counted: Counted, local: bool) -> None:
        dual_annealing(
            counted.one,
            [counted.problem.box] * counted.problem.dim,
            maxiter=10**6,
            rng=counted.rng,
            no_local_search=not local,
            x0=counted.start.clip(*counted.problem.box),
        )

    yield Row("scipy differential_evolution", "DE", evolution)
    yield Row("scipy dual_annealing", "dual annealing", partial(annealing, local=True))
    yield Row("scipy dual_annealing, no local", "dual annealing alone", partial(annealing, local=False))


PEERS = (pycmas, cmaess, swarms, evosaxs, scipys)
