r"""Values as rows write them inside of their texts: JSON, or the repr of a Python value.

Most reprs hold neither " nor \, so each ' begins or ends a string, and the text is JSON once its quotes are exchanged: ten
times faster than `ast.literal_eval`, which reads all others, and the same value. Nesting is bounded by a number of its own:
the interpreter's limit depends on how deep the caller stands, and a row must not be refused by one process and read by another.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

import orjson

MAX_DEPTH = 100
"""Brackets within brackets; ast's own parser ends at 200."""
STOP = "Parameters:"
"""Begins another value wherever it stands outside of strings."""
_DECODER = json.JSONDecoder()
# Words that JSON has and Python has not: exchanging quotes must not make them values.
_JSON_WORDS = re.compile(r"true|false|null|NaN|Infinity")
# Strings without escapes, whole numbers that every reader keeps, and json.dumps' own blanks: nothing that JSON writes otherwise.
_PLAIN = r"""\{(?:QUOTE[^'"\\\x00-\x1f]*+QUOTE|, |: |[\[\]{}]|(?:-?[1-9][0-9]{0,14}|0)(?![0-9.eE]))*+"""
_PLAIN_REPR, _PLAIN_JSON = (re.compile(_PLAIN.replace("QUOTE", quote)) for quote in "'\"")
_STRING = r"""(?: "[^"\\]*+(?:\\.[^"\\]*+)*+" | '[^'\\]*+(?:\\.[^'\\]*+)*+' )"""
# A whole string, a bracket, or what ends a scan: a quote without its other half, a backslash, another "Parameters:".
_PART = re.compile(_STRING + r""" | ([\[{(]) | ([\]})]) | (["'\\]|Parameters:) """, re.DOTALL | re.VERBOSE)
# What a literal consists of: no names, calls or f-strings reach ast's parser, which takes quadratic time for some of them.
_LITERAL = re.compile(
    rf"""(?: u?{_STRING} | [\[\](){{}},:\s] | True\b | False\b | None\b
    | [-+]?[.0-9][0-9_]*+(?:\.[0-9_]*+)?(?:[eE][-+]?[0-9]++)? )*+""",
    re.DOTALL | re.VERBOSE,
)


def unify_line_ends(text: str) -> str:
    """The text with line feeds only."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode_literal(text: str) -> Any:
    """The value that a text is, JSON or Python's repr. Raises ValueError: neither, or deeper than MAX_DEPTH."""
    text = text.strip()
    if text.startswith(("[", "{", "(")) and _may_be_deep(text) and find_end(text, 0) != len(text):
        raise ValueError("brackets that do not close, or too many within each other")
    as_json = _exchange_quotes(text) if "'" in text and '"' not in text else text
    if as_json is not None:
        try:
            return _DECODER.decode(as_json)
        except (ValueError, RecursionError):
            pass
    return _evaluate(text)


def plain_object(text: str) -> str | None:
    """An object of plain values, JSON or repr, as the text that `json.dumps` makes of it; None: `decode_literal` is to read it.

    Most inputs of calls differ from their JSON in the quotes alone: what they hold need not be built and printed again.
    """
    if _PLAIN_REPR.fullmatch(text):
        as_json = text.replace("'", '"')
    elif _PLAIN_JSON.fullmatch(text):
        as_json = text
    else:
        return None
    if _may_be_deep(text):
        return None
    try:
        value = orjson.loads(as_json)
    except orjson.JSONDecodeError:
        return None
    # As many keys as there are: none is within another object, and none comes twice.
    return as_json if len(value) == as_json.count('": ') else None


def decode_prefix(text: str, start: int) -> tuple[Any, int] | None:
    """(value, its end) of the JSON or repr of a list or an object at a place in a text, None where there is none."""
    # A failed try of the decoder looks at all text before it, so it is made once a text: where no other place can follow.
    if text.find(STOP, start) < 0 and not _may_be_deep(text):
        try:
            return _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            pass
    end = find_end(text, start)
    if end < 0:
        return None
    try:
        return decode_literal(text[start:end]), end
    except ValueError:
        return None


def find_end(text: str, start: int) -> int:
    """Where the brackets that open at a place are all closed; -1 when they are not, or are deeper than MAX_DEPTH.

    Linear even when it is asked at every "Parameters:" of a text: one outside of a string ends the scan, so does a
    backslash; of the three states (outside, in ', in ") each is then held by one scan at most wherever one looks.
    """
    depth = 0
    for part in _PART.finditer(text, start):
        if part[1]:
            depth += 1
            if depth > MAX_DEPTH:
                return -1
        elif part[2]:
            depth -= 1
            if depth <= 0:
                return part.end() if depth == 0 else -1
        elif part[3] or not depth:
            return -1
    return -1


def _may_be_deep(text: str) -> bool:
    return len(text) > MAX_DEPTH and text.count("[") + text.count("{") + text.count("(") > MAX_DEPTH


def _exchange_quotes(text: str) -> str | None:
    """A repr without " as JSON, None where that could change its meaning."""
    if "\\" in text:
        return None
    if "True" not in text and "False" not in text and "None" not in text:
        return text.replace("'", '"') if _JSON_WORDS.search(text) is None else None
    parts = text.split("'")
    for number in range(0, len(parts), 2):  # those outside of strings
        if _JSON_WORDS.search(parts[number]):
            return None
        parts[number] = parts[number].replace("True", "true").replace("False", "false").replace("None", "null")
    return '"'.join(parts)


def _evaluate(text: str) -> Any:
    if not _LITERAL.fullmatch(text):
        raise ValueError("neither JSON nor a Python literal")
    try:
        with warnings.catch_warnings():
            # Python keeps an escape that it does not know, '\d', and says so; a row's text is no program of ours.
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        # TypeError: a list as a key. SyntaxError: also null bytes, and integers of more than 4,300 digits.
        raise ValueError(f"no Python literal: {error}") from None
