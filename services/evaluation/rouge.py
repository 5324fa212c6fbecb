"""Rouge-L: how much of a reference an answer says, in its order.

The longest common subsequence of tokens, as F-measure with equal weights. Source: Lin 2004, ROUGE: A Package for Automatic
Evaluation of Summaries, section 3, with beta = 1. A token is a word of letters or digits in lower case (as in Google's
rouge_score), and each Chinese, Japanese or Korean character is one by itself, since such text has no blanks between words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
MAX_TOKENS = 4000
"""Of each text; what comes later is not compared. The time grows with the product of both lengths."""


def rouge_l(answer: str, reference: str) -> float:
    """F-measure from 0 to 1; 0 when either has no tokens."""
    given, wanted = split_tokens(answer)[:MAX_TOKENS], split_tokens(reference)[:MAX_TOKENS]
    common = count_common(given, wanted)
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def split_tokens(text: str) -> list[str]:
    """Words in lower case, and CJK characters one by one."""
    return _TOKEN.findall(text.lower())


def count_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence. Source: Hyyrö 2004, bit-parallel: one big integer is a row of the table."""
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    whole = (1 << len(first)) - 1
    row = whole
    for token in second:
        hit = row & places.get(token, 0)
        row = ((row + hit) | (row - hit)) & whole
    return len(first) - row.bit_count()
