"""What is asked and what comes back, and the held-out rows of a data set as questions.

A row whose turn goes on after a tool's result becomes several questions: each follows the answer to the one before, with the
result that the row has recorded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData, enumerated

_RESULT = re.compile(r"\nObservation: <result>(?P<observation>(?:(?!</result>).)*)</result>\nAnswer:", re.DOTALL)
_CALL = re.compile(r"Action: (.+)\nAction Input: (.+)")


@dataclass(frozen=True)
class Result:
    """What a question follows: a call, and what its tool returned."""

    question: str
    """Id of the question that the call answers."""
    said: str
    """The row's own answer to it; stands in where a model calls another tool or none, so that every row is asked on."""
    observation: str
    in_turn: bool = False
    """It returned in the assistant's own turn ("inline" layout); else in the user's, as OpenAI servers see it."""


@dataclass(frozen=True)
class Question:
    """One held-out prompt and what is expected of the answer."""

    id: str
    messages: Sequence[Mapping[str, str]]
    """AgentFabric's prompt, without what follows from earlier answers."""
    tools: Sequence[Mapping[str, Any]]
    """OpenAI function objects."""
    expected: Sequence[Mapping[str, Any]]
    """[{name, arguments}], or {name, possible} with allowed values; [] when the row calls nothing here."""
    after: Result | None = None
    reference: str = ""
    """What the row answers."""
    category: str = ""
    goes_on: bool = False
    """The row goes on after its call in the assistant's own turn ("inline" layout), so a call need not end that."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that is asked and expected: rows of two data sets may have one id, and never one digest."""
        result = [self.after.said, self.after.observation, self.after.in_turn] if self.after else None
        told = [self.messages, self.tools, self.expected, result, self.reference, self.goes_on]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @cached_property
    def row(self) -> str:
        """SHA-256 of the messages. A conversation in both layouts is asked the same twice, and what follows has the same
        messages, too: all of that is one row to an interval.
        """
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What came back. seconds: wall time of the request."""

    id: str
    text: str
    finish_reason: str
    completion_tokens: int
    seconds: float
    calls: Sequence[Mapping[str, str]] | None = None
    """[{name, arguments (text)}] as the server parsed them; None: it was not asked with `tools`."""
    stop_string: str = ""
    """The stop string of the request that cut it off; "" when it ended otherwise, and where the server does not say."""
    refused: str = ""
    """What the server said when it refused this question alone, such as a prompt that is too long; the text is "" then."""
    question: str = ""
    """Digest of the question; "" in reports of earlier versions."""


def read_questions(dataset: Path, split: str, limit: int, follow_up: bool = False) -> list[Question]:
    """The rows of a split whose last turn is to be scored, and with follow_up what comes after their tools' results.

    limit: of rows; 0 takes all. Raises InvalidData naming the rows that cannot be used.
    """
    tools = read_lines(dataset / "tools.jsonl")
    known = {row["id"]: row for row in tools}
    rows = read_lines(dataset / f"{split}.jsonl")
    # Rows of other splits may share an id among themselves: they are not asked.
    repeated = set(_repeated([row["id"] for row in tools])) & {row["id"] for row in rows}
    _refuse_repeated(sorted(repeated), "tools.jsonl")
    questions: list[Question] = []
    taken = 0
    for place, row in enumerate(rows):
        beside = known.get(row["id"])
        if beside is None:
            raise InvalidData(f"{split}.jsonl has a row {row['id']!r} that tools.jsonl has not")
        if "expected" not in beside or (limit and taken >= limit):
            continue
        taken += 1
        said = _said(row)
        first = Question(
            row["id"], _prompt(row), beside["tools"], beside["expected"], reference=said[0], goes_on=len(said) > 1
        )
        questions.append(first)
        if follow_up and first.expected:
            questions += _follow(first, row, (rows[i] for i in range(place + 1, len(rows))))
    if not questions:
        raise InvalidData(
            f"the split {split!r} has no rows to score; convert with a larger split.{split}, or choose another one"
        )
    return questions


def check_ids(questions: Iterable[Question]) -> None:
    """Raise InvalidData naming the ids that several questions have: answers are known by their question's id alone."""
    _refuse_repeated(_repeated([q.id for q in questions]), "what is asked")


