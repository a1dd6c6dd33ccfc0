"""The same model for other runtimes: ONNX, OpenVINO and GGUF files beside the safetensors, each read by its runtime
and compared before it is published.

    export("onnx", Path("runs/demo/model"), Path("runs/demo/exports"))      # exports/onnx, and what was compared

The ONNX graph, which OpenVINO's is made of, takes `input_ids` and `attention_mask` and gives `last_hidden_state`, as
sentence-transformers' own backends read it, and `sentence_embedding`: pooled and of unit length, whatever reads it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import InputError
from common.models import without_bars
from common.steps import MANIFEST, files_of, fingerprint, folder_step, read_manifest
from release.gguf_file import write_gguf
from release.outside import describe_lines, describe_model
from release.usage import READERS, reader_lines
from release.verify import TOLERANCE, in_clean_process

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

RULES = 1  # increase when other files are made of the same model
# What each format asks for besides the stack, all of it in the extra `export`.
_NEEDS = {
    "graph": ("onnx", "onnxscript"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino", "nncf"),
    "gguf": ("gguf", "xllamacpp"),
}
# The lowest cosine to sentence-transformers in float32 at which a file is that model: TOLERANCE as a cosine; of 8 bits
# what is still of use, where less is told and left out.
LOWEST = {numbers: 1 - TOLERANCE[numbers] ** 2 / 2 for numbers in ("float32", "float16")} | {"int8": 0.99}
# file -> its numbers; others beside them (weights outside the graph) belong to the file before them
FILES = {
    "onnx": {"onnx/model.onnx": "float32", "onnx/model_quantized.onnx": "int8"},
    "openvino": {
        "openvino/openvino_model.xml": "float32",
        "openvino/openvino_model_qint8_quantized.xml": "int8",
    },
    "gguf": {"model-F16.gguf": "float16", "model-Q8_0.gguf": "int8"},
}
ONE_FILE = 1_500_000_000  # bytes; a graph of more than 2 GB cannot be one file


def export(kind: str, folder: Path, exports: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make, or find made already, `exports/KIND`, and tell of it.

    Args:
        kind: a key of FILES.
        folder: a SentenceTransformer that release.verify has found sound.
        settings: of it, as release.outside.settings_of gives them.

    Returns:
        `files` (name in the repository -> file), `compared` (rows of `file`, `numbers`, `cosine`: the lowest over
        `texts` texts), `left_out` (such rows), `reader` and `version` of what read them.

    Raises:
        InputError: a package is missing, the format cannot say this model, or a file gives other vectors.
    """
    versions = _versions(kind)
    inputs = {"model": fingerprint(files_of(folder)), "rules": RULES}
    if kind != "gguf":
        with folder_step(exports / "graph", inputs | {"versions": _versions("graph")}) as step:
            if not step.done:
                print(f"{folder}: tracing the model", file=sys.stderr)
                with _quiet():
                    write_graph(folder, step.path / "model.onnx", settings)
                step.finish()
    with folder_step(exports / kind, inputs | {"versions": versions}) as step:
        if not step.done:
            print(f"{folder}: making {', '.join(FILES[kind])}", file=sys.stderr)
            with _quiet():
                if kind == "gguf":
                    write_ggufs(folder, step.path, settings)
                else:
                    _WRITERS[kind](exports / "graph", step.path)
            reader = {"reader": READERS[kind], "version": versions[READERS[kind]]}
            step.finish(**_compare(kind, folder, step.path, settings), **reader)
    made = read_manifest(exports / kind)
    return {**made, "files": {name: exports / kind / name for name in made["files"]}}


