"""A model to start from as a text embedder of stock sentence-transformers modules.

A bare decoder gets last-token pooling over a guaranteed end token, and unit length. A finished SentenceTransformer
goes on as it was published: tokenizer, end token, pooling, later modules and prompts; an argument replaces each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError
from common.models import ModelReference, fetch_settings, positions_in, resolve_model, without_bars
from common.plain_text import use_plain_text
from common.steps import write_json
from modeling.adapters import add_adapter, merge_adapter
from modeling.keys import DEFAULT_LENGTH
from modeling.portable import make_portable
from modeling.tokens import check_prompts, check_saved_text, check_text, finish_texts

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer
    from transformers import BitsAndBytesConfig, PreTrainedModel

# What `pooling:` means in recipes -> settings of sentence-transformers' Pooling, over the states of a text's tokens.
# BOS counts as the prompt's and EOS as the text's, so that no mean is ever empty. Where a prompt ends in a space that
# the tokenizer joins to the next word, as byte-level and metaspace BPE do, sentence-transformers counts that word's
# first token as the prompt's, in training and encoding alike; the states after it have seen it.
POOLING = {
    "eos": {"pooling_mode": "lasttoken"},
    "mean": {"pooling_mode": "mean"},
    "cls": {"pooling_mode": "cls"},  # the first token: of encoders, whose tokens see what follows
    "mean_without_prompt": {"pooling_mode": "mean", "include_prompt": False},
    "weighted_mean": {"pooling_mode": "weightedmean"},  # by position, 1, 2, ... (SGPT, arXiv 2202.08904, equation 2)
}
UNLIMITED = 10**6
BAR_FROM = 4 * 2**30  # bytes of weights whose saving shows a bar: below, it takes seconds


def build_encoder(
    model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
    pooling: str | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_config: PeftConfig | None = None,
    min_text_tokens: int = 16,
    num_hidden_layers: int | None = None,
) -> SentenceTransformer:
    """A start as an embedder; where nothing else is asked for, a finished one gives its published vectors.

    Args:
        model_name_or_path: any model reference (common.models): a Hub id (`revision`), a folder, package:NAME, a GGUF
            file.
        max_seq_length: longest text in tokens, prompt, BOS and EOS included; longer ones are truncated before EOS.
            None: the embedder's own; 512, or its positions, for a bare model.
        prompts: baked into the model by name, beside those that it has; each leaves `min_text_tokens` for the text.
        pooling: a key of POOLING. None: the embedder's own; "eos" for a bare model.
        dtype, attn_implementation: as in transformers; None keeps the checkpoint's.
        quantization_config: of the frozen weights, see modeling.adapters.quantization.
        peft_config: an adapter to inject and train; its weights are kept in float32, which bfloat16 updates need.
        num_hidden_layers: keep the first so many layers alone.

    Raises:
        InputError: no such model, code of its own, no EOS token to pool at, modules that do not fit together, a
            prompt that leaves too little room, too long a max_seq_length.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    if pooling is not None and pooling not in POOLING:
        raise InputError(f"pooling {pooling!r}: choose one of {', '.join(POOLING)}")
    model = resolve_model(str(model_name_or_path))
    model = dataclasses.replace(model, revision=model.revision or revision)
    model = dataclasses.replace(model, revision=fetch_settings(model))
    loading = {"dtype": dtype, "attn_implementation": attn_implementation, "quantization_config": quantization_config}
    loading = {key: value for key, value in loading.items() if value is not None}
    published = read_published(model)
    encoder = _load(model, published, loading, pooling or "eos")
    if published and pooling not in (None, published.pooling_name):
        encoder[1] = Pooling(encoder[0].get_embedding_dimension(), **POOLING[pooling])
    transformer = encoder[0]
    tokenizer = transformer.tokenizer
    finish_texts(tokenizer, published and published.pooling_name, pooling)
    set_length(
        transformer, max_seq_length, transformer.max_seq_length if published else DEFAULT_LENGTH, model.reference
    )
    keep_layers(transformer.model, num_hidden_layers, model.reference)
    keep_unpacked(transformer.model)
    embedding = transformer.model.get_input_embeddings()
    if embedding.padding_idx == tokenizer.eos_token_id:
        embedding.padding_idx = None  # a checkpoint that pads with EOS would never train the vector of EOS
    encoder.prompts = {**encoder.prompts, **(prompts or {})}
    check_text(encoder)
    check_prompts(tokenizer, encoder.prompts, encoder.max_seq_length, min_text_tokens)
    _check_modules(encoder, model.reference)
    if peft_config is not None:
        add_adapter(encoder, peft_config)
    return encoder


