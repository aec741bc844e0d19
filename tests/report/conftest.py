"""A synthetic study: what a run would leave, without running anything."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from steppe.study.store import Store

# label -> (settings, gradient evaluations per step, RankIC above the baseline)
OPTIMIZERS: dict[str, tuple[dict[str, Any], int, float]] = {
    "adamw": ({"kind": "adamw", "lr": 1e-3, "weight_decay": 0.01}, 1, 0.0),
    "sam": ({"kind": "sam", "base": "adamw", "rho": 0.05, "lr": 1e-3}, 2, 0.001),
    "asam": ({"kind": "asam", "base": "adamw", "rho": 0.5, "lr": 1e-3}, 2, 0.003),
    "gsam": ({"kind": "gsam", "base": "adamw", "rho": 0.05, "alpha": 0.4, "lr": 1e-3}, 2, 0.02),
    "gam": ({"kind": "gam", "base": "adamw", "rho": 0.02, "lr": 1e-3}, 4, -0.011),
    "friendly_sam": (
        {"kind": "friendly_sam", "base": "adamw", "rho": 0.1, "sigma": 1.0, "lr": 1e-3},
        2,
        0.002,
    ),
}
STEPS, EPOCHS = 290, 6

# what a healthy sharpness-aware optimizer tells of its steps
HEALTHY = {
    "perturbed": 1.0,
    "surrogate_gap": 0.0021,
    "cosine": 0.93,
    "gradient_norm": 0.044,
    "skipped": 0.0,
}

Maker = Callable[..., Store]


def trial_id(part: str, label: str, seed: int) -> str:
    return f"{part}-{''.join(c if c.isalnum() else '_' for c in label)}-s{seed}"


def make_study(
    folder: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    optimizers: Mapping[str, tuple[dict[str, Any], int, float]] = OPTIMIZERS,
    parts: Sequence[str] = ("daily", "weekly"),
    simulated: bool = True,
    dates: int = 48,
    failed: Mapping[str, str] | None = None,
    running: Sequence[str] = (),
    tested: bool = True,
    steps: Mapping[str, Mapping[str, float | None]] | None = None,
    funds: Sequence[str] = (),
    landscapes: str = "",
    **spec: Any,
) -> Store:
    """A study folder; trials of ``failed`` (by optimizer) carry its error, those of ``running`` stopped half-way.

    ``steps`` changes what an optimizer tells of its steps from `HEALTHY`, by its label or by "part/label"; a None is
    not told. ``landscapes`` is the part that has surfaces and measures.
    """
    rng = np.random.default_rng(0)
    problem = {
        "kind": "stock_factor",
        "panel": "simulated",
        "train": [date(2016, 1, 4), date(2020, 12, 31)],
        "validation": [date(2021, 1, 4), date(2021, 12, 31)],
        "test": [date(2022, 1, 4), date(2022, 12, 30)],
        "universe": ["csi300", "csi500"],
    }
    store = Store.create(
        folder,
        {
            "name": "sam-on-stocks",
            "title": "Sharpness-aware optimizers on stock selection",
            "problem": problem,
            "optimizers": {label: settings for label, (settings, _, _) in optimizers.items()},
            "baseline": next(iter(optimizers)),
            "seeds": list(seeds),
            "epochs": 20,
            "patience": 5,
        }
        | spec,
    )
    store.write_json(
        "panel_info",
        {
            "name": "simulated market" if simulated else "our vendor's A shares",
            "simulated": simulated,
            "dates": ["2015-06-01", "2022-12-30"],
            "sessions": 1845,
            "stocks": 800,
            "fingerprint": "3f1c9a7b20d4",
            "notes": ["Prices are adjusted for dividends."],
            "blocks": {"test": {"first": "2022-01-04", "last": "2022-12-27", "dates": dates}},
        },
    )
    store.write_json("environment", {"python": "3.11.7", "cpu": "a processor", "cores": 2, "torch": "2.13.0"})
    failed = failed or {}
    plan = []
    with store.lock():  # as a run does; it is also much faster
        for seed in seeds:
            for part in parts:
                for label, (settings, passes, lift) in optimizers.items():
                    plan.append(trial := trial_id(part, label, seed))
                    store.add_trial(trial, part=part, optimizer=label, seed=seed, spec=settings)
                    store.set_state(trial, "running")
                    stop = 3 if label in running or label in failed else EPOCHS - rng.integers(0, 3)
                    seconds = passes * rng.uniform(3.8, 4.4)
                    told: dict[str, float | None] = {}
                    if "base" in settings:
                        told = HEALTHY | {"gradients": float(passes), "perturbation": settings["rho"]}
                        for key in (label, f"{part}/{label}"):
                            told |= (steps or {}).get(key, {})
                    for epoch in range(1, int(stop) + 1):
                        ic = (
                            (0.075 + lift) * (1 - math.exp(-epoch / 1.5))
                            - 0.0006 * epoch
                            + rng.normal(0, 0.0015)
                        )
                        store.record_epoch(
                            trial,
                            epoch,
                            {
                                "train_loss": -0.03 - 0.12 * (1 - math.exp(-epoch / 4)),
                                "validation_ic": ic,
                                "validation_ir": 11 * ic + rng.normal(0, 0.02),
                                "validation_rank_ic": 1.1 * ic,
                            }
                            | _step_metrics(told, epoch, seed),
                            gradient_evaluations=STEPS * passes * epoch,
                            forward_evaluations=STEPS * passes * epoch,
                            seconds=seconds * epoch,
                        )
                    if label in failed:
                        store.set_state(trial, "failed", error=failed[label])
                    elif label not in running:
                        cost = STEPS * passes * int(stop)
                        store.set_state(
                            trial,
                            "done",
                            best_epoch=int(stop) - 2,
                            epochs=int(stop),
                            gradient_evaluations=cost,
                            forward_evaluations=cost,
                            seconds=seconds * stop,
                            samples=int(stop) * STEPS * 800,
                        )
    store.set_plan(plan)
    done = [label for label in optimizers if label not in failed and label not in running]
    if tested and done:
        lifts = {label: optimizers[label][2] for label in done}
        _write_tables(store, rng, lifts, seeds, parts, dates, references=bool(funds))
        if funds:
            _write_funds(store, rng, lifts, seeds, funds)
    if landscapes:
        _write_landscapes(store, landscapes)
    return store


def _step_metrics(told: Mapping[str, float | None], epoch: int, seed: int) -> dict[str, float]:
    """Gaps shrink and gradients part over the epochs."""
    known = {name: value for name, value in told.items() if value is not None}
    if "surrogate_gap" in known:
        known["surrogate_gap"] *= 1 + 1 / epoch + 0.05 * seed
    if "cosine" in known:
        known["cosine"] **= 0.5 + epoch / 4 + 0.05 * seed
    return {f"step_{name}": value for name, value in known.items()}


def _write_tables(
    store: Store,
    rng: np.random.Generator,
    lifts: Mapping[str, float],
    seeds: Sequence[int],
    parts: Sequence[str],
    n: int,
    references: bool,
) -> None:
    days = [date(2022, 1, 4) + timedelta(days=7 * week) for week in range(n)]
    market, universe = rng.normal(0.085, 0.09, n), rng.normal(0.001, 0.025, n)
    scores = [*parts, "blend"] if len(parts) > 1 else list(parts)
    ic, layers, factor = [], [], []
    of_seed = pl.Series("seed", [*seeds, None], dtype=pl.Int64).to_list() if references else list(seeds)
    runs = [(label, lift, of_seed) for label, lift in lifts.items()]
    runs += [("no_model", -0.03, [None])] * references
    for label, lift, seeds_of_label in runs:
        for seed in seeds_of_label:
            for part in scores if label != "no_model" else scores[-1:]:
                key = {"optimizer": label, "seed": seed, "part": part}
                mean = lift + (0.01 if part == "blend" else 0.0)
                rank = market + mean + rng.normal(0, 0.006, n) + rng.normal(0, 0.0006)
                ic.append(
                    pl.DataFrame(
                        {
                            "date": days,
                            "ic": rank * 0.9,
                            "rank_ic": rank,
                            "rank_ic_5": rank * 0.8,
                            "rank_ic_neutral": rank * 0.7,
                        }
                    ).select(*_key(**key), pl.all())
                )
                top = np.zeros(n)
                for layer in range(11):
                    tilt = 0 if layer == 0 else (layer - 5.5) * (0.0009 + 0.02 * mean)
                    top = universe + tilt + (rng.normal(0, 0.004, n) if layer else 0)
                    layers.append(
                        pl.DataFrame(
                            [{"date": d, "layer": layer, "ret": r} for d, r in zip(days, top, strict=True)]
                        ).select(*_key(**key), pl.all())
                    )
                factor.append(
                    {
                        **key,
                        "rank_ic": rank.mean(),
                        "rank_ic_std": rank.std(ddof=1),
                        "rank_ic_ir": rank.mean() / rank.std(ddof=1),
                        "rank_ic_positive": (rank > 0).mean(),
                        "rank_ic_5": 0.8 * rank.mean(),
                        "rank_ic_neutral": 0.7 * rank.mean(),
                        "top_annual_return": float(np.prod(1 + top) ** (50.4 / n) - 1),
                        "top_annual_excess": float(np.prod(1 + top - universe) ** (50.4 / n) - 1),
                        "top_tracking_error": float((top - universe).std(ddof=1) * 50.4**0.5),
                        "top_information_ratio": 4.2 + 20 * lift,
                        "top_max_drawdown": 0.021,
                        "top_turnover": 0.95,
                        "something_new": 1.25,
                    }
                )
    store.write_table("ic", pl.concat(ic))
    store.write_table("layers", pl.concat(layers))
    store.write_table("factor", pl.DataFrame(factor, schema_overrides={"seed": pl.Int64}))
    if references:
        means = pl.DataFrame(factor, schema_overrides={"seed": pl.Int64}).select(
            "optimizer", "seed", "part", "rank_ic", "top_annual_excess"
        )
        horizons = pl.DataFrame({"horizon": [1, 5, 10, 20], "factor": [0.5, 0.8, 1.0, 1.1]})
        decay = means.join(horizons, how="cross").with_columns(pl.col("rank_ic") * pl.col("factor"))
        store.write_table("decay", decay.drop("factor", "top_annual_excess"))
        years = means.join(pl.DataFrame({"year": [2021, 2022]}), how="cross")
        store.write_table("factor_yearly", years)


def _key(optimizer: str, seed: int | None, part: str) -> list[pl.Expr]:
    return [
        pl.lit(optimizer).alias("optimizer"),
        pl.lit(seed, dtype=pl.Int64).alias("seed"),
        pl.lit(part).alias("part"),
    ]


def _write_funds(
    store: Store,
    rng: np.random.Generator,
    lifts: Mapping[str, float],
    seeds: Sequence[int],
    indices: Sequence[str],
) -> None:
    """A year of sessions; better scores earn more, and the score without a model loses to the index."""
    days = [
        date(2022, 1, 4) + timedelta(days=d)
        for d in range(340)
        if (date(2022, 1, 4) + timedelta(d)).weekday() < 5
    ]
    runs = [(label, lift, seed) for label, lift in lifts.items() for seed in (*seeds, None)]
    runs.append(("no_model", -0.03, None))
    daily, summary, yearly, rebalances = [], [], [], []
    for index in indices:
        market = rng.normal(0.0002, 0.012, len(days))
        for label, lift, seed in runs:
            key = {"optimizer": label, "seed": seed, "index": index}
            excess = 0.0003 + 0.02 * lift + rng.normal(0, 0.003, len(days))
            figures = {
                "annual_return": 0.1 + 5 * lift,
                "benchmark_annual_return": 0.05,
                "annual_excess": float(np.prod(1 + excess) ** (252 / len(days)) - 1),
                "tracking_error": float(excess.std() * 252**0.5),
                "information_ratio": float(excess.mean() / excess.std() * 252**0.5),
                "excess_max_drawdown": 0.03,
                "excess_calmar": 2.0,
                "monthly_win_rate": 0.7,
            }
            daily += [
                {**key, "date": d, "ret": r, "benchmark": b}
                for d, r, b in zip(days, (market + excess).tolist(), market.tolist(), strict=True)
            ]
            summary.append(
                {**key, **figures, "turnover": 0.3, "cost_annual": 0.03, "relaxed": 1, "rebalances": 60}
            )
            yearly += [{**key, "period": period, **figures} for period in ("2022", "last 12 months")]
            rebalances += [
                {
                    **key,
                    "date": days[k],
                    "turnover": 0.3,
                    "held": 120,
                    "cash": 0.01,
                    "relaxed": text,
                    "violation": v,
                    "blocked": 1,
                }
                for k, text, v in ((0, "turnover", 0.7), (5, "", 0.0))
            ]
    for name, rows in (
        ("fund_daily", daily),
        ("fund", summary),
        ("fund_yearly", yearly),
        ("fund_rebalances", rebalances),
    ):
        store.write_table(
            name, pl.DataFrame(rows, schema_overrides={"seed": pl.Int64}, infer_schema_length=None)
        )
    store.write_json(
        "panel_info",
        store.read_json("panel_info", {})
        | {
            "fund": {
                "indices": {index: {"weights": "float_cap", "benchmark": "price index"} for index in indices},
                "cost": 0.002,
                "limits": {"active weight": "±0.8 %", "turnover": "30 %"},
                "notes": ["Funds of 100 million would trade 1 % of a stock's daily amount."],
            }
        },
    )


def _write_landscapes(store: Store, part: str) -> None:
    """Bowls, steeper the lower an optimizer's lift; surfaces for the first seed. One trace did not converge."""
    rng = np.random.default_rng(1)
    lifts = {label: lift for label, (_, _, lift) in OPTIMIZERS.items()}
    surfaces, paths, axes, measures = [], [], [], []
    rows = [row for row in store.trials() if row.state == "done" and row.part == part]
    grid = np.linspace(-3.0, 3.0, 25), np.linspace(-2.0, 2.0, 25)
    for row in rows:
        lift = lifts.get(row.optimizer, 0.0)
        about = {"trial": row.id, "optimizer": row.optimizer, "seed": row.seed, "part": row.part}
        steep = math.exp(-25 * lift) * rng.uniform(0.98, 1.02)
        if row.seed == rows[0].seed:
            y, x = (axis.ravel() for axis in np.meshgrid(grid[1], grid[0], indexing="ij"))
            for split, base, shift in (("train", -0.15, 0.1), ("test", -0.09 - lift, 0.5)):
                far = (x - shift) ** 2 / 4 + (y - shift * 0.6) ** 2 + 0.15 * np.sin(2 * x + y)
                loss = base + 0.03 * steep * far
                table = pl.DataFrame({"x": x, "y": y, "loss": loss, "computed": [True] * len(x)})
                key = {**about, "split": split, "dates": 20, "stocks": 125, "kind": "pca"}
                surfaces.append(table.select(*(pl.lit(v).alias(k) for k, v in key.items()), pl.all()))
            epochs = range(row.epochs + 1)
            for epoch in epochs:
                left = 1 - epoch / row.best_epoch
                paths.append({**about, "epoch": epoch, "x": -2.4 * left, "y": 1.1 * math.sin(2.5 * left)})
            for axis, shares in ((1, (0.95, 0.81, 0.81, 0.61)), (2, (0.03, 0.09, 0.12, 0.15))):
                names = ("explained", "null", "explained_centred", "null_centred")
                axes.append({**about, "axis": axis, **dict(zip(names, shares, strict=True))})
        for split in ("train", "test"):
            for name, size, stderr in (
                ("lambda_max", 12.0, math.nan),
                ("trace", 160.0, 8.0),
                ("sam", 0.0031, math.nan),
                ("adaptive_sam", 0.0044, math.nan),
                ("adaptive_average_case", 0.00092, 0.00001),
                ("time_dispersion", 0.041, math.nan),
            ):
                slow = name == "trace" and row.optimizer == "gam" and row.seed == 0
                measures.append(
                    {
                        **about,
                        "split": split,
                        "dates": 20,
                        "measure": name,
                        "value": size * steep * float(rng.uniform(0.97, 1.03)),
                        "stderr": stderr,
                        "converged": not slow,
                        "note": "200 probes did not reach the standard error" if slow else "",
                        "forward": 0.0,
                        "gradient": 40.0,
                    }
                )
    store.write_table("landscape_surface", pl.concat(surfaces))
    store.write_table("landscape_path", pl.DataFrame(paths))
    store.write_table("landscape_axes", pl.DataFrame(axes))
    store.write_table("measures", pl.DataFrame(measures))


