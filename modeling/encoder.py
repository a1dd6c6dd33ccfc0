"""A decoder-only LLM as a text embedder, of stock sentence-transformers modules: the state of the last token, which
is always EOS, as a unit vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import InputError
from common.models import ModelReference, fetch_settings
from common.steps import write_json

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformer
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

# What pooling: means in recipes -> settings of sentence-transformers' Pooling, over the states of a text's tokens.
# BOS counts as the prompt's and EOS as the text's, so that no mean is ever empty. Where a prompt ends in a space that
# the tokenizer joins to the next word, as byte-level and metaspace BPE do, sentence-transformers counts that word's
# first token as the prompt's, in training and encoding alike; the states after it have seen it.
POOLING = {
    "eos": {"pooling_mode": "lasttoken"},
    "mean": {"pooling_mode": "mean"},
    "mean_without_prompt": {"pooling_mode": "mean", "include_prompt": False},
    "weighted_mean": {"pooling_mode": "weightedmean"},  # by position, 1, 2, ... (SGPT, arXiv 2202.08904, equation 2)
}


def build_encoder(
    model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    max_seq_length: int = 512,
    prompts: Mapping[str, str] | None = None,
    pooling: str = "eos",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_config: PeftConfig | None = None,
    min_text_tokens: int = 16,
) -> SentenceTransformer:
    """Transformer + pooling + Normalize around any Hugging Face decoder.

    Args:
        model_name_or_path: Hub id or folder; the folder of a SentenceTransformer made here is one too.
        revision: of the Hub id.
        max_seq_length: longest text in tokens, prompt, BOS and EOS included; longer ones are truncated before EOS.
        prompts: baked into the model by name.
        pooling: a key of POOLING.
        dtype: of the weights; None keeps that of the checkpoint.
        attn_implementation: as in transformers.
        quantization_config: of the frozen weights, see `quantization`.
        peft_config: an adapter to inject and train; its weights are kept in float32, which bfloat16 updates need.
        min_text_tokens: least number of tokens that every prompt has to leave for the text.

    Raises:
        InputError: no such model, no EOS token, a prompt that leaves too little room, too long a max_seq_length.
    """
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    if pooling not in POOLING:
        raise InputError(f"pooling {pooling!r}: choose one of {', '.join(POOLING)}")
    name = str(model_name_or_path)
    commit = fetch_settings(ModelReference(name, name, revision))
    where = {"revision": commit} if commit else {}
    loading = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
    }
    try:
        transformer = Transformer(
            name,
            max_seq_length=max_seq_length,
            model_kwargs={**where, **{key: value for key, value in loading.items() if value is not None}},
            processor_kwargs={**where},
            config_kwargs={**where},
        )
    except (HTTPError, OSError, ValueError, ImportError, SafetensorError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {error}") from None
    # of the text part, where a checkpoint reads images too
    longest = getattr(transformer.config.get_text_config(), "max_position_embeddings", max_seq_length)
    if max_seq_length > longest:
        raise InputError(f"max_seq_length {max_seq_length}: {model_name_or_path} goes to {longest}; lower it")
    guarantee_eos(transformer.tokenizer)
    embedding = transformer.model.get_input_embeddings()
    if embedding.padding_idx == transformer.tokenizer.eos_token_id:
        embedding.padding_idx = None  # a checkpoint that pads with EOS would never train the vector of EOS
    encoder = SentenceTransformer(
        modules=[
            transformer,
            Pooling(transformer.get_embedding_dimension(), **POOLING[pooling]),
            Normalize(),
        ],
        prompts=dict(prompts or {}),
        similarity_fn_name="cosine",
    )
    check_eos(encoder)
    check_prompts(transformer.tokenizer, encoder.prompts, max_seq_length, min_text_tokens)
    if peft_config is not None:
        add_adapter(encoder, peft_config)
    return encoder


def quantization(model: ModelConfig) -> BitsAndBytesConfig | None:
    """How to load the frozen weights of a QLoRA stage (arXiv 2305.14314); None when the recipe does not ask for it.

    Quantised weights are for training: merged into them, an adapter would be rounded to 4 bits too. Publish it merged
    into the weights as they were: `build_encoder` without `quantization_config`, `continue_adapter`, `save_merged`.

    Raises:
        InputError: quantised weights that nothing would train, or no bitsandbytes.
    """
    from transformers import utils
    from trl import get_quantization_config

    if not (model.load_in_4bit or model.load_in_8bit):
        return None
    if not model.use_peft:
        raise InputError("load_in_4bit and load_in_8bit freeze the weights; add an adapter to train: use_peft: true")
    if not utils.is_bitsandbytes_available():
        raise InputError("load_in_4bit and load_in_8bit need bitsandbytes; pip install bitsandbytes, or drop them")
    return get_quantization_config(model)


def guarantee_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `tokenizer` end every text in EOS, whatever its family, its flags and the version of transformers.

    The rule is written into the post-processor, where truncation makes room for it and saving keeps it. Appending the
    EOS string to texts is lost to truncation; `add_eos_token` is not saved and, alone, drops BOS (transformers 5).
    Before a text comes BOS where the family has one of its own (Mistral, Llama), else what stands there now (CLS for
    BERT, nothing for Qwen2 and GPT-2).

    Padding goes to the right, where GradCache can trim it; a tokenizer without padding token gets its unknown token.

    Raises:
        InputError: no EOS token, or no fast tokenizer.
    """
    from tokenizers.processors import TemplateProcessing

    name = tokenizer.name_or_path
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer of {name!r} has no EOS token; set eos_token in its tokenizer_config.json")
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer of {name!r} is not a fast one (no tokenizer.json); convert it first")
    before = _before_text(tokenizer)
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", eos],
        pair=[*before, "$A", "$B:1", eos],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, eos])],
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or eos
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # saving writes what init_kwargs names
    tokenizer.truncation_side = "right"


