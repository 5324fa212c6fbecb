"""Calls in an answer as it comes: `Action: NAME`, `Action Input: {…}` and the text around them, piece by piece.

A call is told at once and whole, when its arguments' last bracket has come, so nobody ever sees half of one. Text is passed
on as soon as it cannot be the beginning of a call. Wherever an answer is cut into pieces, the same comes out. Knows nothing
of vLLM; `tool_parser` puts it there.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

ACTION = "Action:"
ACTION_INPUT = "Action Input:"
LONGEST_NAME = 256
"""Characters; a longer line after "Action:" is prose."""

_NAME = re.compile(r"Action:([^\n]*)\n[ \t]*")
# What may stand outside the strings of an object, in JSON or in Python's notation. "Action" is not among it, so a call that
# was broken off is noticed where the next one begins.
_BARE = re.compile(r"[\s{}\[\],:0-9+\-.eEtrufalsnTFNo]*")
_HALF = re.compile(r"[\ud800-\udfff]")
_IN_STRING = {'"': re.compile(r'[^"\\\n]*'), "'": re.compile(r"[^'\\\n]*")}


class FoundCall(NamedTuple):
    """A call that is whole."""

    name: str
    arguments: str
    """A JSON object."""


class CallReader:
    """Reads one answer. drop_unfinished: a call that the answer's end cuts off is left out; else it is text."""

    def __init__(self, drop_unfinished: bool = False) -> None:
        self._drop_unfinished = drop_unfinished
        self._held = ""
        """Text that may belong to a call."""
        self._arguments: _Arguments | None = None
        """How far the arguments of the call at the beginning of `_held` have been read."""
        self._before = ""
        """The blanks before that call: they go with it."""
        self._after_call = False

    def feed(self, text: str) -> list[str | FoundCall]:
        """The next piece of the answer → what it has settled, in order."""
        self._held += text
        return list(self._read())

    def finish(self) -> list[str | FoundCall]:
        """The answer has ended → what was still held."""
        found = list(self._read())
        rest, unfinished = self._before + self._held, self._held.startswith(ACTION)
        self._held = self._before = ""
        if not rest or (unfinished and self._drop_unfinished) or (self._after_call and not rest.strip()):
            return found
        return [*found, *self._text(rest)]

    def _read(self) -> Iterator[str | FoundCall]:
        while True:
            if not self._before and not self._held.startswith(ACTION):
                start = self._held.find(ACTION)
                end = start if start >= 0 else len(self._held) - _length_of_beginning(self._held)
                text, self._held = self._held[:end], self._held[end:]
                said = text.rstrip()
                yield from self._text(said)
                # Blanks before a call go with it, so they wait until it is known to be one.
                if start < 0:
                    self._held = text[len(said) :] + self._held
                    return
                self._before = text[len(said) :]
            found = self._read_call()
            if found is None:
                return
            if isinstance(found, FoundCall):
                yield found
                self._after_call = True
            else:
                yield from self._text(self._before + found)
            self._before, self._arguments = "", None

    def _read_call(self) -> FoundCall | str | None:
        """The call at the beginning of what is held; the text that is none after all; None: more must come."""
        if self._arguments is None:
            head = _read_head(self._held)
            if head is None:
                return None
            if head[1] < 0:
                return self._take(len(ACTION))
            self._arguments = _Arguments(*head)
        end = self._arguments.read(self._held)
        if end is None:
            return None
        arguments = decode_arguments(self._held[self._arguments.start : end]) if end > 0 else None
        if arguments is None:
            return self._take(len(ACTION))
        name = self._arguments.name
        self._take(end)
        return FoundCall(name, arguments)

    def _take(self, end: int) -> str:
        taken, self._held = self._held[:end], self._held[end:]
        return taken

    def _text(self, text: str) -> Iterator[str]:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            yield text


class _Arguments:
    """Looks for an object's last bracket, each character once."""

    def __init__(self, name: str, start: int) -> None:
        self.name, self.start, self._position = name, start, start
        self._depth = 0
        self._quote = ""

    def read(self, text: str) -> int | None:
        """Where the object ends; -1 when it is none; None: more must come."""
        while self._position < len(text):
            if self._quote:
                found = _IN_STRING[self._quote].match(text, self._position)
                self._position = found.end() if found else self._position
                if self._position == len(text):
                    return None
                character = text[self._position]
                if character == "\n":
                    return -1
                if character == "\\":
                    if self._position + 1 == len(text):
                        return None
                    self._position += 2
                    continue
                self._quote = ""
            else:
                character = text[self._position]
                if character in _IN_STRING:
                    self._quote = character
                elif not _BARE.fullmatch(character):
                    return -1
                self._depth += (character in "{[") - (character in "}]")
            self._position += 1
            if not self._depth and not self._quote:
                return self._position
        return None


def decode_arguments(text: str) -> str | None:
    """An object as strict JSON: the text itself where it is some, else what can be read as one; None: nothing can."""
    for read in _READERS:
        try:
            value: Any = read(text)
            if isinstance(value, dict) and all(isinstance(key, str) for key in value):
                return text if read is _read_strict else _dump(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def escape_halves(text: str) -> str:
    """JSON text whose halves of surrogate pairs are escaped, as models write them: raw ones are no UTF-8."""
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _dump(value: Any) -> str:
    return escape_halves(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _read_strict(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _read_control_characters(text: str) -> Any:
    """Xgrammar 0.2.8 lets a string with maxLength have them as they are, which JSON does not."""
    return json.loads(text, strict=False, parse_constant=_refuse)


_READERS = (_read_strict, _read_control_characters, ast.literal_eval)


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _read_head(text: str) -> tuple[str, int] | None:
    """(name, where the arguments begin), (…, -1) where it is no call; None: more must come."""
    found = _NAME.match(text)
    if found is None:
        return None if "\n" not in text and len(text) <= len(ACTION) + LONGEST_NAME else ("", -1)
    name, rest = found[1].strip(), text[found.end() :]
    if not name or len(name) > LONGEST_NAME:
        return "", -1
    if not rest.startswith(ACTION_INPUT):
        return None if ACTION_INPUT.startswith(rest) else ("", -1)
    given = rest[len(ACTION_INPUT) :].lstrip()
    if not given:
        return None
    return name, len(text) - len(given) if given[0] == "{" else -1


def _length_of_beginning(text: str) -> int:
    """How many of the last characters may be the beginning of "Action:"."""
    return next((n for n in range(min(len(ACTION) - 1, len(text)), 0, -1) if ACTION.startswith(text[-n:])), 0)