def _versions(kind: str) -> dict[str, str]:
    found, missing = {}, []
    for name in (*_NEEDS[kind], "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise InputError(f"--{kind} needs {', '.join(missing)}; pip install '.[export]' in this repository")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without exporters' remarks on their own code, or anything on stdout, where cards go."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(sys.stderr), without_bars():
            yield
    finally:  # what fails is told as ever
        logging.disable(logging.NOTSET)


# --- writing --------------------------------------------------------------------------------------------------------


def write_onnx(graph: Path, target: Path) -> None:
    """onnx/model.onnx, float32 as in the folder `graph`, and onnx/model_quantized.onnx, whose weights are 8 bits.

    Matrices by blocks of 32, computed with 8-bit activations, and the embedding by rows. onnxruntime's dynamic
    quantisation, one scale for all activations of a matrix, is faster and loses far more: see docs/serving.md.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    whole, quantized = (target / name for name in FILES["onnx"])
    # no hard links: onnx refuses such weights beside a graph
    shutil.copytree(graph, whole.parent, ignore=shutil.ignore_patterns(MANIFEST))
    large = sum(path.stat().st_size for path in whole.parent.iterdir()) > ONE_FILE
    quantizer = MatMulNBitsQuantizer(onnx.load(whole), bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    with tempfile.TemporaryDirectory(dir=target.parent) as elsewhere:
        matrices = Path(elsewhere, "matrices.onnx")
        quantizer.model.save_model_to_file(str(matrices), use_external_data_format=large)
        embedding = {"op_types_to_quantize": ["Gather"], "weight_type": QuantType.QInt8, "per_channel": True}
        quantize_dynamic(matrices, quantized, **embedding, use_external_data_format=large)


def write_openvino(graph: Path, target: Path) -> None:
    """The same by OpenVINO: weights alone in 8 bits, activations in float32."""
    # both send statistics about their use, without asking in nncf's case, unless this package is missing
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import nncf
    import openvino

    whole, compressed = (target / name for name in FILES["openvino"])
    whole.parent.mkdir()
    model = openvino.convert_model(graph / "model.onnx")
    del model.rt_info["conversion_parameters"]  # they name this machine's folders
    openvino.save_model(model, whole, compress_to_fp16=False)
    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, compressed, compress_to_fp16=False)


def write_ggufs(folder: Path, target: Path, settings: Mapping[str, Any]) -> None:
    for name in FILES["gguf"]:
        write_gguf(folder, target / name, name.removesuffix(".gguf").partition("-")[2], settings)


_WRITERS = {"onnx": write_onnx, "openvino": write_openvino}  # of a graph


def write_graph(folder: Path, path: Path, settings: Mapping[str, Any]) -> None:
    """The whole model in float32 as an ONNX graph; beyond ONE_FILE its weights lie in path + "_data"."""
    import onnx_ir
    import torch
    from sentence_transformers import SentenceTransformer

    if not settings["include_prompt"]:
        raise InputError(
            f"{folder}: its mean leaves the prompt out, and no graph knows where a prompt ends; publish it without "
            "--onnx and --openvino"
        )
    # eager attention: half again as fast in ONNX Runtime as the scaled-dot-product kind
    loading = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs=loading, local_files_only=True)
    model.eval().requires_grad_(False)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        _whole_model(model),
        (torch.ones_like(mask), mask),
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state", "sentence_embedding"],
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        verbose=False,
    )
    graph = program.model
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()  # lines of this machine's files
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    onnx_ir.save(graph, path, external_data=f"{path.name}_data" if size > ONE_FILE else None)


def _whole_model(model: SentenceTransformer) -> torch.nn.Module:
    import torch

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.modules_after = model[0].model, torch.nn.ModuleList(list(model)[1:])

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            features = {"token_embeddings": states, "attention_mask": attention_mask}
            for module in self.modules_after:
                features = module(features)
            return states, features["sentence_embedding"]

    return Whole().eval()


# --- comparing ------------------------------------------------------------------------------------------------------


def _compare(kind: str, folder: Path, target: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Facts for the manifest: `compared`, `left_out`, `texts`. Deletes what is left out.

    Raises InputError where a file that should be the model gives other vectors.
    """
    reader, lines = READERS[kind], reader_lines(kind, settings)
    given = _expected(folder)
    # llama.cpp refuses longer texts instead of cutting them
    kept = [number for number, is_cut in enumerate(given["is_cut"]) if not is_cut or kind != "gguf"]
    asked, expected = ([given[name][number] for number in kept] for name in ("asked", "vectors"))
    compared, left_out = [], []
    for name, numbers in FILES[kind].items():
        found = in_clean_process(describe_lines, folder, target / name, lines, asked, library=reader)["vectors"]
        row = {"file": name, "numbers": numbers, "cosine": lowest_cosine(expected, found)}
        if row["cosine"] >= LOWEST[numbers]:
            compared.append(row)
            continue
        problem = f"{folder}: {name}: its vectors have a cosine of {row['cosine']:.4f} to the model's in {reader}"
        if numbers != "int8":
            raise InputError(f"{problem}, less than {LOWEST[numbers]}; publish it without --{kind}")
        print(f"{problem}, less than {LOWEST[numbers]}; left out", file=sys.stderr)
        left_out.append(row)
        for path in (target / name).parent.glob(Path(name).stem + ".*"):
            path.unlink()
    return {"compared": compared, "left_out": left_out, "texts": len(asked)}


@functools.cache
def _expected(folder: Path) -> dict[str, Any]:
    """What sentence-transformers makes of the model in float32: once for all formats."""
    return in_clean_process(describe_model, folder, "float32", "cpu", library="sentence-transformers")


def lowest_cosine(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """The lowest cosine of two vectors in the same row; -1 where one is no number.

    >>> lowest_cosine([[1, 0], [0, 2]], [[3, 0], [0, 1]]), lowest_cosine([[1.0]], [[float("nan")]])
    (1.0, -1.0)
    """
    one, other = (np.array(rows, dtype=np.float64) for rows in (first, second))
    cosines = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return float(np.nan_to_num(cosines, nan=-1.0).min())
