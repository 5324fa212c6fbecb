"""Loaded into ms-swift by `--external_plugins` for `independent_questions: true`: questions of one prompt do not see each other.

Conversion puts several questions under one prompt, whose tools cost more tokens than they do. Trained as one conversation, all
but the first are answered with others in sight, as no user asks them, and what was called tells what will not be called next.
Here each question of a row whose channel is "independent" is encoded by itself, by ms-swift's own template. What all of them
begin with is kept once; each attends to that and to itself, at the positions that it would have alone: the gradient of
questions asked alone, at the price of one conversation.

Like swift_plugin.py it runs inside the child, in every rank, and imports nothing of fabrictune.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from swift.callbacks import callbacks_map
from swift.callbacks.base import TrainerCallback
from swift.template import MaxLengthError, Template
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CHANNEL = "independent"
"""As conversion writes it; ms-swift keeps a row's channel when it encodes it, and trains nothing of it."""
_CHUNK = 128
"""Positions of the prompt that attend to those before them in one multiplication."""


def split_questions(messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each question with its answer, under the system message that they share."""
    prompt = [m for m in messages[:1] if m["role"] == "system"]
    rest = messages[len(prompt) :]
    return [[*prompt, *rest[at : at + 2]] for at in range(0, len(rest), 2)]


def join_questions(alone: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Encoded questions as one row, in which what all begin with stands once; `position_ids` tell where each goes on."""
    if len(alone) == 1:  # with positions, too, for a batch of which only some rows have them goes wrong
        return {**alone[0], "position_ids": list(range(len(alone[0]["input_ids"])))}
    shared = 0
    shortest = min(len(encoded["input_ids"]) for encoded in alone)
    while shared < shortest and all(_same(alone[0], other, shared) for other in alone[1:]):
        shared += 1
    if any(encoded["labels"][shared] != -100 for encoded in alone):
        shared -= (
            1  # in the joined row a question's first token follows another one's last: nobody may learn it from there
        )
    joined = {key: list(value) for key, value in alone[0].items() if key in ("input_ids", "labels", "loss_scale")}
    joined["position_ids"] = list(range(len(joined["input_ids"])))
    for other in alone[1:]:
        for key in joined:
            rest = range(shared, len(other["input_ids"])) if key == "position_ids" else other[key][shared:]
            joined[key].extend(rest)
    return {**joined, "lengths": [len(joined["input_ids"])]}


def _same(one: dict[str, Any], other: dict[str, Any], place: int) -> bool:
    """Whether two rows have the same token there, which neither learns."""
    untrained = one["labels"][place] == other["labels"][place] == -100
    return untrained and bool(one["input_ids"][place] == other["input_ids"][place])


def find_parts(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Parts of a joined row, [begin, end): what is shared, then each question; one part where nothing was joined."""
    begins = [place for place in range(1, len(positions)) if positions[place] <= positions[place - 1]]
    if not begins:
        return [(0, len(positions))]
    edges = [0, positions[begins[0]], *begins, len(positions)]
    return list(pairwise(edges))


def make_mask(parts: Sequence[tuple[int, int]]) -> torch.Tensor:
    """What may be seen: bool [length, length], True where the row's position may attend to the column's."""
    length = parts[-1][1]
    part = torch.zeros(length, dtype=torch.long)
    for number, (begin, end) in enumerate(parts):
        part[begin:end] = number
    seen = torch.ones(length, length, dtype=torch.bool).tril_()
    return seen & ((part[None] == 0) | (part[None] == part[:, None]))


class PartsAttention(torch.autograd.Function):  # type: ignore[misc]
    """Attention on a CPU that multiplies only what a joined row may see: torch's takes the whole square, and its backward
    pass twice as long. query [1, heads, length, width], key and value [1, fewer heads, length, width].
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Any, scaling: float
    ) -> torch.Tensor:
        """The weighted values, as query."""
        groups, (heads, length, width) = key.shape[1], query.shape[1:]
        query = (query * scaling).view(groups, heads // groups, length, width)
        key, value = key[0], value[0]
        outcome = torch.empty_like(query)
        steps = _plan(parts)
        weights = []
        for begin, end, shared in steps:
            keys, values = _seen(key, begin, end, shared), _seen(value, begin, end, shared)
            scores = torch.bmm(_flat(query, begin, end), keys.transpose(1, 2))
            scores = scores.view(groups, -1, end - begin, keys.shape[1])
            scores[..., begin - end :] += _causal(end - begin, scores)
            weights.append(scores.softmax(-1))
            flat = weights[-1].view(groups, -1, keys.shape[1])
            outcome[:, :, begin:end] = torch.bmm(flat, values).view(groups, -1, end - begin, width)
        ctx.save_for_backward(query, key, value, outcome, *weights)
        ctx.steps, ctx.scaling = steps, scaling
        return outcome.view(1, heads, length, width)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, outcome, *weights = ctx.saved_tensors
        gradient = gradients[0].reshape(query.shape)
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
        means = (gradient.float() * outcome.float()).sum(-1, keepdim=True).to(query.dtype)
        for (begin, end, shared), weight in zip(ctx.steps, weights, strict=True):
            keys, values = _seen(key, begin, end, shared), _seen(value, begin, end, shared)
            flat = _flat(gradient, begin, end)
            scores = torch.bmm(flat, values.transpose(1, 2)).view(weight.shape)
            scores = scores.sub_(means[:, :, begin:end]).mul_(weight).view(len(key), -1, keys.shape[1])
            of_query[:, :, begin:end] = torch.bmm(scores, keys).view(*of_query.shape[:2], end - begin, -1)
            _add(of_key, torch.bmm(scores.transpose(1, 2), _flat(query, begin, end)), begin, end, shared)
            _add(of_value, torch.bmm(weight.view(scores.shape).transpose(1, 2), flat), begin, end, shared)
        whole = (1, -1, *query.shape[2:])
        of_query = of_query.mul_(ctx.scaling).view(whole)
        return of_query, of_key.to(key.dtype)[None], of_value.to(value.dtype)[None], None, None


def _plan(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(begin, end, how much of the beginning is seen besides) of each multiplication."""
    (_, shared), *questions = parts
    prompt = [(begin, min(begin + _CHUNK, shared), begin) for begin in range(0, shared, _CHUNK)]
    return prompt + [(begin, end, shared) for begin, end in questions]


def _seen(tensor: torch.Tensor, begin: int, end: int, shared: int) -> torch.Tensor:
    return tensor[:, :end] if shared == begin else torch.cat([tensor[:, :shared], tensor[:, begin:end]], 1)


def _add(total: torch.Tensor, more: torch.Tensor, begin: int, end: int, shared: int) -> None:
    total[:, :shared] += more[:, :shared]
    total[:, begin:end] += more[:, shared:]


def _flat(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """All heads that share a key, one below the other."""
    return tensor[:, :, begin:end].reshape(len(tensor), -1, tensor.shape[-1])


def _causal(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), dtype=like.dtype).triu_(1)


def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
           dropout: float = 0.0, scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As transformers' sdpa attention, and faster for one joined row on a CPU."""
    parts = getattr(attention_mask, "parts", None)
    if parts is None or dropout:
        return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    outcome = PartsAttention.apply(query, key, value, parts, scaling or query.shape[-1] ** -0.5)
    return outcome.transpose(1, 2).contiguous(), None


def see_parts(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Before a model's forward pass: the mask that belongs to position_ids, where questions were joined."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None or mask is None or mask.dim() != 2:
        return None
    rows = [find_parts(row[: int(kept.sum())].tolist()) for row, kept in zip(positions, mask, strict=True)]
    if all(len(parts) == 1 for parts in rows):
        return None
    seen = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.bool)
    for one, parts in zip(seen, rows, strict=True):
        length = parts[-1][1]
        one[:length, :length] = make_mask(parts)
        one[length:, 0] = True  # what pads a row sees something, or its softmax would not be a number
    seen = seen[:, None].to(mask.device)
    if len(rows) == 1 and seen.device.type == "cpu":
        seen.parts = rows[0]
    return args, {**kwargs, "attention_mask": seen}


class IndependentQuestions(TrainerCallback):  # type: ignore[misc]  # ms-swift has no types
    """Makes the model see a joined row's questions apart."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the mask before the model, where peft and accelerate have wrapped it."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model.register_forward_pre_hook(see_parts, with_kwargs=True)


def _encode_apart(encode: Callable[..., Any]) -> Callable[..., Any]:
    def encode_apart(self: Any, inputs: Any, *args: Any, return_length: bool = False, **kwargs: Any) -> Any:
        if not isinstance(inputs, dict):
            return encode(self, inputs, *args, return_length=return_length, **kwargs)
        apart = split_questions(inputs["messages"]) if inputs.get("channel") == CHANNEL else [inputs["messages"]]
        rows = [{**inputs, "channel": None, "messages": one} for one in apart]
        joined = join_questions([encode(self, row, *args, return_length=True, **kwargs) for row in rows])
        length = joined["lengths"][0]
        if self.max_length is not None and length > self.max_length:
            raise MaxLengthError(f"Current length of row({length}) is larger than the max_length({self.max_length}).")
        if not return_length:
            del joined["lengths"]
        return joined

    return encode_apart


_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
Template.encode = _encode_apart(Template.encode)
callbacks_map["fabrictune_questions"] = IndependentQuestions
