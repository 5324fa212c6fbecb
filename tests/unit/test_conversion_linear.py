"""Ten times the text takes about ten times as long, whatever it holds: no shape of a row may keep a worker busy.

Every shape here is one that some simple parser reads in quadratic time: each try fails, or succeeds, after all of the rest.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest

from services.conversion.literals import decode_literal
from services.conversion.react import MARKER, parse_system_prompt, parse_turn
from services.conversion.refusals import Refused
from services.conversion.rows import make_tool

SMALL, LARGE = 40_000, 400_000
MOST = 50
"""Times as long for ten times the text: 10 and what noise adds; a quadratic one takes 100."""
SHORTEST = 0.0005
"""Seconds; anything shorter is noise."""
TOOL = make_tool("t", "", {})
API = "{}. t{}: Call this tool to interact with the t{} API. What is the t{} API useful for? does. Parameters: []\n\n"

# Repeated in the description of the first API, whose parameters follow.
DESCRIPTIONS = {
    "numbered lines": "\n1. x",
    "numbers and periods": "\n1.1.1.1.1.",
    "digits and periods in one line": "1.",
    "blanks after a number": "{}\n1.{blanks}",
    "blanks at a line's beginning": "{}\n{blanks}",
    "blank lines": "\n \t",
    "heads out of sequence": "\n1. x: Call this tool",
    "calls in one line": "1. x: Call this tool ",
    "open lists": "Parameters: [",
    "open strings": 'Parameters: ["',
    "open strings in two kinds of quotes": "Parameters: [\" Parameters: ['",
    "escaped quotes": "Parameters: [\\'",
    "open objects": 'Parameters: {"a": ',
    "open objects of a repr": "Parameters: {'a': ",
    "whole lists": "Parameters: [] x",
    "whole lists in lines of their own": "Parameters: []\n",
    "whole lists and blanks": "Parameters: []      ",
    "blanks after the word": "{}Parameters:{blanks}",
    "backslashes": "\\",
    "questions": " API. What is the ",
    "markers": MARKER,
    "format blocks": "\nUse the following format:",
}
# Repeated as the parameters of the only API.
PARAMETERS = {
    "brackets": "[",
    "brackets and braces": '[{"a":',
    "tuples": "[(",
    "closing brackets": "]",
    "periods": "[].",
    "prose": "[]\nprose",
    "quotes": '["',
    "strings side by side": "['a' 'b'",
    "comments": "[#",
}
# A whole turn is one of these again and again.
TURNS = {
    "thoughts": "Thought: x\n",
    "calls": "Action: t\nAction Input: {'a': 1}\nObservation: x\n",
    "answers": "Final Answer: x\n",
    "blanks": "\n  \t ",
    "carriage returns": "\r\r\n",
    "words like keywords": "\nAction Inpu",
}
# (before, again and again, after) of an Action Input.
INPUTS = {
    "brackets": ("", "[", ""),
    "objects": ("", "{'a': ", ""),
    "numbers": ("[", "1,", "]"),
    "numbers and a mistake": ("[", "1,", "]x"),
    "strings in both quotes": ("[", "'a', \"b\", ", "]"),
    "escapes": ("['", "\\d", "']"),
    "escapes that end": ("['", "\\'", ""),
    "strings side by side": ("[", "'a\"'", "]"),
    "digits": ("{'a': 1", "1", "}"),
    "signs": ("[", "-", "1]"),
    "sums": ("[", "1+", "1]"),
    "calls": ("[1]", "()", ""),
    "names": ("[", "a.", "b]"),
    "f-strings": ("[f'", "{a}", "\"']"),
    "comprehensions": ("['\"'", " for a in b", "]"),
    "line ends": ("[", "\n", "]x"),
    "null bytes": ("['", "\0", "\"']"),
    "equal keys": ("{", "'a': 1, ", "}"),
}


def repeat(piece: str, size: int) -> str:
    if "{blanks}" in piece:
        return piece.format("", blanks=" " * size)
    return piece * (size // len(piece))


def in_description(piece: str, size: int) -> str:
    told = repeat(piece, size)
    return f'{MARKER}\n1. t: Call this tool. {told}. Parameters: [{{"name": "a"}}]\n\nUse the following format:'


def in_parameters(piece: str, size: int) -> str:
    return f"{MARKER}\n1. t: Call this tool. Parameters: {repeat(piece, size)}\n\nUse the following format:"


def check(act: Callable[[str], object], make: Callable[[int], str]) -> None:
    """Fail when LARGE takes more than MOST times as long as SMALL; each is made anew, since prompts are kept."""
    small, large = (min(_took(act, make(size + again)) for again in range(3)) for size in (SMALL, LARGE))
    assert large <= MOST * max(small, SHORTEST), f"{small:.4f} s, then {large:.4f} s"


def _took(act: Callable[[str], object], text: str) -> float:
    start = time.thread_time()
    with contextlib.suppress(Refused, ValueError):
        act(text)
    return time.thread_time() - start


@pytest.mark.parametrize("piece", DESCRIPTIONS.values(), ids=DESCRIPTIONS.keys())
def test_a_description_is_read_in_linear_time(piece: str) -> None:
    check(parse_system_prompt, lambda size: in_description(piece, size))


@pytest.mark.parametrize("piece", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_parameters_are_read_in_linear_time(piece: str) -> None:
    check(parse_system_prompt, lambda size: in_parameters(piece, size))


def test_many_apis_are_read_in_linear_time() -> None:
    def make(size: int) -> str:
        apis = "".join(API.format(n, n, n, n) for n in range(1, size // len(API) + 1))
        return f"{MARKER}\n{apis}Use the following format:"

    assert len(parse_system_prompt(make(LARGE))) == LARGE // len(API)
    check(parse_system_prompt, make)


@pytest.mark.parametrize("piece", TURNS.values(), ids=TURNS.keys())
def test_a_turn_is_read_in_linear_time(piece: str) -> None:
    check(lambda text: parse_turn(text, [TOOL]), lambda size: repeat(piece, size))


@pytest.mark.parametrize(("before", "again", "after"), INPUTS.values(), ids=INPUTS.keys())
def test_values_are_read_in_linear_time(before: str, again: str, after: str) -> None:
    check(decode_literal, lambda size: before + repeat(again, size) + after)
