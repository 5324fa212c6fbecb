from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.common.errors import FailedPrecondition, InvalidData, InvalidSpec
from services.inference.engine import (
    Hardware,
    Model,
    choose_dtype,
    describe_model,
    engine_name,
    read_hardware,
    render_engine,
)
from services.inference.engines import ENGINES
from services.inference.failures import explain_failure
from services.inference.parity import EngineText, check, compare, cut_text, read_engine_text
from services.inference.reference import (
    PROMPTS_VERSION,
    ForcedText,
    Reference,
    reference_from_json,
    reference_to_json,
)
from services.inference.revisions import CanaryRun, Deployment, Revision, State, check_traffic, from_json, move, to_json
from services.inference.spec import Parity, parse_canary, parse_spec

LAPTOP = Hardware(gpus=0, cores=2, memory_bytes=24 * 1024**3, cpu_flags=frozenset({"avx2"}))
CONFIG = {"max_position_embeddings": 4096, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
TEXT = ForcedText(tokens=(5, 6, 7), top=(6, 9), second=(8, 7), margin=(2.0, 0.004), logprobs=(-0.1, -1.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 64}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Model:
    return describe_model("models/m", "d", folder)


def test_every_bad_field_is_named_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(
            {"model": "gpt", "max_model_len": 1, "engine_args": ["--host", "0.0.0.0"], "parity": {"min_agreement": 2}}
        )
    fields = [v.field for v in caught.value.violations]
    assert fields == ["spec.model", "spec.max_model_len", "spec.engine_args", "spec.parity.min_agreement"]


OTHERWISE = [
    ("vllm", "--max-model"),
    ("vllm", "--served_model_name"),
    ("swift", "--vllm_max_num"),
    ("swift", "--api_key=s"),
]


@pytest.mark.parametrize(("engine", "flag"), [*((e, f) for e in ENGINES for f in ENGINES[e].owned), *OTHERWISE])
def test_a_flag_that_fabrictune_sets_is_refused_however_it_is_written(engine: str, flag: str) -> None:
    with pytest.raises(InvalidSpec, match="is set by fabrictune"):
        parse_spec({"model": "models/m", "engine": engine, "engine_args": [flag, "x"]})


def test_other_engine_args_pass_through_last_so_that_they_win(model: Model) -> None:
    work = render_engine(
        "x", "r", parse_spec({"model": "models/m", "engine_args": ["--no-enforce-eager"]}), model, LAPTOP
    )
    assert work.argv[-1] == "--no-enforce-eager" and "--enforce-eager" in work.argv


def test_a_cpu_engine_is_eager_float32_offline_and_on_loopback(model: Model) -> None:
    work = render_engine("x", "r", parse_spec({"model": "models/m", "dtype": ""}), model, LAPTOP)
    argv = " ".join(work.argv)
    for part in ("--enforce-eager", "--dtype float32", "--host 127.0.0.1", "--port {port}", "--max-model-len 4096"):
        assert part in argv
    assert work.env["VLLM_CPU_KVCACHE_SPACE"] == "1" and work.env["HF_HUB_OFFLINE"] == "1"
    assert work.env["GOMP_SPINCOUNT"] == "4000", "two engines share the cores while one takes over"
    assert work.env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert int(work.argv[work.argv.index("--block-size") + 1]) % 32 == 0
    assert "--trust-remote-code" not in argv and (work.port, work.health_path) == (8000, "/v1/models")


def test_a_gpu_engine_is_compiled_bfloat16_over_all_its_gpus(model: Model) -> None:
    spec = parse_spec({"model": "models/m", "resources": {"gpus": 2}})
    work = render_engine("x", "r", spec, model, replace(LAPTOP, gpus=2))
    argv = " ".join(work.argv)
    assert "--enforce-eager" not in argv and "--dtype bfloat16 " in argv and "--tensor-parallel-size 2" in argv
    assert work.gpus == 2 and "VLLM_CPU_KVCACHE_SPACE" not in work.env


VLLM = """
-m vllm.entrypoints.openai.api_server --model MODEL --served-model-name x --host 127.0.0.1 --port {port} --dtype float32
--max-model-len 4096 --max-num-seqs 16 --shutdown-timeout 25 --uvicorn-log-level warning --enable-auto-tool-choice
--tool-parser-plugin services.inference.tool_parser --tool-call-parser agentfabric --enforce-eager --block-size 32 --seed 1
"""
SWIFT = """
-m swift.cli.deploy --model MODEL --model_type llama --served_model_name x --host 127.0.0.1 --port {port} --torch_dtype float32
--vllm_max_model_len 4096 --vllm_max_num_seqs 16 --infer_backend vllm --template dummy --template_backend jinja
--load_args false --verbose false --log_interval -1 --log_level warning --vllm_enforce_eager true
--vllm_engine_kwargs {"block_size":32} --seed 1
"""


@pytest.mark.parametrize(("engine", "golden"), [("", VLLM), ("vllm", VLLM), ("swift", SWIFT)])
def test_each_engine_is_a_table_of_arguments(model: Model, engine: str, golden: str) -> None:
    llama = replace(model, config={**model.config, "architectures": ["LlamaForCausalLM"]})
    spec = parse_spec({"model": "models/m", "engine": engine, "engine_args": ["--seed", "1"]})
    work = render_engine("x", "r", spec, llama, LAPTOP, shutdown=25.0)
    assert [a.replace(str(model.folder), "MODEL") for a in work.argv[1:]] == golden.split()
    assert ("USE_HF" in work.env) == (engine == "swift")


def test_swift_deploy_loads_no_adapters_and_says_so() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec({"model": "models/m", "engine": "swift", "adapters": ["adapters/a"]})
    assert [v.field for v in caught.value.violations] == ["spec.adapters"]


def test_swift_deploy_gets_no_model_that_brings_code(model: Model, folder: Path) -> None:
    (folder / "modeling_m.py").write_text("")
    with pytest.raises(InvalidSpec, match="runs code that a model brings"):
        render_engine("x", "r", parse_spec({"model": "models/m", "engine": "swift"}), model, LAPTOP)


def test_auto_is_bfloat16_only_where_the_cpu_multiplies_it() -> None:
    assert choose_dtype("auto", LAPTOP) == "float32"
    assert choose_dtype("auto", replace(LAPTOP, cpu_flags=frozenset({"amx_bf16"}))) == "bfloat16"
    assert choose_dtype("float16", LAPTOP) == "float16"


def test_more_positions_than_the_model_has_are_refused(model: Model) -> None:
    with pytest.raises(InvalidSpec, match=r"spec\.max_model_len: 9000 is more than the 4096") as caught:
        render_engine("x", "r", parse_spec({"model": "models/m", "max_model_len": 9000}), model, LAPTOP)
    assert caught.value.violations


def test_a_folder_without_safetensors_is_no_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidData, match=r"no \*\.safetensors"):
        describe_model("models/m", "d", folder)


def test_an_engine_in_a_pod_of_its_own_fetches_its_model_and_is_reached_from_outside_the_pod(model: Model) -> None:
    remote = replace(model, folder=Path("/models/model"), remote=True)
    work = render_engine("x", "r", parse_spec({"model": "models/m"}), remote, LAPTOP)
    assert "--model /models/model" in " ".join(work.argv) and "--host 0.0.0.0" in " ".join(work.argv)
    assert (work.env["FABRICTUNE_MODEL"], work.env["FABRICTUNE_MODEL_DIGEST"]) == ("models/m", "d")
    assert work.env["FABRICTUNE_REFERENCE_DTYPE"] == "float32" and work.env["FABRICTUNE_TRUST_REMOTE_CODE"] == "false"


def test_a_pod_is_told_whose_adapters_its_engine_is_to_have_where_there_is_room_for_any(model: Model) -> None:
    remote = replace(model, folder=Path("/models/model"), remote=True)
    told = {"model": "models/m", "lora": {"max_adapters": 2}}
    assert render_engine("x", "r", parse_spec(told), remote, LAPTOP).env["FABRICTUNE_ADAPTERS_OF"] == "x/r"
    assert "FABRICTUNE_ADAPTERS_OF" not in render_engine("x", "r", parse_spec(told), model, LAPTOP).env
    assert (
        "FABRICTUNE_ADAPTERS_OF" not in render_engine("x", "r", parse_spec({"model": "models/m"}), remote, LAPTOP).env
    )


def test_the_hardware_of_other_nodes_is_told_as_json_and_nonsense_is_refused_by_name() -> None:
    told = read_hardware('{"gpus": 1, "cores": 4, "memory_bytes": 8589934592, "cpu_flags": ["amx_bf16"]}')
    assert told == Hardware(1, 4, 8 * 2**30, frozenset({"amx_bf16"}))
    with pytest.raises(InvalidSpec, match="FABRICTUNE_ENGINE_HARDWARE"):
        read_hardware('{"gpus": 1}')


def test_engine_names_fit_kubernetes_and_never_meet() -> None:
    long = "a" * 40
    assert len(engine_name(long, long)) <= 63
    assert engine_name("a-b", "c") != engine_name("a", "b-c")


def test_a_known_failure_of_vllm_says_what_to_change() -> None:
    assert "spec.max_concurrency" in explain_failure("torch.OutOfMemoryError: CUDA out of memory. Tried")
    taken = (
        "ValueError: Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory utilization "
        "(0.9, 71.3 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
    )
    assert "--gpu-memory-utilization" in explain_failure(taken) and "stop the other revision" in explain_failure(taken)
    code = "Please pass the argument `trust_remote_code=True` to allow custom code to be run."
    assert "--trust-remote-code" in explain_failure(code)
    started = "INFO Initializing a V1 LLM engine with config: model='/m', trust_remote_code=False, dtype=torch.bfloat16"
    assert explain_failure(started) == ""


def test_what_bfloat16_cannot_tell_apart_is_a_tie_and_what_it_can_is_not() -> None:
    near, far = replace(TEXT, margin=(2.0, 0.2)), replace(TEXT, margin=(2.0, 0.3))
    found = [EngineText(top=(6, 7), logprobs=(-0.1, -1.0))]
    assert compare([near], found, "float32", "bfloat16", Parity()).agreement == 1
    assert compare([far], found, "float32", "bfloat16", Parity()).agreement == 0.5
    assert compare([near], found, "float32", "float32", Parity()).agreement == 0.5


def test_agreement_counts_positions_and_lets_a_near_tie_pass() -> None:
    result = compare([TEXT], [EngineText(top=(6, 7), logprobs=(-0.1, -1.01))], "float32", "float32", Parity())
    assert (result.positions, result.agreement) == (2, 1.0)
    assert result.mean_logprob_difference == pytest.approx(0.005)
    check(result, Parity())


def test_an_engine_that_is_too_far_is_refused_with_both_numbers() -> None:
    result = compare([TEXT], [EngineText(top=(1, 9), logprobs=(-3.1, -1.0))], "float32", "bfloat16", Parity())
    assert result.tolerance == 0.1
    with pytest.raises(FailedPrecondition, match=r"50\.00%.*1\.5000 nats") as caught:
        check(result, Parity())
    assert caught.value.reason_override == "PARITY_FAILED"


def test_an_engine_that_computes_nan_is_refused() -> None:
    read = read_engine_text((5, 6), [None, {"6": {"logprob": math.nan, "rank": 1}}])
    result = compare([cut_text(TEXT, 2)], [read], "float32", "float32", Parity())
    with pytest.raises(FailedPrecondition):
        check(result, Parity())


def test_a_reference_comes_back_from_json_unless_its_prompts_are_of_another_version() -> None:
    reference = Reference("d", "float32", PROMPTS_VERSION, {"torch": "2"}, (TEXT,))
    plain = json.loads(json.dumps(reference_to_json(reference)))
    assert reference_from_json(plain) == reference
    assert reference_from_json({**plain, "prompts_version": -1}) is None


def test_a_deployment_comes_back_from_json() -> None:
    revision = Revision(
        "x", "r", parse_spec({"model": "models/m", "engine_args": ["-O0"]}), State.READY, ready_time=2.5
    )
    deployment = Deployment("x", {"r": 100}, {"r": revision}, 1.5)
    assert from_json(json.loads(json.dumps(to_json(deployment)))) == deployment


def test_what_a_later_version_saved_comes_back_without_the_fields_that_it_added(
    capsys: pytest.CaptureFixture[str],
) -> None:
    revision = Revision("x", "r", parse_spec({"model": "models/m"}), State.READY)
    canary = CanaryRun("r", {"o": 100}, parse_canary({}))
    deployment = Deployment("x", {"r": 100}, {"r": revision}, 1.5, canary)
    saved = json.loads(json.dumps(to_json(deployment)))
    stored = saved["revisions"]["r"]
    for added in (saved, stored, stored["spec"], stored["spec"]["lora"], saved["canary"], saved["canary"]["policy"]):
        added["later"] = 1
    assert from_json(saved) == deployment
    said = capsys.readouterr()
    assert "later" in said.out + said.err and "lora.later" in said.out + said.err
    stored["spec"]["model"] = "what never was a model"
    with pytest.raises(ValidationError, match="must look like models/an-id"):
        from_json(saved)


def test_a_stopped_revision_cannot_become_ready_and_says_so() -> None:
    revision = Revision("x", "r", parse_spec({"model": "models/m"}), State.STOPPED)
    with pytest.raises(FailedPrecondition, match="is STOPPED and cannot become READY"):
        move(revision, State.READY)


def test_traffic_must_add_up_and_go_to_ready_revisions() -> None:
    spec = parse_spec({"model": "models/m"})
    deployment = Deployment("x", {}, {"a": Revision("x", "a", spec, State.READY), "b": Revision("x", "b", spec)})
    check_traffic(deployment, {"a": 100})
    with pytest.raises(InvalidSpec, match="add up to 90"):
        check_traffic(deployment, {"a": 90})
    with pytest.raises(InvalidSpec, match="no such revision"):
        check_traffic(deployment, {"c": 100})
    with pytest.raises(FailedPrecondition, match="is PENDING, not READY"):
        check_traffic(deployment, {"a": 50, "b": 50})


def test_a_spec_that_was_stored_is_a_message_again() -> None:
    from google.protobuf import json_format

    from fabrictune.v1 import inference_pb2

    stored = parse_spec({"model": "models/a", "resources": {"queue_timeout": "5m"}}).model_dump(mode="json")
    restored = parse_spec(stored)
    assert restored.resources.queue_timeout == 300
    message = json_format.ParseDict(restored.model_dump(mode="json", exclude_unset=True), inference_pb2.RevisionSpec())
    assert message.resources.queue_timeout.seconds == 300
