"""The plan of a training run: spec + preset + paths + hardware → the argv and the environment of `swift sft`.

Pure: nothing is started or imported from ms-swift here, so a server can print a plan and a golden test can pin it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.common.programs import MS_SWIFT, TORCH_PROGRAM
from services.common.stage import Child
from services.training.presets import OWN, Preset, fit_accumulation, load_preset
from services.training.spec import DEFAULT_SEED, Spec

PLUGIN = Path(__file__).parent / "swift_plugin.py"
MEAN_PLUGIN = Path(__file__).parent / "swift_mean.py"
ATTENTION_PLUGIN = Path(__file__).parent / "swift_attention.py"
PLUGINS = (PLUGIN, MEAN_PLUGIN, ATTENTION_PLUGIN)


@dataclass(frozen=True)
class Hardware:
    """Where the processes run: the spec's GPUs and nodes, and this process's place among them."""

    gpus: int = 0
    """For each node; 0: CPU."""
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    threads: int = 1
    """CPU threads for each process."""
    bfloat16: bool = False
    """Whether the CPU multiplies bfloat16 itself; GPUs do."""

    @property
    def world_size(self) -> int:
        """Training processes over all nodes."""
        return max(self.gpus, 1) * self.nodes


@dataclass(frozen=True)
class Paths:
    """Folders of one run. The child's working directory is `work`, and datasets are named relative to it, since
    ms-swift gives ':' and '#' in a dataset's path a meaning.
    """

    model: Path
    work: Path
    checkpoint: Path | None = None
    """A checkpoint to go on from."""
    validation: bool = False
    """Whether work/validation.jsonl is there."""


@dataclass(frozen=True)
class Family:
    """How ms-swift names a model that it cannot tell by its config.json: several of its types share an architecture."""

    model_type: str
    template: str


@dataclass(frozen=True)
class Command:
    """A process to start: argv, and what is added to the environment."""

    argv: list[str]
    env: Mapping[str, str] = field(default_factory=dict)


_FAMILIES: tuple[tuple[str, str, Family], ...] = (
    # architecture, a mark in the chat template, what ms-swift 4.6 calls it; the first match counts
    ("LlamaForCausalLM", "<|im_start|>", Family("llama", "chatml")),
    ("LlamaForCausalLM", "Cutting Knowledge Date", Family("llama", "llama3_2")),
    ("LlamaForCausalLM", "<|start_header_id|>", Family("llama", "llama3")),
    ("LlamaForCausalLM", "[INST]", Family("llama", "llama")),
    ("Qwen2ForCausalLM", "created by Alibaba Cloud", Family("qwen2", "qwen2_5")),
    ("Qwen2ForCausalLM", "<|im_start|>", Family("qwen2", "chatml")),
    ("Qwen3ForCausalLM", "<|im_start|>", Family("qwen3", "qwen3")),
    ("QWenLMHeadModel", "", Family("qwen", "qwen")),
)


_DEFAULTS: Mapping[str, Any] = {
    # what ms-swift's own default would do otherwise
    "report_to": "none",  # TensorBoard files beside the checkpoints
    "dataloader_persistent_workers": False,  # draws from the random state at the first evaluation only: a resumed run
    # would see other dropout masks than one without a break
}


def plan_children(spec: Spec) -> list[Child]:
    """The commands of all nodes as they follow from a spec alone, for people: paths and addresses are stand-ins."""
    gpus, nodes = spec.resources.gpus, spec.resources.nodes
    address = "NODE_0" if nodes > 1 else "127.0.0.1"
    paths = Paths(Path("BASE_MODEL"), Path("WORK"), validation=True)
    commands = [
        plan_sft(spec, load_preset(spec.preset), paths, Hardware(gpus, nodes, rank, address)) for rank in range(nodes)
    ]
    return [Child(["python", *command.argv[1:]], command.env) for command in commands]


def infer_family(config: Mapping[str, Any], chat_template: str) -> Family | None:
    """What to tell ms-swift about a model by config.json and chat template; None: ms-swift knows, or nobody does."""
    architecture = (config.get("architectures") or [""])[0]
    for known, mark, family in _FAMILIES:
        if architecture == known and mark in chat_template:
            return family
    return None


def plan_sft(spec: Spec, preset: Preset, paths: Paths, hardware: Hardware, family: Family | None = None) -> Command:
    """The command that trains. Raises InvalidSpec when no gradient accumulation gives the effective batch."""
    arguments = plan_arguments(spec, preset, hardware)
    adjustment = {**preset.arguments, **spec.arguments}.get("logit_adjustment", 0)
    named = {
        "model": str(paths.model),
        **({"model_type": family.model_type, "template": family.template} if family else {}),
        "dataset": "train.jsonl",
        **_validation(arguments, paths),
        **arguments,
        "truncation_strategy": "delete",
        "strict": True,
        "lazy_tokenize": False,
        "seed": seed_of(spec),
        "data_seed": seed_of(spec),
        "output_dir": "run",
        "add_version": False,
        "check_model": False,  # it asks ModelScope's hub, and waits where there is none
        "save_only_model": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        **_plugins(spec, arguments, hardware),
        **({"resume_from_checkpoint": str(paths.checkpoint)} if paths.checkpoint else {}),
    }
    flags = [word for name, value in named.items() for word in (f"--{name}", *_words(value))]
    env = {**environment(paths, hardware), **({"FABRICTUNE_LOGIT_ADJUSTMENT": str(adjustment)} if adjustment else {})}
    return Command([sys.executable, *_launcher(hardware), *flags], env)


def plan_arguments(spec: Spec, preset: Preset, hardware: Hardware) -> dict[str, Any]:
    """The preset's arguments, overridden by the spec's, with the gradient accumulation that the batch needs."""
    arguments: dict[str, Any] = {**_DEFAULTS, **preset.arguments, **spec.arguments}
    batch = arguments.pop("effective_batch_size", preset.effective_batch_size)
    for key in OWN:
        arguments.pop(key, None)
    if batch is not None:
        per_device = int(arguments.get("per_device_train_batch_size", 1))
        arguments["gradient_accumulation_steps"] = fit_accumulation(int(batch), per_device, hardware.world_size)
    if arguments.get("torch_dtype") == "auto":
        arguments |= _fast_dtype(hardware)
    if arguments.get("torch_dtype") == "bfloat16" and not hardware.gpus:
        # transformers wants to be told that a CPU is meant; without it only the weights are bfloat16
        arguments = {"bf16": True, "use_cpu": True, **arguments}
    return arguments


def _fast_dtype(hardware: Hardware) -> dict[str, Any]:
    """bfloat16 where it is multiplied natively, else float32."""
    return {"torch_dtype": "bfloat16" if hardware.gpus or hardware.bfloat16 else "float32"}


def seed_of(spec: Spec) -> int:
    """The seed of weights and data order."""
    return DEFAULT_SEED if spec.seed is None else spec.seed


def environment(paths: Paths, hardware: Hardware) -> dict[str, str]:
    """What the child's environment needs: no hub, no telemetry, caches of its own, threads that fit the processes."""
    return {
        **TORCH_PROGRAM,
        **MS_SWIFT,
        "MODELSCOPE_CACHE": str(paths.work / "cache"),
        "HF_DATASETS_CACHE": str(paths.work / "cache" / "datasets"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(hardware.threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a file in the working directory must not shadow a module
        **({} if hardware.gpus else {"CUDA_VISIBLE_DEVICES": ""}),
    }


def _launcher(hardware: Hardware) -> list[str]:
    if hardware.world_size == 1:
        return ["-m", "swift.cli.sft"]
    return [
        *("-m", "torch.distributed.run", "--nproc_per_node", str(max(hardware.gpus, 1))),
        *("--nnodes", str(hardware.nodes), "--node_rank", str(hardware.node_rank)),
        *("--master_addr", hardware.master_addr, "--master_port", str(hardware.master_port)),
        *("-m", "swift.cli.sft"),
    ]


def attends_in_blocks(arguments: Mapping[str, Any], on_cpu: bool) -> bool:
    """Whether swift_attention.py takes the place of torch's attention."""
    return on_cpu and arguments.get("torch_dtype") == "bfloat16" and not arguments.get("attn_impl")


def _plugins(spec: Spec, arguments: Mapping[str, Any], hardware: Hardware) -> dict[str, list[str]]:
    # A checkpoint is told of by the plugin's callback, so the mean has to be in it by then.
    files, callbacks = [str(PLUGIN)], ["fabrictune", *_listed(arguments.get("callbacks"))]
    if spec.chosen_checkpoint == "mean":
        files, callbacks = [*files, str(MEAN_PLUGIN)], ["fabrictune_mean", *callbacks]
    if attends_in_blocks(arguments, on_cpu=not hardware.gpus):
        files = [*files, str(ATTENTION_PLUGIN)]
    return {"external_plugins": files, "callbacks": callbacks}


def _validation(arguments: Mapping[str, Any], paths: Paths) -> dict[str, Any]:
    if not paths.validation or arguments.get("eval_strategy") == "no":
        return {"eval_strategy": "no"}
    return {"val_dataset": "validation.jsonl", "eval_strategy": "steps"}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value, ensure_ascii=False)] if isinstance(value, dict) else [str(value)]
