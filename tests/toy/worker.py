"""The toy stage: writes `size` bytes, may sleep, fail, or die, as its spec says. Runs as a real worker process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from services.common.errors import InvalidData, Unavailable
from services.common.reporter import Progress, Reporter
from services.common.stage import Stage


class Spec(BaseModel):
    """Fields of fabrictune.v1.MergeSpec are reused: `engine` says what to do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: str = ""
    adapter: str = ""
    engine: str = Field("write", pattern="^(write|sleep|fail|again|die|die-once)$")


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Do what `engine` says."""
    reporter.log(f"toy: {spec.engine}")
    reporter.progress(Progress(unit="bytes", step=1, total_steps=2, phase="writing", loss=0.5))
    marker = Path(os.environ["FABRICTUNE_DATA_DIR"]) / "died-once"
    if spec.engine == "sleep":
        time.sleep(60)
    if spec.engine == "fail":
        raise InvalidData("row 7 cannot be used")
    if spec.engine == "again":
        raise Unavailable("the weather is bad")
    if spec.engine == "die" or (spec.engine == "die-once" and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (output / "weights.safetensors").write_bytes(b"toy" * 1000)
    return {"engine": spec.engine}


STAGE: Stage[Spec] = Stage(
    kind="toy",
    collection="mergeJobs",
    output_kind="model",
    output_collection="models",
    spec=Spec,
    inputs=lambda spec: {"base_model": spec.base_model} if spec.base_model else {},
    run=run,
)

if __name__ == "__main__":
    from services.common.worker import main

    main(STAGE)