@dataclasses.dataclass(frozen=True)
class Published:
    """What a finished embedder's own files say of it, read without its weights."""

    pooling: dict[str, Any]  # settings of sentence-transformers' Pooling
    modules: tuple[str, ...]  # names of the classes, in order
    prompts: dict[str, str]
    max_seq_length: int | None

    @property
    def pooling_name(self) -> str:
        """The key of POOLING, or sentence-transformers' name where we have none."""
        known = {"include_prompt": True, **self.pooling}
        names = [name for name, settings in POOLING.items() if {"include_prompt": True, **settings} == known]
        return names[0] if names else str(self.pooling["pooling_mode"])


def read_published(model: ModelReference) -> Published | None:
    """What `model` is as a finished SentenceTransformer; None for a bare checkpoint, which has no modules.json.

    Raises:
        InputError: modules that are not sentence-transformers' own, or that do not begin with Transformer, Pooling.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = read_setting(model, "modules.json")
    if modules is None:
        return None
    for module in modules:
        if not module["type"].startswith("sentence_transformers."):
            raise InputError(
                f"model {model.reference!r}: its module {module['type']} is code of its own, which is not run here; "
                "start from a model of sentence-transformers' own modules"
            )
    names = tuple(module["type"].rpartition(".")[2] for module in modules)
    if names[:2] != ("Transformer", "Pooling"):
        raise InputError(
            f"model {model.reference!r}: its modules are {', '.join(names)}; Transformer, Pooling, ... train"
        )
    try:
        pooling = Pooling.load_config(model.name_or_path, subfolder=modules[1]["path"], revision=model.revision)
    except (OSError, ValueError) as error:
        raise InputError(f"model {model.reference!r}: its pooling cannot be read: {error}") from None
    settings = read_setting(model, "config_sentence_transformers.json") or {}
    length = (read_setting(model, "sentence_bert_config.json") or {}).get("max_seq_length")
    if length is None:  # where sentence-transformers 6 writes it; a number beyond any model's means no limit
        length = (read_setting(model, "tokenizer_config.json") or {}).get("model_max_length", UNLIMITED)
        length = length if length < UNLIMITED else None
    pooling = {key: value for key, value in pooling.items() if key in ("pooling_mode", "include_prompt")}
    return Published(pooling, names, settings.get("prompts") or {}, length)


def read_setting(model: ModelReference, name: str) -> Any:
    """The JSON file `name` of a model whose settings were fetched; None where it has none."""
    if model.is_local:
        path = Path(model.name_or_path) / name
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.name_or_path, name, revision=model.revision)
        path = Path(found) if isinstance(found, str) else None
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else None
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}; fetch or save the model again") from None


def _load(
    model: ModelReference, published: Published | None, loading: Mapping[str, Any], pooling: str
) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    where = {"revision": model.revision} if model.revision else {}
    kwargs = {"model_kwargs": {**where, **loading}, "processor_kwargs": {**where}, "config_kwargs": {**where}}
    with _one_line(model):
        if published:
            encoder = SentenceTransformer(model.name_or_path, revision=model.revision, model_kwargs=dict(loading))
        else:
            transformer = Transformer(model.name_or_path, **kwargs)
            pooled = Pooling(transformer.get_embedding_dimension(), **POOLING[pooling])
            encoder = SentenceTransformer(modules=[transformer, pooled, Normalize()], similarity_fn_name="cosine")
    use_plain_text(encoder, model.name_or_path, model.revision)
    return encoder


@contextlib.contextmanager
def _one_line(model: ModelReference) -> Iterator[None]:
    """The tokenizer alone is loaded, no processor of images or sound beside it; errors of loading are one line."""
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError
    from sentence_transformers.base.modules import transformer
    from transformers import AutoTokenizer

    processor, transformer.AutoProcessor = transformer.AutoProcessor, AutoTokenizer
    try:
        yield
    # RuntimeError: weights of other shapes than the configuration says
    except (HTTPError, OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {model.reference!r} cannot be loaded: {error}") from None
    finally:
        transformer.AutoProcessor = processor


def _check_modules(encoder: SentenceTransformer, reference: str) -> None:
    """Refuse modules that do not fit together: a Dense of other dimensions than what comes before it."""
    import torch

    try:
        with torch.no_grad():
            encoder(encoder.preprocess(["a"]))
    except RuntimeError as error:
        modules = ", ".join(type(module).__name__ for module in encoder)
        raise InputError(f"model {reference!r}: its modules ({modules}) do not fit together: {error}") from None


def set_length(transformer: Transformer, max_seq_length: int | None, otherwise: int, reference: str) -> None:
    """Texts of at most `max_seq_length` tokens, of `otherwise` where it is None and the model has so many positions.
    Raises InputError for more than it has.
    """
    # of the text part, where a checkpoint reads images too
    longest = positions_in(transformer.config.get_text_config())
    if max_seq_length and longest and max_seq_length > longest:
        raise InputError(f"max_seq_length {max_seq_length}: {reference} goes to {longest}; lower it")
    length = max_seq_length or otherwise
    transformer.max_seq_length = min(length, longest or length)


def keep_layers(model: PreTrainedModel, number: int | None, reference: str) -> None:
    """Drop all but the first `number` layers, which read the same text and stop earlier; None keeps all."""
    from torch import nn

    config = model.config.get_text_config()
    if number is None or number == config.num_hidden_layers:
        return
    if number > config.num_hidden_layers:
        raise InputError(f"num_hidden_layers {number}: {reference} has {config.num_hidden_layers}; lower it")
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    [name] = [name for name, part in lists.items() if len(part) == config.num_hidden_layers]
    model.set_submodule(name, lists[name][:number])
    config.num_hidden_layers = number
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:number]


def keep_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes (0.50) from packing 4-bit weights for inference, as it does for good at the first evaluation
    on CPUs with AVX512-BF16: their kernel has no gradient, so layers below would train on a part of theirs.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def save_merged(encoder: SentenceTransformer, folder: Path) -> None:
    """Merge the adapter, if there is one, into the weights (in place) and write a plain SentenceTransformer folder.

    Raises InputError when the tokenizer read back from the folder gives other ids.
    """
    merge_adapter(encoder)
    save(encoder, folder)
    check_saved_text(encoder, folder)


def save_adapter(encoder: SentenceTransformer, folder: Path, base: str, revision: str | None = None) -> None:
    """Write the adapter in peft format, with tokenizer, pooling and prompts beside it.

    `base` is how the adapter names the model it belongs to (transformers would write the local path it was loaded
    from): a Hub id with its `revision`, or a path relative to `folder`.
    """
    save(encoder, folder)
    name_base(folder, base, revision)


def save(encoder: SentenceTransformer, folder: Path) -> None:
    """As sentence-transformers does it, with max_seq_length where servers look for it, in sentence_bert_config.json.

    sentence-transformers 6 reads it there, before tokenizer_config.json, but writes it into the latter alone.
    """
    tokenizer = encoder.tokenizer.backend_tokenizer
    tokenizer.no_truncation()  # the file would hold the length and the padding that the last batch asked for
    tokenizer.no_padding()
    size = sum(weight.nbytes for weight in encoder.parameters())
    with without_bars() if size < BAR_FROM else contextlib.nullcontext():  # transformers' own bar, one step a file
        encoder.save_pretrained(str(folder), create_model_card=False)
    path = folder / "sentence_bert_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "max_seq_length": encoder.max_seq_length})
    make_portable(folder)


def name_base(folder: Path, base: str, revision: str | None) -> None:
    """Write into the adapter in `folder` which model it belongs to."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "base_model_name_or_path": base, "revision": revision})
