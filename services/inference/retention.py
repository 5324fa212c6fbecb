"""Recorded prompts and answers are deleted in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from services.common.logs import get_logger
from services.inference.traffic import Sink, delete_expired

SWEEP_SECONDS = 3600.0


class Sweeper:
    """Deletes what is older than the retention, at once and every hour, whether or not anything is recorded now."""

    def __init__(self, sink: Sink, days: int, seconds: float = SWEEP_SECONDS) -> None:
        self._stopped = threading.Event()
        sweep = partial(delete_expired, sink, days)
        threading.Thread(target=self._run, args=(sweep, seconds), name="sweeper", daemon=True).start()

    def close(self) -> None:
        """Sweep no more."""
        self._stopped.set()

    def _run(self, sweep: Callable[[], int], seconds: float) -> None:
        log = get_logger("recorder")
        while not self._stopped.is_set():
            try:
                if deleted := sweep():
                    log.info("old records deleted", objects=deleted)
            except Exception as error:  # noqa: BLE001 - the thread's rim: the store may be away for an hour
                log.warning("old records could not be deleted", error=str(error))
            self._stopped.wait(seconds)
