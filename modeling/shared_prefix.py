"""A batch of texts as one row without padding, in which the tokens that all texts begin with appear once.

The states of a causal decoder do not depend on what follows. So a prompt that all texts of a batch share is computed
once, and every text attends to it; as the texts lie end to end, no padding is computed either:

    [prefix | rest of text 1 | rest of text 2 | ...]    one row, each token at its position in its own text

The prefix is the longest common prefix of the batch's token ids, after the usual tokenisation of whole texts: a prompt
tokenised on its own would end in other tokens. What a text shares with others beyond the prefix is computed once too,
and so are equal texts. Where last tokens alone are pooled, the last layer computes keys and values of the whole row,
and all else (94 % of its work in SmolLM2) of those tokens. All but attention works on tokens one by one, so this is
exact up to rounding, forward and backward, with LoRA, gradient checkpointing and GradCache. Only dropout draws other
masks.

The batches of one call of `encode` share their prefix too: the first one's keys and values are kept until the call
ends, within which weights, adapters, autocast, device and config cannot change. `encode` sorts its texts by their
length, against padding; as there is none here, they are sorted by how they begin.

Two hooks on the first module pack a batch and unpack the states, one attention function runs between them, hooks in
the last layer cut it to the last tokens, `encode` is wrapped; all else stays as it is. transformers' key-value cache
would not do: gradient checkpointing drops it, and the model trains on, wrongly.
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
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling.packing import Features, Packing, Prefix, pack, texts_of

# Causal decoders whose layers read other tokens by attention alone, and whose attention is softmax(q k * scaling) v
# within a causal window: what `packed_attention` computes. (Gemma 2 caps its logits, GPT-OSS has sinks.)
ARCHITECTURES = ("gemma3_text", "gemma4_text", "llama", "ministral3", "mistral", "qwen2", "qwen3", "qwen3_5_text")
_ATTENTION = "shared_prefix"  # its name in transformers
_FLASH_HEAD_SIZE = 256  # the largest that torch's flash kernel takes


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

    Vectors and gradients are those of the plain path up to rounding. A model that this cannot be done for runs as
    before, and a warning says why, once; so does a batch without padding or prefix. With last-token pooling,
    `token_embeddings` holds the last tokens' states alone. Run the backward pass in the context of its forward pass:
    gradient checkpointing computes the layers again, and fails outside.

    >>> with share_prefix(model) as counts:                                                        # doctest: +SKIP
    ...     vectors = model.encode(texts, prompt=prompt)
    >>> counts.tokens_padded / counts.tokens_computed                                              # doctest: +SKIP
    13.3
    """
    transformer = model[0]
    packer = _Packer(pools_last_token([*model][1:]))
    if reason := why_not(transformer):
        _warn_once(reason)
        yield packer.counts
        return
    backbone = transformer.model
    attention = backbone.config._attn_implementation
    outer = {name: vars(model).get(name) for name in ("encode", "_input_length")}
    backbone.set_attn_implementation(_ATTENTION)
    hooks = [transformer.register_forward_pre_hook(packer.pack), transformer.register_forward_hook(packer.unpack)]
    if packer.last_only and attention != _ATTENTION:  # else a context around this one has cut it already
        hooks += _LastTokens().cut(backbone.layers[-1])
    model.encode = functools.partial(packer.encode, model.encode)
    if rotates_by_position(backbone):  # else a vector depends on which texts are in its batch
        model._input_length = alphabetical  # by which `encode` sorts
    try:
        yield packer.counts
    finally:
        for name, value in outer.items():
            vars(model).pop(name, None)
            if value is not None:
                setattr(model, name, value)
        for hook in hooks:
            hook.remove()
        backbone.set_attn_implementation(attention)


def why_not(module: nn.Module) -> str | None:
    """Why texts cannot share a prefix in `module`, the first of a SentenceTransformer; None if they can."""
    if not isinstance(module, Transformer):
        return f"{type(module).__name__} is no Transformer"
    config = module.config
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    causal = getattr(config, "is_causal", True) and all(getattr(part, "is_causal", True) for part in module.modules())
    if not causal or getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return f"{config.model_type} attends in both directions"
    if others:
        return f"{config.model_type} has layers of {', '.join(sorted(others))}, which carry a state along the row"
    return None if config.model_type in ARCHITECTURES else f"{config.model_type} is not one of them"


def pools_last_token(modules: Sequence[nn.Module]) -> bool:
    """Whether the modules after the first read nothing but the state of each text's last token."""
    pooling = next(iter(modules), None)
    return isinstance(pooling, Pooling) and pooling.pooling_mode == "lasttoken" and pooling.include_prompt


def rotates_by_position(backbone: nn.Module) -> bool:
    """Whether the rotary angles of a token depend on its position alone, not on the batch's longest text."""
    kinds = backbone.rotary_emb.rope_type
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]  # Gemma has one for each type of layer
    return not any("dynamic" in kind or kind == "longrope" for kind in kinds)


def alphabetical(text: Any) -> int:
    """A number that is smaller the later a text comes in the order of its bytes, of which 64 are looked at.

    >>> sorted(["a man", "b", "a", "a man eats"], key=alphabetical, reverse=True)
    ['a', 'a man', 'a man eats', 'b']
    """
    if not isinstance(text, str):
        return SentenceTransformer._input_length(text)
    return -int.from_bytes(text.encode("utf-8", "surrogatepass")[:64].ljust(64, b"\0"), "big")


