"""A saved embedder as a GGUF file, which llama.cpp and what is built on it read.

    write_gguf(Path("runs/demo/model"), Path("model-F16.gguf"), "F16", settings)

llama.cpp's own converter is not used: it knows byte-level tokenizers by a hash of ids, in which our end token counts,
forces BOS off for some vocabularies, takes Gemma3TextModel for another architecture and writes no pooling type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

# model_type of transformers -> architecture of llama.cpp. Mistral is its llama: the same layers, the same RoPE.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "bert": "bert"}
POOLING = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
# How a byte-level tokenizer splits texts first, as tokenizer.json has it -> llama.cpp's name for the rule.
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_CASES + r"\p{N}" + _REST: "qwen2", _CASES + r"\p{N}{1,3}" + _REST: "llama-bpe"}


def write_gguf(folder: Path, path: Path, weights: str, settings: Mapping[str, Any]) -> None:
    """Write the SentenceTransformer in `folder`, of these `settings` (release.outside.settings_of), to `path`, its
    matrices as `weights`: "F32", "F16" or "Q8_0".

    Raises InputError for an architecture, a tokenizer, a pooling or a module that such a file cannot say.
    """
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for problem in _problems(config, settings):
        raise InputError(f"{folder}: {problem}; publish it without --gguf")
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    _write_shape(writer, config)
    writer.add_pooling_type(gguf.PoolingType[POOLING[settings["pooling_mode"]]])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        _write_tokenizer(writer, tokenizer, config.vocab_size)
    except LookupError as error:
        raise InputError(f"{folder}: GGUF cannot say its tokenizer: {error}; publish it without --gguf") from None
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in _tensors(folder):
        if name.startswith("pooler."):
            continue  # of BERT's pretraining; no embedder reads it
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise InputError(f"{folder}: GGUF has no name for its weights {name}; publish it without --gguf")
        if architecture == "llama" and (heads := _heads(name, config)):
            tensor = interleave_halves(tensor, heads)
        is_matrix = tensor.ndim == 2 and not stored.startswith(("position_embd", "token_types"))
        kind = gguf.GGMLQuantizationType[weights if is_matrix else "F32"]
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    if config.model_type != "bert" and config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config))
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if weights == "F32" else f"MOSTLY_{weights}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _problems(config: PreTrainedConfig, settings: Mapping[str, Any]) -> Iterator[str]:
    """What llama.cpp would read as another model, or not at all."""
    if config.model_type not in ARCHITECTURES:
        yield f"no GGUF is written here for {config.model_type}, only for {', '.join(ARCHITECTURES)}"
        return
    if settings["pooling_mode"] not in POOLING or not settings["include_prompt"]:
        yield f"llama.cpp cannot pool as it does ({settings['pooling_mode']}, the prompt in or out)"
    if further := set(settings["modules"]) - {"Transformer", "Pooling", "Normalize"}:
        yield f"llama.cpp knows no module {min(further)}"
    if not settings["normalised"] and settings["similarity"] != "cosine":
        yield f"llama.cpp gives vectors of unit length, and its own are compared by {settings['similarity']}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < settings["max_seq_length"]:
        yield f"llama.cpp would not keep its attention to the last {window} tokens"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        yield f"its RoPE scaling is {rope['rope_type']}, which is not written here"


def _write_shape(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    import gguf

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "bert":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_causal_attention(False)
        writer.add_token_type_count(config.type_vocab_size)
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _llama3_divisors(config: PreTrainedConfig) -> np.ndarray:
    """What Llama 3.1 and later divide each of RoPE's frequencies by: shape (head size / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    plain = config.rope_parameters["rope_theta"] ** (-np.arange(len(scaled)) / len(scaled))
    return (plain / scaled).astype(np.float32)


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The folder's weights by name in float32, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                yield name, weights.get_tensor(name).float().numpy()


def _heads(name: str, config: PreTrainedConfig) -> int:
    """How many heads the rows of a matrix belong to that RoPE turns; 0 for all others."""
    found = re.search(r"self_attn\.([qk])_proj\.", name)
    return (found and {"q": config.num_attention_heads, "k": config.num_key_value_heads}[found[1]]) or 0


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of `weight`, (heads * size, ...), reordered in each head: llama.cpp's llama turns rows 2i and 2i + 1
    together, transformers i and i + size / 2.

    >>> interleave_halves(np.array([0, 1, 2, 3]), 1).tolist()
    [0, 2, 1, 3]
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


# --- tokenizer ------------------------------------------------------------------------------------------------------


def _write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    """Vocabulary, rule for splitting, what stands around texts. Raises LookupError: not one of llama.cpp's kinds."""
    from gguf import TokenType

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, kind, split = rules["model"], *_kind(rules)
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, TokenType.NORMAL
    added = tokenizer.added_tokens_decoder
    if kind == "llama":
        ranks = {"".join(_pair(merge)): rank for rank, merge in reversed([*enumerate(model["merges"])])}
        # in sentencepiece the pair whose joint token scores highest is merged first
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
        for number, token in enumerate(tokens):
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[number] = TokenType.BYTE
        writer.add_add_space_prefix(_puts_space_first(rules))
    if kind == "gpt2":
        writer.add_token_merges([" ".join(_pair(merge)) for merge in model["merges"]])
    if kind == "bert":  # llama.cpp marks where words begin, WordPiece where they go on
        tokens = [token if number in added else _phantom(token) for number, token in enumerate(tokens)]
    for number, token in added.items():
        types[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    if kind == "llama" and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_ends(writer, tokenizer)


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _phantom(token: str) -> str:
    return token[2:] if token.startswith("##") else "\u2581" + token


def _write_ends(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokens before and after every text, as our post-processor has them, whatever the tokenizer's names say."""
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(n for n in range(len(ids)) if ids[n : n + len(bare)] == bare)
    before, after = ids[:start], ids[start + len(bare) :]
    if len(before) > 1 or len(after) > 1:
        raise LookupError(f"{len(before)} tokens stand before every text and {len(after)} after it")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    writer.add_add_sep_token(bool(after))  # what llama.cpp's WordPiece ends texts in
    for number in before:
        writer.add_bos_token_id(number)
    for number in after:
        writer.add_eos_token_id(number)
        writer.add_sep_token_id(number)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)


def _kind(rules: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's names for the tokenizer's model and for how it splits texts first."""
    model = rules["model"]
    if model["type"] == "WordPiece":
        return "bert", "default"
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama", "default"
    steps = rules["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if model["type"] == "BPE" and steps[-1].get("type") == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        first = steps[:-1]
        if not first and steps[-1]["use_regex"]:
            return "gpt2", "gpt-2"
        if [step["type"] for step in first] == ["Digits"] and first[0]["individual_digits"]:
            return "gpt2", "smollm"
        if [step["type"] for step in first] == ["Split"] and first[0]["pattern"].get("Regex") in _SPLITS:
            return "gpt2", _SPLITS[first[0]["pattern"]["Regex"]]
    raise LookupError(f"{model['type']} after {', '.join(str(step.get('type')) for step in steps)}")


def _puts_space_first(rules: Mapping[str, Any]) -> bool:
    """Whether a space is put before every text, as sentencepiece's dummy prefix is."""
    steps = rules["pre_tokenizer"] or {}
    text = json.dumps([rules["normalizer"], steps.get("pretokenizers", [steps])])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text