def chains_of(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions with those that follow each behind it."""
    chains: list[list[Question]] = []
    for question in questions:
        if question.after is None:
            chains.append([question])
        else:
            chains[-1].append(question)
    return chains


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises InvalidData."""
    try:
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise InvalidData(
            f"there is no {file.name} in {file.parent}; is this a folder that `fabrictune convert` or `evaluate` wrote?"
        ) from None
    except NotADirectoryError:
        raise InvalidData(f"{file.parent} is a file; give the folder that has {file.name} in it") from None
    except OSError as error:
        raise InvalidData(f"{file} cannot be read: {error.strerror}; make it a file that may be read") from None
    except ValueError as error:
        raise InvalidData(f"{file.name} has a line that is not JSON: {error}") from None
    if odd := next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), 0):
        raise InvalidData(f"{file.name}: row {odd} is no JSON object; is this a file that fabrictune wrote?")
    return rows


def _repeated(ids: Iterable[str]) -> list[str]:
    return [row_id for row_id, rows in Counter(ids).items() if rows > 1]


def _refuse_repeated(ids: Sequence[str], where: str) -> None:
    if ids:
        raise InvalidData(
            f"{where} has ids that several rows share ({len(ids)}): {enumerated([repr(row_id) for row_id in ids])}. "
            "Give each row an id of its own; `fabrictune convert` does"
        )


def _prompt(row: Mapping[str, Any]) -> list[dict[str, str]]:
    turns = row["messages"]
    last = max(i for i, m in enumerate(turns) if m["role"] != "assistant")
    return [{"role": m["role"], "content": m["content"]} for m in turns[: last + 1]]


def _said(row: Mapping[str, Any]) -> list[str]:
    """The pieces of the assistant's last turn."""
    return [str(m["content"]) for m in row["messages"][len(_prompt(row)) :]]


def _follow(first: Question, row: Mapping[str, Any], later: Iterable[Mapping[str, Any]]) -> Iterator[Question]:
    """What is asked after each result of a row's turn, in its own layout."""
    pieces = _said(row)
    in_turn = len(pieces) > 1
    steps = _inline_steps(pieces) if in_turn else _split_steps(first, pieces[0], later)
    before = first.id
    for number, (said, observation, reference) in enumerate(steps, 1):
        expected = _read_calls(reference)
        result = Result(before, said, observation, in_turn)
        before = f"{first.id}#{number}"
        yield Question(before, first.messages, first.tools, expected, result, reference)


def _inline_steps(pieces: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(call, result, what is said then) of a turn in pieces: call, result, call or answer, …"""
    for number in range(0, len(pieces) - 2, 2):
        match = _RESULT.fullmatch(pieces[number + 1])
        if match is None:
            return
        yield pieces[number], match["observation"], pieces[number + 2].removeprefix(" ")


def _split_steps(first: Question, said: str, later: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The same of rows that stand behind their question's, each with all that came before in the user's turn."""
    asked = first.messages[-1]["content"] + said
    for row in later:
        prompt = _prompt(row)
        if prompt[:-1] != list(first.messages[:-1]) or not prompt[-1]["content"].startswith(asked):
            return
        match = _RESULT.fullmatch(prompt[-1]["content"], len(asked))
        if match is None:
            return
        reference = _said(row)[0]
        yield said, match["observation"], reference
        said, asked = reference, prompt[-1]["content"] + reference


def _read_calls(text: str) -> list[dict[str, Any]]:
    """The first call of a row's own text."""
    found = _CALL.search(text)
    return [{"name": found[1], "arguments": json.loads(found[2])}] if found else []
