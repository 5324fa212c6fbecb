"""One file from a web address to disk. A download that breaks off goes on where it stopped, in the same run or a later one.

A file that is here already is asked for again only when the server's is another one (ETag, or its date). No redirect
leads from https to http. Nothing is held in memory.
"""

from __future__ import annotations

import json
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import httpx

from fabrictune.addresses import check_address, shown
from fabrictune.errors import ApiError

OnProgress = Callable[[int, int | None], None]
"""(bytes that are here, bytes in all if that is known)."""
REDIRECTS = 5
PAUSES = (0.2, 1.0, 3.0, 10.0)
"""Seconds between attempts of which none brings anything; one that brings bytes begins them anew."""
STATUS_CODES = {
    # status: (google.rpc.Code, what it means here)
    401: ("UNAUTHENTICATED", "it wants a sign-in, which this command has not; download the file, then give its path"),
    403: ("PERMISSION_DENIED", "it may not be read from here"),
    404: ("NOT_FOUND", "there is no such file"),
    410: ("NOT_FOUND", "the file has gone"),
}


class _BrokeOff(Exception):
    """Worth another attempt."""


class Trust(NamedTuple):
    """What the user has said of a bucket's endpoint; of other addresses nothing is said."""

    plain_host: str = ""
    """One host that may be asked by http."""
    ca_file: str = ""
    """Its certificate authority."""


NOTHING_SAID = Trust()


