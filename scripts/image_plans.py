"""The container images as a table, and the commands that build and save them as printable values. Nothing here acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pip_settings import parse

SERVER_BYTES = 350_000_000
"""More than this, uncompressed, and a build fails: a server brings what it imports and nothing else."""

SHARED_DOCKERFILE = "services/common/Dockerfile"
SHARED = ("build", "app", "runtime")
"""Its targets, an image each; the services' Dockerfiles begin with them."""

CUDA_DOCKERFILE = "services/common/cuda.Dockerfile"
"""The base of VARIANT=cuda, built before the others; --base is then its base."""

DEFAULT_BASE = {"cpu": "python:3.11-slim-bookworm", "cuda": "nvidia/cuda:13.0.2-runtime-ubi9"}
"""As the two Dockerfiles say it, for the label; --base overrides."""

PIP_OPTIONS = (
    "index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "proxy", "timeout", "default-timeout",
)  # fmt: skip
"""What a build is told of pip's settings."""


@dataclass(frozen=True)
class Image:
    """One image: fabrictune-{name}."""

    name: str
    service: str
    """Whose folder has the Dockerfile."""
    description: str
    target: str = ""
    """Stage of the Dockerfile; empty: the last."""
    max_bytes: int = SERVER_BYTES
    """0: no limit."""

    @property
    def heavy(self) -> bool:
        """Whether it has torch, and so a variant for GPUs."""
        return not self.max_bytes


IMAGES = (
    Image("pipeline", "pipeline", "runs and artifacts, the front door (server)"),
    Image("conversion", "conversion", "rows into training data (server and worker)"),
    Image("merging", "merging", "an adapter merged into its base model (server and worker)"),
    Image("evaluation", "evaluation", "tool calls scored, before and after (server and worker)"),
    Image("inference", "inference", "deployments and the gateway (server)", "server"),
    Image("training", "training", "training jobs (server)", "server"),
    Image("inference-engine", "inference", "the engine of a served revision (vLLM)", "engine", max_bytes=0),
    Image("training-worker", "training", "a training job (torch, ms-swift)", "worker", max_bytes=0),
)


@dataclass(frozen=True)
class Settings:
    """What one call of `make images` was asked for."""

    tool: str
    tag: str
    registry: str
    base: str
    """Empty: what the Dockerfile says."""
    variant: str = "cpu"
    version: str = "unknown"
    revision: str = "unknown"
    source: str = "unknown"
    epoch: str = ""
    """SOURCE_DATE_EPOCH: all times in the image are this one."""

    def reference(self, image: Image) -> str:
        """The image's name and tag. The CPU and the CUDA variant are two names, so neither hides the other."""
        return self.named(f"{image.name}-cuda" if self.variant == "cuda" else image.name)

    @property
    def shared(self) -> str:
        """What the names of the shared images begin with, before -build, -app and -runtime."""
        return f"{self.prefix}fabrictune{'-cuda' if self.variant == 'cuda' else ''}"

    @property
    def prefix(self) -> str:
        """The registry with its slash, or nothing."""
        return f"{self.registry}/" if self.registry else ""

    def named(self, name: str) -> str:
        """Registry, name and tag."""
        return f"{self.prefix}fabrictune-{name}:{self.tag}"


@dataclass(frozen=True)
class Pip:
    """pip's settings as a build is told them."""

    conf: str
    """A pip.conf."""
    folders: tuple[str, ...]
    """Local files and folders that it names."""


def plan_shared(target: str, settings: Settings, pip: Pip, conf: Path) -> list[str]:
    """The command that builds one of the SHARED images. conf: the file that pip.conf was written to."""
    base = settings.named("cuda-base") if settings.variant == "cuda" else settings.base
    arguments = {"BASE": base} if base else {}
    name = f"{settings.shared}-{target}:{settings.tag}"
    return plan(settings, SHARED_DOCKERFILE, name, arguments, [f"--target={target}", *plan_secret(settings, pip, conf)])


