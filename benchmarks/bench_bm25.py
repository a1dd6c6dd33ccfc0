"""BM25 search: the backend that recipes use by default (bm25s) against rank_bm25, which users would pick by name.

    python -m benchmarks.bench_bm25 [--documents 50000] [--queries 20] [--rounds 3] [--set DATA/scifact --split test]

Prints a Markdown table: process CPU seconds of a query against every document, and their ratio, alternated in one
process; the median of the rounds, with their range. With --set, a folder that `kind: local` reads, also the nDCG@10
of each backend's ranking on the set's queries.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dataset_builders.candidates import bm25_scorer
from dataset_builders.cli import ArgumentParser, run
from dataset_builders.folders import stack_versions
from dataset_builders.sources import LocalSource, read_rows

BACKENDS = ("bm25s", "rank_bm25")
VOCABULARY = 30_000


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    documents, queries = zipf_texts(args.documents, (40, 120), seed=0), zipf_texts(args.queries, (4, 12), seed=1)
    scorers = {backend: bm25_scorer(documents, backend) for backend in BACKENDS}
    rounds = [{name: cpu_seconds(scorers[name], queries) for name in BACKENDS} for _ in range(args.rounds)]
    print(format_table(rounds, args))
    if args.set:
        for backend in BACKENDS:
            print(f"nDCG@10 of {backend} on {args.set.name} ({args.split}): {ndcg(args.set, args.split, backend):.4f}")


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python -m benchmarks.bench_bm25", description=__doc__)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", type=Path, help="folder of corpus.parquet, queries.parquet and qrels.parquet")
    parser.add_argument("--split", default="test", help="whose queries of the set are asked (default: test)")
    return parser.parse_args(argv)


def zipf_texts(count: int, words: tuple[int, int], seed: int) -> list[str]:
    """Texts of made-up words whose frequencies fall as 1 / rank, as those of a natural language do."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    lengths = rng.integers(*words, size=count)
    drawn = rng.choice(VOCABULARY, size=lengths.sum(), p=shares / shares.sum())
    return [" ".join(f"w{word:x}q" for word in text) for text in np.split(drawn, lengths.cumsum()[:-1])]


def cpu_seconds(scorer: Callable[[str], np.ndarray], queries: Sequence[str]) -> float:
    """Mean over `queries` of the process CPU seconds that scoring all documents takes."""
    start = time.process_time()
    for query in queries:
        scorer(query)
    return (time.process_time() - start) / len(queries)


def ndcg(folder: Path, split: str, backend: str) -> float:
    """nDCG@10 of a backend on the queries of `split` that have a relevant document, by ir_measures."""
    import ir_measures

    rows = read_rows(LocalSource(kind="local", path=str(folder), split=split), None)
    qrels: dict[str, dict[str, int]] = {}
    for query, document, score, found in rows.qrels:
        if found == split:
            qrels.setdefault(query, {})[document] = score
    scorer, ids = bm25_scorer(list(rows.documents.values()), backend), list(rows.documents)
    run = {}
    for query in qrels:
        scores = scorer(rows.queries[query])
        run[query] = {ids[place]: float(scores[place]) for place in np.argsort(-scores, kind="stable")[:100]}
    [value] = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run).values()
    return value


def format_table(rounds: Sequence[dict[str, float]], args) -> str:
    ratios = [one["rank_bm25"] / one["bm25s"] for one in rounds]
    versions = stack_versions()
    return "\n".join(
        [
            f"{args.documents:,} documents, {args.queries} queries, {len(rounds)} rounds; {platform.machine()}, "
            f"Python {platform.python_version()}, " + ", ".join(f"{name} {versions[name]}" for name in BACKENDS),
            "",
            "| backend | ms a query | ratio |",
            "|---|---:|---:|",
            f"| bm25s | {1000 * statistics.median(one['bm25s'] for one in rounds):.2f} | 1 |",
            f"| rank_bm25 | {1000 * statistics.median(one['rank_bm25'] for one in rounds):.2f} "
            f"| {statistics.median(ratios):.0f} [{min(ratios):.0f}-{max(ratios):.0f}] |",
        ]
    )


if __name__ == "__main__":
    run(main)
