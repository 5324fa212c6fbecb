"""Work on several cores: one process for each task, its progress added up, its error raised here as it was raised there."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from services.common.errors import FabrictuneError, InvalidSpec, WorkerLost

GARBAGE = 50_000
"""So many objects more than before, and it is looked for those that hold each other; Python's own number is 700."""
Tell = Callable[[int], None]
"""Called with how many more are done."""


def count_processes() -> int:
    """Cores that this process may use: FABRICTUNE_PROCESSES, else the container's limit, else the machine's.

    Raises InvalidSpec.
    """
    if told := os.environ.get("FABRICTUNE_PROCESSES", ""):
        if not told.isdigit() or not int(told):
            raise InvalidSpec(f"FABRICTUNE_PROCESSES is {told!r}; it must be a number of processes")
        return int(told)
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def run_tasks(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], tell: Tell) -> list[Any]:
    """work(*task, tell) of each task, all at a time; their results in order.

    A single task is done in this process. Raises what a task raised, WorkerLost when a process was killed.
    """
    if len(tasks) == 1:
        with _less_garbage():
            return [work(*tasks[0], tell)]
    # A copy of this process knows all that it needs; a new one would import for as long as 10,000 rows take.
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    results: list[Any] = [None] * len(tasks)
    try:
        for number, task in enumerate(tasks):
            ours, theirs = context.Pipe(duplex=False)
            started = context.Process(target=_run, args=(work, task, theirs, [*running, ours]), daemon=True)
            started.start()
            theirs.close()
            running[ours] = number, started
        while running:
            for connection in [c for c in wait(list(running)) if isinstance(c, Connection)]:
                number, process = running[connection]
                kind, value = _receive(connection, process)
                if kind == "told":
                    tell(value)
                elif kind == "failed":
                    raise value
                else:
                    results[number] = value
                    del running[connection]
                    process.join()
        return results
    finally:
        for _, left in running.values():
            left.kill()
            left.join()


@contextmanager
def _less_garbage() -> Iterator[None]:
    """Look for garbage seldom: rows make many objects, and none that hold each other."""
    before = gc.get_threshold()
    gc.set_threshold(GARBAGE, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _receive(connection: Connection, process: BaseProcess) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except EOFError:
        process.join()
        raise WorkerLost(
            f"a process of the conversion was killed (exit {process.exitcode}), most often for want of memory"
        ) from None
    return kind, value


def _run(
    work: Callable[..., Any], task: tuple[Any, ...], connection: Connection, inherited: Sequence[Connection]
) -> None:
    for other in inherited:
        other.close()  # the parent's ends: were they open here, nobody would notice that the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's own way to end is not this one's
    gc.freeze()  # so that looking for garbage copies no page of the parent's
    try:
        with _less_garbage():
            result = work(*task, lambda count: connection.send(("told", count)))
    except (FabrictuneError, OSError) as error:
        connection.send(("failed", error))
    except Exception as unknown:  # noqa: BLE001 - this process's rim: the parent is to know why, not only that it ended
        trace = "".join(traceback.format_exception(unknown))
        connection.send(("failed", FabrictuneError(f"a process of the conversion broke:\n{trace}")))
    else:
        connection.send(("done", result))
