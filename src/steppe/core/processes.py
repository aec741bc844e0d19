"""Worker processes for numerical work: one thread each, spawned, gone when their parent is."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["end_with_parent", "one_thread", "pool", "single_threaded_children"]


@contextmanager
def pool(
    workers: int, initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """An executor with that many processes; what is still queued on leaving is dropped.

    Processes are spawned, never forked: torch's threads do not survive a fork. `initializer` runs once in each.
    """
    with single_threaded_children():
        executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _begin, (initializer, initargs)
        )
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)


@contextmanager
def single_threaded_children() -> Iterator[None]:
    """Processes that are started inside compute with one thread: numerical libraries read this when they load."""
    inherited = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in inherited}
    os.environ.update(inherited)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside: the bits of a sum depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def end_with_parent() -> None:
    """Have this worker process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    if initializer:
        initializer(*initargs)
