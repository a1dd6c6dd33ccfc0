"""A model of less precision on a CPU: seconds, cosines with its vectors in float32, and what its ranking loses.

    python -m benchmarks.bench_precision --model runs/real/model --set DATA/scifact [--split test]

bfloat16 is `model_kwargs={"dtype": "bfloat16"}`. int8 has its linear layers quantised: weights once, inputs as they
come, by torch (one scale for all rows) or, where it is installed, by torchao (a scale a row). All encode within
`share_prefix`. Seconds are processor time; the documents come in three parts, of which the sides take turns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.measure import environment, median_and_range, timed
from benchmarks.mining_inputs import ndcg, read_texts
from common.cli import ArgumentParser, run
from common.tables import markdown_table
from dataset_builders.dense import dense_top_k

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PARTS = 3
HEADER = ["weights and products", "seconds", "times faster", "lowest cosine", "median cosine", "nDCG@10"]
FLAGS = ("avx512_bf16", "amx_bf16", "avx512_vnni", "amx_int8")  # of processors: what makes them fast


def main(argv: Sequence[str]) -> None:
    from sentence_transformers import SentenceTransformer

    parser = ArgumentParser(prog="python -m benchmarks.bench_precision", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a SentenceTransformer")
    parser.add_argument("--set", type=Path, required=True, help="folder of corpus, queries and qrels")
    parser.add_argument("--split", default="test")
    args = parser.parse_args(argv)
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    print(environment("sentence-transformers", "torch"), *(flag for flag in FLAGS if flag in cpuinfo), flush=True)
    texts = read_texts(args, 10**6)
    sides = reduced(SentenceTransformer(args.model, device="cpu", model_kwargs={"dtype": "float32"}))
    documents: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    queries = {name: encode(model, texts.queries, "query") for name, model in sides.items()}  # also warms up
    for part in range(PARTS):
        for name, model in sides.items():
            found = documents[name]
            work = texts.documents[part::PARTS]
            seconds[name].append(timed(lambda: found.append(encode(model, work, "document")), "cpu"))  # noqa: B023
    whole = texts.documents
    order = np.argsort(np.concatenate([np.arange(part, len(whole), PARTS) for part in range(PARTS)]))
    vectors = {name: np.concatenate(found)[order] for name, found in documents.items()}
    first, *_ = sides
    rows = []
    for name in sides:
        cosines = np.concatenate([(vectors[name] * vectors[first]).sum(1), (queries[name] * queries[first]).sum(1)])
        ratios = [plain / own for plain, own in zip(seconds[first], seconds[name], strict=True)]
        positions, _ = dense_top_k(queries[name], vectors[name], 10)
        figures = f"{cosines.min():.4f}", f"{np.median(cosines):.4f}", f"{ndcg(positions, texts.judged):.4f}"
        rows.append([name, f"{sum(seconds[name]):.0f}", median_and_range(ratios, 2), *figures])
    print(f"\n{markdown_table(HEADER, rows)}")


def reduced(model: SentenceTransformer) -> dict[str, SentenceTransformer]:
    import torch
    from torch.ao.quantization import quantize_dynamic

    sides = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    sides["int8, torch"] = quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return sides
    sides["int8, torchao"] = copy.deepcopy(model)
    quantize_(sides["int8, torchao"][0].model, Int8DynamicActivationInt8WeightConfig())
    return sides


def encode(model: SentenceTransformer, texts: Sequence[str], name: str) -> np.ndarray:
    from modeling.shared_prefix import share_prefix

    with share_prefix(model):
        vectors = model.encode(texts, prompt_name=name, convert_to_tensor=True).float().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    run(main)
