"""Which row goes where, in which order, with which other tools beside its own: all by seeded hashes of names and ids.

Tools are split, not rows: tools that stand in one prompt are tied together (union-find), and each group goes to train,
validation or test as a whole, so a held-out tool has never been seen in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TypeVar

from services.common.errors import InvalidData
from services.common.fabric import Tool
from services.conversion.kinship import Equivalents, Kin

T = TypeVar("T")
SPLITS = ("train", "validation", "test")


def seeded(seed: int, *parts: object) -> int:
    """A number of 64 bits from a seed and a name; the same on every machine and in every process."""
    text = "\x1f".join((str(seed), *map(str, parts)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def seeded_order(items: Iterable[T], seed: int, key: str) -> list[T]:
    """Items in an order of the seed's choosing. key: tells different orders apart; items are known by their repr."""
    return sorted(items, key=lambda item: seeded(seed, key, item))


class ToolGroups:
    """Tools that may not be separated. Union-find with path halving: near-linear."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def add(self, names: Iterable[str]) -> None:
        """These tools exist."""
        for name in names:
            self._parent.setdefault(name, name)

    def tie(self, names: Sequence[str]) -> None:
        """These tools stand in one prompt."""
        self.add(names)
        for name in names[1:]:
            first, other = self.root(names[0]), self.root(name)
            if first != other:
                self._parent[max(first, other)] = min(first, other)

    def root(self, name: str) -> str:
        """The group of a tool, named by one of its tools."""
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def pairs(self) -> list[tuple[str, str]]:
        """(tool, its group) of every tool; ties of these pairs make the same groups elsewhere."""
        return [(name, self.root(name)) for name in self._parent]

    def members(self) -> dict[str, int]:
        """Group → how many tools it has."""
        sizes: dict[str, int] = {}
        for name in self._parent:
            root = self.root(name)
            sizes[root] = sizes.get(root, 0) + 1
        return sizes


def assign_splits(
    groups: ToolGroups, fixed: Mapping[str, set[str]], validation: float, test: float, seed: int
) -> dict[str, str]:
    """Group → split. fixed: group → splits that sources have named for its rows. Raises InvalidData on two of them.

    Other groups are dealt in seeded order until test and validation have their parts of all tools; a group that is much
    larger than what is missing goes to train.
    """
    torn = sorted(root for root, splits in fixed.items() if len(splits) > 1)
    if torn:
        raise InvalidData(
            f"tools of {torn[0]!r} stand in rows for {' and '.join(sorted(fixed[torn[0]]))}: no tool may be in two splits"
        )
    assigned = {root: next(iter(splits)) for root, splits in fixed.items()}
    sizes = groups.members()
    free = [root for root in seeded_order(sorted(sizes), seed, "split") if root not in assigned]
    total = sum(sizes[root] for root in free)
    missing = {"test": test * total, "validation": validation * total}
    for root in free:
        room = next((s for s in ("test", "validation") if missing[s] >= max(1.0, sizes[root] / 2)), "train")
        assigned[root] = room
        if room in missing:
            missing[room] -= sizes[root]
    return assigned


def add_distractors(
    tools: Sequence[Tool],
    pool: Sequence[Tool],
    count: int,
    seed: int,
    row_id: str,
    equivalents: Equivalents = frozenset(),
) -> list[Tool]:
    """The row's tools and `count` others from the pool, in seeded order.

    A tool that is of a kind with one of the row's own is left out: it might fit the question as well.
    """
    own = Kin(tools, equivalents)
    names = {t.name for t in tools}
    chosen = list(tools)
    start, stride = seeded(seed, "distractor", row_id), _stride(len(pool))
    for step in range(len(pool)):
        if len(chosen) == len(tools) + count:
            break
        # A walk with a stride that has no factor in common with the pool's length visits every tool once.
        tool = pool[(start + step * stride) % len(pool)]
        if tool.name not in names and not own.may_have(tool):
            names.add(tool.name)
            chosen.append(tool)
    return sorted(chosen, key=lambda t: seeded(seed, "place", row_id, t.name)) if len(chosen) > 1 else chosen


def pick_one(options: Sequence[T], seed: int, *parts: object) -> T:
    """One of the options."""
    return options[seeded(seed, "one", *parts) % len(options)] if len(options) > 1 else options[0]


def pick_count(low: int, high: int, seed: int, *parts: object) -> int:
    """A number from low to high."""
    return low + seeded(seed, "count", *parts) % (high - low + 1)


@lru_cache(maxsize=16)
def _stride(length: int) -> int:
    return next(s for s in range(7919, 7919 + length + 2) if math.gcd(s, length) == 1)
