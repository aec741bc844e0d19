"""The sentences of a study of functions: who came to the floor first, what diverged, what the numbers cannot say."""

from __future__ import annotations

import math

from steppe.report.cells import number, significant
from steppe.report.function_results import BACKWARD, TOLERANCE, Functions, Problem, Reached
from steppe.report.words import Verdict, count, enumerate_names

__all__ = ["budget", "judge", "limits", "missing"]


def judge(functions: Functions) -> Verdict:
    """Which optimizer came to the floor within the budget, in how many evaluations; ties are told as ties."""
    problems = [problem for problem in functions.problems if functions.runs(problem.part)]
    if not problems:
        return Verdict("There is no verdict yet: no trial has recorded a loss.", [], [])
    sentences = {problem.part: _judge(functions, problem) for problem in problems}
    details = _divergence(functions)
    if functions.sweep:
        details.append("The optimizers are settings of the same methods: what differs is the setting alone.")
    if len(problems) == 1:
        return Verdict(sentences[problems[0].part], details, _lines(functions, problems[0]))
    solved = [p for p in problems if any(r.seeds for r in functions.reached(p).values())]
    firsts: dict[str, list[str]] = {}
    for problem in solved:
        for r in _leaders(functions, problem):
            firsts.setdefault(r.optimizer, []).append(problem.title)
    headline = (
        f"On {len(solved)} of {len(problems)} problems some optimizer came to the floor within the budget"
        if solved
        else f"On none of {len(problems)} problems did an optimizer come to the floor within the budget"
    )
    if firsts:
        most = max(map(len, firsts.values()))
        names = [label for label in functions.results.optimizers if len(firsts.get(label, [])) == most]
        share = f"on {most} of them{' each' * (len(names) > 1)}" if len(solved) > 1 else "there"
        headline += f"; {enumerate_names(names)} {'was' if len(names) == 1 else 'were'} first, or tied for it, {share}"
    return Verdict(headline + ".", details, [sentences[problem.part] for problem in problems])


def _leaders(functions: Functions, problem: Problem) -> list[Reached]:
    """The optimizer that came to the floor from most seeds and soonest, and those that cannot be told from it.

    Two tie if as many seeds came there and the spans of their evaluations, seed by seed and as coarse as the record
    is, overlap.
    """
    order = sorted(
        (r for r in functions.reached(problem).values() if r.seeds),
        key=lambda r: (-r.seeds / r.runs, r.median),
    )
    if not order:
        return []
    first = order[0]
    return [
        r
        for r in order
        if r.seeds / r.runs == first.seeds / first.runs
        and r.span[0] < first.span[1]
        and first.span[0] < r.span[1]
    ]


def _judge(functions: Functions, problem: Problem) -> str:
    leaders = _leaders(functions, problem)
    floor = _floor(functions, problem)
    if not leaders:
        low = functions.lowest(problem.part)
        if not math.isfinite(low):
            return f"{problem.title}: every run diverged or failed."
        names = [
            label
            for label, runs in functions.runs(problem.part).items()
            if min(run.lowest for run in runs) <= low * (1 + 1e-12) + 1e-300
        ]
        return (
            f"{problem.title}: no optimizer came to the {floor} within the budget; {enumerate_names(names)} came "
            f"nearest, with a loss of {significant(low, 4)}."
        )
    first = leaders[0]
    seeds = _seeds(first)
    if len(leaders) > 1:
        names = [r.optimizer for r in leaders]
        low, high = min(r.median for r in leaders), max(r.median for r in leaders)
        span = number(low, 0) if low == high else f"{number(low, 0)} to {number(high, 0)}"
        return (
            f"{problem.title}: {enumerate_names(names)} tie: each came to the {floor} in {span} evaluations, {seeds}, "
            "and their seeds or records overlap."
        )
    counts = f"{number(first.median, 0)} evaluations, {seeds}"
    return f"{problem.title}: {first.optimizer} came to the {floor} first, in {counts}."


