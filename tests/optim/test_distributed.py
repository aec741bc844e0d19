"""Two processes over gloo, launched by torchrun once; what they do and check stands in distributed/ranks.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "distributed" / "ranks.py"
CASES = re.findall(r"^        (\w+),$", SCRIPT.read_text("utf-8"), flags=re.MULTILINE)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)


@pytest.fixture(scope="module")
def output() -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launcher, str(SCRIPT)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return run.stdout + run.stderr


@pytest.mark.parametrize("case", CASES)
def test_over_two_ranks(case: str, output: str) -> None:
    assert f"passed {case}" in output, output[-4000:]
