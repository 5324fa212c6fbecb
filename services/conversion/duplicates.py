"""Rows that say the same again: found by hashes on disk, each bucket of them by itself, the first in place stays.

Exact: the same tools, questions, calls and answers. Near: of the shingles (three words or Chinese characters) of questions,
calls and answers, at least NEAR are in common; what prompts say of tools does not count. Source: MinHash, Broder 1997;
bands, Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4. Eight bands of 8 of 64 permutations find 99 % of the
pairs at 0.9.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Sequence
from operator import eq
from pathlib import Path
from typing import IO, Any

import msgspec

from services.conversion.spill import PLACE, Buckets, Row, read_bucket

NEAR = 0.9
PERMUTATIONS, BANDS = 64, 8
SIGNATURE_BYTES = 4 * PERMUTATIONS
IDS = "ids"
_DIGEST = 16
_ENTRY = _DIGEST + PLACE.size
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
_encode = msgspec.msgpack.Encoder().encode


class Index:
    """What one process knows of its rows; `folder` takes its files."""

    def __init__(self, folder: Path, buckets: int, near: bool) -> None:
        self._folder = folder
        self._exact = Buckets(folder, "exact", buckets)
        self._near = Buckets(folder, "near", buckets) if near else None
        self._signatures: tuple[int, IO[bytes]] | None = None

    def add(self, row: Row, chunk: int, number: int) -> None:
        """Remember a row. Numbers of a chunk come in order, from 0."""
        place = PLACE.pack(chunk, number)
        said = _encode((row.tools, row.rounds, row.system))
        digest = hashlib.blake2b(said, digest_size=_DIGEST).digest()
        self._exact.put_hashed(digest, digest + place)
        if self._near is None:
            return
        signature = sign(row)
        self._open_signatures(chunk).write(signature)
        for band in range(BANDS):
            part = signature[band * SIGNATURE_BYTES // BANDS : (band + 1) * SIGNATURE_BYTES // BANDS]
            digest = hashlib.blake2b(part, digest_size=_DIGEST, salt=bytes([band])).digest()
            self._near.put_hashed(digest, digest + place)

    def close(self) -> None:
        """Write what is still held."""
        self._exact.close()
        if self._near is not None:
            self._near.close()
        if self._signatures is not None:
            self._signatures[1].close()

    def _open_signatures(self, chunk: int) -> IO[bytes]:
        if self._signatures is None or self._signatures[0] != chunk:
            if self._signatures is not None:
                self._signatures[1].close()
            self._signatures = chunk, signature_file(self._folder, chunk).open("wb")
        return self._signatures[1]


def put_id(ids: Buckets, row_id: str, chunk: int, number: int) -> None:
    """Remember a row's id in the buckets named IDS."""
    digest = hashlib.blake2b(row_id.encode(), digest_size=_DIGEST).digest()
    ids.put_hashed(digest, digest + PLACE.pack(chunk, number))


def find_repeated_ids(folders: Sequence[Path], bucket: int) -> Iterator[tuple[int, int]]:
    """(chunk, number) of each row that has an earlier one's id."""
    for same in _groups(read_bucket(folders, IDS, bucket)):
        yield from same[1:]


def sign(row: Row) -> bytes:
    """A row's MinHash signature: PERMUTATIONS numbers of 32 bits."""
    from rensa import RMinHash

    texts: list[str] = []
    for query, turn, _ in row.rounds:
        texts += [query, turn.answer, *(f"{c.lead} {c.name} {c.arguments}" for c in turn.calls)]
    words = _WORD.findall("\n".join(texts).lower())
    shingles = [" ".join(words[n : n + 3]) for n in range(max(1, len(words) - 2))]
    minhash: Any = RMinHash(num_perm=PERMUTATIONS, seed=1)
    minhash.update(shingles)
    return array("I", minhash.digest()).tobytes()


def find_exact(folders: Sequence[Path], bucket: int) -> Iterator[tuple[int, int]]:
    """(chunk, number) of each row that repeats an earlier one."""
    for same in _groups(read_bucket(folders, "exact", bucket)):
        yield from same[1:]


def find_near(folders: Sequence[Path], bucket: int) -> Iterator[tuple[int, int]]:
    """(chunk, number) of each row that is nearly an earlier one which shares a band with it; some come twice."""
    for same in _groups(read_bucket(folders, "near", bucket)):
        first, *others = same
        signature = array("I", _read_signature(folders, *first))
        for place in others:
            equal = sum(map(eq, signature, array("I", _read_signature(folders, *place))))
            if equal >= NEAR * PERMUTATIONS:
                yield place


def signature_file(folder: Path, chunk: int) -> Path:
    """Where the signatures of a chunk's rows lie, one after the other."""
    return folder / f"signatures-{chunk:06d}"


def _groups(data: bytes) -> Iterator[list[tuple[int, int]]]:
    """Places that share a digest, two or more, in order."""
    entries = sorted(data[n : n + _ENTRY] for n in range(0, len(data), _ENTRY))
    start = 0
    while start < len(entries):
        end, digest = start + 1, entries[start][:_DIGEST]
        while end < len(entries) and entries[end].startswith(digest):
            end += 1
        if end - start > 1:
            places = [PLACE.unpack(entry[_DIGEST:]) for entry in entries[start:end]]
            yield [(chunk, number) for chunk, number in places]
        start = end


def _read_signature(folders: Sequence[Path], chunk: int, number: int) -> bytes:
    file = next(f for f in (signature_file(folder, chunk) for folder in folders) if f.exists())
    with file.open("rb") as data:
        data.seek(number * SIGNATURE_BYTES)
        return data.read(SIGNATURE_BYTES)
