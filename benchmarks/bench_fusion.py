"""How well do BM25, the dense model, both ways of fusing them and the teacher rank a build's candidates?

    python -m dataset_builders.build --config recipes/data/scifact.yaml --data_root DATA --output_dir runs/scifact/data
    python -m benchmarks.bench_fusion runs/scifact/data runs/demo/data

Over the queries that were graded. A hybrid teacher is cross-fitted, so no query has a part in its own ranking; the
weight of the convex sum is one number, chosen on these queries (at most 1,000 of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.measure import environment
from common.cli import ArgumentParser, run
from common.steps import read_manifest
from common.tables import markdown_table
from eval.held_out import load_held_out
from eval.intervals import format_mean, mean_with_interval
from eval.metrics import ranking_scores

MEASURES = ("nDCG@10", "R@100")
RANKINGS = {
    "BM25": pl.col("bm25_rank"),
    "dense": pl.col("dense_rank"),
    "RRF": pl.col("rrf_rank"),
    "convex": pl.col("convex_rank"),
    "teacher": pl.when(pl.col("rrf_rank").is_not_null()).then(-pl.col("teacher_score")),
}


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.bench_fusion", description=__doc__)
    parser.add_argument("data", nargs="+", type=Path, help="folders that dataset_builders.build wrote")
    rows = []
    for folder in parser.parse_args(argv).data:
        values = scores(folder)
        difference = np.subtract(values["teacher"]["per_query"], values["RRF"]["per_query"])
        against = format_mean(mean_with_interval(difference[None]), "+.3f")
        means = [" / ".join(f"{values[name][measure]:.3f}" for measure in MEASURES) for name in RANKINGS]
        weight = read_manifest(folder / "candidates")["bm25_weight"]
        rows.append([str(folder), f"{len(difference):,}", *means, f"{weight:.2f}", against])
    print(environment("bm25s", "sentence-transformers", "scikit-learn"))
    print("nDCG@10 / R@100")
    print(markdown_table(["data", "queries", *RANKINGS, "BM25's weight", "teacher - RRF, nDCG@10 [95 %]"], rows))


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Ranking -> its measures over the graded queries, as eval.metrics has them."""
    split = read_manifest(folder / "hub")["inputs"]["recipe"]["source"]["split"]
    qrels = load_held_out(folder, split).qrels
    table, found = pl.read_parquet(folder / "scores" / "scores.parquet"), {}
    for name, key in RANKINGS.items():
        ranked = table.select("query_id", "document_id", key=key).drop_nulls("key").sort("key", maintain_order=True)
        by_query = ranked.group_by("query_id").agg("document_id").rows()
        found[name] = ranking_scores(qrels, dict(by_query))
    return found


if __name__ == "__main__":
    run(main)