def plan_build(image: Image, settings: Settings, pip: Pip, conf: Path) -> list[str]:
    """The command that builds one image, on the SHARED ones."""
    arguments = {"SHARED": settings.shared, "TAG": settings.tag}
    arguments |= {"VARIANT": settings.variant} if image.heavy else {}
    options = [f"--target={image.target}"] if image.target else []
    options += [*plan_secret(settings, pip, conf), *(f"--label={k}={v}" for k, v in labels(image, settings).items())]
    return plan(settings, f"services/{image.service}/Dockerfile", settings.reference(image), arguments, options)


def plan_cuda_base(settings: Settings) -> list[str]:
    """The command that builds what CUDA variants stand on."""
    arguments = {"BASE": settings.base} if settings.base else {}
    return plan(settings, CUDA_DOCKERFILE, settings.named("cuda-base"), arguments, [])


def labels(image: Image, settings: Settings) -> dict[str, str]:
    """What an image says of itself, in OCI's terms."""
    told = {
        "title": f"fabrictune-{image.name}",
        "description": f"fabrictune: {image.description}",
        "version": settings.version,
        "revision": settings.revision,
        "source": settings.source,
        "licenses": "Apache-2.0",
        "base.name": settings.base or DEFAULT_BASE[settings.variant],
    }
    return {f"org.opencontainers.image.{key}": value for key, value in told.items()}


def plan_secret(settings: Settings, pip: Pip, conf: Path) -> list[str]:
    """Options that tell a build pip's settings; buildah can mount the folders that they name."""
    options = [f"--secret=id=pip.conf,src={conf}"] if pip.conf else []
    return options + ([f"--volume={f}:{f}:ro" for f in pip.folders] if settings.tool == "buildah" else [])


def plan(settings: Settings, file: str, name: str, arguments: Mapping[str, str], options: Sequence[str]) -> list[str]:
    """What all builds have in common."""
    command, arguments = [settings.tool, "build", "--platform=linux/amd64", f"--file={file}", *options], dict(arguments)
    if settings.tool == "buildah":
        command += ["--layers", *([f"--timestamp={settings.epoch}"] if settings.epoch else [])]
    elif settings.epoch:
        arguments["SOURCE_DATE_EPOCH"] = settings.epoch
    return [*command, *(f"--build-arg={key}={value}" for key, value in arguments.items()), f"--tag={name}", "."]


def plan_save(image: Image, settings: Settings, archive: Path) -> list[str]:
    """The command that writes an image as a docker archive."""
    reference = settings.reference(image)
    if settings.tool == "docker":
        return ["docker", "save", f"--output={archive}", reference]
    return ["buildah", "push", "--quiet", reference, f"docker-archive:{archive}:{reference}"]


def plan_pip(listing: str, *, mounts: bool = True) -> Pip:
    """`pip config list` → what a build is told. mounts: whether the tool can mount local folders; if not, they go."""
    told = {option: values for option, values in parse(listing).items() if option in PIP_OPTIONS}
    if not mounts:
        told = {option: [v for v in values if not v.startswith(("/", "file://"))] for option, values in told.items()}
    settings = {option: values for option, values in told.items() if values}
    lines = [f"{option} = {' '.join(values)}" for option, values in sorted(settings.items())]
    places = [place.removeprefix("file://") for values in settings.values() for place in values]
    folders = [str(Path(place).parent) if place.endswith("/simple") else place for place in places if place[:1] == "/"]
    return Pip("\n".join(["[global]", *lines, ""]) if lines else "", tuple(dict.fromkeys(folders)))


def parse_size(text: str) -> int:
    """Bytes of what buildah prints, such as 151 MB."""
    number, unit = text.split()
    return int(float(number) * 1000.0 ** ("B", "KB", "MB", "GB", "TB").index(unit.upper()))
