"""The layout of a packed row: where the tokens of a batch's texts lie, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Features = dict[str, Any]  # what texts become in the tokenizer: input_ids, attention_mask, ...
_SHORTEST_PREFIX = 8  # a shorter one (BOS, mostly) costs more to put before every text's keys than it saves


@dataclass
class Prefix:
    """P tokens that texts begin with, and what the layers make of them."""

    ids: Tensor  # (P,)
    # by layer, rotated keys and values: (1, key-value heads, P, head size) each
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    states: Tensor | None = None  # (P, hidden size), after the last layer

    def begins_with(self, ids: Tensor) -> int:
        """How many of `ids` it begins with.

        >>> Prefix(torch.tensor([5, 6, 7])).begins_with(torch.tensor([5, 6, 8, 9]))
        2
        """
        length = min(len(self.ids), len(ids))
        return _length_of_run(self.ids[:length] == ids[:length])


class Packing:
    """Where the tokens of B texts lie in a row of N tokens, of which the first `known` are not computed again.

    No dataclass: in half precision FSDP2 casts the arguments of layers and copies dataclasses, so `keeps` would be
    filled in a copy.
    """

    def __init__(
        self,
        prefix: int,  # number of tokens that all texts begin with; they lie first
        rests: list[int],  # number of tokens of each text after them, at least one
        tokens: Tensor,  # (N - known,) index of each token to compute in the flattened batch
        positions: Tensor,  # (N - known,) of each in its own text, from 0
        places: Tensor,  # as the batch: index of each token in the row, 0 for padding; or (B, 1): of the last tokens
        known: int = 0,
        kept: Prefix | None = None,  # of the batches before this one; it begins with the known tokens
        keeps: Prefix | None = None,  # of this batch, for those after it: the layers fill it in
    ) -> None:
        self.prefix, self.rests = prefix, rests
        self.tokens, self.positions, self.places = tokens, positions, places
        self.known, self.kept, self.keeps = known, kept, keeps
        self._masks: dict[Any, Tensor] = {}

    @property
    def new(self) -> int:
        """Tokens of the prefix that are computed."""
        return self.prefix - self.known

    def mask(self, before: int, length: int, window: int | None, like: Tensor) -> Tensor | None:
        """`causal_mask`, made once for all layers; None where it is plain causal attention."""
        if window is not None and window >= before + length:
            window = None
        if not before and window is None:
            return None
        key = (before, length, window, like.dtype, like.device)
        if key not in self._masks:
            self._masks[key] = causal_mask(before, length, window, like)
        return self._masks[key]


def causal_mask(before: int, length: int, window: int | None, like: Tensor) -> Tensor:
    """(length, before + length): 0 where token i of `length` tokens after `before` others sees a token, else -inf.

    >>> causal_mask(1, 2, None, torch.zeros(1))
    tensor([[0., 0., -inf],
            [0., 0., 0.]])
    >>> causal_mask(1, 2, 2, torch.zeros(1))
    tensor([[0., 0., -inf],
            [-inf, 0., 0.]])
    """
    seen = torch.ones(length, before + length, dtype=torch.bool, device=like.device).tril(before)
    if window is not None:
        seen = seen.triu(before - window + 1)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, -torch.inf)


def pack(
    features: Features, last_only: bool = False, kept: Prefix | None = None, keeping: bool = False
) -> Packing | None:
    """The packing of a batch, padded on either side or flattened; None if that would save nothing.

    `last_only` lays out the last tokens of a padded batch alone; `kept` is what batches before this one have computed,
    and with `keeping` this batch's prefix is to be kept, if it goes beyond that.
    """
    texts = texts_of(features)
    if texts is None:
        return None
    starts, lengths = texts
    padded = "cu_seq_lens_q" not in features
    shape, ids = features["input_ids"].shape, features["input_ids"].flatten()
    common = common_prefix(ids, starts, max(int(lengths.min()) - 1, 0))
    known = _worthwhile(kept.begins_with(ids[starts[0] : starts[0] + common])) if kept else 0
    new = _worthwhile(common - known) if len(lengths) > 1 else 0
    prefix = known + new
    rests = lengths - prefix
    if padded and not prefix and int(rests.sum()) == ids.numel():
        return None
    offsets = torch.arange(int(rests.sum()), device=ids.device) - (rests.cumsum(0) - rests).repeat_interleave(rests)
    first = torch.arange(prefix, device=ids.device)
    positions = torch.cat([first, prefix + offsets])
    tokens = torch.cat([starts[0] + first, starts.repeat_interleave(rests) + prefix + offsets])
    if padded and last_only:
        places = prefix + rests.cumsum(0)[:, None] - 1
    else:
        places = torch.zeros(ids.numel(), dtype=torch.long, device=ids.device)
        places[starts[:, None] + first] = first
        places[tokens[prefix:]] = torch.arange(prefix, len(tokens), device=ids.device)
        places = places.view(shape)
    keeps = Prefix(ids[tokens[:prefix]]) if keeping and new else None
    return Packing(prefix, rests.tolist(), tokens[known:], positions[known:], places, known, kept, keeps)


def texts_of(features: Features) -> tuple[Tensor, Tensor] | None:
    """(B,) where each text starts in the flattened batch, (B,) how many tokens it has; None if that is not known.

    >>> ids = torch.tensor([[0, 0, 5], [6, 7, 8]])
    >>> texts_of({"input_ids": ids, "attention_mask": (ids > 0).int()})
    (tensor([2, 3]), tensor([1, 3]))
    """
    ids = features.get("input_ids")
    if ids is None or ids.numel() == 0 or "packing" in features:
        return None
    if "cu_seq_lens_q" in features:
        bounds = features["cu_seq_lens_q"].long()
        return bounds[:-1], bounds.diff()
    if "attention_mask" not in features:
        return None
    present = features["attention_mask"]
    lengths = present.sum(dim=1)
    if not lengths.all():
        return None  # an empty text: leave it to the plain path
    return torch.arange(len(ids), device=ids.device) * ids.shape[1] + present.int().argmax(dim=1), lengths


def common_prefix(ids: Tensor, starts: Tensor, longest: int) -> int:
    """How many of the `longest` ids from each of `starts` are the same in all.

    >>> common_prefix(torch.tensor([5, 6, 7, 5, 6, 8, 5, 6]), torch.tensor([0, 3, 6]), 2)
    2
    """
    heads = ids[starts[:, None] + torch.arange(longest, device=ids.device)]
    return _length_of_run((heads == heads[0]).all(dim=0))


def _length_of_run(equal: Tensor) -> int:
    """How many are true before the first that is not."""
    return int(equal.long().cumprod(dim=0).sum())


def _worthwhile(tokens: int) -> int:
    return tokens if tokens >= _SHORTEST_PREFIX else 0