@dataclass(frozen=True)
class _Stamp:
    """What the server said of the file, so that it is known again."""

    etag: str = ""
    modified: str = ""
    size: int | None = None

    @property
    def resumes(self) -> str:
        """What If-Range may name; a weak ETag tells two files apart, but not two bytes."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    @property
    def conditions(self) -> dict[str, str]:
        """Headers that ask for the file only when it is another one."""
        return {"if-none-match": self.etag} if self.etag else {"if-modified-since": self.modified}


def download(
    address: str,
    target: Path,
    work: Path,
    max_bytes: int,
    on_progress: OnProgress = lambda _have, _total: None,
    trust: Trust = NOTHING_SAID,
) -> None:
    """Bring the file at `address` to `target`. work: a folder that keeps what is unfinished.

    Raises ApiError: NOT_FOUND, PERMISSION_DENIED, UNAUTHENTICATED, UNAVAILABLE, RESOURCE_EXHAUSTED (larger than max_bytes
    or the disk), INVALID_ARGUMENT (no https address, an HTML page).
    """
    check_address(address, trust.plain_host)
    work.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = _Download(address, target, work, max_bytes, on_progress, trust)
    failures = 0
    with _open_http(trust) as http:
        while True:
            before = file.have
            try:
                file.attempt(http)
                return
            except _BrokeOff as error:
                failures = 0 if file.have > before else failures + 1
                if failures > len(PAUSES):
                    raise ApiError(
                        f"the download of {shown(address)} broke off ({error}); run it again to go on", "UNAVAILABLE"
                    ) from None
                time.sleep(PAUSES[max(failures - 1, 0)])


class _Download:
    """One file on its way."""

    def __init__(
        self, address: str, target: Path, work: Path, max_bytes: int, on_progress: OnProgress, trust: Trust
    ) -> None:
        self._address, self._target, self._max, self._tell = address, target, max_bytes, on_progress
        self._plain_host = trust.plain_host
        self._part, self._part_stamp = work / f"{target.name}.part", work / f"{target.name}.part.json"
        self._stamp = work / f"{target.name}.json"
        self._asked = False

    @property
    def have(self) -> int:
        """Bytes that have come."""
        return self._part.stat().st_size if self._part.exists() else 0

    def attempt(self, http: httpx.Client) -> None:
        """Ask for the file, or for what is missing of it. Raises _BrokeOff, ApiError."""
        begun, whole = _read_stamp(self._part_stamp), _read_stamp(self._stamp)
        if not begun.resumes:
            self._part.unlink(missing_ok=True)
        # Packed on the way, an answer could not be gone on with: its bytes are not the file's.
        headers = {"accept-encoding": "identity"}
        if have := self.have:
            headers |= {"range": f"bytes={have}-", "if-range": begun.resumes}
        elif self._target.exists() and (whole.etag or whole.modified):
            headers |= whole.conditions
        with self._ask(http, headers) as answer:
            if answer.status_code == HTTPStatus.NOT_MODIFIED:
                size = self._target.stat().st_size
                self._tell(size, size)
            elif answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self._part.unlink(missing_ok=True)
                raise _BrokeOff("the file is shorter than before")
            else:
                self._check(answer)
                self._receive(answer)

    @contextmanager
    def _ask(self, http: httpx.Client, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """The answer after redirects; errors on the way are ours."""
        url = check_address(self._address, self._plain_host)
        try:
            for _ in range(REDIRECTS + 1):
                with http.stream("GET", url, headers=headers) as answer:
                    self._asked = True
                    if not answer.has_redirect_location or answer.next_request is None:
                        yield answer
                        return
                    following = answer.next_request.url
                if following.scheme != "https" and url.scheme == "https":
                    raise ApiError(
                        f"{shown(str(url))} leads on to {shown(str(following))}, which is not https", "INVALID_ARGUMENT"
                    )
                url = check_address(str(following), self._plain_host)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._explain(error, url) from None
        except httpx.HTTPError as error:
            raise _BrokeOff(str(error) or type(error).__name__) from None
        raise ApiError(f"{shown(self._address)} leads on more than {REDIRECTS} times", "INVALID_ARGUMENT")

    def _explain(self, error: httpx.HTTPError, url: httpx.URL) -> Exception:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            return ApiError(
                f"{url.host} is not trusted ({cause}); if its certificate is right, SSL_CERT_FILE names the authority",
                "FAILED_PRECONDITION",
            )
        if self._asked:
            return _BrokeOff(str(error))
        kept = f" What came before is at {self._target}: give that path to use it." if self._target.exists() else ""
        return ApiError(
            f"{url.host} cannot be reached ({str(error) or type(error).__name__}). Is this machine online?{kept}",
            "UNAVAILABLE",
        )

    def _check(self, answer: httpx.Response) -> None:
        """Raises what a status, a size or a kind of content stands in the way with."""
        where, status = shown(self._address), answer.status_code
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
            raise _BrokeOff(f"HTTP {status} {answer.reason_phrase}")
        if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            code, text = STATUS_CODES.get(status, ("FAILED_PRECONDITION", "the server refuses it"))
            raise ApiError(f"{where}: {text} (HTTP {status} {answer.reason_phrase})", code)
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml"):
            raise ApiError(
                f"{where} is an HTML page, not rows: a sign-in or error page, or the page that links to the file",
                "INVALID_ARGUMENT",
                "INVALID_DATA",
            )
        packed = answer.headers.get("content-encoding", "identity").lower()
        if packed != "identity" and not (packed in ("gzip", "x-gzip") and self._target.name.endswith(".gz")):
            raise ApiError(f"{where} comes packed ({packed}), though it was asked for as it is", "FAILED_PRECONDITION")

    def _receive(self, answer: httpx.Response) -> None:
        going_on = answer.status_code == HTTPStatus.PARTIAL_CONTENT
        have = self.have if going_on else 0
        if going_on and not answer.headers.get("content-range", "").startswith(f"bytes {have}-"):
            self._part.unlink(missing_ok=True)
            raise _BrokeOff("the server sent another part than was asked for")
        length = answer.headers.get("content-length", "")
        total = have + int(length) if length.isdigit() else None
        self._check_size(total or 0)
        self._check_room((total or 0) - have)
        stamp = _Stamp(answer.headers.get("etag", ""), answer.headers.get("last-modified", ""), total)
        self._part_stamp.write_text(json.dumps(vars(stamp)))
        with self._part.open("ab" if going_on else "wb") as out:
            self._tell(have, total)
            for chunk in answer.iter_raw():  # as they come: larger ones would be gathered, and lost at a break
                have += len(chunk)
                self._check_size(have)
                out.write(chunk)
                self._tell(have, total)
        if total is not None and have != total:
            raise _BrokeOff(f"{have} of {total} bytes came")
        self._part.replace(self._target)
        self._part_stamp.replace(self._stamp)

    def _check_size(self, size: int) -> None:
        if size > self._max:
            self._part.unlink(missing_ok=True)
            raise ApiError(
                f"{shown(self._address)} is larger than {self._max} bytes; FABRICTUNE_MAX_SOURCE_BYTES sets the limit",
                "RESOURCE_EXHAUSTED",
            )

    def _check_room(self, missing: int) -> None:
        free = shutil.disk_usage(self._target.parent).free
        if missing > free:
            raise ApiError(
                f"{shown(self._address)} has {missing / 1e6:.0f} MB to come, but only {free / 1e6:.0f} MB are free at "
                f"{self._target.parent}",
                "RESOURCE_EXHAUSTED",
            )


def _read_stamp(file: Path) -> _Stamp:
    try:
        return _Stamp(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return _Stamp()


def _open_http(trust: Trust) -> httpx.Client:
    verify = ssl.create_default_context(cafile=trust.ca_file) if trust.ca_file else True
    return httpx.Client(timeout=httpx.Timeout(30), verify=verify, headers={"user-agent": "fabrictune"})
