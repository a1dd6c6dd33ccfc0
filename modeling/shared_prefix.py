"""A batch of texts as one row without padding, in which the tokens that all texts begin with appear once.

The states of a causal decoder do not depend on what follows. So a prompt that every text of a batch carries is
computed once, and every text attends to it; and as the texts lie end to end, no padding is computed either:

    [prefix | rest of text 1 | rest of text 2 | ...]    one row, each token at its position in its own text

The prefix is the longest common prefix of the batch's token ids, after the usual tokenisation of whole texts: a prompt
tokenised on its own would end in other tokens. Everything but attention works on tokens one by one, so this is exact
up to rounding, forward and backward, whatever the weights are: LoRA, gradient checkpointing, GradCache. Only where
dropout is on are its draws others (one draw for the prefix of all texts).

sentence-transformers' encode, losses and trainer, transformers' modules and all that is saved stay as they are: two
hooks on the first module pack a batch and lay the states out again, and one attention function runs between them.
A key-value cache would not do: transformers drops it under gradient checkpointing, and trains on, wrongly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Causal decoders whose layers know of other tokens by attention and rotary positions alone, and whose attention is
# softmax(q k * scaling) v within a causal window: what `packed_attention` computes. (Gemma 2 caps its logits, GPT-OSS
# has sinks.)
ARCHITECTURES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_ATTENTION = "shared_prefix"  # its name in transformers
_SHORTEST_PREFIX = 8  # a shorter one (BOS, mostly) costs more to put before every text's keys than it saves

Features = dict[str, Any]


@dataclass
class TokenCounts:
    """What a context has saved, in tokens that went through the layers (GradCache's second pass counts again)."""

    tokens_computed: int = 0
    tokens_padded: int = 0  # those that the plain path would have computed: rows times the longest text


@contextmanager
def share_prefix(model: SentenceTransformer) -> Iterator[TokenCounts]:
    """Within the context, `model` computes what the texts of a batch begin with once, and no padding.

    Vectors and gradients are those of the plain path up to rounding, in `encode` and in training. A model that this
    cannot be done for (an encoder, a bidirectional decoder, an architecture not in `ARCHITECTURES`) runs as before;
    so does a batch in which nothing is shared and nothing padded. With last-token pooling the states of other tokens
    are not laid out again: `token_embeddings` then holds the last one alone. A backward pass belongs into the context
    that its forward pass ran in: gradient checkpointing runs the layers once more, and fails outside.

    >>> with share_prefix(model) as counts:                                                        # doctest: +SKIP
    ...     vectors = model.encode(texts, prompt=prompt)
    >>> counts.tokens_padded / counts.tokens_computed                                              # doctest: +SKIP
    10.4
    """
    counts = TokenCounts()
    transformer = model[0]
    if not can_share(transformer):
        yield counts
        return
    backbone = transformer.model
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation(_ATTENTION)
    hooks = [
        transformer.register_forward_pre_hook(_Packer(counts, pools_last_token([*model][1:]))),
        transformer.register_forward_hook(_unpack),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
        backbone.set_attn_implementation(before)


def can_share(module: nn.Module) -> bool:
    """Whether `module`, the first of a SentenceTransformer, is a causal decoder of a known architecture."""
    if not isinstance(module, Transformer) or module.config.model_type not in ARCHITECTURES:
        return False
    bidirectional = getattr(module.config, "use_bidirectional_attention", False)
    return getattr(module.config, "is_causal", True) and not bidirectional


def pools_last_token(modules: Sequence[nn.Module]) -> bool:
    """Whether the modules after the first read nothing but the state of each text's last token."""
    pooling = next(iter(modules), None)
    return isinstance(pooling, Pooling) and pooling.pooling_mode == "lasttoken" and pooling.include_prompt


# --- layout ---------------------------------------------------------------------------------------------------------


@dataclass
class Packing:
    """Where the tokens of B texts lie in a row of N tokens."""

    prefix: int  # tokens that all texts begin with; they lie first
    own: list[int]  # tokens of each text after them, at least one
    tokens: Tensor  # (N,): place of each token of the row in the flattened batch
    positions: Tensor  # (N,): of each token in its own text, from 0
    places: Tensor  # shape of the batch: place of each of its tokens in the row; 0, of any token, for padding.
    # Or (B, 1): place of each text's last token
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def spans(self) -> list[int]:
        """Lengths of the parts of the row: prefix, if there is one, and texts."""
        return [self.prefix, *self.own] if self.prefix else self.own

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """(longest, prefix + longest) additive: what the own tokens of a text see of the prefix and of themselves.

        The mask of a shorter text is its upper left corner. None is plain causal attention.
        """
        longest = max(self.own)
        binding = window is not None and window < self.prefix + longest
        if not self.prefix and not binding:
            return None
        key = (window if binding else None, like.dtype, like.device)
        if key not in self._masks:  # once for all layers
            self._masks[key] = causal_mask(self.prefix, longest, window if binding else None, like)
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


def pack(features: Features, last_only: bool = False) -> Packing | None:
    """The packing of a batch, padded on either side or flattened; None if that would save nothing.

    `last_only` lays out the last tokens of a padded batch alone.
    """
    ids = features.get("input_ids")
    if ids is None or ids.numel() == 0 or "packing" in features:
        return None
    if "cu_seq_lens_q" in features:
        bounds = features["cu_seq_lens_q"].long()
        starts, lengths, padded = bounds[:-1], bounds.diff(), False
    elif "attention_mask" in features:
        present = features["attention_mask"]
        lengths = present.sum(dim=1)
        starts = torch.arange(len(ids), device=ids.device) * ids.shape[1] + present.int().argmax(dim=1)
        padded = True
    else:
        return None
    shortest = int(lengths.min())
    if shortest == 0 and padded:
        return None  # a text without a token: what the plain path makes of it is its own affair
    prefix = common_prefix(ids.flatten(), starts, shortest - 1) if len(lengths) > 1 and shortest > 0 else 0
    if prefix < _SHORTEST_PREFIX:
        prefix = 0
    own = lengths - prefix
    if padded and not prefix and int(own.sum()) == ids.numel():
        return None
    offsets = torch.arange(int(own.sum()), device=ids.device) - (own.cumsum(0) - own).repeat_interleave(own)
    first = torch.arange(prefix, device=ids.device)
    positions = torch.cat([first, prefix + offsets])
    tokens = torch.cat([starts[0] + first, starts.repeat_interleave(own) + prefix + offsets])
    if padded and last_only:
        places = prefix + own.cumsum(0)[:, None] - 1
    else:
        places = torch.zeros(ids.numel(), dtype=torch.long, device=ids.device)
        places[starts[:, None] + first] = first
        places[tokens[prefix:]] = torch.arange(prefix, len(tokens), device=ids.device)
        places = places.view(ids.shape)
    return Packing(prefix, own.tolist(), tokens, positions, places)


def common_prefix(ids: Tensor, starts: Tensor, longest: int) -> int:
    """How many of the `longest` ids from each of `starts` are the same in all.

    >>> common_prefix(torch.tensor([5, 6, 7, 5, 6, 8, 5, 6]), torch.tensor([0, 3, 6]), 2)
    2
    """
    heads = ids[starts[:, None] + torch.arange(longest, device=ids.device)]
    return int((heads == heads[0]).all(dim=0).long().cumprod(dim=0).sum())


# --- hooks on the first module --------------------------------------------------------------------------------------


@dataclass
class _Packer:
    """Forward pre-hook: hands the module a packed row in the place of the batch."""

    counts: TokenCounts
    last_only: bool

    def __call__(self, module: nn.Module, args: tuple[Features]) -> tuple[Features] | None:
        (features,) = args
        packing = pack(features, self.last_only)
        if packing is None:
            computed = features["input_ids"].numel() if "input_ids" in features else 0
            self.counts.tokens_computed += computed
            self.counts.tokens_padded += computed
            return None
        self.counts.tokens_computed += len(packing.tokens)
        self.counts.tokens_padded += len(packing.own) * (packing.prefix + max(packing.own))
        ids = features["input_ids"]
        return (
            {
                "input_ids": ids.flatten()[packing.tokens][None],
                "position_ids": packing.positions[None],
                # transformers makes no mask where it is given one of four dimensions. Of no size, so that every
                # attention function but ours fails: a backward pass outside the context does, instead of going wrong
                "attention_mask": ids.new_empty((1, 1, 0, 0), dtype=torch.bool),
                "packing": packing,
                "batch": features,
            },
        )


def _unpack(module: Transformer, args: tuple[Features], output: Features) -> Features | None:
    """Forward hook: the states of the row, laid out as the batch was, or the last ones; pooling notices nothing."""
    if "packing" not in output:
        return None
    features, places = output["batch"], output["packing"].places
    states = output[module.module_output_name].squeeze(0)
    rows = states.index_select(0, places.flatten())
    features[module.module_output_name] = rows.view(*places.shape, -1)
    return features


# --- attention ------------------------------------------------------------------------------------------------------


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each text to the prefix and itself, as transformers' AttentionInterface calls it.

    Args:
        query: (1, heads, N, head size), rotated.
        key: (1, key-value heads, N, head size), rotated; value likewise.
        packing: where the texts lie; None is a padded batch, which attends as `sdpa` does.
        sliding_window: tokens that a token sees, itself included; None is all.

    Returns:
        (1, N, heads, head size), and None for the weights.
    """
    if packing is None:
        settings = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if query.is_cuda and not dropout:
        # under autocast rotary positions leave queries and keys in float32, values not
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        if dtype in (torch.float16, torch.bfloat16):
            query, key, value = (part.to(dtype) for part in (query, key, value))
            return _varlen_attention(query, key, value, packing, scaling, sliding_window), None
    return _attention_by_text(query, key, value, packing, dropout, scaling, sliding_window), None


def _attention_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One call of torch's attention for the prefix and one for each text: on a CPU as fast as a single one."""
    settings = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
    queries, keys, values = (part.split(packing.spans, dim=2) for part in (query, key, value))
    states = []
    if packing.prefix:
        mask = None
        if window is not None and window < packing.prefix:
            mask = causal_mask(0, packing.prefix, window, query)
        attended = scaled_dot_product_attention(
            queries[0], keys[0], values[0], attn_mask=mask, is_causal=mask is None, **settings
        )
        states.append(attended)
        queries = queries[1:]
        keys, values = (_after_prefix(part) for part in (keys, values))
    mask = packing.mask(window, query)
    for length, q, k, v in zip(packing.own, queries, keys, values, strict=True):
        own_mask = None if mask is None else mask[:length, : packing.prefix + length]
        states.append(scaled_dot_product_attention(q, k, v, attn_mask=own_mask, is_causal=mask is None, **settings))
    return torch.cat(states, dim=2).transpose(1, 2).contiguous()


def _after_prefix(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Keys (or values) of the prefix before those of each text.

    The gradients of the prefix's are summed over the texts in one sum (the backward of `expand`), which in bfloat16
    loses less than adding them up one by one.
    """
    prefix, *own = parts
    copies = prefix.expand(len(own), -1, -1, -1).split(1)
    return [torch.cat(pair, dim=2) for pair in zip(copies, own, strict=True)]


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """One call of the flash kernel for sequences of different lengths, of fewer queries than keys where a text has a
    prefix. Half precision on CUDA alone. Not run yet: there was no GPU.
    """
    device = query.device
    spans = packing.spans
    visible = [packing.prefix, *(packing.prefix + length for length in packing.own)] if packing.prefix else spans
    queries = query[0].transpose(0, 1)
    keys, values = (_with_prefixes(part[0].transpose(0, 1), packing) for part in (key, value))
    bounds = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (spans, visible)
    ]
    states = varlen_attn(
        queries.contiguous(),
        keys,
        values,
        *bounds,
        max(spans),
        max(visible),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return states[None]


def _with_prefixes(part: Tensor, packing: Packing) -> Tensor:
    """(N, heads, head size) -> prefix, then of each text prefix and own part, end to end."""
    if not packing.prefix:
        return part.contiguous()
    prefix, *own = part.split(packing.spans)
    copies = prefix.expand(len(own), *prefix.shape)  # its gradient is one sum, see _after_prefix
    return torch.cat([prefix, *itertools.chain.from_iterable(zip(copies, own, strict=True))])


AttentionInterface.register(_ATTENTION, packed_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)  # for batches that are not packed
