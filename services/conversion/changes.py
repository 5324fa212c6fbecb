"""What changed between two texts, word by word, as spans that read in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

EQUAL, DELETED, INSERTED = "EQUAL", "DELETED", "INSERTED"
MOST_PIECES = 4000
"""More words than that are compared as lines, and more lines not at all: time is bounded, whatever the text."""
FINE_PIECES = 1000
CRUMB_WORDS, CRUMB_PART = 3, 4
"""Up to so many words between two changes are not told apart from them when they are less than this part as long."""
# Words, Chinese characters one by one, blanks, any other character by itself.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|\s+|[^\w\s]")
_LINES = re.compile(r"[^\n]*\n|[^\n]+")


class Span(NamedTuple):
    """A piece of text. kind: EQUAL is in both, DELETED in the one before, INSERTED in the one after."""

    kind: str
    text: str


def mark_changes(before: str, after: str) -> list[Span]:
    """The spans from one text to the other: EQUAL and DELETED ones are `before`, EQUAL and INSERTED ones `after`."""
    spans: list[Span] = []
    deleted = inserted = ""
    blocks = _compare(before, after)
    for number, (equal, old, new) in enumerate(blocks):
        around = [sum(map(len, blocks[at])) for at in (number - 1, number + 1) if 0 <= at < len(blocks)]
        if equal and len(around) == 2 and _is_crumb(equal, sum(around)):
            deleted, inserted = deleted + equal, inserted + equal
        elif equal:
            spans += [*_changed(deleted, inserted), Span(EQUAL, equal)]
            deleted = inserted = ""
        deleted, inserted = deleted + old, inserted + new
    return spans + _changed(deleted, inserted)


def cut_spans(spans: Sequence[Span], lengths: Sequence[int]) -> list[list[Span]]:
    """The spans of a text, shared out to its pieces, one or more. lengths: of each; what is DELETED goes where it stood."""
    pieces: list[list[Span]] = [[] for _ in lengths]
    at, room = 0, lengths[0]
    for kind, text in spans:
        if kind == DELETED:
            pieces[at].append(Span(kind, text))
            continue
        while text:
            while not room and at + 1 < len(lengths):
                at += 1
                room = lengths[at]
            part = text[:room] if at + 1 < len(lengths) else text
            pieces[at].append(Span(kind, part))
            text, room = text[len(part) :], room - len(part)
    return pieces


def _compare(before: str, after: str) -> list[tuple[str, str, str]]:
    """(in both, only before, only after), in turn: what is in both, and what differs."""
    for pattern in (_WORDS, _LINES):
        old, new = pattern.findall(before), pattern.findall(after)
        if max(len(old), len(new)) <= MOST_PIECES:
            break
    else:
        return [("", before, after)]
    # Without autojunk changes are found better, but in quadratic time.
    matcher = SequenceMatcher(None, old, new, autojunk=max(len(old), len(new)) > FINE_PIECES)
    found: list[tuple[str, str, str]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        same = kind == "equal"
        found.append(("".join(old[a:b]), "", "") if same else ("", "".join(old[a:b]), "".join(new[c:d])))
    return found


def _is_crumb(equal: str, changed: int) -> bool:
    """Whether what two changes have between them is a coincidence, and they read better as one."""
    if not any(character.isalnum() for character in equal):
        return True
    return len(equal.split()) <= CRUMB_WORDS and len(equal) * CRUMB_PART < changed


def _changed(deleted: str, inserted: str) -> list[Span]:
    return [Span(kind, text) for kind, text in ((DELETED, deleted), (INSERTED, inserted)) if text]
