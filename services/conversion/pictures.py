"""Results with pictures: AgentFabric's prompt asks that an address in a result is shown as `![图片](url)`; this sees to it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from services.common.fabric import Turn
from services.common.pictures import ADDRESS, SHOWN, find_pictures, find_shown, trim_address

MARKS: Mapping[str, str] = {"zh": "![图片]({})", "en": "![Image]({})"}
"""Language → how the prompt wants a picture (fabric.URL_ZH, URL_EN)."""
# Code stays as it is, and so does what is shown already, also as part of a link; all else that holds an address is told apart.
_PART = re.compile(
    rf"(?P<kept>```.*?(?:```|\Z)|\[{SHOWN}\]\([^)\n]{{0,2000}}\)|{SHOWN})"
    rf"|<img\s[^>]{{0,300}}?src=[\"']?(?P<html>{ADDRESS})[^>]{{0,300}}>"
    rf"|(?<!!)\[[^\[\]\n]{{0,500}}\]\([ \t]*<?(?P<link>{ADDRESS})>?(?:[ \t]+\"[^\"\n]{{0,500}}\")?[ \t]*\)"
    rf"|<(?P<pointed>{ADDRESS})>|`(?P<quoted>{ADDRESS})`|(?<!\]\()(?P<bare>{ADDRESS})",
    re.DOTALL,
)


def has_pictures(turn: Turn) -> bool:
    """Whether a result may hold one; quick, since most hold no address at all."""
    for call in turn.calls:  # noqa: SIM110 - a generator costs more than what it looks at, and all rows come here
        if call.observation and "://" in call.observation:
            return True
    return False


def show_pictures(turn: Turn, language: str) -> Turn:
    """A turn in which every picture of a result is shown: where its address is named, else at the end of the answer.

    What is said between two calls counts as well. A turn that stops at a call or a result is left without an end.
    """
    pictures: dict[str, None] = {}
    shown: set[str] = set()
    calls = []
    for call in turn.calls:
        lead = _show(call.lead, pictures, language)
        shown |= find_shown(lead)
        calls.append(call._replace(lead=lead))
        pictures |= dict.fromkeys(find_pictures(call.observation or ""))
    if not pictures:
        return turn
    answer = _show(turn.answer, pictures, language)
    shown |= find_shown(answer)
    if answer:
        missing = [MARKS[language].format(url) for url in pictures if url not in shown]
        answer = "\n".join([answer.rstrip() if missing else answer, *missing])
    return Turn(tuple(calls), answer)


def _show(text: str, pictures: Mapping[str, None], language: str) -> str:
    """The text with every mention of these pictures as a picture."""
    if not pictures or "://" not in text:
        return text

    def show(part: re.Match[str]) -> str:
        address = part[part.lastgroup or 0]
        url = trim_address(address)
        if part.lastgroup == "kept" or url not in pictures:
            return part[0]
        after = address[len(url) :] if part.lastgroup == "bare" else ""
        return MARKS[language].format(url) + after

    return _PART.sub(show, text)
