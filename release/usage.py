"""How a saved model is used without sentence-transformers: the code that cards print, and that verification runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

# First version of sentence-transformers that has a module, by the beginning of its type in modules.json; older ones
# know `sentence_transformers.models` alone.
_FIRST_VERSIONS = {
    "sentence_transformers.base.modules.normalize": "6.0.0",
    "sentence_transformers.base.": "5.4.0",
    "sentence_transformers.sentence_transformer.": "5.4.0",
}
# (pooling_mode, include_prompt) of sentence-transformers' Pooling -> the same from ids, mask (B, T) and states
# (B, T, H) by torch. BOS counts as the prompt's and EOS as the text's.
_MEAN = """\
    weights = mask.unsqueeze(-1).to(states.dtype)
    vectors = (states * weights).sum(dim=1) / weights.sum(dim=1)"""
POOLED = {
    ("lasttoken", True): "    vectors = states[torch.arange(len(texts)), mask.sum(dim=1) - 1]  # of the last token",
    ("cls", True): "    vectors = states[:, 0]  # of the first token",
    ("mean", True): _MEAN,
    ("mean", False): f"""\
    if prompt:  # its tokens, BOS included, are left out; EOS, the last of the prompt alone, is the text's
        mask[:, : len(tokenizer(prompt)["input_ids"]) - 1] = 0
{_MEAN}""",
    ("weightedmean", True): """\
    weights = (mask * torch.arange(1, 1 + mask.shape[1])).unsqueeze(-1).to(states.dtype)  # by position
    vectors = (states * weights).sum(dim=1) / weights.sum(dim=1)""",
}
_ENCODE = """

def encode(texts, prompt=""):
    texts = [prompt + text for text in texts]
    batch = tokenizer(texts, padding=True, truncation=True, max_length={max_seq_length}, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
{pooled}
    return {vectors}
"""
_LOAD = """\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(repository)
model = AutoModel.from_pretrained(repository).eval()
"""
_LOAD_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(repository)
base = AutoModel.from_pretrained({base}, revision={revision}, dtype=torch.{dtype})
model = PeftModel.from_pretrained(base, repository).eval()
"""


def oldest_sentence_transformers(module_types: Iterable[str]) -> str | None:
    """The first version that reads modules.json with these types; None: no known bound."""
    starts = {start for start in _FIRST_VERSIONS for name in module_types if name.startswith(start)}
    return max((_FIRST_VERSIONS[start] for start in starts), default=None)


def encode_lines(settings: Mapping[str, Any], adapter: Mapping[str, Any] | None = None) -> str | None:
    """Code that defines `encode(texts, prompt="")` by transformers alone, of the model at `repository`, a name that is
    to be defined before; None for a model with further modules. `adapter`: `base`, `revision`, `dtype` of a LoRA one.
    """
    pooling = (settings["pooling_mode"], settings["include_prompt"])
    if pooling not in POOLED or set(settings["modules"]) - {"Transformer", "Pooling", "Normalize"}:
        return None
    if adapter:
        values = {"base": json.dumps(adapter["base"]), "revision": json.dumps(adapter["revision"])}
        load = _LOAD_ADAPTER.format(**values, dtype=adapter["dtype"])
    else:
        load = _LOAD
    vectors = "torch.nn.functional.normalize(vectors, dim=1)" if settings["normalised"] else "vectors"
    lines = {"max_seq_length": settings["max_seq_length"], "pooled": POOLED[pooling], "vectors": vectors}
    return load + _ENCODE.format(**lines)


# What reads an exported file -> the package to import; lines that define `encode(texts, prompt="")` by it, of `file`.
READERS = {"onnx": "onnxruntime", "openvino": "openvino", "gguf": "xllamacpp"}
_READ_ONNX = """\
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(repository)
session = onnxruntime.InferenceSession(file)
"""
# OpenVINO computes in bfloat16 where the processor can, unless it is told
_READ_OPENVINO = """\
import openvino
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(repository)
model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
"""
_ENCODE_GRAPH = """

def encode(texts, prompt=""):
    texts = [prompt + text for text in texts]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=%d, return_tensors="np")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return %s
"""
_READ_GGUF = """\
import xllamacpp  # llama.cpp

parameters = xllamacpp.CommonParams()
parameters.model.path = file
parameters.embedding = True
parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = %d
parameters.n_parallel = 1
parameters.cpuparams.n_threads = 1  # or as many as cores are free
parameters.verbosity = 1
server = xllamacpp.Server(parameters)


def encode(texts, prompt=""):
    found = server.handle_embeddings({"input": [prompt + text for text in texts]})
    return [row["embedding"] for row in found["data"]]
"""


def reader_lines(kind: str, settings: Mapping[str, Any]) -> str:
    """Code that defines `encode(texts, prompt="")` by what reads a `kind` of release.exports, of `repository` and
    `file`, names that are to be defined before.
    """
    length = settings["max_seq_length"]
    if kind == "gguf":
        return _READ_GGUF % length
    if kind == "onnx":
        return _READ_ONNX + _ENCODE_GRAPH % (length, 'session.run(["sentence_embedding"], inputs)[0]')
    return _READ_OPENVINO + _ENCODE_GRAPH % (length, 'model(inputs)["sentence_embedding"]')
