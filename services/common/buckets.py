"""Rows in a bucket that is not ours: found, and signed for reading. Settings are those of every S3 client.

    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL    Amazon's own when both are absent
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
    AWS_PROFILE, AWS_SHARED_CREDENTIALS_FILE keys from a profile's file, when there are none above
    AWS_REGION, AWS_DEFAULT_REGION           asked for when both are absent
    AWS_CA_BUNDLE                            the endpoint's certificate authority

Without any keys the bucket is asked anonymously.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple
from urllib.parse import urlsplit

import minio
import urllib3
from minio.credentials import AWSConfigProvider
from minio.error import MinioException, S3Error

from services.common.errors import FabrictuneError, InvalidSpec, NotFound, PermissionDenied, Unavailable
from services.common.store import DENIED, MISSING, RETRIES

AMAZON = "https://s3.amazonaws.com"
EXPIRY = timedelta(hours=12)


class SignedFile(NamedTuple):
    """One object. path: its key below the prefix."""

    path: str
    address: str
    size: int


class Signed(NamedTuple):
    """The rows files of a prefix, and what their addresses need."""

    files: tuple[SignedFile, ...]
    plain_host: str
    """The endpoint's host when it is asked by http; else ""."""
    ca_file: str


def sign_rows(uri: str, names_rows: Callable[[str], bool]) -> Signed:
    """The rows files of s3://bucket/prefix: an object of that name, or all below that folder.

    Raises InvalidSpec, NotFound, PermissionDenied, Unavailable.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise InvalidSpec(f"{uri!r} must look like s3://bucket/prefix")
    said = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or AMAZON
    endpoint = urlsplit(said)
    if endpoint.scheme not in ("http", "https") or not endpoint.hostname or endpoint.username:
        raise InvalidSpec(f"AWS_ENDPOINT_URL is {said!r}; it must look like https://host:port")
    ca_file = os.environ.get("AWS_CA_BUNDLE", "")
    try:
        client = _connect(endpoint.netloc, endpoint.scheme == "https", ca_file)
        found = [
            (entry.object_name, entry.size or 0)
            for entry in client.list_objects(bucket, key.rstrip("/"), recursive=True)
            if entry.object_name and not entry.is_dir and names_rows(entry.object_name)
        ]
        files = tuple(
            SignedFile(path, client.get_presigned_url("GET", bucket, name, EXPIRY), size)
            for name, size in found
            if (path := _below(name, key))
        )
    except S3Error as error:
        raise _translate(error, uri, said) from None
    except (urllib3.exceptions.HTTPError, MinioException, OSError, ValueError) as error:
        text = (
            f"{uri} cannot be read from {said} ({type(error).__name__}: {str(error)[:200]}); AWS_ENDPOINT_URL names it"
        )
        raise (InvalidSpec if isinstance(error, ValueError) else Unavailable)(text) from None
    if not files:
        raise NotFound(f"{said} has no rows files at {uri}")
    return Signed(files, endpoint.hostname if endpoint.scheme == "http" else "", ca_file)


def _below(name: str, key: str) -> str:
    """A key's path below the prefix, "" when it is not there: rows/a.jsonl is below rows, rows-old/a.jsonl is not."""
    folder = key.rstrip("/")
    if not folder:
        return name
    if name == folder:
        return name.rpartition("/")[2]
    return name.removeprefix(f"{folder}/") if name.startswith(f"{folder}/") else ""


def _connect(host: str, secure: bool, ca_file: str) -> minio.Minio:
    said = {name: os.environ.get(f"AWS_{name}", "") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")}
    profile = any(os.environ.get(name) for name in ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE"))
    keys = bool(said["ACCESS_KEY_ID"])
    return minio.Minio(
        host,
        access_key=said["ACCESS_KEY_ID"] if keys else None,
        secret_key=said["SECRET_ACCESS_KEY"] if keys else None,
        session_token=said["SESSION_TOKEN"] or None if keys else None,
        credentials=AWSConfigProvider() if profile and not keys else None,
        secure=secure,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None,
        http_client=urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5, read=60),
            retries=RETRIES,
            ca_certs=ca_file or None,
        ),
    )


def _translate(error: S3Error, uri: str, endpoint: str) -> FabrictuneError:
    code = str(error.code)
    if code in MISSING:
        return NotFound(f"{endpoint} has no {uri} ({code})")
    if code in DENIED:
        who = os.environ.get("AWS_ACCESS_KEY_ID") or "anonymous readers"
        return PermissionDenied(
            f"{endpoint} refuses {uri} to {who} ({code}); see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
        )
    return Unavailable(f"{endpoint} said {code} for {uri}: {error.message}")
