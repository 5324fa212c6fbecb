"""Which rows go on: not a duplicate, and, of a source that gives more than are wanted, those with the smallest seeded hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from services.conversion import duplicates
from services.conversion.spec import Spec
from services.conversion.spill import PLACE, Buckets, read_bucket

_HASH = 8


class Marks:
    """A bit for each row."""

    def __init__(self, rows: Mapping[int, int], bits: bytes = b"") -> None:
        """rows: chunk → how many rows it has."""
        self.rows, self.count = dict(rows), 0
        self._bases: dict[int, int] = {}
        total = 0
        for chunk in sorted(rows):
            self._bases[chunk] = total
            total += rows[chunk]
        self.bits = bytearray(bits or bytes(total // 8 + 1))

    def add(self, place: tuple[int, int]) -> None:
        """Mark (chunk, number in the chunk)."""
        position = self._bases[place[0]] + place[1]
        byte, bit = position >> 3, 1 << (position & 7)
        self.count += not self.bits[byte] & bit
        self.bits[byte] |= bit

    def count_in(self, chunk: int) -> int:
        """How many rows of a chunk are marked."""
        return sum((chunk, number) in self for number in range(self.rows.get(chunk, 0)))

    def union(self, other: Marks) -> Marks:
        """Marked here or there."""
        bits = int.from_bytes(self.bits, "little") | int.from_bytes(other.bits, "little")
        return Marks(self.rows, bits.to_bytes(len(self.bits), "little"))

    def __contains__(self, place: tuple[int, int]) -> bool:
        position = self._bases[place[0]] + place[1]
        return bool(self.bits[position >> 3] & 1 << (position & 7))


class Ballots:
    """The hashes by which one process's rows are chosen; only of sources that may give too many."""

    def __init__(self, folder: Path, spec: Spec, buckets: int) -> None:
        self._buckets = {
            number: Buckets(folder, f"count-{number}", buckets)
            for number, source in enumerate(spec.sources)
            if source.count or source.mix_ratio
        }

    def wants(self, source: int) -> bool:
        """Whether `add` is to be called for its rows."""
        return source in self._buckets

    def add(self, source: int, chance: int, chunk: int, number: int) -> None:
        """chance: a seeded hash of 64 bits."""
        digest = chance.to_bytes(_HASH, "big")
        self._buckets[source].put_hashed(digest, digest + PLACE.pack(chunk, number))

    def close(self) -> None:
        """Write what is still held."""
        for buckets in self._buckets.values():
            buckets.close()


def find_duplicates(spec: Spec, folders: Sequence[Path], rows: Mapping[int, int], buckets: int) -> tuple[Marks, int]:
    """(marks on rows that repeat others, how many of them do so exactly)."""
    marks = Marks(rows)
    if spec.duplicates == "keep":
        return marks, 0
    for bucket in range(buckets):
        for place in duplicates.find_exact(folders, bucket):
            marks.add(place)
    exact = marks.count
    if spec.duplicates == "near":
        for bucket in range(buckets):
            for place in duplicates.find_near(folders, bucket):
                marks.add(place)
    return marks, exact


def find_repeated_ids(folders: Sequence[Path], rows: Mapping[int, int], buckets: int) -> Marks:
    """Marks on rows that have an earlier one's id: sources count from 0 each, and files may have the same name."""
    marks = Marks(rows)
    for bucket in range(buckets):
        for place in duplicates.find_repeated_ids(folders, bucket):
            marks.add(place)
    return marks


def leave_out(
    spec: Spec, folders: Sequence[Path], rows: Mapping[int, int], kept: Mapping[int, int], buckets: int, gone: Marks
) -> Marks:
    """Marks on rows beyond `count` and `mix_ratio`. kept: source → rows that are no duplicates."""
    marks = Marks(rows)
    wanted = count_wanted(spec, kept)
    for source, most in wanted.items():
        taken = 0
        for bucket in range(buckets):
            data = read_bucket(folders, f"count-{source}", bucket)
            size = _HASH + PLACE.size
            for entry in sorted(data[n : n + size] for n in range(0, len(data), size)):
                chunk, number = PLACE.unpack(entry[_HASH:])
                if (chunk, number) in gone:
                    continue
                if taken < most:
                    taken += 1
                else:
                    marks.add((chunk, number))
    return marks


def count_wanted(spec: Spec, kept: Mapping[int, int]) -> dict[int, int]:
    """Source → at most so many of its rows, for those that say so."""
    counted = {n: min(kept.get(n, 0), s.count or kept.get(n, 0)) for n, s in enumerate(spec.sources)}
    own = sum(count for n, count in counted.items() if not spec.sources[n].mix_ratio)
    wanted: dict[int, int] = {}
    for number, source in enumerate(spec.sources):
        if source.mix_ratio:
            wanted[number] = min(counted[number], round(source.mix_ratio * own))
        elif source.count:
            wanted[number] = counted[number]
    return wanted
