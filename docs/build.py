"""Write docs/optimizers.md from the registries: ``python docs/build.py`` (``--check`` only compares)."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from steppe.core.spec import Spec
from steppe.optim.federated.registry import METHODS
from steppe.optim.registry import LOSSES, OPTIMIZERS

PAGE = Path(__file__).with_name("optimizers.md")

INTRO = """# Optimizers

<!-- written by docs/build.py from the registries: change those, then run it -->

`steppe.optim.create(key, params, base="adamw", **hyper)` builds any of them; sharpness-aware optimizers wrap any
base optimizer. Formulas, defaults and where paper and code differ stand in each class's docstring; how they fit
into training loops, in [loops.md](loops.md).

- **Gradients** per step, with the defaults: each is one forward and one backward pass over the batch. A number
  with "about" depends on what is drawn or measured.
- **Copies**: tensors as large as all parameters together that are held besides weights, gradients and the base's
  state: between steps / at most within one. With `restore="subtract"` the copy of the weights is not held. On a
  CPU its memory is kept from step to step, since new pages would cost several times the copying.
- **Buys**: a published figure, with its source. Nobody has compared all of them at equal cost and equal tuning;
  that is what studies are for.
"""

COMBINATIONS = """## Combinations

`Composed(params, base, ascent="asam", descent="gsam", cadence="looksam", ...)` takes each part from the
optimizer that brought it. Those that have parts to lend:
"""


def page() -> str:
    """The page as it should be."""
    sharp = {key: spec for key, spec in OPTIMIZERS.items() if spec.family == "sharpness-aware"}
    first = {key: spec for key, spec in OPTIMIZERS.items() if spec.family == "first-order"}
    free = {key: spec for key, spec in OPTIMIZERS.items() if spec.family == "gradient-free"}
    lines = [INTRO, "## Sharpness-aware", "", *costs(sharp), "", COMBINATIONS, *lenders(sharp), ""]
    lines += [
        "## Losses",
        "",
        "Added to the training loss; any optimizer minimises it.",
        "",
        *costs(LOSSES),
        "",
    ]
    lines += [
        "## Federated",
        "",
        "`Federation(model, loss, clients, method)` trains simulated clients in turn.",
        "",
    ]
    lines += [*plain(METHODS), "", "## First-order", "", *plain(first)]
    if free:
        lines += ["", "## Gradient-free", "", *plain(free)]
    return "\n".join(lines) + "\n"


def costs(specs: Mapping[str, Spec]) -> Iterable[str]:
    """A table with what each costs and buys."""
    yield "| key | class | what it does | gradients | copies | buys | paper |"
    yield "|---|---|---|---|---|---|---|"
    for key, spec in specs.items():
        evals = f"{'about ' if spec.random else ''}{spec.evals:.3g}"
        copies = " / ".join(f"{each:g}" for each in spec.copies)
        name = spec.path.partition(":")[2]
        yield f"| `{key}` | `{name}` | {spec.summary} | {evals} | {copies} | {spec.buys} | {spec.paper} |"


def plain(specs: Mapping[str, Spec]) -> Iterable[str]:
    """A table of what each does."""
    yield "| key | class | what it does | gradients per step | paper |"
    yield "|---|---|---|---|---|"
    for key, spec in specs.items():
        name, needs = spec.path.replace(":", "."), f" (needs `{spec.requires}`)" if spec.requires else ""
        yield f"| `{key}` | `{name}`{needs} | {spec.summary} | {spec.evals:g} | {spec.paper} |"


def lenders(specs: Mapping[str, Spec]) -> Iterable[str]:
    """What each paper has brought, by role."""
    yield "| role | parts, by the key of the optimizer that lends them |"
    yield "|---|---|"
    parts = {key: getattr(spec.load(), "parts", None) for key, spec in specs.items()}
    for role in ("ascent", "radius", "descent", "cadence"):
        seen: dict[type, str] = {}
        for key, given in parts.items():
            if given is not None:
                seen.setdefault(getattr(given, role), key)
        yield f"| {role} | {', '.join(f'`{key}` ({part.__name__})' for part, key in seen.items())} |"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text("utf-8") != page() and f"{PAGE.name} is stale: run python docs/build.py")
    PAGE.write_text(page(), "utf-8")
