"""Files that change under a running server, such as a mounted Secret: the kubelet puts another folder behind a link."""

from __future__ import annotations

from pathlib import Path


class WatchedFiles:
    """Says when one of some files has changed. Threads may share it."""

    def __init__(self, *files: Path) -> None:
        self._files = files
        self._seen: list[tuple[int, int, int] | None] = []

    def changed(self) -> bool:
        """Whether one has changed since this was asked last; true the first time. It costs a stat of each."""
        now = [_stamp(file) for file in self._files]
        before, self._seen = self._seen, now
        return now != before


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        there = file.stat()  # of the file that a link leads to
    except OSError:
        return None
    return there.st_mtime_ns, there.st_ino, there.st_size
