"""The engine swift: `swift export --merge_lora` as a child process, with the whole model in its memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from services.common.errors import FabrictuneError, FailedPrecondition, InvalidData, ResourceExhausted
from services.common.model_code import files_naming_code
from services.common.programs import MS_SWIFT, TORCH_PROGRAM

LAST_LINES = 15
# ms-swift cannot tell some models by their config.json, since several of its types share an architecture. A merge needs no
# template, so any will do.
MODEL_TYPES: Mapping[str, str] = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


def merge_with_swift(base: Path, adapter: Path, output: Path) -> None:
    """Write base + adapter into `output` with `swift export --merge_lora`, as a child that ends with this process's stage.

    Raises FailedPrecondition (ms-swift is not installed), ResourceExhausted (it was killed), FabrictuneError with its last words.
    """
    # Into a folder that is there already ms-swift 4.6 writes nothing, and ends well.
    merged = output / ".merged"
    argv = plan_swift(base, adapter, merged)
    environment = {
        **TORCH_PROGRAM,
        **MS_SWIFT,
        "PYTHONSAFEPATH": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="fabrictune-swift-") as work:
        environment["MODELSCOPE_CACHE"] = str(Path(work) / "cache")
        child = subprocess.Popen(
            argv, cwd=work, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        log.seek(0)
        said = log.read().decode(errors="replace").splitlines()
    if code == 0 and any(merged.glob("*.safetensors")):
        for file in merged.iterdir():
            shutil.move(file, output / file.name)
        merged.rmdir()
        return
    last = "\n".join(said[-LAST_LINES:])
    if "No module named" in last and "swift" in last:
        raise FailedPrecondition("ms-swift is not installed here: run `make setup`, or use the engine stream")
    if code < 0:
        raise ResourceExhausted(f"swift export was killed by signal {-code}; is there memory for the whole model?")
    raise FabrictuneError(f"swift export ended with {code}:\n{last}")


def plan_swift(base: Path, adapter: Path, output: Path) -> list[str]:
    """The command. output: not there yet. Raises InvalidData, FailedPrecondition (the model brings code)."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidData(f"config.json of the base model {base.name} cannot be read: {error}") from None
    if naming := files_naming_code(base):
        raise FailedPrecondition(
            f"the base model comes with Python code of its own (auto_map in {', '.join(naming)}), which swift export would run, "
            "whoever wrote it; use the engine stream, which runs none"
        )
    model_type = MODEL_TYPES.get((config.get("architectures") or [""])[0])
    return [
        *(sys.executable, "-m", "swift.cli.export"),
        *("--model", str(base.absolute()), "--adapters", str(adapter.absolute())),
        *("--merge_lora", "true", "--output_dir", str(output.absolute())),
        *("--load_args", "false"),
        *(("--model_type", model_type, "--template", "dummy") if model_type else ()),
    ]
