"""GGUF files, the format of llama.cpp, as models: each is dequantised once into a folder that every loader reads.

The folder lies in the cache (`$HF_HOME/graded-embedder`) under a name that changes with the file, with the version of
transformers that reads it and with the rules of this module. It is written under a temporary name and renamed when
whole.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError
from common.steps import file_sha256, fingerprint, write_json

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

RULES = 1  # increase when this module writes another folder for the same file
FACTS = "gguf.json"  # what the folder was made from
# How llama.cpp splits a text before byte-level BPE, by the name in `tokenizer.ggml.pre`, where transformers (5.23)
# knows no rule and falls back to GPT-2's: `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp.
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Those that add BOS where the file does not say, and take a whole word that is a token before they merge.
_LLAMA_3 = ("llama3", "llama-v3", "llama-bpe", "tekken")
_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling")


def is_gguf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def gguf_sha256(path: Path) -> str:
    """SHA-256 of the file, read once in a process unless it changes."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def quantisation(path: Path) -> dict[str, Any]:
    """What a card says of the weights: file, SHA-256, type of most of them (such as Q4_1), mean bits per weight."""
    return json.loads((dequantise(path) / FACTS).read_text(encoding="utf-8"))


def dequantise(path: Path) -> Path:
    """The folder with the file's weights in bfloat16 (float32 where the file holds float32), tokenizer and config.

    Rounding 4-bit weights to bfloat16 moves them by 0.14 % and vectors by less than 1e-4 in cosine, and halves the
    folder. Safe against kills and against several processes at once.

    Raises InputError when package gguf is missing, and for a file that is cut off, split, or of an architecture or a
    tokenizer that transformers does not read.
    """
    from filelock import FileLock
    from huggingface_hub.constants import HF_HOME

    decides = {
        "file": gguf_sha256(path),
        "rules": RULES,
        "transformers": importlib.metadata.version("transformers"),
    }
    folder = Path(HF_HOME, "graded-embedder", f"{path.stem}-{fingerprint(decides)}")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # released by the system when the process ends, however it ends
        if not folder.is_dir():  # another process may have made it meanwhile
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _write_model(path, partial)
            os.replace(partial, folder)
    return folder


def _write_model(path: Path, folder: Path) -> None:
    import torch

    reader = _read(path)
    facts = _facts(path, reader)
    print(f"dequantising {path.name} ({facts['type']}) into {folder.parent}, once", file=sys.stderr)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, loading = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32 if facts["type"] == "F32" else torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),  # without it, save_pretrained refuses the model
            output_loading_info=True,
        )
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise InputError(f"{path}: transformers cannot read this GGUF: {error}; name the original model") from None
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise InputError(f"{path}: no weights for {min(loading['missing_keys'] | loading['mismatched_keys'])}")
    _restore_tokenizer(path, tokenizer, reader)
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            _restore_llama3_rope(path, model.config, torch.from_numpy(tensor.data.copy()))
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / FACTS, facts)


def _read(path: Path) -> GGUFReader:
    """The file's metadata and tensors, the latter mapped. Raises InputError for a file that cannot be used."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(f"{path}: reading GGUF files needs package gguf; pip install 'gguf>=0.19'") from None
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: cut off or damaged ({error}); fetch the file again") from None
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise InputError(f"{path}: one part of several; join them with llama-gguf-split --merge")
    # transformers (5.23) drops these but for gpt-oss: other positions, hence other vectors, without a word
    scaling = [key for key in reader.fields if ".rope.scaling." in key]
    scaling += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_factors")]
    if scaling and _text(reader, "general.architecture") != "gpt-oss":
        raise InputError(
            f"{path}: transformers does not read its RoPE scaling ({scaling[0]}); name the original model"
        )
    return reader


def _text(reader: GGUFReader, key: str) -> str | None:
    return reader.fields[key].contents() if key in reader.fields else None


def _facts(path: Path, reader: GGUFReader) -> dict[str, Any]:
    weights = Counter()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return {
        "file": path.name,
        "sha256": gguf_sha256(path),
        "type": max(weights, key=weights.get),
        "bits_per_weight": round(8 * sum(tensor.n_bytes for tensor in reader.tensors) / weights.total(), 2),
    }


def _restore_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, reader: GGUFReader) -> None:
    """Split texts as the model was trained. Raises InputError for a rule that is not known here.

    transformers takes GPT-2's rule for each that it does not know: numbers would be cut into other tokens.
    """
    from tokenizers import pre_tokenizers

    if _text(reader, "tokenizer.ggml.model") != "gpt2":
        return  # no byte-level BPE
    backend, rule = tokenizer.backend_tokenizer, _text(reader, "tokenizer.ggml.pre")
    if rule in _LLAMA_3:
        backend.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in reader.fields:
            tokenizer.add_bos_token = True
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # transformers knows the rule
    if rule in _DIGITS_FIRST:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif rule not in _AS_GPT2:
        raise InputError(f"{path}: how its tokenizer splits texts ({rule!r}) is not known; name the original model")


def _restore_llama3_rope(path: Path, config: PreTrainedConfig, divisors: torch.Tensor) -> None:
    """Scale RoPE as Llama 3.1 and later do: the file holds what each frequency is divided by, transformers drops it.

    Raises InputError when the divisors are not those of Llama 3.1 to 3.3, which differ in their factor alone.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base, size = config.rope_parameters["rope_theta"], config.head_dim
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    if not torch.allclose(divisors, base ** (-torch.arange(0, size, 2) / size) / scaled, rtol=1e-4):
        raise InputError(f"{path}: its RoPE scaling (rope_freqs.weight) is not Llama 3's; name the original model")