def _before_text(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that belong before a text: BOS, or whatever stands there now if EOS doubles as BOS."""
    if tokenizer.bos_token is not None and tokenizer.bos_token != tokenizer.eos_token:
        return [tokenizer.bos_token]
    encoding = tokenizer("a", return_special_tokens_mask=True)
    return tokenizer.convert_ids_to_tokens(encoding["input_ids"][: encoding["special_tokens_mask"].index(0)])


def check_eos(encoder: SentenceTransformer) -> None:
    """Assert on real texts that the last token is EOS: empty, short, truncated, and with each prompt.

    Raises:
        InputError: when the tokenizer ends a text otherwise.
    """
    tokenizer = encoder.tokenizer
    long = "text " * encoder.max_seq_length
    for name, prompt in {"": "", **encoder.prompts}.items():
        features = encoder.preprocess(["", "a", long], prompt=prompt or None)
        lengths = features["attention_mask"].sum(dim=1)
        last = features["input_ids"][range(3), lengths - 1].tolist()
        if last != [tokenizer.eos_token_id] * 3 or lengths.max() > encoder.max_seq_length:
            raise InputError(
                f"tokenizer of {tokenizer.name_or_path!r} ends texts in {tokenizer.convert_ids_to_tokens(last)} with "
                f"prompt {name!r}, not in EOS ({tokenizer.eos_token}); its tokenizer.json cannot be used"
            )


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, str], max_seq_length: int, min_text_tokens: int
) -> None:
    """Refuse a prompt that leaves fewer than `min_text_tokens` of `max_seq_length` for the text.

    A prompt of max_seq_length tokens gives every query the same vector, and nothing says so.
    """
    for name, prompt in {"": "", **prompts}.items():
        taken = len(tokenizer(prompt, verbose=False)["input_ids"])  # BOS and EOS are in it
        if max_seq_length - taken < min_text_tokens:
            raise InputError(
                f"prompt {name!r} leaves {max(max_seq_length - taken, 0)} of {max_seq_length} tokens for the text, at "
                f"least {min_text_tokens} are needed; shorten the prompt or raise max_seq_length"
            )


def add_adapter(encoder: SentenceTransformer, peft_config: PeftConfig) -> None:
    """Freeze the weights and inject a new adapter to train, in float32."""
    encoder.add_adapter(peft_config)
    _train_in_float32(encoder)


def continue_adapter(encoder: SentenceTransformer, folder: Path) -> None:
    """Freeze the weights and go on training the adapter that `save_adapter` wrote into `folder`."""
    backbone = encoder.transformers_model
    conversions = backbone._weight_conversions
    encoder.load_adapter(str(folder), is_trainable=True)
    # load_adapter notes there how it renamed peft's keys; saving the merged weights would rename them the other way
    backbone._weight_conversions = conversions
    _train_in_float32(encoder)


def _train_in_float32(encoder: SentenceTransformer) -> None:
    # a step of 1e-4 is below what bfloat16 can add to a weight of 0.1
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_adapter(encoder: SentenceTransformer, folder: Path, base: str, revision: str | None = None) -> None:
    """Write the adapter in peft format, with tokenizer, pooling and prompts beside it.

    `base` is how the adapter names the model it belongs to (transformers would write the local path it was loaded
    from): a Hub id with its `revision`, or a path relative to `folder`.
    """
    _save(encoder, folder)
    name_base(folder, base, revision)


def _save(encoder: SentenceTransformer, folder: Path) -> None:
    """As sentence-transformers does it, with max_seq_length where servers look for it, in sentence_bert_config.json.

    sentence-transformers 6 reads it there, before tokenizer_config.json, but writes it into the latter alone.
    """
    tokenizer = encoder.tokenizer.backend_tokenizer
    tokenizer.no_truncation()  # the file would hold the length and the padding that the last batch asked for
    tokenizer.no_padding()
    encoder.save_pretrained(str(folder), create_model_card=False)
    path = folder / "sentence_bert_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "max_seq_length": encoder.max_seq_length})


def name_base(folder: Path, base: str, revision: str | None) -> None:
    """Write into the adapter in `folder` which model it belongs to."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "base_model_name_or_path": base, "revision": revision})


def save_merged(encoder: SentenceTransformer, folder: Path) -> None:
    """Merge the adapter, if there is one, into the weights (in place) and write a plain SentenceTransformer folder.

    Raises:
        InputError: when the tokenizer read back from the folder no longer ends texts in EOS.
    """
    merge_adapter(encoder)
    _save(encoder, folder)
    check_saved_tokenizer(encoder, folder)


def merge_adapter(encoder: SentenceTransformer) -> None:
    """Add the adapter to the weights it was injected into, and take its layers out again.

    peft's `merge_and_unload` is a method of its own wrapper, which an injected adapter does not have.

    Raises:
        ValueError: the weights are quantised, see `quantization`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    backbone = encoder.transformers_model
    if getattr(backbone, "is_quantized", False):
        raise ValueError("an adapter merged into quantised weights would be rounded with them; load them unquantised")
    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            backbone.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):  # lora_modules_to_save
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            backbone.set_submodule(name, merged)
    if getattr(backbone, "_hf_peft_config_loaded", False):
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False
    encoder.requires_grad_(True)


def check_saved_tokenizer(encoder: SentenceTransformer, folder: Path) -> None:
    """Assert that the tokenizer in `folder` gives the ids that `encoder` was trained on, EOS last."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(str(folder))
    texts = ["", "a", "text " * encoder.max_seq_length, *encoder.prompts.values()]
    expected, read = (tokenizer(texts, truncation=True)["input_ids"] for tokenizer in (encoder.tokenizer, saved))
    if read != expected or any(ids[-1] != saved.eos_token_id for ids in read):
        raise InputError(f"{folder}: the saved tokenizer does not give the ids the model was trained on")
