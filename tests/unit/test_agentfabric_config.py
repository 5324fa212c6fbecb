"""AgentFabric's model_config.json is added to, never spoilt; and how long ago `--since` says."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fabrictune.cli.agentfabric import model_config, write_model_config
from fabrictune.connection import start_ticks
from fabrictune.errors import ApiError
from fabrictune.traffic import parse_since
from fabrictune.v1 import inference_pb2

DEPLOYMENT = inference_pb2.Deployment(address="http://127.0.0.1:8480/v1", served_model="weather")
ENTRY = {
    "type": "openai", "model": "weather", "api_base": "http://127.0.0.1:8480/v1", "is_chat": True,
    "is_function_call": False, "support_stream": True,
}  # fmt: skip


def test_the_entry_stands_beside_the_others_and_keeps_what_a_user_added(tmp_path: Path) -> None:
    file = tmp_path / "model_config.json"
    others = {"qwen-max": {"type": "dashscope"}, "weather": {"api_key": "k", "api_base": "http://old"}, "通义": {}}
    file.write_text(json.dumps(others, ensure_ascii=False), encoding="utf-8")
    file.chmod(0o640)
    assert write_model_config(file, model_config(DEPLOYMENT))
    written = file.read_text(encoding="utf-8")
    assert json.loads(written) == {**others, "weather": {"api_key": "k", **ENTRY}}
    assert list(json.loads(written)) == list(others) and "通义" in written
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    before = file.stat().st_mtime_ns
    assert not write_model_config(file, model_config(DEPLOYMENT))
    assert (file.read_text(encoding="utf-8"), file.stat().st_mtime_ns) == (written, before)


def test_while_connect_runs_the_address_is_that_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".fabrictune").mkdir()
    said = {"pid": os.getpid(), "started": start_ticks(os.getpid()), "gateway": "https://127.0.0.1:41234"}
    (tmp_path / ".fabrictune" / "connection.json").write_text(json.dumps(said))
    assert model_config(DEPLOYMENT)["weather"]["api_base"] == "https://127.0.0.1:41234/v1"


def test_a_file_that_is_not_there_is_made_and_a_link_stays_a_link(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "model_config.json")
    assert write_model_config(link, model_config(DEPLOYMENT))
    assert link.is_symlink() and json.loads(link.read_text()) == {"weather": ENTRY}


@pytest.mark.parametrize("text", ["{", "[]", '{"weather": 1}', "\ufeff\x00"])
def test_a_file_that_is_no_model_config_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    file = tmp_path / "model_config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ApiError, match=r"model_config\.json"):
        write_model_config(file, model_config(DEPLOYMENT))
    assert file.read_text(encoding="utf-8") == text
    assert [f.name for f in tmp_path.iterdir()] == ["model_config.json"]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="cannot be written"):
        write_model_config(tmp_path / "no/model_config.json", model_config(DEPLOYMENT))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("36h", "2026-11-22T12:00"), ("2w", "2026-11-10T00:00"), ("2026-11-01", "2026-11-01T00:00"),
        ("2026-11-01T02:00+02:00", "2026-11-01T00:00"), ("", ""),
    ],
)  # fmt: skip
def test_since_is_an_age_or_a_date_in_utc(text: str, told: str) -> None:
    found = parse_since(text, datetime(2026, 11, 24, tzinfo=UTC))
    assert (found.strftime("%Y-%m-%dT%H:%M") if found else "") == told


def test_a_since_that_is_no_time_is_refused() -> None:
    with pytest.raises(ApiError, match="36h, 7d or 2w"):
        parse_since("soon")
