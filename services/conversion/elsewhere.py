"""Questions of other rows that none of a prompt's tools fits: far ones, and near misses.

A near miss is about a tool of the same field ("the time difference between two cities" where only `get_local_time` is listed).
Far ones alone teach a small model to look for the field, not for the tool (docs/quickstart.md, "Near misses").
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from services.common.fabric import Tool
from services.conversion.kinship import Equivalents, fits_none, names_one, nearly_fits, words_of
from services.conversion.mixture import seeded

MOST_LOOKED_AT = 200
"""Questions, for one prompt."""

Question = tuple[str, tuple[Tool, ...]]
"""A question and the tools of its row."""
Suits = Callable[[Sequence[Tool], Sequence[Tool], Equivalents], bool]
"""Whether a question about some tools is one to ask where others are listed."""


class Elsewhere:
    """Questions that may be asked where their tool is not listed."""

    def __init__(self, asked: Sequence[Question], equivalents: Equivalents = frozenset()) -> None:
        self._asked, self._equivalents = asked, equivalents
        self._places: dict[str, list[int]] = defaultdict(list)
        for place, (_, tools) in enumerate(asked):
            for word in words_of(tools):
                self._places[word].append(place)
        self._rivals = [sum(len(self._places[word]) for word in words_of(tools)) for _, tools in asked]

    def far(self, tools: Sequence[Tool], start: int) -> Iterator[Question]:
        """Questions whose tools have nothing in common with these, from a place on."""
        count = len(self._asked)
        return self._asked_at(((start + step) % count for step in range(min(count, MOST_LOOKED_AT))), fits_none, tools)

    def near(self, tools: Sequence[Tool], start: int) -> Iterator[Question]:
        """Questions that one of these tools nearly fits, in an order that the start draws.

        A question that is related to many would stand in many prompts, and be learned by heart as one to refuse; so it is
        drawn the less, the more there are (weighted sampling with exponential keys, Efraimidis and Spirakis 2006).
        """
        places = self._from(start, words_of(tools))[:MOST_LOOKED_AT]
        places.sort(key=lambda place: -math.log((seeded(start, place) + 1) / 2**64) * self._rivals[place])
        return self._asked_at(places, nearly_fits, tools)

    def _asked_at(self, places: Iterable[int], suits: Suits, tools: Sequence[Tool]) -> Iterator[Question]:
        for place in places:
            query, others = self._asked[place]
            if suits(others, tools, self._equivalents) and not names_one(query, tools):
                yield query, others

    def _from(self, start: int, words: Iterable[str]) -> list[int]:
        """Places of questions about any of these words, the first one at or behind the start."""
        places = sorted({place for word in words for place in self._places.get(word, ())})
        first = bisect_left(places, start % len(self._asked)) if places else 0
        return places[first:] + places[:first]
