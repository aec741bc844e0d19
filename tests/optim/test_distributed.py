"""Two processes over gloo, launched by torchrun once per script; what they do and check stands in distributed/."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "distributed"
CASES = [
    (script, case)
    for script in ("ranks.py", "samples.py")
    for case in re.findall(r"^        (\w+),$", (FOLDER / script).read_text("utf-8"), flags=re.MULTILINE)
]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)


@functools.cache
def output_of(script: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launcher, str(FOLDER / script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return run.stdout + run.stderr


@pytest.mark.parametrize(("script", "case"), CASES)
def test_over_two_ranks(script: str, case: str) -> None:
    output = output_of(script)
    assert f"passed {case}" in output, output[-4000:]
