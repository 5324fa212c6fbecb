"""`fabrictune up` and `down`: everything on one machine; `fabrictune tokens`: API keys for servers beyond loopback."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fabrictune.cli.context import console, print_json, settings
from fabrictune.connection import is_alive, read_up_file
from fabrictune.errors import ApiError

START_SECONDS = 60.0
STOP_SECONDS = 180.0
DataDir = Annotated[Path, typer.Option(envvar="FABRICTUNE_DATA_DIR", help="Object store, cache, logs and journal.")]
tokens = typer.Typer(name="tokens", help="API keys for servers that listen beyond loopback.", no_args_is_help=True)


def up(
    data_dir: DataDir = Path(".fabrictune"),
    host: Annotated[
        str, typer.Option(envvar="FABRICTUNE_HOST", help="Beyond loopback it needs TLS files and tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="FABRICTUNE_PORT", help="gRPC; 0 takes a free one.")] = 8470,
    gateway_port: Annotated[
        int, typer.Option(envvar="FABRICTUNE_GATEWAY_PORT", help="OpenAI-compatible HTTP; 0 takes a free one.")
    ] = 8480,
    metrics_port: Annotated[
        int, typer.Option(envvar="FABRICTUNE_METRICS_PORT", help="Prometheus; 0 takes a free one.")
    ] = 8490,
    s3_endpoint: Annotated[
        str,
        typer.Option(
            envvar="FABRICTUNE_S3_ENDPOINT",
            help="Use this S3 instead of the embedded one; keys from FABRICTUNE_S3_ACCESS_KEY and _SECRET_KEY.",
        ),
    ] = "",
    record: Annotated[
        bool,
        typer.Option(
            "--record", envvar="FABRICTUNE_RECORD", help="Keep prompts and answers, redacted (docs/agentfabric.md)."
        ),
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run in the background; `fabrictune down` ends it.")
    ] = False,
) -> None:
    """Start all services and an object store on this machine. Ctrl-C ends them; jobs that ran go on next time."""
    flags = {
        "FABRICTUNE_DATA_DIR": str(data_dir),
        "FABRICTUNE_HOST": host,
        "FABRICTUNE_PORT": str(port),
        "FABRICTUNE_GATEWAY_PORT": str(gateway_port),
        "FABRICTUNE_METRICS_PORT": str(metrics_port),
        "FABRICTUNE_S3_ENDPOINT": s3_endpoint,
        "FABRICTUNE_RECORD": "true" if record else "",
    }
    os.environ.update({key: value for key, value in flags.items() if value})
    running = find_running(data_dir)
    if running:
        raise ApiError(
            f"`fabrictune up` runs already for {data_dir} (process {running['pid']}, {running['endpoint']}); "
            "`fabrictune down` ends it",
            "ALREADY_EXISTS",
        )
    if detach:
        _start_detached(data_dir)
        return
    from fabrictune import local

    local.serve(announce=not settings().json)


def down(data_dir: DataDir = Path(".fabrictune")) -> None:
    """End the `fabrictune up` of this folder and everything that it started."""
    running = find_running(data_dir)
    if running:
        os.kill(int(running["pid"]), signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while is_alive(running):
            if time.monotonic() > deadline:
                raise ApiError(f"process {running['pid']} does not end; see {data_dir}/up.log", "DEADLINE_EXCEEDED")
            time.sleep(0.1)
    from fabrictune import local

    left = local.end_leftovers(data_dir)
    text = f"stopped {running['endpoint']}" if running else "nothing was running"
    if settings().json:
        print_json({"stopped": bool(running), "leftovers": left})
    else:
        console.print(text + (f" and {left} process(es) that an earlier one had left" if left else ""), highlight=False)


@contextmanager
def ensure_up(data_dir: Path | None = None) -> Iterator[None]:
    """A running `fabrictune up` of this folder: the one that is there, or a new one in the background.

    One that was started here is ended again when the block is left by Ctrl-C or an error before it could be used.
    """
    folder = data_dir or Path(os.environ.get("FABRICTUNE_DATA_DIR", ".fabrictune"))
    if find_running(folder):
        yield
        return
    _start_detached(folder)
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nstopping what was started …")
        down(folder)
        raise


def find_running(data_dir: Path) -> dict[str, str]:
    """What the `fabrictune up` of a folder says of itself, if its process lives; else {}."""
    said = read_up_file(data_dir)
    return said if is_alive(said) else {}


@tokens.command("new")
def new_token(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    role: Annotated[str, typer.Option(help="viewer, operator or admin.")] = "operator",
    file: Annotated[Path, typer.Option(envvar="FABRICTUNE_TOKENS_FILE", help="Tokens file to add it to.")] = Path(
        "tokens.yaml"
    ),
) -> None:
    """Make an API key: printed once, kept only as a hash."""
    if role not in ("viewer", "operator", "admin"):
        raise ApiError(f"{role!r} is no role; there are viewer, operator, admin", "INVALID_ARGUMENT")
    import yaml

    entries = yaml.safe_load(file.read_text()) if file.exists() else []
    if not isinstance(entries, list):
        raise ApiError(f"{file} is no tokens file: it must hold a list", "INVALID_ARGUMENT")
    if any(e.get("name") == name for e in entries):
        raise ApiError(f"{file} has a key for {name!r} already; remove it first", "ALREADY_EXISTS")
    token = "ft_" + secrets.token_urlsafe(32)
    entries.append({"name": name, "role": role, "sha256": hashlib.sha256(token.encode()).hexdigest()})
    draft = file.with_suffix(".tmp")
    draft.touch(mode=0o600)
    draft.write_text(yaml.safe_dump(entries, sort_keys=False))
    draft.replace(file)
    if settings().json:
        print_json({"name": name, "role": role, "token": token})
    else:
        console.print(f"FABRICTUNE_TOKEN={token}", highlight=False, soft_wrap=True)


def _start_detached(data_dir: Path) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    (data_dir / "up.json").unlink(missing_ok=True)
    log = data_dir / "up.log"
    offset = log.stat().st_size if log.exists() else 0
    with log.open("ab") as out, console.status("starting the services and the object store …"):
        process = subprocess.Popen(
            [sys.executable, "-m", "fabrictune", "up"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, "FABRICTUNE_DATA_DIR": str(data_dir)},
        )
        deadline = time.monotonic() + START_SECONDS
        while not find_running(data_dir):
            if process.poll() is not None:
                raise ApiError(f"`fabrictune up` did not start: {_last_error(log, offset)}", "FAILED_PRECONDITION")
            if time.monotonic() > deadline:
                process.terminate()
                raise ApiError(
                    f"`fabrictune up` was not ready within {START_SECONDS:.0f} s; see {log}", "DEADLINE_EXCEEDED"
                )
            time.sleep(0.1)
    said = find_running(data_dir)
    if settings().json:
        print_json(said)
    else:
        console.print(f"fabrictune is up at {said['endpoint']} (process {said['pid']}, log {log})", highlight=False)


def _last_error(log: Path, offset: int) -> str:
    with log.open("rb") as written:
        written.seek(offset)
        lines = written.read().decode(errors="replace").strip().splitlines()
    marked = [i for i, line in enumerate(lines) if line.startswith("error:")]
    return "\n".join(lines[marked[-1] :]).removeprefix("error:").strip() if marked else "\n".join(lines[-5:])
