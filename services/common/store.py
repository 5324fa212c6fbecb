"""The object store: plain S3 through minio, with errors that say what to do.

What minio's public methods lack (a conditional put) goes through its public `get_presigned_url` and one HTTP client.
Small documents (jobs, events, manifests) and the signed addresses of big files pass here; see `artifacts` for folders.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import BytesIO
from typing import Any, TypeVar
from urllib.parse import urlsplit

import minio
import urllib3
from minio.credentials import Credentials, IamAwsProvider
from minio.error import MinioException, S3Error

from services.common.config import StoreConfig
from services.common.errors import (
    FabrictuneError,
    InvalidSpec,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)

T = TypeVar("T")
CONNECTIONS = 16
EXPIRY = timedelta(hours=1)
MISSING = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NotFound"})
DENIED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"})
RETRIES = urllib3.Retry(total=4, connect=2, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504])
"""Of one request: 3 s for a store that is busy or just begins, at once for one that is not there."""
FULL = frozenset({"StorageFull", "XMinioStorageFull", "QuotaExceeded", "InsufficientStorage"})

IDENTITY = frozenset(
    {"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"}
)
"""Variables that tell a workload where its keys come from: IAM roles for service accounts, EKS Pod Identity, ECS."""


class OwnIdentity:
    """The keys that a cloud gives this workload for a while, where the settings have none: a provider as minio wants it."""

    def __init__(self) -> None:
        self._cloud = IamAwsProvider()

    def retrieve(self) -> Credentials:
        """Keys that are valid now. Raises Unavailable, PermissionDenied."""
        try:
            return self._cloud.retrieve()
        except (urllib3.exceptions.HTTPError, MinioException, OSError, ValueError, KeyError) as error:
            kind = Unavailable if isinstance(error, urllib3.exceptions.HTTPError) else PermissionDenied
            raise kind(
                f"this workload's own identity gives no key for the object store: {type(error).__name__}: {error}. Look at "
                "the service account's annotations and role, or set FABRICTUNE_S3_ACCESS_KEY and _SECRET_KEY"
            ) from None


class Store:
    """One bucket. Threads may share it."""

    def __init__(self, config: StoreConfig) -> None:
        address = urlsplit(config.endpoint)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InvalidSpec(f"FABRICTUNE_S3_ENDPOINT is {config.endpoint!r}; it must look like http://host:port")
        identity = None if config.access_key or IDENTITY.isdisjoint(os.environ) else OwnIdentity()
        self.bucket, self.endpoint = config.bucket, config.endpoint
        self._key = "this workload's own identity" if identity else f"the key {config.access_key!r}"
        self.http = urllib3.PoolManager(
            num_pools=4,
            maxsize=CONNECTIONS,
            timeout=urllib3.Timeout(connect=3, read=60),
            retries=RETRIES,
            ca_certs=str(config.ca_file) if config.ca_file else None,
        )
        self.client = minio.Minio(
            address.netloc,
            access_key=config.access_key,
            secret_key=config.secret_key.get_secret_value(),
            secure=address.scheme == "https",
            region=config.region,
            http_client=self.http,
            credentials=identity,
        )
        if not config.path_style:
            self.client.enable_virtual_style_endpoint()

    def ensure_bucket(self) -> None:
        """Make the bucket when it is not there. Raises Unavailable, PermissionDenied."""
        if not self._ask("", lambda: self.client.bucket_exists(self.bucket)):
            self._ask("", lambda: self.client.make_bucket(self.bucket))

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write a small object."""
        self._ask(key, lambda: self.client.put_object(self.bucket, key, BytesIO(data), len(data)))

    def put_stream(self, key: str, data: Any, size: int, part_size: int, threads: int) -> None:
        """Write an object from a stream, in parallel parts."""
        self._ask(
            key,
            lambda: self.client.put_object(
                self.bucket, key, data, size, part_size=part_size, num_parallel_uploads=threads
            ),
        )

    def get_bytes(self, key: str) -> bytes:
        """Read a small object. Raises NotFound."""
        return self._ask(key, lambda: self._read(key))

    def get_head(self, key: str, size: int) -> bytes:
        """The first `size` bytes of an object, or all of it when it is smaller. Raises NotFound."""
        return self._ask(key, lambda: self._read(key, size))

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        """Bytes begin..end of an object, or fewer when it ends before. Raises NotFound."""
        return self._ask(key, lambda: self._read(key, end - begin, begin)) if end > begin else b""

    def put_json(self, key: str, value: Any, only_if_absent: bool = False) -> bool:
        """Write a document; with only_if_absent, False when the key is taken (If-None-Match: *)."""
        data = json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
        if not only_if_absent:
            self.put_bytes(key, data)
            return True
        return self._ask(key, lambda: self._put_absent(key, data))

    def get_json(self, key: str) -> Any | None:
        """A document, or None."""
        try:
            return json.loads(self.get_bytes(key))
        except NotFound:
            return None

    def list_keys(self, prefix: str, start_after: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in order, after `start_after`."""
        found = self.client.list_objects(self.bucket, prefix, recursive=True, start_after=start_after or None)
        yield from self._ask(prefix, lambda: [str(o.object_name) for o in found])

    def list_folders(self, prefix: str, start_after: str = "", limit: int = 1000) -> list[str]:
        """Names of the "folders" right below `prefix`, in order, at most `limit`."""

        def ask() -> list[str]:
            names: list[str] = []
            for entry in self.client.list_objects(self.bucket, prefix, start_after=start_after or None):
                name = str(entry.object_name)
                if entry.is_dir and name > start_after and len(names) < limit:
                    names.append(name.removeprefix(prefix).rstrip("/"))
                if len(names) == limit:
                    break
            return names

        return self._ask(prefix, ask)

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is fine."""
        self._ask(key, lambda: self.client.remove_object(self.bucket, key))

    def presign(self, method: str, key: str) -> str:
        """An address that lets its holder GET or PUT one object for an hour."""
        return self._ask(key, lambda: str(self.client.get_presigned_url(method, self.bucket, key, EXPIRY)))

    def size_of(self, key: str) -> int:
        """Bytes of an object. Raises NotFound."""
        return self._ask(key, lambda: int(self.client.stat_object(self.bucket, key).size or 0))

    def _read(self, key: str, size: int = 0, offset: int = 0) -> bytes:
        answer = self.client.get_object(self.bucket, key, offset=offset, length=size)
        try:
            return bytes(answer.read())
        finally:
            answer.close()
            answer.release_conn()

    def _put_absent(self, key: str, data: bytes) -> bool:
        # minio 7.2 has no conditional put; a header that is not part of the signature may be added to a signed address.
        address = self.client.get_presigned_url("PUT", self.bucket, key, EXPIRY)
        # A server that failed may have written it all the same: callers that get False look at what is there.
        for pause in (0.2, 0.5, 1.0, None):
            answer = self.http.request("PUT", address, body=data, headers={"If-None-Match": "*"}, retries=False)
            if answer.status < 500 or pause is None:
                break
            time.sleep(pause)
        if answer.status in (409, 412):
            return False
        if answer.status >= 300:
            text = answer.data[:300].decode(errors="replace")
            kind = PermissionDenied if answer.status == 403 else Unavailable
            raise kind(f"{self.endpoint} refused {key}: HTTP {answer.status} {text}")
        return True

    def _ask(self, key: str, request: Callable[[], T]) -> T:
        """Ask the store and turn its errors into ours."""
        where = f"{self.endpoint}/{self.bucket}" + (f"/{key}" if key else "")
        try:
            return request()
        except FabrictuneError:
            raise
        except S3Error as error:
            raise self._translate(error, where) from None
        except (urllib3.exceptions.HTTPError, MinioException, OSError) as error:
            raise Unavailable(
                f"the object store at {self.endpoint} does not answer ({type(error).__name__}); is it running? "
                "FABRICTUNE_S3_ENDPOINT names it"
            ) from None

    def _translate(self, error: S3Error, where: str) -> FabrictuneError:
        code = str(error.code)
        if code in MISSING:
            return NotFound(f"there is no {where}")
        if code in DENIED:
            return PermissionDenied(
                f"the object store refuses {self._key} for {where} ({code}); "
                "see FABRICTUNE_S3_ACCESS_KEY and _SECRET_KEY"
            )
        if code in FULL:
            return ResourceExhausted(f"the object store at {self.endpoint} is full ({code})")
        return Unavailable(f"the object store said {code} for {where}: {error.message}")


def open_store(config: StoreConfig) -> Store:
    """The store that the settings name; its bucket exists afterwards. Raises InvalidSpec, Unavailable, PermissionDenied."""
    store = Store(config)
    store.ensure_bucket()
    return store
