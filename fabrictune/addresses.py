"""Web addresses of rows: which may be asked, and how they are shown. https; http on loopback, and where the user has said so."""

from __future__ import annotations

import ipaddress

import httpx

from fabrictune.errors import ApiError


def check_address(address: str, plain_host: str = "") -> httpx.URL:
    """The address, if it may be asked. Raises ApiError."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise ApiError(f"{address!r} is no address: {error}", "INVALID_ARGUMENT") from None
    if url.userinfo:
        raise ApiError(
            f"{shown(address)} has a user name or password in it; arguments are no place for them", "INVALID_ARGUMENT"
        )
    plain = url.scheme == "http" and (is_loopback(url.host) or url.host == plain_host)
    if not url.host or not (url.scheme == "https" or plain):
        raise ApiError(
            f"{shown(address)}: rows come by https; http is taken from this machine only", "INVALID_ARGUMENT"
        )
    return url


def shown(address: str) -> str:
    """An address without what may be secret: user, password, query."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return address.partition("?")[0]
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
