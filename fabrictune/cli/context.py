"""What every command shares: the global options, the connection, the ways to print, and how errors end the program."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fabrictune.errors import ApiError

if TYPE_CHECKING:
    from fabrictune.client import Client

EXIT_INTERRUPTED = 130
# google.rpc.Code → sysexits.h; the same table as the workers' (services.common.errors).
EXIT_CODES: Mapping[str, int] = {
    "INVALID_ARGUMENT": 64,
    "ALREADY_EXISTS": 64,
    "DATA_LOSS": 65,
    "NOT_FOUND": 66,
    "UNAVAILABLE": 75,
    "RESOURCE_EXHAUSTED": 75,
    "UNAUTHENTICATED": 77,
    "PERMISSION_DENIED": 77,
    "FAILED_PRECONDITION": 78,
    "DEADLINE_EXCEEDED": 78,
    "CANCELLED": 143,
}
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, emoji=False)
"""Wide where it is piped: `grep` and `awk` want a row on one line."""
errors = Console(stderr=True, emoji=False)


@dataclass(frozen=True)
class Settings:
    """The options before the command."""

    endpoint: str = ""
    ca_file: Path | None = None
    json: bool = False

    def connect(self) -> Client:
        """A client for the chosen server."""
        from fabrictune.client import Client

        return Client(self.endpoint, ca_file=self.ca_file)


def program() -> str:
    """How the user can call this command again: its path where it is not on PATH."""
    called = sys.argv[0]
    return "fabrictune" if shutil.which("fabrictune") or not called.endswith("fabrictune") else called


def settings() -> Settings:
    """The options of the command that runs now."""
    context = click.get_current_context(silent=True)
    found = context.find_object(Settings) if context else None
    return found or Settings()


def print_message(message: Message) -> None:
    """One protobuf message, as JSON or as YAML-like text."""
    plain = to_dict(message)
    if settings().json:
        print_json(plain)
    else:
        import yaml

        console.print(
            yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip(), highlight=False, soft_wrap=True
        )


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def print_json_line(value: Any) -> None:
    """One document of a stream: JSON in one line on stdout, at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], empty: str) -> None:
    """Rows as a table (columns: key → title), or as JSON; `empty` is said when there are none."""
    if settings().json:
        print_json([dict(r) for r in rows])
        return
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in columns.values():
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(row.get(key, ""))) for key in columns))
    console.print(table)


def to_dict(message: Message) -> dict[str, Any]:
    """A message as a dict in the API's own field names, of plain types all through (an Any would be an OrderedDict)."""
    plain: dict[str, Any] = json.loads(json_format.MessageToJson(message, preserving_proto_field_name=True))
    return plain


def exit_code(error: Exception) -> int | None:
    """The exit status for an error that we know; None for one that is a bug."""
    if isinstance(error, ApiError):
        return EXIT_CODES.get(error.code, 70)
    if isinstance(error, click.ClickException):
        return error.exit_code
    code = getattr(error, "exit_code", None)
    return int(code) if isinstance(code, int) else None


def report_error(error: Exception, as_json: bool) -> None:
    """Say what went wrong, once, on stderr."""
    if isinstance(error, click.ClickException) and not as_json:
        error.show()
        return
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    if as_json:
        reason = getattr(error, "reason", "") or type(error).__name__
        sys.stderr.write(json.dumps({"error": {"message": text, "reason": reason}}, ensure_ascii=False) + "\n")
    else:
        first, _, rest = text.partition("\n")
        errors.print("[bold red]error:[/] ", end="")
        errors.print(first, markup=False, highlight=False, soft_wrap=True)
        if rest:
            errors.print(rest, markup=False, highlight=False, soft_wrap=True)


def say(plain: object, text: str) -> None:
    """What has been done: `plain` as JSON when that is asked for, else a line of text."""
    if settings().json:
        print_json(plain)
    else:
        console.print(text, highlight=False)