def _lines(functions: Functions, problem: Problem) -> list[str]:
    """One sentence per optimizer, soonest first."""
    reached = sorted(functions.reached(problem).values(), key=lambda r: (-r.seeds / r.runs, r.median))
    sentences = []
    for r in reached:
        runs = functions.runs(problem.part)[r.optimizer]
        low, high = min(run.lowest for run in runs), max(run.lowest for run in runs)
        if r.seeds == r.runs:
            text = f"came to the floor in {number(r.median, 0)} evaluations, {_seeds(r)}."
        elif r.seeds:
            text = (
                f"came to the floor from {r.seeds} of {r.runs} seeds, in {number(r.median, 0)} evaluations; worst "
                f"loss {significant(high, 4)}."
            )
        elif not math.isfinite(low):
            text = "diverged." if any(run.diverged for run in runs) else "failed, see below."
        else:
            span = significant(low, 4) if low == high else f"{significant(low, 4)} to {significant(high, 4)}"
            text = f"did not come to the floor; lowest loss {span}."
        sentences.append(f"{r.optimizer} {text}")
    return sentences


def _divergence(functions: Functions) -> list[str]:
    where: dict[str, list[str]] = {}
    for problem in functions.problems:
        for label, runs in functions.runs(problem.part).items():
            if any(run.diverged for run in runs):
                where.setdefault(label, []).append(problem.title)
    if len(functions.problems) == 1:
        return [f"{enumerate_names(list(where))} diverged."] if where else []
    return [f"{label} diverged on {enumerate_names(titles)}." for label, titles in where.items()]


def _floor(functions: Functions, problem: Problem) -> str:
    reference = functions.reference(problem)
    text = significant(reference, 5) if reference else "0"
    return f"floor of {text}" if problem.floor is not None else f"lowest loss that was found, {text},"


def _seeds(reached: Reached) -> str:
    if reached.runs == 1:
        return "from one seed"
    which = "all" if reached.seeds == reached.runs else str(reached.seeds)
    return (
        f"median over {which} of {count(reached.runs, 'seed')}"
        if which != "all"
        else f"median over all {reached.runs} seeds"
    )


def budget(functions: Functions) -> str:
    """What the trials share."""
    spec = functions.results.spec
    most = spec.get("evaluations")
    epochs = count(spec["epochs"], "epoch") + f" of {count(spec['problem'].get('steps', 10), 'step')}"
    text = f"at most {number(most, 0)} evaluations or {epochs}" if most else f"at most {epochs}"
    return (
        "Same start, batch order and budget for every optimizer, seed by seed "
        f"({count(len(spec['seeds']), 'seed')}): {text}. "
        f"Evaluations are counted in forward passes: a loss is one, a gradient {1 + BACKWARD}."
    )


def missing(functions: Functions) -> list[str]:
    """What a reader would look for and not find."""
    trials = functions.results.trials
    open_ = [trial for trial in trials if trial.state in ("pending", "running")]
    sentences = []
    if open_ or not trials:
        sentences.append(
            f"This study is not complete: {len(open_)} of {count(len(trials), 'trial')} are not done."
        )
    elif not functions.results.panel.get("parts"):
        sentences.append("The study tells nothing of its problems, so floors and minima are not known.")
    failed = [t for t in trials if t.state == "failed" and "diverged" not in (t.error or "")]
    if failed:
        sentences.append(
            f"{count(len(failed), 'trial')} failed for another reason than divergence: see below."
        )
    return sentences


def limits(functions: Functions) -> list[str]:
    """What the numbers on this page cannot say."""
    results = functions.results
    seeds = len(results.spec["seeds"])
    spread = results.spec["problem"].get("spread", 0)
    sentences = [
        "These are functions and problems of a few weights. Who wins here need not win on a network of a million.",
        f"Reached means within {TOLERANCE} of the floor, times the floor's size where that is above one. Another "
        "tolerance may give another order.",
        "Runs are recorded once an epoch: evaluations to the floor are known to the length of an epoch, and a loss "
        "that was lower within one is not seen.",
    ]
    if not spread:
        sentences.append(
            "All seeds start at the same weights, so an optimizer that draws nothing, on a problem without batches or "
            "noise, does the same from each: its seeds are one observation."
        )
    if seeds < 5:
        sentences.append(
            f"{count(seeds, 'seed').capitalize()}: chance in the drawing optimizers is hardly seen."
        )
    sentences.append(
        "The settings of a sweep are chosen to show their effect: what is called right or too large is so here, on "
        "these functions and this budget."
        if functions.sweep
        else "Settings are those listed; how they were chosen is told in the study's file. One that is poor for a "
        "function says little about the method."
    )
    sentences.append("Seconds are CPU time on one machine; evaluations do not depend on it.")
    return sentences
