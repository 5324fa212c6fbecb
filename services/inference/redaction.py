"""What is taken out of recorded prompts and answers before they are kept: a table of regular expressions.

Each rule's finds become its name, "<email>", the same on both sides of a conversation, so that a call's arguments still
agree with its question. Every pattern here is linear: its parts are bounded, and it begins only where a word can begin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from services.common.errors import InvalidSpec, Violation

RULES: Mapping[str, str] = {
    "email": r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}",
    # A token that says what it is: OpenAI's and Stripe's, ours, Hugging Face's, GitHub's, GitLab's, Slack's, AWS's, Google's.
    "key": (
        r"(?<![A-Za-z0-9_-])(?:[spr]k[-_]|ft_|hf_|gh[opsur]_|github_pat_|glpat-|xox[abeprs]-|AKIA|ASIA|AIza)[A-Za-z0-9_-]{12,512}"
    ),
    "jwt": r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,4096}\.[A-Za-z0-9_-]{8,8192}\.[A-Za-z0-9_-]{8,1024}",
    "bearer": r"(?<![A-Za-z])[Bb]earer[ ]{1,4}(?P<secret>[A-Za-z0-9._~+/=-]{8,4096})",
    # "password": "…", api_key=…, 密码：…; only the value goes.
    "secret": (
        r"(?i:passwords?|passwd|api[-_ ]?key|secret(?:[-_ ]?key)?|access[-_ ]?key|(?:access|auth)[-_ ]?token|密码|口令|密钥)"
        r"[\"']?[ ]{0,4}[:=：是][ ]{0,4}[\"']?(?P<secret>[^\s\"',;&<>{}\[\]，。；]{6,256})"
    ),
    # +86 139…, +1 (555) …; China's mobile numbers; North America's, written in groups.
    "phone": (
        r"(?<![\w+])\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}(?!\d)"
        r"|(?<![\d.])1[3-9]\d(?:[ -]?\d{4}){2}(?![\d.])"
        r"|(?<![\d.])\(?[2-9]\d{2}\)?[ .-]\d{3}[.-]\d{4}(?!\d)"
    ),
    # China's identity card: 17 digits with a date of birth inside, and a check character.
    "id": r"(?<!\d)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)",
    # Payment cards in groups of four.
    "card": r"(?<![\d-])\d{4}(?:[ -]\d{4}){3}(?![\d-])",
}
"""Name → pattern. Of a pattern with a group `secret` only that group is replaced. Order: the first to find a text has it."""


class Redaction:
    """Replaces what its rules find."""

    def __init__(self, rules: Mapping[str, re.Pattern[str]]) -> None:
        self._rules = rules

    def clean_text(self, text: str) -> str:
        """The text without what the rules find."""
        for name, pattern in self._rules.items():
            text = pattern.sub(f"<{name}>" if "secret" not in pattern.groupindex else _value_only(name), text)
        return text

    def clean(self, value: Any) -> Any:
        """The same for every text inside of a JSON value; keys stay."""
        if isinstance(value, str):
            return self.clean_text(value)
        if isinstance(value, list):
            return [self.clean(item) for item in value]
        if isinstance(value, dict):
            return {key: self.clean(item) for key, item in value.items()}
        return value


def load_rules(file: Path | None) -> Redaction:
    """The default rules and those of a file. Raises InvalidSpec naming every rule that is wrong.

    file: YAML, {name: pattern}; a default's name with another pattern replaces it, with `false` turns it off.
    """
    rules = {name: re.compile(pattern) for name, pattern in RULES.items()}
    wrong = []
    for name, pattern in _read(file).items():
        if pattern is False:
            rules.pop(name, None)
            continue
        try:
            rules[name] = re.compile(pattern)
        except (re.error, TypeError) as error:
            wrong.append(Violation(f"{file}: {name}", f"is no regular expression: {error}"))
            continue
        if rules[name].search(""):
            wrong.append(Violation(f"{file}: {name}", "finds the empty text, so it would find something everywhere"))
    if wrong:
        raise InvalidSpec("FABRICTUNE_RECORD_RULES names rules that cannot be used", violations=wrong)
    return Redaction(rules)


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidSpec(f"FABRICTUNE_RECORD_RULES: {file} cannot be read as YAML: {error}") from None
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
        raise InvalidSpec(f"FABRICTUNE_RECORD_RULES: {file} must hold a mapping, such as `customer: 'C-\\d{{6}}'`")
    return read


def _value_only(name: str) -> Any:
    def replace(match: re.Match[str]) -> str:
        start, end = match.start("secret") - match.start(), match.end("secret") - match.start()
        return f"{match[0][:start]}<{name}>{match[0][end:]}"

    return replace
