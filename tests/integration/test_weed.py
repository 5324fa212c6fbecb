"""The embedded object store: started once, found again, private, and clear about why it cannot start."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from services.common import weed
from services.common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.common.store import open_store
from services.common.weed import EmbeddedStore


def test_it_is_found_again_keeps_its_data_and_listens_on_loopback_only(tmp_path: Path) -> None:
    first = EmbeddedStore(tmp_path)
    try:
        config = first.start()
        open_store(config).put_json("a.json", {"n": 1})
        credentials = tmp_path / "credentials.json"
        assert credentials.stat().st_mode & 0o777 == 0o600
        pid = json.loads((tmp_path / "weed.json").read_text())["pid"]
        process = psutil.Process(pid)
        listening = [c.laddr for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        assert listening
        assert {address.ip for address in listening} == {"127.0.0.1"}
        secret = config.secret_key.get_secret_value()
        assert secret not in " ".join(process.cmdline())
        again = EmbeddedStore(tmp_path)  # another process after a kill -9 of the first
        assert again.start() == config
        assert json.loads((tmp_path / "weed.json").read_text())["pid"] == pid
    finally:
        assert first.stop()
    assert not psutil.pid_exists(pid)
    assert not first.stop()
    second = EmbeddedStore(tmp_path)
    try:
        assert open_store(second.start()).get_json("a.json") == {"n": 1}
    finally:
        second.stop()


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceExhausted, match="only 10 MB are free"):
        EmbeddedStore(tmp_path).start()


def test_keys_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "credentials.json").write_text("{")
    with pytest.raises(FailedPrecondition, match="restore or delete it"):
        EmbeddedStore(tmp_path).start()


def test_a_store_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FailedPrecondition, match="`make setup`"):
        EmbeddedStore(tmp_path).start()


def test_a_store_that_dies_at_once_says_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "weed").write_text("#!/bin/sh\necho the disk is on fire\nexit 3\n")
    (tmp_path / "weed").chmod(0o755)
    store = EmbeddedStore(tmp_path / "s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "python"))
        with pytest.raises(Unavailable, match="the disk is on fire"):
            store.start()


def test_a_store_that_does_not_start_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs is ended, and one that died is no zombie."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(weed, "START_SECONDS", 0.5)
    for name, last in (("hangs", "sleep 60"), ("dies", "sleep 0.2")):
        (tmp_path / "weed").write_text(f"#!/bin/sh\n{last}\n")
        (tmp_path / "weed").chmod(0o755)
        store = EmbeddedStore(tmp_path / name)
        with pytest.raises(Unavailable):
            store.start()
        assert not psutil.pid_exists(json.loads((tmp_path / name / "weed.json").read_text())["pid"])
