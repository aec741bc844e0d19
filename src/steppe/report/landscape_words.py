"""What the landscapes show in plain sentences, and what they cannot show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import polars as pl

from steppe.report.cells import number
from steppe.report.landscapes import Landscapes, Taken, facts_of, sample_of
from steppe.study.statistics import FEWEST

__all__ = ["HEADINGS", "cautions", "density_note", "how_to_read", "judge_flatness"]

NOISE = 2.0
"""Standard errors by which two measurements must differ to be called different."""


HEADINGS = {
    "trajectory": "The loss in the plane of each training",
    "random": "The loss in a random plane through the kept weights",
    "eigenvectors": "The loss in the plane of the two leading Hessian eigenvectors",
}

_AXES = {
    "trajectory": "White: the weights after each epoch, which leave the plane a little and are projected on it. Its "
    "axes are distances between weights along the first two principal components of the trajectory about the kept "
    "weights.",
    "random": "Axes of a random plane: two random directions, the same draw for every optimizer, each filter of them "
    "scaled to the length of the same filter of the weights (Li et al. 2018). At 1 the weights have moved by as much "
    "as they are long.",
    "eigenvectors": "Axes of the eigenvectors’ plane: the two directions in which the train loss is bent upwards most, "
    "on the test panels too. At 0.01 the weights have moved by a hundredth of their length.",
}


def how_to_read(landscapes: Landscapes) -> list[str]:
    """What the marks and the axes of the panels are, of the planes there are."""
    planes = dict.fromkeys(plane for part in landscapes.parts for _, plane in landscapes.views(part))
    if not planes:
        return []
    marks = (
        "Diamond: the weights that are kept, where the axes meet. Cross: the lowest loss of the panel. Contours and "
        "colours stand for the same losses in all panels under one scale; they are not equally far apart in loss."
    )
    return [marks, *(_AXES[plane] for plane in planes)]


def density_note(landscapes: Landscapes) -> str:
    """How the spectral densities were found; empty where there are none."""
    if landscapes.density.is_empty():
        return ""
    rough = landscapes.density.filter(~pl.col("converged"))["optimizer"].unique(maintain_order=True).to_list()
    return (
        f"By stochastic Lanczos quadrature from a few random vectors, on {sample_of(landscapes.density)}, smoothed "
        "alike by a normal curve with a hundredth of the widest spectrum as standard deviation. The scale is "
        "logarithmic: nearly all eigenvalues are close to zero, and humps far out are single ones. What is less than a "
        "tenth of a single eigenvalue is left out."
        + (f" The ends of the spectrum of {_list(rough)} did not converge." if rough else "")
    )


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
    return {
        label: gaps[panel.trial]
        for view in landscapes.views(part)[:1]
        for label, pair in landscapes.panels(part, *view).items()
        for panel in pair.values()
        if panel.trial in gaps
    }


def _association(landscapes: Landscapes, part: str) -> list[str]:
    links = landscapes.links(part)
    if not links:
        return []
    most = max(link.association.n for link in links)
    shown = [link for link in links if link.shown]
    if not any(math.isfinite(link.p_holm) for link in links):
        if most < FEWEST:
            chance = f"once in {math.factorial(most) // 2}" if most > 2 else "always"
            why = f"chance alone orders {most} perfectly, one way or the other, {chance}"
            return [f"{most} trials are too few to say whether flatter ones generalise better: {why}."]
        return [
            f"Across {most} trials no measure or no outcome varies: nothing can be said of generalisation."
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
                perfect = any(abs(link.association.tau) == 1 for link in told)
                sentences.append(
                    f"Judged by {outcome} across {n} trials, flatter ones generalise {word} by {len(told)} of "
                    f"{len(among)} measures, more than chance explains if trials count as independent. "
                    f"Kendall’s τ: {taus}."
                    + (" ±1 is a perfect order of few trials, not a certainty." if perfect else "")
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
    planes = {plane for part in landscapes.parts for _, plane in landscapes.views(part)}
    if planes:
        sentences.append(
            "A panel is a plane of two among thousands of directions, and each trial has a plane of its own: only what "
            "happens in it is comparable, at equal distances."
            + (
                " Two axes explain most of a random walk too, so their share says little by itself."
                if "trajectory" in planes
                else ""
            )
        )
    if "random" in planes:
        sentences.append(
            "Random directions hardly meet the few sharp ones: a random plane looks flatter than the loss is."
        )
    if not landscapes.lines.is_empty():
        sentences.append(
            "A barrier belongs to two sets of weights: exchanging the units of one of them changes the way between "
            "them, not what either computes."
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
