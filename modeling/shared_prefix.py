"""A batch of texts as one row without padding, in which the tokens that all texts begin with appear once.

The states of a causal decoder do not depend on what follows. So a prompt that every text of a batch carries is
computed once, and every text attends to it; and as the texts lie end to end, no padding is computed either:

    [prefix | rest of text 1 | rest of text 2 | ...]    one row, each token at its position in its own text

The prefix is the longest common prefix of the batch's token ids, after the usual tokenisation of whole texts: a prompt
tokenised on its own would end in other tokens. Everything but attention works on tokens one by one, so this is exact
up to rounding, forward and backward, whatever the weights are: LoRA, gradient checkpointing, GradCache. Only where
dropout is on are its draws others (one draw for the prefix of all texts).

The batches of one call of `encode` share their prefix too: the first one's keys and values are kept for the others,
which compute no more than what they begin with beyond it. They go when the call ends. Weights, adapters, autocast,
device and config cannot change within a call, so what is kept is never stale, and nothing has to watch for it.

sentence-transformers' losses and trainer, transformers' modules and all that is saved stay as they are: two hooks on
the first module pack a batch and lay the states out again, one attention function runs between them, and `encode` gets
a beginning and an end. transformers' own key-value cache would not do: it is dropped under gradient checkpointing, and
the model trains on, wrongly.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
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
    """Tokens of all forward passes in a context, in this process: GradCache's second passes and evaluations count too.

    Both are 0 for a model that nothing can be shared for.
    """

    tokens_computed: int = 0  # that went through the layers
    tokens_padded: int = 0  # that the plain path would have computed: rows times the longest text


@contextmanager
def share_prefix(model: SentenceTransformer) -> Iterator[TokenCounts]:
    """Within the context, `model` computes once what the texts of a batch or a call of `encode` share, and no padding.

    Vectors and gradients are those of the plain path up to rounding, in `encode` and in training. A model that this
    cannot be done for (an encoder, a bidirectional decoder, an architecture not in `ARCHITECTURES`) runs as before,
    and a warning says so, once; a batch in which nothing is shared and nothing padded runs as before, too. With
    last-token pooling the states of other tokens are not laid out again: `token_embeddings` then holds the last one
    alone. A backward pass belongs into the context that its forward pass ran in: gradient checkpointing runs the
    layers once more, and fails outside.

    >>> with share_prefix(model) as counts:                                                        # doctest: +SKIP
    ...     vectors = model.encode(texts, prompt=prompt)
    >>> counts.tokens_padded / counts.tokens_computed                                              # doctest: +SKIP
    13.3
    """
    transformer = model[0]
    packer = _Packer(pools_last_token([*model][1:]))
    if not can_share(transformer):
        _warn_once(transformer.config.model_type if hasattr(transformer, "config") else type(transformer).__name__)
        yield packer.counts
        return
    backbone = transformer.model
    attention = backbone.config._attn_implementation
    encode = vars(model).get("encode")  # of a context around this one
    backbone.set_attn_implementation(_ATTENTION)
    hooks = [
        transformer.register_forward_pre_hook(packer.pack),
        transformer.register_forward_hook(packer.unpack),
    ]
    model.encode = functools.partial(_encode, model.encode, packer)
    try:
        yield packer.counts
    finally:
        del model.encode
        if encode is not None:
            model.encode = encode
        for hook in hooks:
            hook.remove()
        backbone.set_attn_implementation(attention)


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


def rotates_by_position(backbone: nn.Module) -> bool:
    """Whether the rotary angles of a token are those of its position alone, however long the batch's longest text."""
    kinds = backbone.rotary_emb.rope_type
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]  # Gemma 3 has one for each type of layer
    return not any("dynamic" in kind or kind == "longrope" for kind in kinds)


@functools.cache
def _warn_once(kind: str) -> None:
    logging.getLogger(__name__).warning(
        f"share_prefix changes nothing for this model, of type {kind}: it is for causal decoders of type "
        f"{', '.join(ARCHITECTURES)}"
    )


