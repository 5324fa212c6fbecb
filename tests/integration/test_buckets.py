"""Rows in a bucket that is not ours: a real S3 server, asked as any S3 client asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fabrictune.errors import ApiError
from fabrictune.sources import find_rows
from services.common.config import StoreConfig
from services.common.errors import InvalidSpec, NotFound, PermissionDenied, Unavailable
from services.common.store import Store

ROW = b'{"conversations": []}\n'


@pytest.fixture
def bucket(object_store: StoreConfig, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with rows and other things."""
    for name in (
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_ENDPOINT_URL",
        "AWS_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", object_store.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key.get_secret_value())
    monkeypatch.setenv("AWS_REGION", object_store.region)
    monkeypatch.setenv("FABRICTUNE_DATA_DIR", str(tmp_path / "data"))
    for key in ("rows/a.jsonl", "rows/more/b c.jsonl", "rows/read.me", "rows-old/a.jsonl", "top.jsonl"):
        store.put_bytes(key, ROW * len(key))
    return f"s3://{store.bucket}"


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_the_rows_files_below_a_prefix_come_and_nothing_else(bucket: str) -> None:
    steps: list[tuple[int, int | None]] = []
    found = find_rows(f"{bucket}/rows", on_progress=lambda *step: steps.append(step))
    assert files(found.path) == {"a.jsonl": ROW * 12, "more/b c.jsonl": ROW * 19}
    assert found.origin == f"{bucket}/rows"
    assert steps[-1] == (31 * len(ROW), 31 * len(ROW))


def test_one_object_and_a_whole_bucket_are_sources_too(bucket: str) -> None:
    assert find_rows(f"{bucket}/top.jsonl").path.read_bytes() == ROW * 9
    assert set(files(find_rows(bucket).path)) == {
        "rows/a.jsonl",
        "rows/more/b c.jsonl",
        "rows-old/a.jsonl",
        "top.jsonl",
    }


def test_what_has_gone_from_the_bucket_goes_here(bucket: str, store: Store) -> None:
    find_rows(f"{bucket}/rows/")
    store.delete("rows/more/b c.jsonl")
    store.put_bytes("rows/a.jsonl", ROW)
    assert find_rows(f"{bucket}/rows/").path.read_bytes() == ROW


def test_what_is_wrong_is_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match=r"has no rows files at s3://test-.*/nothing"):
        find_rows(f"{bucket}/nothing")
    with pytest.raises(NotFound, match="NoSuchBucket"):
        find_rows("s3://no-such-bucket-here/rows")
    with pytest.raises(InvalidSpec, match="must look like s3://bucket/prefix"):
        find_rows("s3:///rows")
    monkeypatch.setenv("FABRICTUNE_MAX_SOURCE_BYTES", "100")
    with pytest.raises(ApiError, match="FABRICTUNE_MAX_SOURCE_BYTES sets the limit"):
        find_rows(f"{bucket}/rows")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(PermissionDenied, match="AWS_SECRET_ACCESS_KEY") as refused:
        find_rows(f"{bucket}/rows")
    assert "wrong-secret" not in str(refused.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"cannot be read from http://127\.0\.0\.1:9"):
        find_rows(f"{bucket}/rows")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    with pytest.raises(InvalidSpec, match="must look like https://host:port"):
        find_rows(f"{bucket}/rows")
