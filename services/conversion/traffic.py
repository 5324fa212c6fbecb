"""Recorded traffic becomes rows in AgentFabric's form: conversations in which a tool was called, answered, and told of.

AgentFabric asks the model once for each step, each time with all that was said before. So most records are the beginning of
a later one: only the last is a row. The first one is needed to tell where the question ends, since RolePlay writes what the
model has said right behind it. So the files are read twice, what each record holds is kept on disk, and at last what another
record goes on with is left out. In memory there are hashes only.
"""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from services.common.errors import InvalidData
from services.common.fabric import language_of, render_prefix, render_system, render_transcript
from services.conversion.readers import agentfabric, openai_tools
from services.conversion.refusals import REASONS as REFUSALS
from services.conversion.refusals import Refused
from services.conversion.rows import Conversation

CUT_OFF = "CUT_OFF"
NOT_CHAT = "NOT_CHAT"
NO_CALL = "NO_CALL"
NO_RESULT = "NO_RESULT"
TOOL_FAILED = "TOOL_FAILED"
CONTINUED = "CONTINUED"
DUPLICATE = "DUPLICATE"
REASONS: Mapping[str, str] = {
    CONTINUED: "a step of a conversation that another record has more of",
    DUPLICATE: "the same conversation once more",
    NO_CALL: "no tool was called",
    NO_RESULT: "the last call got no result, or its result no answer",
    TOOL_FAILED: "the tool's result is an error",
    CUT_OFF: "the answer did not end by itself",
    NOT_CHAT: "a plain completion, or nothing that was said",
    **{code: f"expected {reason.expected}" for code, reason in REFUSALS.items()},
}
"""Why a record is no row; beside these the codes of conversion's refusals."""

FAILED = ("Tool api ", " failed to call. Args: ")
"""How RolePlay tells the model that a tool raised. Source: modelscope-agent 0.7.1, agent.py, _call_tool."""
ENDS = frozenset({"stop", "tool_calls"})
RESULT = "\nObservation: <result>"
"""How RolePlay goes on after what the model has said (fabric.render_result)."""


class LeftOut(NamedTuple):
    """A record that is no row."""

    id: str
    time: str
    reason: str = ""
    detail: str = ""


class Selection(NamedTuple):
    """What came of the records."""

    records: int
    rows: int
    left_out: Mapping[str, int]
    """Reason → how many, the most frequent first."""


def write_rows(files: Sequence[Path], since: datetime | None, rows: Path, left_out: Path) -> Selection:
    """Read records (.jsonl.gz), and write rows and what was left out as JSON lines. Raises InvalidData: a broken file."""
    questions = find_questions(read_records(files, since))
    continued, seen = set[bytes](), set[bytes]()
    total = written = 0
    with tempfile.TemporaryFile() as spilled, left_out.open("wb") as refused, rows.open("wb") as kept:
        refusals = _Refusals(refused)
        for total, record in enumerate(read_records(files, since), 1):  # noqa: B007 - it is counted here
            told = LeftOut(str(record.get("id", "")), str(record.get("time", "")))
            try:
                row, marks = _understand(record, questions)
            except _Unanswered as error:
                # The first step of every conversation is one: whether there was more of it is known at the end.
                _write(spilled, [told.id, told.time, NO_RESULT, error.detail, error.mark.hex(), None])
            except Refused as error:
                refusals.add(told._replace(reason=error.code, detail=error.detail))
            else:
                continued.update(marks[:-1])
                _write(spilled, [told.id, told.time, "", "", marks[-1].hex(), row])
        spilled.seek(0)
        for number, time, reason, detail, digest, row in map(orjson.loads, spilled):
            mark = bytes.fromhex(digest)
            told = LeftOut(
                number, time, CONTINUED if mark in continued else reason or DUPLICATE * (mark in seen), detail
            )
            if told.reason:
                refusals.add(told)
                continue
            seen.add(mark)
            written += 1
            _write(kept, row)
    return Selection(total, written, dict(refusals.counts.most_common()))


def read_records(files: Iterable[Path], since: datetime | None = None) -> Iterator[dict[str, Any]]:
    """The records of files, since a time. Raises InvalidData."""
    begin = since.isoformat() if since else ""
    for file in files:
        try:
            with gzip.open(file) as lines:
                for number, line in enumerate(lines, 1):
                    record = orjson.loads(line)
                    if not isinstance(record, dict):
                        raise InvalidData(f"{file} line {number} is no record")
                    if str(record.get("time", "")) >= begin:
                        yield record
        except (OSError, EOFError, zlib.error, orjson.JSONDecodeError) as error:
            raise InvalidData(f"{file} is no file of records: {error}") from None


def find_questions(records: Iterable[Mapping[str, Any]]) -> dict[bytes, int]:
    """Where questions end: (hash of the talk up to a question and what was first answered → characters of the question)."""
    found: dict[bytes, int] = {}
    for record in records:
        messages, said = _messages(record), (record.get("answer") or {}).get("content")
        asked = _last_text(messages)
        if asked and isinstance(said, str) and RESULT not in asked:
            found[_digest(messages[:-1], asked + said)] = len(asked)
    return found


