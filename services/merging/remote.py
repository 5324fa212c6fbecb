"""A merge from the object store to the object store: the base is read by ranges, the model uploaded while it is made.

Every byte of the base is read once, in order, and hashed on the way, so what was merged is what its manifest says; a
difference ends the merge before the model exists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from services.common.errors import DataLoss, InvalidData
from services.common.remote import RemoteArtifact, RemoteDraft
from services.merging.merge import Merge
from services.merging.mixture import Mixture
from services.merging.plan import Plan, plan_merge
from services.merging.tensors import Header, read_header, write_header
from services.merging.verify import verify

OnTensor = Callable[[int, int], None]


def merge_remote(base: RemoteArtifact, mixture: Mixture, draft: RemoteDraft, on_tensor: OnTensor) -> Plan:
    """Write base + adapters into the draft. Raises as merge_folder, and DataLoss when the base is not what it should be."""
    files = sorted(name for name in base.sizes if name.endswith(".safetensors") and "/" not in name)
    if not files:
        raise InvalidData(f"{base.name} has no *.safetensors weights; pickled weights are never read")
    headers = [read_header(file, base.sizes[file], partial(base.read_range, file)) for file in files]
    plan = plan_merge(headers, mixture, base.name)
    merge = Merge(plan, mixture)
    for header in headers:
        added = plan.added.get(header.file, {})
        size = header.size - header.data + len(write_header(header, added))
        size += sum(entry.end - entry.begin for entry in added.values())
        draft.write(header.file, size, _merged(base, merge, header))
        on_tensor(merge.done, plan.tensors)
    verify(plan, mixture, base.read_range, draft.read_range, draft.sizes)
    return plan


def _merged(base: RemoteArtifact, merge: Merge, header: Header) -> Iterator[Any]:
    sha256 = hashlib.sha256(base.read_range(header.file, 0, header.data))
    hashed = header.data
    for chunk in merge.chunks(header, partial(base.read_range, header.file)):
        piece = chunk.piece
        if piece is not None and piece.begin == hashed:  # an added tensor begins as one that was there before
            sha256.update(chunk.source)
            hashed = piece.end
        yield chunk.data
    if sha256.hexdigest() != base.sha256_of(header.file):
        raise DataLoss(f"{base.name}/{header.file} is not what was stored: its hash differs; the merge is thrown away")
