"""The sentences of the report: the verdict, what was held equal, which perturbation looks dead, what is missing, and
what the numbers cannot say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from steppe.report.cells import number, percent, score_name
from steppe.report.funds import Funds
from steppe.report.results import NO_MODEL, Results, Steps
from steppe.study.statistics import verdict

__all__ = [
    "Verdict",
    "count",
    "doubts",
    "enumerate_names",
    "fund_terms",
    "funds",
    "held_equal",
    "judge",
    "limits",
    "missing",
]

SAME_GRADIENT = 0.999
"""Cosine of g and p above which the second gradient tells nothing new."""

MOST_SKIPPED = 0.01
"""Share of skipped steps a healthy training stays below."""


@dataclass(frozen=True)
class Verdict:
    """The answer in words.

    Attributes:
        headline: one sentence.
        details: what stands behind it and what it costs.
        comparisons: one sentence per optimizer, best first.
    """

    headline: str
    details: Sequence[str]
    comparisons: Sequence[str]


def judge(results: Results) -> Verdict:
    """Which optimizer generalised best on the final score's test RankIC, and whether that can be told from chance."""
    base, final = results.baseline, results.final
    if not results.tested:
        return Verdict("There is no verdict yet: no optimizer has a test result.", [], [])
    if base not in results.tested:
        return Verdict(f"There is no verdict yet: the baseline {base} has no test result.", [], [])
    scores = {label: results.estimates[label].mean for label in results.tested if label in results.estimates}
    ranked = sorted(scores, key=lambda label: -scores[label])
    comparisons = results.comparisons
    if not comparisons:
        return Verdict(
            f"There is nothing to compare yet: only the baseline {base} has a test result.", [], []
        )
    shown = [label for label in ranked if label in comparisons and comparisons[label].shown]
    better = [label for label in shown if comparisons[label].difference > 0]
    worse = [label for label in shown if comparisons[label].difference < 0]
    best = ranked[0]
    one_seed = all(c.n_seeds == 1 for c in comparisons.values())
    chance = "the chance of dates" if one_seed else "chance"

    details = []
    if best in better:
        headline = (
            f"{best} generalised best: test RankIC {number(scores[best], 4)} against {number(scores[base], 4)} "
            f"of {base}, more than {chance} explains."
        )
    elif better:
        headline = (
            f"{enumerate_names(better)} beat{'s' * (len(better) == 1)} {base} by more than {chance} explains."
        )
        details.append(
            f"The highest test RankIC is that of {best} ({number(scores[best], 4)}), but it varies too much to be "
            f"told from {base}."
        )
    elif best == base or worse:
        headline = f"No optimizer beats the baseline {base} on these data."
    else:
        headline = f"No optimizer can be told from {base} on these data: the differences are within chance."
    if not better:
        details.append(
            f"The highest test RankIC is that of {best}, {number(scores[best], 4)}"
            + (f", against {number(scores[base], 4)} of {base}." if best != base else ".")
        )
    if worse:
        details.append(
            f"{enumerate_names(worse)} trail{'s' * (len(worse) == 1)} {base} by more than {chance} explains."
        )
    named = best if best != base else next((label for label in ranked if label != base), base)
    cost = results.costs.get(named)
    if cost is not None and cost.gradient_ratio == cost.gradient_ratio:
        details.append(
            f"Training {named} took {number(cost.gradient_ratio, 2)} times the gradient "
            f"evaluations and {number(cost.seconds_ratio, 2)} times the seconds of {base}."
        )
    doubtful = {s.optimizer for s in results.steps if any(_doubts(s))}
    if doubtful:
        names = enumerate_names([label for label in results.optimizers if label in doubtful])
        details.append(
            f"Whether {names} did what the name says is in doubt: see “Did the perturbation act?”."
        )
    details.append(
        f"Judged on the {score_name(final)} over the test block, each optimizer against {base}; the order among the "
        "others is not tested."
    )
    if one_seed:
        headline = f"{headline.removesuffix('.')}; only one seed was run."
    sentences = [verdict(comparisons[label], "RankIC") for label in ranked if label in comparisons]
    return Verdict(headline, details, sentences)


def held_equal(results: Results) -> str:
    """What the trials share."""
    spec = results.spec
    seeds, epochs, patience = spec["seeds"], spec.get("epochs"), spec.get("patience")
    text = (
        f"Same data, initial weights, batch order and budget for every optimizer, seed by seed "
        f"({count(len(seeds), 'seed')}: {', '.join(map(str, seeds))})"
    )
    if epochs is None:
        return text + "."
    stop = (
        f"; training stops after {count(patience, 'epoch')} without a better validation score"
        if patience
        else ""
    )
    return f"{text}; at most {count(epochs, 'epoch')}{stop}, and the best epoch's weights are kept."


def doubts(results: Results) -> list[str]:
    """What looks dead or broken in the steps of an optimizer, one sentence or two for all that share it."""
    found: dict[str, dict[str, list[str]]] = {}
    for s in results.steps:
        for doubt in _doubts(s):
            found.setdefault(doubt, {}).setdefault(s.optimizer, []).append(s.part)
    everywhere = {
        label: [s.part for s in results.steps if s.optimizer == label] for label in results.optimizers
    }
    sentences = []
    for doubt, where in found.items():
        names = [
            label if parts == everywhere[label] else f"{label} ({', '.join(parts)})"
            for label, parts in where.items()
        ]
        sentences.append(f"{enumerate_names(names)}: {doubt}")
    return sentences