@functools.cache
def _warn_once(reason: str) -> None:
    logging.getLogger(__name__).warning(
        f"share_prefix changes nothing for this model: {reason}; it is for causal decoders of type "
        f"{', '.join(ARCHITECTURES)}"
    )


# --- hooks on the first module, and on encode -----------------------------------------------------------------------


@dataclass
class _Packer:
    """Gives the module a packed row instead of a batch, and lays its states out as the batch was."""

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
        self.counts.tokens_computed += len(packing.ids)
        self.counts.tokens_padded += len(texts_of(features)[0]) * packing.longest
        return (
            {
                "input_ids": packing.ids[None],
                "position_ids": packing.positions[None],
                # transformers makes no mask where it is given one of four dimensions. Of no size, so that any
                # attention function but ours fails, as in a backward pass outside the context, and none goes wrong
                "attention_mask": packing.ids.new_empty((1, 1, 0, 0), dtype=torch.bool),
                "packing": packing,
                "batch": features,
            },
        )

    def unpack(self, module: Transformer, args: tuple[Features], output: Features) -> Features | None:
        """Forward hook: the states of all tokens, or of the last ones alone, where pooling looks for them."""
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

    def encode(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`encode(*args, **kwargs)`, whose batches share their prefix; it is freed in the end."""
        self.encoding = True
        try:
            return encode(*args, **kwargs)
        finally:
            self.encoding, self.kept = False, None


# --- the last layer -------------------------------------------------------------------------------------------------


class _LastTokens:
    """Hooks of the last layer: its queries, its attention's output and its MLP are computed for the tokens alone that
    are pooled. Of the others it needs keys and values; their states stay unfinished.
    """

    which: Tensor | None = None  # places in the row; None where it is not packed
    length = 0  # of the row

    def cut(self, layer: nn.Module) -> list[RemovableHandle]:
        attention = layer.self_attn
        hooks = [attention.register_forward_pre_hook(self.begin, with_kwargs=True)]
        for module in (attention.q_proj, attention.o_proj, layer.mlp):
            hooks += [module.register_forward_pre_hook(self.select), module.register_forward_hook(self.put_back)]
        return hooks

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Here, as gradient checkpointing runs the layer's parts again and not its hooks."""
        packing = kwargs.get("packing")
        self.which = packing and packing.last

    def select(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.which is None:
            return None
        self.length = args[0].shape[1]
        return (args[0].index_select(1, self.which),)

    def put_back(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self.which is None:
            return None
        return output.new_zeros(1, self.length, output.shape[-1]).index_copy(1, self.which, output)


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
        sliding_window: number of tokens that a token sees, itself included; None is all.

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
    # under autocast rotary positions leave queries and keys in float32, values not
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    halves = query.is_cuda and dtype in (torch.float16, torch.bfloat16)
    if halves and not dropout and query.shape[-1] <= _FLASH_HEAD_SIZE:
        query, key, value = (part.to(dtype) for part in (query, key, value))
        return _varlen_attention(query, key, value, packing, scaling, sliding_window), None
    return _attention_by_text(query, key, value, packing, scaling, sliding_window, dropout), None


def _attention_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """One call of torch's attention for the prefix and one for each text: on a CPU as fast as a single one."""
    settings = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
    states = []
    for part, *seen in zip(
        query.split(packing.computed, dim=2), _seen_by_each(key, packing), _seen_by_each(value, packing), strict=True
    ):
        mask = packing.mask(part.shape[2], seen[0].shape[2], window, query)
        states.append(scaled_dot_product_attention(part, *seen, attn_mask=mask, is_causal=mask is None, **settings))
    return torch.cat(states, dim=2).transpose(1, 2).contiguous()


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """One call of the flash kernel for sequences of different lengths, of fewer queries than keys where a text has a
    prefix. Half precision on CUDA alone. Not run yet: there was no GPU.
    """
    keys, values = (_seen_by_each(part, packing) for part in (key, value))
    lengths = packing.computed, [part.shape[2] for part in keys]
    bounds = [
        torch.tensor([0, *itertools.accumulate(part)], dtype=torch.int32, device=query.device) for part in lengths
    ]
    rows = (torch.cat(parts, dim=2)[0].transpose(0, 1).contiguous() for parts in ([query], keys, values))
    seen = (-1 if window is None else window - 1, 0)
    states = varlen_attn(*rows, *bounds, *map(max, lengths), scale=scaling, window_size=seen, enable_gqa=True)
    return states[None]


def _seen_by_each(part: Tensor, packing: Packing) -> list[Tensor]:
    """The keys (or values) that the computed tokens of the prefix see, if there are any, and those of each text: of
    the prefix, shared with the text before it, its own.

    The gradients of the prefix's are summed over the texts in one sum (the backward of `expand`), which in bfloat16
    loses less than adding them up one by one.
    """
    prefix, *rests = part.split([packing.prefix, *packing.rests], dim=2)
    copies = prefix.expand(len(rests), -1, -1, -1).split(1)
    seen, rest = [prefix] if packing.new else [], None
    for copy, shared, own in zip(copies, packing.shared, rests, strict=True):
        rest = torch.cat([rest[:, :, :shared], own], dim=2) if shared else own
        seen.append(torch.cat([copy, rest], dim=2) if packing.prefix else rest)
    return seen


AttentionInterface.register(_ATTENTION, packed_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)  # for batches that are not packed