# --- layout ---------------------------------------------------------------------------------------------------------


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

    No dataclass: in half precision FSDP2 casts what layers are called with, and copies dataclasses for that. What
    layers fill in would be lost.

    Args:
        prefix: tokens that all texts begin with; they lie first.
        own: tokens of each text after them, at least one.
        tokens: (N - known,): place of each token to compute in the flattened batch.
        positions: (N - known,): of each in its own text, from 0.
        places: shape of the batch: place of each of its tokens in the row; 0, of any token, for padding. Or (B, 1):
            place of each text's last token.
        kept: of batches before this one; it begins with the known tokens.
        keeps: this batch's, for those after it: the layers fill it in.
    """

    def __init__(
        self,
        prefix: int,
        own: list[int],
        tokens: Tensor,
        positions: Tensor,
        places: Tensor,
        known: int = 0,
        kept: Prefix | None = None,
        keeps: Prefix | None = None,
    ) -> None:
        self.prefix, self.own = prefix, own
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

    Args:
        last_only: lay out the last tokens of a padded batch alone.
        kept: what batches before this one have computed.
        keeping: this batch's prefix is to be kept, if it goes beyond that.
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
        places = places.view(shape)
    keeps = Prefix(ids[tokens[:prefix]]) if keeping and new else None
    return Packing(prefix, own.tolist(), tokens[known:], positions[known:], places, known, kept, keeps)


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
        return None  # a text without a token: what the plain path makes of it is its own affair
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


# --- hooks on the first module, and on encode -----------------------------------------------------------------------


@dataclass
class _Packer:
    """Hands the module a packed row in the place of a batch, and lays its states out as the batch was."""

    last_only: bool
    counts: TokenCounts = field(default_factory=TokenCounts)
    encoding: bool = False  # within a call of `encode`
    kept: Prefix | None = None  # what its batches so far have computed

    def pack(self, module: Transformer, args: tuple[Features]) -> tuple[Features] | None:
        """Forward pre-hook."""
        (features,) = args
        keeping = self.encoding and rotates_by_position(module.model)
        packing = pack(features, self.last_only, self.kept, keeping)
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

    def unpack(self, module: Transformer, args: tuple[Features], output: Features) -> Features | None:
        """Forward hook: the states of all tokens, or of the last ones alone; pooling notices nothing."""
        if "packing" not in output:
            return None
        packing, features, name = output["packing"], output["batch"], module.module_output_name
        states = output[name].squeeze(0)
        if packing.known:
            states = torch.cat([packing.kept.states[: packing.known], states])
        if packing.keeps:
            packing.keeps.states = states[: packing.prefix].clone()
            self.kept = packing.keeps  # only now that it is whole
        rows = states.index_select(0, packing.places.flatten())
        features[name] = rows.view(*packing.places.shape, -1)
        return features


def _encode(encode: Callable[..., Any], packer: _Packer, *args: Any, **kwargs: Any) -> Any:
    """`encode(*args, **kwargs)`, whose batches share their prefix; it is freed in the end."""
    packer.encoding = True
    try:
        return encode(*args, **kwargs)
    finally:
        packer.encoding, packer.kept = False, None


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
        query: (1, heads, N - known, head size), rotated.
        key: (1, key-value heads, N - known, head size), rotated; value likewise.
        packing: where the texts lie; None is a padded batch, which attends as `sdpa` does.
        sliding_window: tokens that a token sees, itself included; None is all.

    Returns:
        (1, N - known, heads, head size), and None for the weights.
    """
    if packing is None:
        settings = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if packing.known:
        kept = (part[:, :, : packing.known] for part in packing.kept.layers[module.layer_idx])
        key, value = (torch.cat(parts, dim=2) for parts in zip(kept, (key, value), strict=True))
    if packing.keeps:  # copies: views would keep the whole row
        packing.keeps.layers[module.layer_idx] = tuple(part[:, :, : packing.prefix].clone() for part in (key, value))
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

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        settings = {"is_causal": mask is None, "dropout_p": dropout, "scale": scaling, "enable_gqa": True}
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)

    prefix_query, *queries = query.split([packing.new, *packing.own], dim=2)
    (prefix_key, *keys), (prefix_value, *values) = (
        part.split([packing.prefix, *packing.own], dim=2) for part in (key, value)
    )
    states = []
    if packing.new:
        mask = packing.mask(packing.known, packing.new, window, query)
        states.append(attend(prefix_query, prefix_key, prefix_value, mask))
    if packing.prefix:
        keys, values = _after_prefix(prefix_key, keys), _after_prefix(prefix_value, values)
    mask = packing.mask(packing.prefix, max(packing.own), window, query)  # a shorter text's is its upper left corner
    for length, *text in zip(packing.own, queries, keys, values, strict=True):
        states.append(attend(*text, None if mask is None else mask[:length, : packing.prefix + length]))
    return torch.cat(states, dim=2).transpose(1, 2).contiguous()


def _after_prefix(prefix: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
    """Keys (or values) of the prefix before those of each text.

    The gradients of the prefix's are summed over the texts in one sum (the backward of `expand`), which in bfloat16
    loses less than adding them up one by one.
    """
    copies = prefix.expand(len(own), -1, -1, -1).split(1)
    return [torch.cat(pair, dim=2) for pair in zip(copies, own, strict=True)]


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """One call of the flash kernel for sequences of different lengths, of fewer queries than keys where a text has a
    prefix. Half precision on CUDA alone. Not run yet: there was no GPU.
    """
    texts = [packing.prefix + length for length in packing.own]
    lengths = ([packing.new, *packing.own], [packing.prefix, *texts]) if packing.new else (packing.own, texts)
    bounds = [
        torch.tensor([0, *itertools.accumulate(part)], dtype=torch.int32, device=query.device) for part in lengths
    ]
    keys, values = (_with_prefixes(part[0].transpose(0, 1), packing) for part in (key, value))
    states = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        *bounds,
        *map(max, lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return states[None]


def _with_prefixes(part: Tensor, packing: Packing) -> Tensor:
    """(N, heads, head size) -> prefix, if any of it is computed, then of each text prefix and own part, end to end."""
    if not packing.prefix:
        return part.contiguous()
    prefix, *own = part.split([packing.prefix, *packing.own])
    copies = prefix.expand(len(own), *prefix.shape)  # its gradient is one sum, see _after_prefix
    texts = itertools.chain.from_iterable(zip(copies, own, strict=True))
    return torch.cat([prefix, *texts] if packing.new else [*texts])


AttentionInterface.register(_ATTENTION, packed_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)  # for batches that are not packed
