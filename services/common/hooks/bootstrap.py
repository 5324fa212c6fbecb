"""`python -m services.common.hooks.bootstrap`: makes the Secrets of an installation that are not there yet, and changes none.

The chart's hook runs it before each install and upgrade, so that no secret is ever in the chart, in a release or in Git,
and rendering twice gives the same. Only the generated certificate is replaced, when it is near its end. What is printed
names Secrets, never what is in them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated

from lightkube import Client
from lightkube.core.exceptions import ApiError
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Secret
from pydantic import BaseModel, ConfigDict, Field, Json
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from services.common.clusters.api import explained, open_client
from services.common.clusters.manifests import INSTANCE
from services.common.config import load
from services.common.errors import FailedPrecondition, Unavailable
from services.common.hooks.certificates import read_certificate
from services.common.hooks.secret_values import (
    ROLES,
    SecretValue,
    server_names,
    store_secret,
    tls_secret,
    token_secret,
    tokens_secret,
)
from services.common.main import run_until_stopped

RENEWAL = timedelta(days=90)
MANAGED_BY = {"app.kubernetes.io/managed-by": "fabrictune"}


class Wanted(BaseModel):
    """Which Secrets the installation makes for itself; the others are the user's or cert-manager's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tls: bool
    auth: bool
    store: bool
    services: tuple[str, ...] = ()
    hosts: tuple[str, ...] = Field((), description="more names that the certificate holds, such as an ingress's host")


class BootstrapConfig(BaseSettings):
    """FABRICTUNE_…, from the chart."""

    model_config = SettingsConfigDict(env_prefix="FABRICTUNE_", frozen=True)

    namespace: str = Field(min_length=1)
    release: str = Field(
        min_length=1, description="what all names begin with, and the label app.kubernetes.io/instance"
    )
    bootstrap: Annotated[Json[Wanted], NoDecode]


class Bootstrap:
    """Brings what there is to what is wanted. Two may run at once: who is second takes what the first has made."""

    def __init__(self, client: Client, config: BootstrapConfig, now: datetime) -> None:
        self._client, self._config, self._now = client, config, now

    def run(self) -> Iterator[str]:
        """Make what is absent; a line for each Secret. Raises FailedPrecondition, PermissionDenied, Unavailable."""
        wanted, release = self._config.bootstrap, self._config.release
        if wanted.tls:
            yield self._ensure_certificate(f"{release}-tls")
        if wanted.auth:
            yield from self._ensure_tokens(f"{release}-tokens")
        if wanted.store:
            yield self._ensure(store_secret(f"{release}-store"))[1]

    def _ensure_certificate(self, name: str) -> str:
        config = self._config
        names = server_names(config.release, config.namespace, config.bootstrap.services, config.bootstrap.hosts)
        found = self._get(name)
        if found is None:
            data, line = self._ensure(tls_secret(name, names, self._now))
            return f"{line}; the certificate is valid until {read_certificate(data['tls.crt']).expires:%Y-%m-%d}"
        try:
            facts = read_certificate(_data(found).get("tls.crt", b""))
        except ValueError:
            raise FailedPrecondition(
                f"the Secret {name} holds no certificate that can be read; delete it, and the next upgrade makes a new one"
            ) from None
        ours = ((found.metadata and found.metadata.labels) or {}).items() >= MANAGED_BY.items()
        if ours and facts.expires - self._now < RENEWAL:
            self._replace(tls_secret(name, names, self._now), found)
            return (
                f"renewed the certificate in the Secret {name}, which was valid until {facts.expires:%Y-%m-%d}; "
                f"restart the pods: kubectl -n {config.namespace} rollout restart deployment -l {INSTANCE}={self._config.release}"
            )
        line = f"kept the Secret {name}; the certificate is valid until {facts.expires:%Y-%m-%d}"
        lacking = [n for n in names if not facts.covers(n)]
        if lacking:
            line += f". It lacks {', '.join(lacking)}: delete the Secret and upgrade again to have them"
        return line

    def _ensure_tokens(self, name: str) -> Iterator[str]:
        """Hashes last: once they are there the tokens are too, and a run that was cut off can go on."""
        singles = {holder: f"{self._config.release}-token-{holder}" for holder in ROLES}
        if self._get(name) is not None:
            missing = [single for single in singles.values() if self._get(single) is None]
            if missing:
                raise FailedPrecondition(
                    f"the Secret {name} is there, but {', '.join(missing)} is missing, and hashes cannot be turned back into "
                    f"tokens. Put it back (key `token`), or have all made anew: kubectl -n {self._config.namespace} "
                    f"delete secret --ignore-not-found {' '.join([name, *singles.values()])}, then upgrade again"
                )
            yield f"kept the Secrets {', '.join([name, *singles.values()])}"
            return
        tokens = {}
        for holder, single in singles.items():
            data, line = self._ensure(token_secret(single))
            if not data.get("token"):
                raise FailedPrecondition(f"the Secret {single} has no key `token`; delete it, or put one in")
            tokens[holder] = data["token"].strip()  # made by hand it may end in a newline
            yield line
        yield self._ensure(tokens_secret(name, tokens))[1]

    def _ensure(self, value: SecretValue) -> tuple[Mapping[str, bytes], str]:
        """What is in the Secret now, and what has been done."""
        found = self._get(value.name)
        if found is not None:
            return _data(found), f"kept the Secret {value.name}"
        with explained("create", "secrets", value.name):
            try:
                self._client.create(self._manifest(value))
            except ApiError as error:
                if error.status.code != 409:
                    raise
                found = self._get(value.name)
                if found is None:
                    raise Unavailable(f"the Secret {value.name} came and went; try again") from None
                return _data(found), f"kept the Secret {value.name}"
        return value.data, f"made the Secret {value.name}"

    def _get(self, name: str) -> Secret | None:
        with explained("get", "secrets", name):
            try:
                return self._client.get(Secret, name, namespace=self._config.namespace)
            except ApiError as error:
                if error.status.code == 404:
                    return None
                raise

    def _replace(self, value: SecretValue, found: Secret) -> None:
        manifest = self._manifest(value)
        if manifest.metadata and found.metadata:
            manifest.metadata.resourceVersion = found.metadata.resourceVersion
        with explained("update", "secrets", value.name):
            try:
                self._client.replace(manifest)
            except ApiError as error:
                if error.status.code != 409:  # another one has renewed it meanwhile
                    raise

    def _manifest(self, value: SecretValue) -> Secret:
        metadata = ObjectMeta(
            name=value.name, namespace=self._config.namespace, labels={INSTANCE: self._config.release, **MANAGED_BY}
        )
        data = {key: base64.b64encode(item).decode() for key, item in value.data.items()}
        return Secret(metadata=metadata, type=value.type, data=data)


def _data(secret: Secret) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in (secret.data or {}).items()}


def main() -> None:
    """The hook's entry."""
    config = load(BootstrapConfig)
    assert isinstance(config, BootstrapConfig)
    for line in Bootstrap(open_client(config.namespace), config, datetime.now(UTC)).run():
        print(line, flush=True)


if __name__ == "__main__":
    run_until_stopped(main)
