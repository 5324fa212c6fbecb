"""A merge from folder to folder. What does not change is copied by the kernel: reflinked where the file system can."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.common.errors import InvalidData, ResourceExhausted
from services.common.manifests import File, digest_of_files
from services.merging.merge import AHEAD, Merge, Piece
from services.merging.mixture import Mixture
from services.merging.plan import Plan, plan_merge
from services.merging.tensors import TensorFile
from services.merging.verify import verify

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
OnTensor = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """What a merge has done. digest: of the weights' files, as an artifact's is made."""

    plan: Plan
    digest: str


def merge_folder(base: Path, mixture: Mixture, output: Path, on_tensor: OnTensor = lambda done, total: None) -> Merged:
    """Write base + adapters into `output`. Raises InvalidData before a byte is written when they do not fit together,
    ResourceExhausted when the disk is or becomes full, DataLoss when what was written is not the definition.
    """
    with ExitStack() as stack:
        opened = _open_weights(base, stack)
        plan = plan_merge([tensors.header for tensors in opened.values()], mixture, base.name)
        _check_room(plan, output)
        merge = Merge(plan, mixture)
        written = [_write(merge, tensors, output / file, on_tensor) for file, tensors in opened.items()]
        sizes = {file.path: file.size for file in written}
        verify(
            plan, mixture, lambda f, b, e: bytes(opened[f].view(b, e)), lambda f, b, e: _read(output / f, b, e), sizes
        )
    return Merged(plan, digest_of_files(written))


def plan_folder(base: Path, mixture: Mixture) -> Plan:
    """What merge_folder would do. Raises InvalidData."""
    with ExitStack() as stack:
        headers = [tensors.header for tensors in _open_weights(base, stack).values()]
        return plan_merge(headers, mixture, base.name)


def find_weights(base: Path) -> list[Path]:
    """The base model's files. Raises InvalidData when there are none."""
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise InvalidData(f"{base} has no *.safetensors weights; pickled weights are never read")
    return files


def _open_weights(base: Path, stack: ExitStack) -> dict[str, TensorFile]:
    return {path.name: stack.enter_context(TensorFile(path)) for path in find_weights(base)}


def _check_room(plan: Plan, output: Path) -> None:
    free = shutil.disk_usage(output).free
    if plan.size > free:
        raise ResourceExhausted(
            f"the merged model needs {plan.size / 1e9:.1f} GB at {output}; {free / 1e9:.1f} GB are free"
        )


def _write(merge: Merge, tensors: TensorFile, target: Path, on_tensor: OnTensor) -> File:
    sha256, hashing = hashlib.sha256(), deque[tuple[Piece | None, Future[None]]]()

    def finish() -> None:
        piece, hashed = hashing.popleft()
        hashed.result()
        if piece is not None:
            tensors.forget(piece.begin, piece.end)
            if piece.end == piece.entry.end:
                on_tensor(merge.done, merge.plan.tensors)

    try:
        # A digest takes longer than writing does, so it has a thread of its own.
        with target.open("wb", buffering=0) as out, ThreadPoolExecutor(1) as hasher:
            for chunk in merge.chunks(tensors.header, tensors.view):
                piece = chunk.piece
                hashing.append((piece, hasher.submit(sha256.update, chunk.data)))
                if piece is not None and not piece.is_touched:
                    _copy(tensors.file, out, piece.begin, piece.end)
                else:
                    _write_all(out, chunk.data)
                if len(hashing) > AHEAD:
                    finish()
            while hashing:
                finish()
            size = out.tell()
    except OSError as error:
        if error.errno in FULL:
            raise ResourceExhausted(f"writing {target.name} failed: {error.strerror}; free some of the disk") from None
        raise
    return File(target.name, size, sha256.hexdigest())


def _copy(source: BinaryIO, out: BinaryIO, begin: int, end: int) -> None:
    """Append bytes begin..end of the source, within the kernel where it can."""
    left = end - begin
    while left > 0:
        try:
            count = os.copy_file_range(source.fileno(), out.fileno(), left, offset_src=end - left)
        except OSError as error:
            if error.errno in FULL:
                raise
            count = 0  # another file system, or one that cannot: through user space then
        if not count:
            _write_all(out, os.pread(source.fileno(), left, end - left))
            return
        left -= count


def _write_all(out: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _read(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)
