"""Which tools are of a kind, so that a question for one may fit another: by words of their names, or as people say.

Rules of names know no meaning (docs/adr/0003), so people name the tools that do the same: a spec's `equivalent_tools`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations, product

from services.common.fabric import Tool

Equivalents = frozenset[frozenset[str]]
"""Pairs of tools' names that can stand for each other."""
# Words of tools' names that tell nothing of what a tool is about.
# fmt: off
COMMON = frozenset({
    "a", "an", "and", "by", "calculate", "check", "convert", "create", "data", "details", "find", "for",
    "from", "generate", "get", "in", "info", "information", "list", "of", "search", "set", "the", "to",
})
# fmt: on


@lru_cache(maxsize=16384)
def telling_words(name: str) -> frozenset[str]:
    """Words of a tool's name that say what it is about, in lower case."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return frozenset(w for w in re.findall(r"[^\W\d_]+", spaced.lower()) if w not in COMMON)


def words_of(tools: Iterable[Tool]) -> frozenset[str]:
    """Telling words of all these tools' names."""
    return frozenset[str]().union(*(telling_words(t.name) for t in tools))


def pair_up(groups: Iterable[Sequence[str]]) -> Equivalents:
    """The pairs of groups of names."""
    return frozenset(frozenset(pair) for group in groups for pair in combinations(group, 2))


class Kin:
    """Tools, and all that is of a kind with one of them."""

    def __init__(self, tools: Sequence[Tool], equivalents: Equivalents = frozenset()) -> None:
        self._words, self._names, self._equivalents = words_of(tools), {t.name for t in tools}, equivalents

    def may_have(self, tool: Tool) -> bool:
        """Whether a tool has one's name, a telling word in common with one, or can stand for one."""
        return (
            tool.name in self._names
            or not telling_words(tool.name).isdisjoint(self._words)
            or any(frozenset((tool.name, name)) in self._equivalents for name in self._names)
        )


def fits_none(query_tools: Sequence[Tool], tools: Sequence[Tool], equivalents: Equivalents = frozenset()) -> bool:
    """Whether a question about `query_tools` surely fits none of `tools`."""
    kin = Kin(query_tools, equivalents)
    return not any(kin.may_have(tool) for tool in tools)


def related(query_tools: Sequence[Tool], tools: Sequence[Tool]) -> Iterator[tuple[str, str]]:
    """Names of (a question's tool, a listed one) that have a telling word in common."""
    for asked, listed in product((t.name for t in query_tools), (t.name for t in tools)):
        if telling_words(asked) & telling_words(listed):
            yield asked, listed


def nearly_fits(query_tools: Sequence[Tool], tools: Sequence[Tool], equivalents: Equivalents = frozenset()) -> bool:
    """Whether a question about `query_tools` is a near miss of `tools`: some have a telling word in common, and none may be
    the same.
    """
    if any(_may_be_same(a.name, b.name, equivalents) for a, b in product(query_tools, tools)):
        return False
    return any(True for _ in related(query_tools, tools))


def _may_be_same(asked: str, listed: str, equivalents: Equivalents) -> bool:
    """Whether nothing tells two tools apart: "get_distance" and "calculate_distance" have no other telling word."""
    words, others = telling_words(asked), telling_words(listed)
    alike = bool(words & others) and (words <= others or others <= words)
    return asked == listed or alike or frozenset((asked, listed)) in equivalents


def names_one(query: str, tools: Sequence[Tool]) -> bool:
    """Whether a question has all telling words of a tool's name, so that the tool may fit it: "the current weather at 13° N,
    80° E" and `get_current_weather`, though its row calls `get_weather_by_coordinates`.
    """
    text = query.lower()
    return any(words and all(word in text for word in words) for words in (telling_words(t.name) for t in tools))
