"""The layout of a packed row: where the tokens of a batch's texts lie, and what they have in common.

The distinct texts lie in the order of their ids, so that those that begin alike are neighbours. Of each there are the
tokens after those that it shares with its neighbour before it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Features = dict[str, Any]  # what texts become in the tokenizer: input_ids, attention_mask, ...
_SHORTEST_PREFIX = 8  # a shorter one (BOS, mostly) costs more to put before every text's keys than it saves
_SHORTEST_SHARED = 2  # of two neighbours, after the prefix: more than BOS


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
        return int((self.ids[:length] == ids[:length]).long().cumprod(dim=0).sum())


class Packing:
    """Where the tokens of the distinct texts lie in a row of N tokens, of which the first `known` are not computed
    again.

    No dataclass: in half precision FSDP2 casts the arguments of layers and copies dataclasses, so `keeps` would be
    filled in a copy.
    """

    def __init__(
        self,
        prefix: int,  # number of tokens that all texts begin with; they lie first
        shared: list[int],  # number of tokens after them that each text begins with like the one before it
        rests: list[int],  # number of tokens of each text after those, at least one
        ids: Tensor,  # (N - known,) to compute
        positions: Tensor,  # (N - known,) of each in its own text, from 0
        places: Tensor,  # as the batch: index of each token in the row, 0 for padding; or (B, 1): of the last tokens
        known: int = 0,
        kept: Prefix | None = None,  # of the batches before this one; it begins with the known tokens
        keeps: Prefix | None = None,  # of this batch, for those after it: the layers fill it in
    ) -> None:
        self.prefix, self.shared, self.rests = prefix, shared, rests
        self.ids, self.positions, self.places = ids, positions, places
        self.known, self.kept, self.keeps = known, kept, keeps
        self._masks: dict[Any, Tensor] = {}

    @property
    def new(self) -> int:
        """Tokens of the prefix that are computed."""
        return self.prefix - self.known

    @property
    def computed(self) -> list[int]:
        """Tokens that are computed: of the prefix, if any, and of each text."""
        return [self.new, *self.rests] if self.new else self.rests

    @functools.cached_property
    def last(self) -> Tensor:
        """(number of distinct texts,) which of the computed tokens are the last of a text."""
        return torch.tensor(self.rests, device=self.ids.device).cumsum(dim=0) + (self.new - 1)

    @property
    def longest(self) -> int:
        return self.prefix + max(map(sum, zip(self.shared, self.rests, strict=True)))

    def mask(self, length: int, end: int, window: int | None, like: Tensor) -> Tensor | None:
        """(length, end) of `causal_mask`, which is made once for all layers: what the last `length` of `end` tokens
        see. None where that is plain causal attention.
        """
        if window is not None and window >= end:
            window = None
        if length == end and window is None:
            return None
        key = (window, like.dtype, like.device)
        if key not in self._masks:
            self._masks[key] = causal_mask(self.longest, window, like)
        return self._masks[key][end - length : end, :end]


def causal_mask(length: int, window: int | None, like: Tensor) -> Tensor:
    """(length, length): 0 where a token sees another, itself and up to `window` - 1 before it, else -inf.

    >>> causal_mask(3, 2, torch.zeros(1))
    tensor([[0., -inf, -inf],
            [0., 0., -inf],
            [-inf, 0., 0.]])
    """
    seen = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
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
    columns = torch.arange(int(lengths.max()), device=ids.device)
    present = columns < lengths[:, None]
    found = (starts[:, None] + columns).clamp(max=len(ids) - 1)
    # sorted, so that a text has more in common with its neighbour than with any before that
    distinct, which = ids[found].masked_fill(~present, -1).unique(dim=0, return_inverse=True)
    in_common = (distinct[1:] == distinct[:-1]).long().cumprod(dim=1).sum(dim=1)
    common = int(torch.cat([in_common, lengths - 1]).min())
    known = _worthwhile(kept.begins_with(distinct[0, :common])) if kept else 0
    new = _worthwhile(common - known) if len(distinct) > 1 else 0
    prefix = known + new
    shared = torch.cat([in_common.new_zeros(1), in_common - prefix])
    shared[shared < _SHORTEST_SHARED] = 0
    own = (columns >= prefix + shared[:, None]) & (distinct >= 0)
    rests = own.sum(dim=1)
    if padded and not prefix and int(rests.sum()) == ids.numel():
        return None
    first = columns[:prefix]
    # index in the row of each token of the distinct texts: what a text shares lies with the last one that has it
    index = torch.zeros_like(distinct)
    index[own] = torch.arange(prefix, prefix + int(rests.sum()), device=ids.device)
    index = index.cummax(dim=0).values
    index[:, :prefix] = first
    if padded and last_only:
        places = index[which, lengths - 1][:, None]
    else:
        places = torch.zeros_like(ids)
        places[found[present]] = index[which][present]
        places = places.view(shape)
    row = torch.cat([distinct[0, :prefix], distinct[own]])
    positions = torch.cat([first, columns.expand_as(own)[own]])
    keeps = Prefix(row[:prefix]) if keeping and new else None
    layout = prefix, shared.tolist(), rests.tolist(), row[known:], positions[known:], places
    return Packing(*layout, known, kept, keeps)


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


def _worthwhile(tokens: int) -> int:
    return tokens if tokens >= _SHORTEST_PREFIX else 0