def split_question(messages: list[Any], questions: Mapping[bytes, int]) -> tuple[list[Any], str]:
    """(the messages up to the bare question, what was done since), where the first step of this talk is known."""
    asked = _last_text(messages)
    at = asked.find(RESULT)
    length = questions.get(_digest(messages[:-1], asked[:at])) if at >= 0 else None
    if length is None:
        return messages, ""
    return [*messages[:-1], {**messages[-1], "content": asked[:length]}], asked[length:]


def read_conversation(record: Mapping[str, Any], questions: Mapping[bytes, int]) -> Conversation:
    """What a record holds: the request's messages and the answer. questions: see find_questions. Raises Refused."""
    request, answer = record.get("request") or {}, record.get("answer") or {}
    messages = request.get("messages")
    if not isinstance(messages, list) or not (answer.get("content") or answer.get("tool_calls")):
        raise Refused(NOT_CHAT, str(record.get("path", "")))
    if answer.get("finish_reason") not in ENDS:
        raise Refused(CUT_OFF, f"finish_reason {answer.get('finish_reason')!r}")
    said = {"role": "assistant", **{k: answer[k] for k in ("content", "tool_calls") if answer.get(k)}}
    if request.get("tools"):
        return openai_tools.read({"tools": request["tools"], "messages": [*messages, said]})
    messages, done = split_question(messages, questions)
    return agentfabric.read({"messages": [*messages, {**said, "content": done + (answer.get("content") or "")}]})


def check_conversation(conversation: Conversation) -> None:
    """Refuse one without a call, with one that got no good result, or whose last result got no answer."""
    calls = [call for each in conversation.rounds for call in each.turn.calls]
    if not calls:
        raise Refused(NO_CALL)
    for call in calls:
        if call.observation is None or not call.observation.strip():
            raise Refused(NO_RESULT, call.name)
        if call.observation.startswith(FAILED[0]) and FAILED[1] in call.observation:
            raise Refused(TOOL_FAILED, call.observation[:200])
    if not conversation.rounds[-1].turn.answer:
        raise Refused(NO_RESULT, f"{calls[-1].name}, then nothing was said")


def mark_steps(conversation: Conversation) -> list[bytes]:
    """A hash of the conversation up to each of its steps: question, call, result, answer. The last is of all of it."""
    rolling = hashlib.sha256()
    marks: list[bytes] = []

    def step(*parts: str) -> None:
        rolling.update(orjson.dumps(parts))
        marks.append(rolling.digest()[:16])

    step("system", conversation.system or conversation.instruction, str(conversation.tools))
    for each in conversation.rounds:
        step("question", each.query)
        for call in each.turn.calls:
            step("call", call.lead, call.name, call.arguments)
            if call.observation is not None:
                step("result", call.observation)
        if each.turn.answer:
            step("answer", each.turn.answer)
    return marks


def make_row(record: Mapping[str, Any], conversation: Conversation, mark: bytes) -> dict[str, Any]:
    """A row that the reader of the form `agentfabric` takes; OpenAI's tools are told as AgentFabric's prompt."""
    language = language_of(conversation.rounds[-1].query)
    system = conversation.system
    if system is None:
        system = render_system(conversation.tools, conversation.instruction, language)
    turns = [{"from": "system", "value": system}]
    for each in conversation.rounds:
        prefix = render_prefix(conversation.tools, language) if each.prefix is None else each.prefix
        turns.append({"from": "user", "value": prefix + each.query})
        turns.append({"from": "assistant", "value": render_transcript(each.turn)})
    told = {key: record[key] for key in ("time", "deployment", "revision") if record.get(key)}
    row = {"id": f"traffic-{mark.hex()[:12]}", "conversations": turns, "meta": told}
    agentfabric.read(row)  # what conversion would refuse later is refused here, by name
    return row


def _messages(record: Mapping[str, Any]) -> list[Any]:
    found = (record.get("request") or {}).get("messages")
    return found if isinstance(found, list) else []


def _last_text(messages: Sequence[Any]) -> str:
    """What the user said last, as text; "" where it is not the user's turn, or no text."""
    last = messages[-1] if messages else None
    text = last.get("content") if isinstance(last, dict) and last.get("role") == "user" else ""
    return text if isinstance(text, str) else ""


def _digest(before: Sequence[Any], text: str) -> bytes:
    return hashlib.sha256(orjson.dumps([before, text])).digest()[:16]


def _understand(record: Mapping[str, Any], questions: Mapping[bytes, int]) -> tuple[dict[str, Any], list[bytes]]:
    """(row, the marks of its steps). Raises Refused; _Unanswered when the conversation stops at a call."""
    conversation = read_conversation(record, questions)
    marks = mark_steps(conversation)
    try:
        check_conversation(conversation)
    except Refused as error:
        raise _Unanswered(error.detail, marks[-1]) if error.code == NO_RESULT else error from None
    return make_row(record, conversation, marks[-1]), marks


class _Unanswered(Exception):
    def __init__(self, detail: str, mark: bytes) -> None:
        super().__init__(detail)
        self.detail, self.mark = detail, mark


class _Refusals:
    """Writes what is left out, and counts it by reason."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.counts = file, Counter[str]()

    def add(self, told: LeftOut) -> None:
        """One more."""
        self.counts[told.reason] += 1
        _write(self._file, {key: value for key, value in told._asdict().items() if value})


def _write(file: IO[bytes], value: Any) -> None:
    file.write(orjson.dumps(value) + b"\n")
