r"""Lengths of training rows in a model's own tokens, so that a max_length can be chosen before a GPU is paid for.

A row is counted as training sees it: each message as `<|im_start|>role\n … <|im_end|>\n` (ChatML: three marks and the role),
and messages of the assistant that follow each other as one. A vocabulary without these marks has others in their place.
Files of the model's folder are read, never run: code that comes with a model stays where it is.
"""

from __future__ import annotations

import base64
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData

TOKENIZER_JSON, QWEN_TIKTOKEN = "tokenizer.json", "qwen.tiktoken"
MARKS = 3
"""<|im_start|>, <|im_end|> and the line break after it."""
HEADER = "assistant\n"
REMEMBERED, REMEMBERED_LENGTH = 1024, 16_384
"""So many system prompts of at most so many characters: 32 MB at the worst."""
# How Qwen-7B splits text before its merges. Source: tokenization_qwen.py of Qwen/Qwen-7B-Chat.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Messages = Sequence[Mapping[str, Any]]
CountTexts = Callable[[Sequence[str]], Sequence[int]]


class Tokenizer:
    """Counts tokens. For one thread of a process."""

    def __init__(self, count_texts: CountTexts) -> None:
        """count_texts: texts → tokens of each, without any that a model puts around a text."""
        self._count_texts = count_texts
        self._header = count_texts([HEADER])[0]
        self._system_prompts: dict[str, int] = {}

    def count(self, messages: Messages) -> int:
        """Tokens of a row."""
        return self.count_rows([messages])[0]

    def count_rows(self, rows: Sequence[Messages]) -> list[int]:
        """Tokens of each row. Cheaper than one by one: what rows have in common is counted once."""
        lengths = self._count_all({text: role == "system" for row in rows for role, text in _texts(row)})
        return [self._marks(row) + sum(lengths[text] for _, text in _texts(row)) for row in rows]

    def _marks(self, row: Messages) -> int:
        """Tokens around the messages; the assistant's role stands in the prompt, apart from what it says."""
        roles = ["", *(str(message["role"]) for message in row)]
        begun = [role for before, role in pairwise(roles) if not before == role == "assistant"]
        return MARKS * len(begun) + self._header * begun.count("assistant")

    def _count_all(self, texts: Mapping[str, bool]) -> Mapping[str, int]:
        """texts: text → whether it is a system prompt, which is likely to come again."""
        known = {text: n for text in texts if (n := self._system_prompts.pop(text, None)) is not None}
        new = [text for text in texts if text not in known]
        lengths = known | dict(zip(new, self._count_texts(new), strict=True))
        for text, is_system in texts.items():
            if is_system and len(text) <= REMEMBERED_LENGTH:
                self._system_prompts[text] = lengths[text]
        while len(self._system_prompts) > REMEMBERED:
            del self._system_prompts[next(iter(self._system_prompts))]  # the one that was asked for longest ago
        return lengths


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder. Raises InvalidData: there is none that can be read without running code."""
    if (folder / TOKENIZER_JSON).is_file():
        return Tokenizer(_open_tokenizer_json(folder / TOKENIZER_JSON))
    if (folder / QWEN_TIKTOKEN).is_file():
        return Tokenizer(_open_tiktoken(folder / QWEN_TIKTOKEN))
    raise InvalidData(
        f"{folder.name} has neither {TOKENIZER_JSON} nor {QWEN_TIKTOKEN}, so its tokens cannot be counted; leave "
        "`tokenizer` empty, or save the model's tokenizer as a fast one"
    )


def _texts(row: Messages) -> list[tuple[str, str]]:
    """(role, text to count) of each message: with its role, which is one text with it, unless it is the assistant's."""
    return [
        (role, text if role == "assistant" else f"{role}\n{text}")
        for role, text in ((str(message["role"]), str(message["content"])) for message in row)
    ]


def _open_tokenizer_json(file: Path) -> CountTexts:
    # Processes share the work out; threads of the library's own would fight over the same cores. It asks at its first use.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - tokenizers 0.23 raises nothing narrower
        raise InvalidData(f"{file.name} is no tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [len(e) for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _open_tiktoken(file: Path) -> CountTexts:
    import tiktoken

    ranks = _read_ranks(file)
    encoding = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [len(encoding.encode_ordinary(unicodedata.normalize("NFC", text))) for text in texts]


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Token → rank. tiktoken 0.14 reads such files too, but keeps copies by their paths where every user may write."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InvalidData(f"{file.name} line {number} is no token in base64 and its rank") from None
    if len(set(ranks.values())) != len(ranks) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise InvalidData(f"{file.name} is incomplete: each of the 256 bytes must have a rank, and each rank one token")
    return ranks
