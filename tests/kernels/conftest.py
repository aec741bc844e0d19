"""These tests run the native code of `kernels/`; the rest of the suite passes without it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from steppe.quant import gru


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if gru.native is None:
        reason = "steppe-kernels is not installed: make kernels"
    elif not gru.native.paths():
        reason = "steppe-kernels run on no path of this CPU"
    else:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``only("avx2")``: as if the CPU had these paths alone."""
    return lambda paths: monkeypatch.setenv("STEPPE_GRU_PATHS", paths)
