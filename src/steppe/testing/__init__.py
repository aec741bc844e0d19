"""What every optimizer has to hold, as checks that run on any registered one and on your own.

``check_optimizer("sam")`` runs them all; your own class comes with its `Spec` in place of the key.
Under pytest, one test per check::

    @pytest.mark.parametrize("name", checks_for(SPEC))
    @pytest.mark.parametrize("demo", SPEC.demos)
    def test_conforms(name, demo):
        checks_for(SPEC)[name](SPEC, demo)
"""

from __future__ import annotations

from steppe.core.spec import Spec
from steppe.optim.gradient_free.base import GradientFree
from steppe.optim.registry import OPTIMIZERS, optimizer_class
from steppe.optim.sharpness.base import SharpnessAware
from steppe.testing.every import CHECKS
from steppe.testing.gradient_free import GRADIENT_FREE_CHECKS
from steppe.testing.rig import Check, ConformanceError, Rig
from steppe.testing.sharpness import SHARPNESS_CHECKS

__all__ = [
    "CHECKS",
    "GRADIENT_FREE_CHECKS",
    "SHARPNESS_CHECKS",
    "Check",
    "ConformanceError",
    "Rig",
    "check_optimizer",
    "checks_for",
]


def checks_for(spec: Spec) -> dict[str, Check]:
    """The checks that apply to an optimizer."""
    cls = optimizer_class(spec)
    if issubclass(cls, GradientFree):
        return dict(GRADIENT_FREE_CHECKS)
    return {**CHECKS, **SHARPNESS_CHECKS} if issubclass(cls, SharpnessAware) else dict(CHECKS)


def check_optimizer(optimizer: str | Spec) -> None:
    """Run every check on every demo of an optimizer.

    Args:
        optimizer: a registry key, or the `Spec` of your own, whose `demos` are run and whose `xfail` names the checks
            it cannot hold.

    Raises:
        ConformanceError: at least one check failed, or one listed in `xfail` holds; the message lists all of them.
    """
    spec = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    failures = []
    for name, check in checks_for(spec).items():
        for demo in spec.demos:
            try:
                check(spec, demo)
            except Exception as error:
                if name not in spec.xfail:
                    failures.append(f"{name} with {dict(demo)}: {error}")
            else:
                if name in spec.xfail:
                    failures.append(f"{name} with {dict(demo)}: holds, though xfail says: {spec.xfail[name]}")
    if failures:
        raise ConformanceError(f"{spec.path}:\n" + "\n".join(failures))
