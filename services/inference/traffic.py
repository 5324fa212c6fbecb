"""Recorded traffic: what is kept of a request and its answer, where it lies, and how long.

A record is one JSON object: id, time, deployment, revision, path, request, answer, usage. Of a request only the fields
named here are kept: never headers, never a token, never who asked (`user`, `metadata`), no pictures.
Objects are traffic/{deployment}/{day}/{time}-{random}.jsonl.gz; a day's folder goes when it is older than the retention.
"""

from __future__ import annotations

import gzip
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import orjson

ROOT = "traffic/"
REQUEST_FIELDS = (
    "messages", "prompt", "tools", "tool_choice", "stop", "temperature", "top_p", "max_tokens", "max_completion_tokens",
)  # fmt: skip
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")


class Unreadable(ValueError):
    """A request or an answer that is no conversation; the message says why."""


class Unfinished(Unreadable):
    """A stream that broke off."""


class Sink(Protocol):
    """Where records go. services.common.store.Store is one."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write an object."""

    def list_keys(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """Keys below a prefix, in order."""

    def list_folders(self, prefix: str, start_after: str = "", limit: int = 1000) -> list[str]:
        """Names right below a prefix, in order."""

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is fine."""


class Folder:
    """A folder in a store's place, readable by its owner alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write a file. Raises OSError."""
        file = self._folder / key
        for folder in (self._folder, *reversed(list(self._own(file)))):
            folder.mkdir(parents=folder == self._folder, exist_ok=True, mode=0o700)
        draft = file.with_suffix(".part")
        draft.touch(mode=0o600)
        draft.write_bytes(data)
        draft.replace(file)

    def list_keys(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """Files below a folder, in order."""
        found = sorted(f.relative_to(self._folder).as_posix() for f in (self._folder / prefix).rglob("*.gz"))
        return (key for key in found if key > start_after)

    def list_folders(self, prefix: str, start_after: str = "", limit: int = 1000) -> list[str]:
        """Folders right below another."""
        there = self._folder / prefix
        names = sorted(f.name for f in there.iterdir() if f.is_dir()) if there.is_dir() else []
        return [name for name in names if name > start_after][:limit]

    def _own(self, file: Path) -> Iterator[Path]:
        """The folders between a file and the root, which `mkdir(parents=True)` would make for everyone to read."""
        for folder in file.parents:
            if folder == self._folder:
                return
            yield folder

    def delete(self, key: str) -> None:
        """Delete a file, and the folder of its day once that is empty."""
        file = self._folder / key
        file.unlink(missing_ok=True)
        if file.parent.is_dir() and not any(file.parent.iterdir()):
            file.parent.rmdir()


def read_request(raw: bytes) -> dict[str, Any]:
    """What is kept of a request's body. Raises Unreadable."""
    body = _load(raw, "the request")
    kept = {key: body[key] for key in REQUEST_FIELDS if body.get(key) is not None}
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_keep_message(message) for message in kept["messages"]]
    elif "prompt" not in kept:
        raise Unreadable("the request has neither messages nor a prompt")
    return kept


def read_answer(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the first choice: content, tool_calls, finish_reason; the usage) of a whole answer's body. Raises Unreadable."""
    body = _load(raw, "the answer")
    choice = _first(body)
    if choice is None:
        raise Unreadable("the answer has no choices")
    message = choice.get("message") or {}
    answer: dict[str, Any] = {"content": message.get("content") or choice.get("text") or ""}
    if message.get("tool_calls"):
        answer["tool_calls"] = message["tool_calls"]
    return answer | {"finish_reason": choice.get("finish_reason") or ""}, body.get("usage") or {}


def read_stream(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a stream of server-sent events. Raises Unreadable, also when it broke off."""
    said: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    usage: dict[str, Any] = {}
    reason = ""
    for line in raw.split(b"\n"):
        data = line.strip().removeprefix(b"data:").strip()
        if not data.startswith(b"{"):
            continue
        event = _load(data, "an event of the stream")
        usage = event.get("usage") or usage
        choice = _first(event)
        if choice is None:
            continue
        delta = choice.get("delta") or {}
        said.append(delta.get("content") or choice.get("text") or "")
        for piece in delta.get("tool_calls") or ():
            _join_call(calls.setdefault(int(piece.get("index") or 0), {}), piece)
        reason = choice.get("finish_reason") or reason
    if not reason:
        raise Unfinished("the stream broke off")
    answer: dict[str, Any] = {"content": "".join(said)}
    if calls:
        answer["tool_calls"] = [calls[index] for index in sorted(calls)]
    return answer | {"finish_reason": reason}, usage


def put_records(sink: Sink, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records, an object for each deployment. Raises what the sink raises."""
    by_deployment: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_deployment.setdefault(str(record["deployment"]), []).append(record)
    for deployment, own in by_deployment.items():
        now = datetime.now(UTC)
        key = f"{ROOT}{deployment}/{now:%Y-%m-%d}/{now:%H%M%S}-{secrets.token_hex(6)}.jsonl.gz"
        sink.put_bytes(key, gzip.compress(b"".join(orjson.dumps(r) + b"\n" for r in own), 6, mtime=0))


def list_records(sink: Sink, deployment: str, since: date | None = None, start_after: str = "") -> Iterator[str]:
    """Keys of a deployment's objects since a day, oldest first."""
    prefix = f"{ROOT}{deployment}/"
    # Keys sort by day, and within one by time. "~" is after every digit. (SeaweedFS 4.48 leaves out all of a folder when
    # `start_after` is its bare name, so the day before is named.)
    first = f"{prefix}{since - timedelta(days=1):%Y-%m-%d}/~" if since else ""
    return sink.list_keys(prefix, max(first, start_after))


def delete_expired(sink: Sink, days: int, today: date | None = None) -> int:
    """Delete what is older than so many days; returns how many objects."""
    oldest = f"{(today or datetime.now(UTC).date()) - timedelta(days=days):%Y-%m-%d}"
    deleted = 0
    for deployment in sink.list_folders(ROOT):
        for day in sink.list_folders(f"{ROOT}{deployment}/"):
            if day < oldest:
                deleted += _delete_all(sink, sink.list_keys(f"{ROOT}{deployment}/{day}/"))
    return deleted


def _delete_all(sink: Sink, keys: Iterable[str]) -> int:
    listed = list(keys)
    for key in listed:
        sink.delete(key)
    return len(listed)


def _load(raw: bytes, what: str) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"{what} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Unreadable(f"{what} is no JSON object")
    return body


def _first(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first choice: further ones (`n`) are not kept."""
    choices = [c for c in body.get("choices") or () if isinstance(c, dict) and not c.get("index")]
    return choices[0] if choices else None


def _keep_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Unreadable("a message that is no object")
    kept = {key: message[key] for key in MESSAGE_FIELDS if message.get(key) is not None}
    if isinstance(kept.get("content"), list):
        # Pictures and sound are not kept, only that there was one.
        kept["content"] = [
            part if isinstance(part, dict) and part.get("type") == "text" else {"type": "left_out"}
            for part in kept["content"]
        ]
    return kept


def _join_call(call: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """A piece of a streamed tool call: the id and name come once, the arguments bit by bit."""
    for key in ("id", "type"):
        if piece.get(key):
            call[key] = piece[key]
    function, more = call.setdefault("function", {"name": "", "arguments": ""}), piece.get("function") or {}
    function["name"] += more.get("name") or ""
    function["arguments"] += more.get("arguments") or ""
