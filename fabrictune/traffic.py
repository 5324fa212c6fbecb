"""What a gateway has recorded, brought here: files of records, for `fabrictune datasets from-traffic`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from fabrictune.errors import ApiError
from fabrictune.transfer import open_http

if TYPE_CHECKING:
    from fabrictune.client import Client

UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def parse_since(text: str, now: datetime | None = None) -> datetime | None:
    """A time: "36h", "7d", "2w" before now, or 2026-11-01[T12:00[+02:00]] (UTC unless it says). "" is None."""
    if not text:
        return None
    if match := re.fullmatch(r"(\d{1,5})([hdw])", text):
        return (now or datetime.now(UTC)) - int(match[1]) * UNITS[match[2]]
    try:
        told = datetime.fromisoformat(text)
    except ValueError:
        raise ApiError(
            f"--since {text!r} is no time: give 36h, 7d or 2w, or a date such as 2026-11-01", "INVALID_ARGUMENT"
        ) from None
    return (told if told.tzinfo else told.replace(tzinfo=UTC)).astimezone(UTC)


def fetch_records(client: Client, deployment: str, since: datetime | None, folder: Path) -> list[Path]:
    """Download the records of a deployment into a folder. Raises ApiError."""
    fetched: list[Path] = []
    with open_http(60) as http:
        for file in client.inference.export_traffic(deployment, since):
            target = folder / f"{len(fetched):06}.jsonl.gz"
            try:
                with http.stream("GET", file.address) as answer, target.open("wb") as out:
                    if answer.status_code == 404:  # deleted meanwhile: it was too old to be kept
                        target.unlink()
                        continue
                    if answer.status_code >= 300:
                        raise ApiError(f"the object store refused {file.key}: HTTP {answer.status_code}", "UNAVAILABLE")
                    for chunk in answer.iter_bytes():
                        out.write(chunk)
            except httpx.HTTPError as error:
                raise ApiError(f"the download of {file.key} broke off ({error}); run it again", "UNAVAILABLE") from None
            fetched.append(target)
    return fetched


def list_records(folder: Path) -> list[Path]:
    """The records that a gateway has written into a folder (FABRICTUNE_RECORD_FOLDER). Raises ApiError."""
    found = sorted(folder.rglob("*.jsonl.gz"))
    if not found:
        raise ApiError(f"{folder} has no records; they are files *.jsonl.gz below traffic/", "NOT_FOUND")
    return found
