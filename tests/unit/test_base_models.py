"""Base models that are taken, and those that are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.base_models import prepare
from services.common.errors import InvalidData, NotFound, Unavailable


def model(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = model(tmp_path / "mine", "config.json", "model.safetensors", "tokenizer.json")
    found, metadata = prepare(str(folder), tmp_path)
    assert found == folder
    assert metadata == {"description": "mine", "source": "folder mine"}


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    folder = model(tmp_path / "mine", "pytorch_model.bin")
    with pytest.raises(InvalidData) as refused:
        prepare(str(folder), tmp_path)
    for part in ("no config.json", "no *.safetensors", "never read (pytorch_model.bin)", "no tokenizer"):
        assert part in str(refused.value)


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    folder = model(tmp_path / "mine", "model.safetensors", "tokenizer.json")
    (folder / "config.json").write_text("{")
    with pytest.raises(InvalidData, match=r"config\.json is not JSON"):
        prepare(str(folder), tmp_path)


def test_something_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="smollm2-135m-instruct, nor a folder here, nor hf:ORG/NAME"):
        prepare("llama", tmp_path)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="Is this machine online"):
        prepare("hf:nobody/nothing", tmp_path)
