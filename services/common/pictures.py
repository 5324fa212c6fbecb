"""Pictures in text: their addresses, and which of them Markdown shows. AgentFabric displays `![…](address)` as a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator

# An address ends at the first letter that RFC 3986 has not (a Chinese comma, a quote), at a bracket that closes more than the
# address has opened, and at "," or ";" before the next address. A backslash and "u" go on in an escape: no address is told.
ADDRESS = r"(?i:https?://)(?:(?![,;]https?://)[A-Za-z0-9\-._~:/?#@!$&*+,;=%]|\((?:[A-Za-z0-9\-._~:/?#@!$&*+,;=%])*+\))++(?!\\u)"
SUFFIXES = ("png", "jpg", "jpeg", "gif", "webp", "bmp", "svg")
SHOWN = rf"!\[[^\]\n]{{0,500}}\]\([ \t]*<?(?:{ADDRESS})>?(?:[ \t]+\"[^\"\n]{{0,500}}\")?[ \t]*\)"
"""`![…](address)` or `![…](address "title")`."""
_ADDRESS = re.compile(ADDRESS)
_SHOWN = re.compile(SHOWN)
_PICTURE = re.compile(rf"https?://[^/?#]+/[^?#]*\.(?:{'|'.join(SUFFIXES)})(?:[?#]|$)", re.IGNORECASE)


def find_pictures(text: str) -> list[str]:
    """The addresses of pictures in a text, each once, in order. A picture is known by the ending of its path."""
    return list(dict.fromkeys(address for address in _find_addresses(text) if is_picture(address)))


def find_shown(text: str) -> set[str]:
    """The addresses that Markdown in a text shows as pictures."""
    return {address for shown in _SHOWN.finditer(text) for address in _find_addresses(shown[0].rpartition("](")[2])}


def is_picture(address: str) -> bool:
    """Whether an address's path ends as a picture's does."""
    return _PICTURE.match(address) is not None


def trim_address(address: str) -> str:
    """Without the punctuation of the sentence that it stands in."""
    return address.rstrip(".,;:!?*~")


def _find_addresses(text: str) -> Iterator[str]:
    if "://" in text:
        yield from (trim_address(match[0]) for match in _ADDRESS.finditer(text))
