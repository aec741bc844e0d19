"""What the landscapes show in plain sentences, and what they cannot show."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steppe.report.cells import number
from steppe.report.landscapes import Landscapes, Taken, facts_of

__all__ = ["cautions", "judge_flatness"]

NOISE = 2.0
"""Standard errors by which two measurements must differ to be called different."""


def judge_flatness(landscapes: Landscapes) -> list[str]:
    """Does "flatter on train, lower on test" hold here? Per part: the answer, its grounds, and the associations."""
    several = len(landscapes.parts) > 1
    sentences = []
    for part in landscapes.parts:
        found = [*_claim(landscapes, part), *_association(landscapes, part)]
        if found and several:
            found[0] = f"{part.capitalize()}: {found[0]}"
        sentences += found
    return sentences


def _claim(landscapes: Landscapes, part: str) -> list[str]:
    base = landscapes.results.baseline
    losses = _losses(landscapes, part)
    held: dict[bool, list[str]] = {True: [], False: []}
    behind = []
    for label in landscapes.labels(part):
        if label == base:
            continue
        flatter, sharper, alike = _counts(landscapes, part, label)
        total = flatter + sharper + alike
        if not total:
            continue
        text = f"{label} is flatter than {base} on train by {flatter} of {total} measures"
        text += f", sharper by {sharper}" if sharper else ""
        text += f", alike within the error of measuring by {alike}" if alike else ""
        if label in losses and base in losses:
            (train, test), (base_train, base_test) = losses[label], losses[base]
            digits = _digits(abs(test - base_test))
            lower = test < base_test
            held[flatter > total / 2 and lower].append(label)
            text += (
                f"; its test loss is {'lower' if lower else 'higher' if test > base_test else 'the same'} "
                f"({number(test, digits)} against {number(base_test, digits)}), its train loss "
                f"{number(train, digits)} against {number(base_train, digits)}"
            )
        behind.append(text + ".")
    sentences = []
    if any(held.values()):
        claim = f"“Flatter on train, lower on test” than {base}"
        if not held[False]:
            sentences.append(f"{claim} holds for {_list(held[True])}.")
        elif not held[True]:
            sentences.append(f"{claim} does not hold here, for {_list(held[False], 'or')}.")
        else:
            sentences.append(f"{claim} holds for {_list(held[True])}, not for {_list(held[False], 'or')}.")
        sentences[-1] += (
            " Flatter means by more than half of the measures; losses are those at the kept weights of one seed, on "
            "the dates of the surfaces, and whether they differ by chance is not tested."
        )
    return sentences + behind


def _counts(landscapes: Landscapes, part: str, label: str) -> tuple[int, int, int]:
    """Measures on train by which an optimizer is flatter than the baseline, sharper, and neither."""
    counts = [0, 0, 0]
    for key in landscapes.keys(part):
        pair = landscapes.taken_with_baseline(part, label, key)
        if pair is None:
            continue
        own, base = pair
        difference = own.value - base.value
        if facts_of(key).larger == "flatter":
            difference = -difference
        noise = NOISE * math.hypot(_error(own), _error(base))
        counts[2 if abs(difference) <= noise else 0 if difference < 0 else 1] += 1
    return counts[0], counts[1], counts[2]


def _error(taken: Taken) -> float:
    return taken.stderr if math.isfinite(taken.stderr) else 0.0


def _losses(landscapes: Landscapes, part: str) -> dict[str, tuple[float, float]]:
    """Optimizer -> train and test loss at the kept weights, on the first seed with surfaces."""
    gaps = landscapes.gaps(part)
    found: dict[str, tuple[float, float]] = {}
    for seed in landscapes.seeds(part)[:1]:
        for label, pair in landscapes.panels(part, seed).items():
            trial = next(iter(pair.values())).trial
            if trial in gaps:
                found[label] = gaps[trial]
    return found


def _association(landscapes: Landscapes, part: str) -> list[str]:
    links = landscapes.links(part)
    if not links:
        return []
    most = max(link.association.n for link in links)
    shown = [link for link in links if link.shown]
    if not any(math.isfinite(link.p_holm) for link in links):
        return [
            f"{most} trials are too few to say whether flatter ones generalise better: an interval takes five, a firm "
            "one many more."
        ]
    if not shown:
        return [
            f"Across {most} trials no measure's association with generalisation can be told from chance (after Holm's "
            f"correction over {len(links)} comparisons)."
        ]
    sentences = []
    for outcome in dict.fromkeys(link.outcome for link in shown):
        among = [link for link in links if link.outcome == outcome]
        for word, direction in (("better", 1), ("worse", -1)):
            told = [link for link in among if link.shown and link.association.tau * link.sign * direction > 0]
            if told:
                taus = ", ".join(
                    f"{facts_of(link.measure).title} {number(link.association.tau, 2, sign=True)}"
                    for link in told
                )
                n = max(link.association.n for link in told)
                sentences.append(
                    f"Judged by {outcome} across {n} trials, flatter ones generalise {word} by {len(told)} of "
                    f"{len(among)} measures, more than chance explains if trials count as independent. "
                    f"Kendall’s τ: {taus}."
                )
    return sentences


def cautions(landscapes: Landscapes) -> list[str]:
    """What flatness cannot say, here and in general; and what a measurement said of itself."""
    sentences = [
        "Flatness describes the weights that were found; it does not say why they generalise. In larger comparisons "
        "its correlation with generalisation was weak or of the wrong sign (Andriushchenko et al. 2023).",
        "λmax, the trace and others marked * change when one layer is scaled up and the next down, which leaves "
        "the function as it is (Dinh et al. 2017). The adaptive measures beside them do not.",
    ]
    if not landscapes.surface.is_empty():
        sentences.append(
            "A panel is a plane of two among thousands of directions, and each trial has a plane of its own: only what "
            "happens in it is comparable, at equal distances. Two axes explain most of a random walk too, so their "
            "share says little by itself."
        )
    sentences.append(
        "Trials that share an optimizer or a seed are not independent, so intervals of τ are on the narrow side and "
        "its p-values too small; with one seed, τ compares optimizers only."
    )
    for part in landscapes.parts:
        for note, where in landscapes.notes(part).items():
            rest = f" and {len(where) - 2} more" if len(where) > 2 else ""
            sentences.append(f"{', '.join(where[:2])}{rest}: {note.rstrip('.')}.")
    return sentences


def _digits(difference: float) -> int:
    """Decimals that show two figures of a difference."""
    return min(max(1 - math.floor(math.log10(difference)), 2), 8) if difference else 4


def _list(names: Sequence[str], joint: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joint} {names[-1]}"