def _doubts(s: Steps) -> Iterator[str]:
    if s.skipped == 1:
        yield "every step was skipped, because a gradient was not finite. The weights have never moved."
    elif s.skipped > MOST_SKIPPED:
        yield f"{percent(s.skipped)} of the steps were skipped, because a gradient was not finite."
    if s.perturbed == 0:
        yield "no gradient was taken at perturbed weights. This is the base optimizer at work."
    elif s.perturbation == 0:
        yield (
            "the perturbation is zero, so the second gradient repeats the first. Either rho is 0, or rounding to the "
            "weights' precision takes the perturbation away."
        )
    else:
        if s.surrogate_gap <= 0:
            yield (
                "the loss does not rise from w to w + e, so the ascent does not ascend. That may be so where e follows "
                "something else than the gradient (noise, momentum, the gradient norm); else rho may be far too large."
            )
        if s.cosine > SAME_GRADIENT:
            yield (
                f"the gradients at w and w + e point the same way (cosine above {SAME_GRADIENT}), so the second one "
                "tells nothing new. A larger rho would change that."
            )


def funds(funds: Funds) -> list[str]:
    """Did flatness turn into excess return? One sentence per index and optimizer, and one about the score without a
    model."""
    sentences = []
    for index in funds.indices:
        measure = f"annual excess over {index}"
        sentences += [verdict(c, measure, 3) for c in funds.comparisons(index).values()]
        reference = funds.reference_comparison(index)
        if reference is not None:
            sentences.append(verdict(reference, measure, 3).replace(NO_MODEL, "the score without a model"))
    return sentences


def fund_terms(funds: Funds) -> list[str]:
    """What the portfolios assume: benchmark, weights, costs, limits, capacity."""
    facts, sentences = funds.facts, []
    for index, how in facts.get("indices", {}).items():
        weights = {
            "data": "the index weights of the data",
            "float_cap": "the float-cap weights of the members on each date, since the data have no index weights",
        }.get(how["weights"], how["weights"])
        sentences.append(
            f"{index}: measured by its {how['benchmark']}; active weights are against {weights}."
        )
    if any("price index" in how["benchmark"] for how in facts.get("indices", {}).values()):
        sentences.append(
            "A price index leaves its members' dividends out while the funds reinvest theirs, so every excess over it "
            "contains the index's dividend yield; differences between optimizers do not."
        )
    if "cost" in facts:
        sentences.append(
            f"Weekly rebalances at the vwap of the next session, {percent(facts['cost'])} of the traded value on each "
            "side. Suspended stocks do not trade, nothing is bought that is locked at its upper limit and nothing sold "
            "that is locked at its lower one; cash earns nothing."
        )
    if facts.get("limits"):
        limits = ", ".join(f"{key} {value}" for key, value in facts["limits"].items())
        sentences.append(
            f"Limits: {limits}. Where they cannot all be kept they are widened in a stated order, as little as "
            "possible, and counted; a suspended stock beyond its own limit, which nobody can trade, is not counted."
        )
    sentences += facts.get("notes", [])
    return sentences


def missing(results: Results) -> list[str]:
    """What a reader would look for and not find, trial by trial and table by table."""
    states = Counter(trial.state for trial in results.trials)
    sentences = []
    if len(results.trials) != states["done"]:
        counts = ", ".join(f"{states[s]} {s}" for s in ("done", "running", "pending", "failed") if states[s])
        sentences.append(f"This study is not complete: of {count(len(results.trials), 'trial')} {counts}.")
    if not results.trials:
        sentences.append("No trial has been entered yet.")
    absent = [label for label in results.optimizers if label not in results.tested]
    if absent and results.tested:
        sentences.append(f"Without test results so far: {', '.join(absent)}.")
    if not results.tested:
        sentences.append("The factor test has not run yet: it follows when the trials are done.")
    return sentences


def limits(results: Results) -> list[str]:
    """What the numbers on this page cannot say."""
    spec, sentences = results.spec, []
    if results.simulated:
        sentences.append(
            "The panel is simulated. These numbers say how the optimizers behave on made-up prices; they say nothing "
            "about any market."
        )
    if len(spec["seeds"]) == 1:
        sentences.append(
            "One seed: intervals cover the choice of dates only. Another initialisation could reorder the optimizers."
        )
    elif len(spec["seeds"]) == 2:
        sentences.append(
            "Two seeds say almost nothing about how much seeds matter, so hardly any difference can be shown: "
            "run three or more."
        )
    elif len(spec["seeds"]) < 5:
        sentences.append(
            f"{len(spec['seeds'])} seeds: intervals hold for seeds and dates together and are wide, because few seeds "
            "say little about how much seeds matter."
        )
    if results.dates:
        sentences.append(
            f"One test block of {len(results.dates)} dates, {results.dates[0]} to {results.dates[-1]}: another period "
            "may tell another story."
        )
    if not results.layers.is_empty():
        sentences.append(
            "Layer returns carry no trading costs, and leave out stocks that could not be bought on the next session: "
            "not known on the date itself. They rank scores; they are not what a portfolio would have earned."
        )
    sentences.append(
        "Hyper-parameters are those listed under Settings, and each optimizer's defaults. None was tuned here."
    )
    sentences.append(
        "Seconds are CPU time of the training steps on one machine; a busy or different one changes them, gradient "
        "evaluations do not change."
    )
    return sentences


def enumerate_names(names: Sequence[str]) -> str:
    """The names as running text has them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def count(n: int, noun: str) -> str:
    """A number with its noun."""
    return f"{n} {noun}{'s' * (n != 1)}"
