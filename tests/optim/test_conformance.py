"""Every registered optimizer passes every check; being registered is enough to be tested here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from steppe.core.spec import Spec
from steppe.optim.registry import OPTIMIZERS
from steppe.testing import checks_for

CASES = [
    pytest.param(
        spec,
        check,
        demo,
        id=f"{key}-{number}-{name}",
        marks=pytest.mark.xfail(reason=spec.xfail[name]) if name in spec.xfail else (),
    )
    for key, spec in OPTIMIZERS.items()
    if not spec.missing
    for name, check in checks_for(spec).items()
    for number, demo in enumerate(spec.demos)
]
CASES += [
    pytest.param(spec, None, {}, id=key, marks=pytest.mark.skip(reason=spec.missing))
    for key, spec in OPTIMIZERS.items()
    if spec.missing
]


@pytest.mark.parametrize(("spec", "check", "demo"), CASES)
def test_conforms(spec: Spec, check: Any, demo: Mapping[str, Any]) -> None:
    check(spec, demo)
