"""Where trials run: this process, or local worker processes with one torch thread each.

Processes over trials beat threads inside one: a GRU's step is a chain of small operations that two threads slow
down. Workers are spawned, never forked (torch's threads do not survive a fork), and end with their parent.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from steppe.core.processes import end_with_parent, single_threaded_children
from steppe.study.store import Store
from steppe.study.trial import Task, run_trial

__all__ = ["run_here", "run_processes"]

_TICK_SECONDS = 1.0


def run_here(tasks: Sequence[Task], on_tick: Callable[[], None]) -> None:
    """Run the tasks one after the other in this process."""
    for task in tasks:
        run_trial(task)
        on_tick()


def run_processes(tasks: Sequence[Task], workers: int, on_tick: Callable[[], None]) -> None:
    """Run the tasks in ``workers`` processes; ``on_tick`` is called about once a second.

    A worker that dies (out of memory, killed) fails its trial with its exit code and is replaced.
    """
    context = multiprocessing.get_context("spawn")
    queue = deque(tasks)
    crew: dict[Connection, tuple[SpawnProcess, Task]] = {}

    def hire() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        task = queue.popleft()
        crew[ours] = process, task
        give(ours, task)

    def give(link: Connection, task: Task) -> None:
        with suppress(OSError):  # it died already: its end of the pipe will say so
            link.send(task)

    with single_threaded_children():
        try:
            while queue and len(crew) < workers:
                hire()
            while crew:
                for link in wait(list(crew), timeout=_TICK_SECONDS):
                    assert isinstance(link, Connection)
                    process, task = crew.pop(link)
                    try:
                        link.recv()
                    except (EOFError, OSError):
                        process.join()
                        Store.open(task.folder).set_state(
                            task.trial.id,
                            "failed",
                            error=f"its worker process died with exit code {process.exitcode}.",
                        )
                        if queue:
                            hire()
                        continue
                    if queue:
                        task = queue.popleft()
                        crew[link] = process, task
                        give(link, task)
                    else:
                        link.close()
                on_tick()
        finally:
            for link, (process, _) in crew.items():
                process.terminate()
                process.join()
                link.close()


def _work(link: Connection) -> None:
    end_with_parent()
    while True:
        try:
            task: Task = link.recv()
        except EOFError:
            return
        run_trial(task)
        link.send(None)