def add_other_landscapes(store: Store, part: str = "daily") -> None:
    """The other planes, lines from the baseline and between the seeds, and densities, beside what is there."""
    done = [row for row in store.trials() if row.state == "done" and row.part == part]
    base, first = done[0].optimizer, done[0].seed
    on = {"dates": 8, "stocks": 100}
    about = {
        (row.optimizer, row.seed): {
            "trial": row.id,
            "optimizer": row.optimizer,
            "seed": row.seed,
            "part": part,
        }
        for row in done
    }
    surface = store.table("landscape_surface")
    others = [
        surface.with_columns(
            kind=pl.lit(plane), x=pl.col("x") * reach, y=pl.col("y") * reach, dates=8, stocks=100
        ).cast(surface.schema)
        for plane, reach in (("random", 0.3), ("eigenvectors", 0.015))
    ]
    store.write_table("landscape_surface", pl.concat([surface, *others]))
    t = np.linspace(0, 1, 11)
    ends = [(key, (base, first)) for key in about if key[1] == first and key[0] != base]
    ends += [(key, (key[0], first)) for key in about if key[1] != first]
    lines, eigenvalues, densities = [], [], []
    for end, start in ends:
        for split, height in (("train", 0.05 if end[1] == first else 0.0), ("test", 0.02)):
            loss = -0.1 + 0.02 * t + 4 * height * t * (1 - t)
            table = pl.DataFrame({"t": t, "loss": loss})
            key = {**about[end], "split": split, **on, "origin": about[start]["trial"]}
            lines.append(table.select(*(pl.lit(v).alias(k) for k, v in key.items()), pl.all()))
    for number, key in enumerate(key for key in about if key[1] == first):
        of = {**about[key], "split": "train", **on}
        for axis, value in ((1, 3.0 - 0.2 * number), (2, 1.0)):
            eigenvalues.append(
                {**of, "converged": number != 1, "axis": axis, "eigenvalue": value, "residual": 1e-4}
            )
        for value, weight in ((-0.2, 0.01), (0.0, 0.9898), (0.3, 0.0001), (3.0 - 0.2 * number, 0.0001)):
            densities.append(
                {**of, "dim": 10_000, "converged": number != 1, "eigenvalue": value, "weight": weight}
            )
    store.write_table("landscape_line", pl.concat(lines))
    store.write_table("landscape_eigenvalues", pl.DataFrame(eigenvalues))
    store.write_table("landscape_density", pl.DataFrame(densities))


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder per set of changes, made once: a study is a few hundred small transactions."""
    made: dict[str, Path] = {}

    def folder(**changes: Any) -> Path:
        key = repr(changes)
        if key not in made:
            made[key] = make_study(tmp_path_factory.mktemp("study") / "study", **changes).folder
        return made[key]

    return folder


@pytest.fixture
def study(studies: Callable[..., Path], tmp_path: Path) -> Maker:
    """``study(**changes) -> Store``: a copy of its own for every test."""

    def copy(**changes: Any) -> Store:
        shutil.copytree(studies(**changes), tmp_path / "study")
        return Store.open(tmp_path / "study")

    return copy
