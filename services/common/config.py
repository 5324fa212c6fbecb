"""Settings of servers and workers, from the environment (`FABRICTUNE_…`). This table is the manual.

Secrets come from the environment or from files only, never from arguments. A worker reads the same settings as the
server that started it: the local cluster hands its own environment on, Kubernetes mounts the same Secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from services.common.errors import InvalidSpec, Violation


class StoreConfig(BaseSettings):
    """The object store: FABRICTUNE_S3_…"""

    model_config = SettingsConfigDict(env_prefix="FABRICTUNE_S3_", frozen=True)

    endpoint: str = Field("", description="such as http://127.0.0.1:8333; https turns TLS on")
    bucket: str = "fabrictune"
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: SecretStr = SecretStr("")
    path_style: bool = Field(True, description="false addresses buckets as host names")
    ca_file: Path | None = Field(None, description="a certificate authority for the store's TLS")


class ServerConfig(BaseSettings):
    """A gRPC server: FABRICTUNE_…"""

    model_config = SettingsConfigDict(env_prefix="FABRICTUNE_", frozen=True)

    host: str = Field("127.0.0.1", description="beyond loopback TLS files and tokens are needed, or `insecure`")
    port: int = Field(8470, ge=0, le=65535, description="0 takes a free one")
    gateway_port: int = Field(8480, ge=0, le=65535, description="HTTP address of the inference gateway")
    metrics_port: int = Field(8490, ge=0, le=65535, description="Prometheus metrics, on loopback or the pod's address")
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tokens_file: Path | None = Field(None, description="YAML: a list of {name, role, sha256} API keys")
    oidc_issuer: str = Field("", description="accept JWTs of this issuer")
    oidc_audience: str = "fabrictune"
    oidc_roles_claim: str = "fabrictune_role"
    insecure: bool = Field(False, description="serve beyond loopback without TLS or tokens, knowing what that means")
    drain_seconds: float = Field(10, ge=0, description="how long calls and answers in flight may take after SIGTERM")
    data_dir: Path = Field(Path(".fabrictune"), description="cache, scratch and, on one machine, everything else")
    log_format: str = Field("json", pattern="^(json|console)$")
    log_level: str = "INFO"
    gateway_url: str = Field("", description="where evaluation reaches the gateway; its own when empty")
    endpoints: dict[str, str] = Field(
        default_factory=dict, description='the other services, for the pipeline: {"training": "host:port", …}'
    )
    ca_file: Path | None = Field(None, description="a certificate authority, to call other services over TLS")
    token: SecretStr = Field(SecretStr(""), description="sent when other services are called")
    cluster: Literal["local", "kubernetes"] = Field("local", description="where jobs and engines run")
    max_concurrent_jobs: int = Field(1, ge=1, description="jobs that the local cluster runs side by side")
    namespace: str = Field("", description="Kubernetes: where Jobs and engines are made; the server's own when empty")
    release: str = Field("fabrictune", description="Kubernetes: app.kubernetes.io/instance of what this release makes")
    templates: Path = Field(Path("/etc/fabrictune/templates"), description="Kubernetes: the chart's job templates")
    owner: str = Field("", description="Kubernetes: the Deployment that owns the engines, so that they go with it")
    engine_hardware: str = Field("", description="Kubernetes: what an engine's node has, as JSON; see inference.engine")
    grace_seconds: float = Field(120, gt=0, description="a worker that was told to end is killed after these")
    engine_grace_seconds: float = Field(15, gt=0, description="and so is an engine")
    engine_start_seconds: float = Field(
        1800, gt=0, description="how long an engine may load its model, from its process's start until it answers"
    )


class RecordConfig(BaseSettings):
    """What the gateway keeps of its traffic, off by default: FABRICTUNE_RECORD…"""

    model_config = SettingsConfigDict(env_prefix="FABRICTUNE_", frozen=True)

    record: bool = Field(False, description="keep prompts and answers, redacted")
    record_folder: Path | None = Field(None, description="keep them in files here instead of the object store")
    record_days: int = Field(
        30, ge=1, le=3650, description="how long they are kept; what is older is deleted every hour"
    )
    record_rules: Path | None = Field(
        None, description="YAML, {name: regular expression}: redacted beside the defaults"
    )
    record_memory_bytes: int = Field(64 << 20, ge=1 << 20, description="the most held in memory; more is not recorded")
    record_flush_seconds: float = Field(5, gt=0, le=600, description="how long a record may wait to be written")


def load(kind: type[BaseSettings]) -> BaseSettings:
    """Settings of one kind. Raises InvalidSpec naming every variable that is wrong."""
    try:
        return kind()
    except ValidationError as error:
        prefix = str(kind.model_config.get("env_prefix", ""))
        violations = [
            Violation(prefix + "_".join(str(part) for part in e["loc"]).upper(), e["msg"]) for e in error.errors()
        ]
        raise InvalidSpec("the environment has settings that cannot be used", violations=violations) from None
    except SettingsError as error:  # a variable that should hold JSON and does not
        raise InvalidSpec(f"the environment has a setting that cannot be read: {error}") from None


def load_store() -> StoreConfig:
    """The store's settings. Raises InvalidSpec."""
    config = load(StoreConfig)
    assert isinstance(config, StoreConfig)
    return config


def load_server() -> ServerConfig:
    """The server's settings. Raises InvalidSpec."""
    config = load(ServerConfig)
    assert isinstance(config, ServerConfig)
    return config


def load_record() -> RecordConfig:
    """The recorder's settings. Raises InvalidSpec."""
    config = load(RecordConfig)
    assert isinstance(config, RecordConfig)
    return config
