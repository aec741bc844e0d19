"""Write docs/optimizers.md from the registry: ``python docs/build.py`` (``--check`` only compares)."""

import sys
from pathlib import Path

from steppe.optim.registry import OPTIMIZERS

PAGE = Path(__file__).with_name("optimizers.md")


def page() -> str:
    """The page as it should be."""
    lines = [
        "# Optimizers",
        "",
        "<!-- written by docs/build.py from the registry: change the registry, then run it -->",
        "",
        '`steppe.optim.create(key, params, base="adamw", **hyper)` builds any of them; sharpness-aware optimizers '
        "wrap any base optimizer. Formulas, defaults and where paper and code differ stand in each class's docstring.",
        "",
        "| key | class | what it does | gradients per step | paper |",
        "|---|---|---|---|---|",
    ]
    for key, spec in OPTIMIZERS.items():
        name = spec.path.replace(":", ".")
        lines.append(f"| `{key}` | `{name}` | {spec.summary} | {spec.evals:g} | {spec.paper} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text("utf-8") != page() and f"{PAGE.name} is stale: run python docs/build.py")
    PAGE.write_text(page(), "utf-8")
