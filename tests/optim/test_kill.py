"""kill -9 in the middle of training, with every sharpness-aware optimizer: what resumes has the bits of what went on.

Run as a script, this file trains each of them in a forked child, kills the child, resumes from the file it left and
prints one line of JSON per case. A process of its own, because forking one that has threads is not safe.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from steppe.core.checkpoint import load_tree, save_tree
from steppe.optim import OPTIMIZERS
from steppe.testing import Rig
from steppe.testing.rig import same

Case: TypeAlias = tuple[str, int, str]
"""Registry key, number of the demo, moment of the kill."""

STEPS, STOP = 6, 3
"""Steps of the training, and how many are done when the child stops to be killed."""

OTHERS = itertools.cycle(("in the first pass", "while saving", "at any time"))
CASES: list[Case] = [
    (key, number, next(OTHERS) if number else "in the last pass")
    for key, spec in OPTIMIZERS.items()
    if spec.family == "sharpness-aware"
    for number in range(len(spec.demos))
]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[int, bool]]:
    """Case -> number of steps that the file held, and whether training on from there gave the same bits."""
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("killed"))]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {(key, number, moment): (steps, equal) for key, number, moment, steps, equal in lines}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_killed_and_resumed_to_the_same_bits(resumed: dict[Case, tuple[int, bool]], case: Case) -> None:
    steps, equal = resumed[case]
    assert equal
    if case[-1] != "at any time":
        assert steps == (STOP - 1 if case[-1] == "while saving" else STOP)


# -- in a process of its own ---------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    Rig(OPTIMIZERS["sam"], {})  # imports for all children what torch imports late
    gc.freeze()  # a collection would touch, and so copy, every page in every child
    for case in CASES:  # before this process uses autograd, which does not stand a fork afterwards
        kill(case, path(folder, case))
    for case in CASES:
        print(json.dumps([*case, *resume(case, path(folder, case))]))


def kill(case: Case, file: Path) -> None:
    """Fork a training, and kill it when it is where the case wants it, or some time later."""
    any_time = case[-1] == "at any time"
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(reads)

        def due() -> None:
            os.write(writes, b"!")
            if not any_time:
                signal.pause()

        try:
            train_until_killed(case, file, due)
        finally:
            os._exit(0)
    os.close(writes)
    os.read(reads, 1)  # nothing, if the child ended of itself
    os.close(reads)
    if any_time:
        time.sleep(child % 10 / 1000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def train_until_killed(case: Case, file: Path, due: Callable[[], None]) -> None:
    """Train and save after each step; `due` tells that it is time, and mostly does not return."""
    rig, moment, calls, last, replace = rig_of(case), case[-1], 0, 1, os.replace

    def closure(p: Any = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = rig.closure(p)
        if rig.steps == STOP and moment.endswith("pass") and calls == last:
            due()
        return loss

    def replacing(*paths: Any) -> None:
        if rig.steps == STOP and moment == "while saving":
            due()
        replace(*paths)

    os.replace = replacing  # type: ignore[assignment]
    while rig.steps < STEPS:
        if rig.steps == STOP and moment == "in the last pass":
            last = passes_of_next_step(rig)
        calls = 0
        rig.train(1, closure)
        held = {"model": rig.model.state_dict(), "optimizer": rig.optimizer.state_dict()}
        save_tree(file, {"steps": rig.steps, **held})
        if rig.steps == 2 and moment == "at any time":
            due()


def resume(case: Case, file: Path) -> tuple[int, bool]:
    """Go on from the file; the steps it held, and whether the weights are those of an uninterrupted training."""
    rig, tree = rig_of(case), load_tree(file)
    rig.model.load_state_dict(tree["model"])
    rig.optimizer.load_state_dict(tree["optimizer"])
    rig.steps = tree["steps"]
    rig.train(STEPS - rig.steps)
    straight = rig_of(case)
    straight.train(STEPS)
    return tree["steps"], same(straight.weights(), rig.weights())


def rig_of(case: Case) -> Rig:
    key, number, _ = case
    return Rig(OPTIMIZERS[key], OPTIMIZERS[key].demos[number])


def passes_of_next_step(rig: Rig) -> int:
    ahead, calls = copy.deepcopy(rig), 0

    def closure(p: Any = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ahead.closure(p)

    ahead.train(1, closure)
    return calls


def path(folder: Path, case: Case) -> Path:
    return folder / f"{'-'.join(map(str, case))}.safetensors"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
