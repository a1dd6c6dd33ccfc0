"""Mining graded data: our steps against the tools that people would otherwise use, on the same inputs.

    python -m benchmarks.bench_mining [bm25] [negatives] [grading] [--set DATA/scifact --split test]

| part | ours | against |
|---|---|---|
| bm25 | BM25 by parts of the corpus, with bm25s inside | rank_bm25 |
| negatives | dense search by parts, then the margin | sentence-transformers' mine_hard_negatives |
| grading | a cross-encoder's grading in shards | CrossEncoder.predict, over all pairs and query by query |

Texts are synthetic, or those of a --set (a folder that `kind: local` reads). The sides take turns in one process, and
seconds are process CPU seconds: medians over the rounds. Ratios are of one round each, with their range. Memory is
of a further process for each side, which makes the inputs and then does the side's work once.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import environment, in_child, median_and_range, peak_memory
from benchmarks.mining_inputs import BLOCK, PART, Given, Texts, ndcg, read_texts, whole
from benchmarks.synthetic import write_cross_encoder
from common.cli import ArgumentParser, InputError, at_least_1, run
from common.steps import write_arrow
from common.tables import markdown_table
from dataset_builders.bm25 import Bm25, search_bm25, tokenise
from dataset_builders.columns import TextColumn
from dataset_builders.engines import LOCAL
from dataset_builders.mine import select_negatives
from dataset_builders.schema import LABEL_FLOOR
from dataset_builders.teachers import PairScorer, Teacher
from dataset_builders.top_k import ranges

DEPTH = 100  # documents retrieved for a query
OKAPI_QUERIES = 20  # that rank_bm25 answers of a synthetic set; its time is scaled to all
NEGATIVES, MARGIN = 7, 0.95

Seconds = dict[str, float]  # of the parts of a side's work


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    print(environment("bm25s", "rank_bm25", "sentence-transformers", "transformers", "torch"), flush=True)
    for name in args.parts:
        rounds, title, remarks = in_child(_timed, name, args)
        memory = {side: in_child(_memory, name, side, args) for side in rounds[0]}
        print(f"\n{name}: {title}, {len(rounds)} rounds\n\n{format_table(rounds, memory)}\n")
        print("\n".join(f"- {remark}" for remark in remarks), flush=True)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.bench_mining", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--documents", type=at_least_1, default=50_000, help="synthetic documents (default: 50,000)")
    parser.add_argument("--rounds", type=at_least_1, default=3)
    parser.add_argument("--set", type=Path, help="folder of corpus.parquet, queries.parquet and qrels.parquet")
    parser.add_argument("--split", default="test", help="whose queries of the set are asked (default: test)")
    args = parser.parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise InputError(f"part {name!r}: the parts are {', '.join(PARTS)}")
    args.parts = args.parts or list(PARTS)
    return args


def format_table(rounds: Sequence[Mapping[str, Seconds]], memory: Mapping[str, tuple[float, float]]) -> str:
    """One row for each side; the first is ours, and the others' seconds are divided by its seconds."""
    ours = next(iter(rounds[0]))
    parts = list(rounds[0][ours])
    rows = []
    for side in rounds[0]:
        seconds = [[one[side][part] for one in rounds] for part in parts]
        ratios = [[one[side][part] / one[ours][part] for one in rounds] for part in parts]
        if len(parts) > 1:
            ratios.append([sum(one[side].values()) / sum(one[ours].values()) for one in rounds])
        before, peak = memory[side]
        written = ["1" if side == ours else median_and_range(ratio) for ratio in ratios]
        middles = [f"{statistics.median(values):.2f}" for values in seconds]
        rows.append([side, *middles, *written, f"{peak - before:,.0f}", f"{before:,.0f}"])
    names = [*parts, "all"] if len(parts) > 1 else parts
    header = [*(f"{part}, s" for part in parts), *(f"{name}, ratio" for name in names)]
    return markdown_table(["side", *header, "memory, MiB", "on top of"], rows)


def _timed(name: str, args: Namespace) -> tuple[list[dict[str, Seconds]], str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        part = PARTS[name](args, Path(folder))
        rounds, results = [], {}
        for _ in range(args.rounds):
            seconds: dict[str, Seconds] = {side: {} for side in part.sides}
            for side, work in part.sides.items():
                results[side] = work(seconds[side])
            rounds.append(seconds)
        return rounds, part.title, part.remarks(results)


def _memory(name: str, side: str, args: Namespace) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        part = PARTS[name](args, Path(folder))
        return peak_memory(lambda: part.sides[side]({}))


@contextmanager
def cpu_seconds(seconds: Seconds, name: str, scale: float = 1.0) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[name] = scale * (time.process_time() - start)


class Bm25Search:
    """Indexing the documents, and then the queries' best 100. Both sides tokenise alike."""

    def __init__(self, args: Namespace, folder: Path) -> None:
        import bm25s  # noqa: F401  imported before the clock starts
        import rank_bm25  # noqa: F401
        import torch  # noqa: F401

        self.texts, self.folder, self.has_names = read_texts(args, 2000), folder, bool(args.set)
        batch = pa.record_batch({"text": self.texts.documents})
        write_arrow(folder / "texts.arrow", [batch], batch.schema)
        count = len(self.texts.queries)
        self.asked = np.arange(count) if args.set else np.arange(0, count, max(count // OKAPI_QUERIES, 1))
        self.sides = {"ours": self._ours, "rank_bm25": self._rank_bm25}
        self.title = f"{len(self.texts.documents):,} documents, {count:,} queries, top {DEPTH}"
        if len(self.asked) < count:
            self.title += f" (rank_bm25: {len(self.asked)} of them, scaled)"

    def _ours(self, seconds: Seconds) -> np.ndarray:
        parts, blocks = ranges(len(self.texts.documents), PART), ranges(len(self.texts.queries), BLOCK)
        work = self.folder / "work"
        search = (Bm25(top_k=DEPTH), TextColumn(self.folder / "texts.arrow"), parts, self.texts.queries, blocks, work)
        shutil.rmtree(work, ignore_errors=True)
        with cpu_seconds(seconds, "index"):
            search_bm25(*search, LOCAL)
        shutil.rmtree(work / "bm25.shards")
        with cpu_seconds(seconds, "search"):
            ranking = search_bm25(*search, LOCAL)
        seconds["index"] -= seconds["search"]
        return whole(ranking)["document"][self.asked]

    def _rank_bm25(self, seconds: Seconds) -> np.ndarray:
        from rank_bm25 import BM25Okapi

        with cpu_seconds(seconds, "index"):
            index = BM25Okapi(tokenise(self.texts.documents))
        found = []
        with cpu_seconds(seconds, "search", len(self.texts.queries) / len(self.asked)):
            for row in self.asked:
                scores = index.get_scores(tokenise([self.texts.queries[row]])[0])
                best = np.argpartition(-scores, DEPTH)[:DEPTH]
                found.append(best[np.argsort(-scores[best], kind="stable")])
        return np.array(found)

    def remarks(self, results: Mapping[str, np.ndarray]) -> list[str]:
        pairs = zip(*(found[:, :10].tolist() for found in results.values()), strict=True)
        shared = np.mean([len({*one} & {*other}) / 10 for one, other in pairs])
        remarks = [f"the two share {shared:.0%} of their best 10: rank_bm25 floors negative idf"]
        judged = [self.texts.judged[row] for row in self.asked]
        if self.has_names:
            scores = [f"{side} {ndcg(found, judged):.4f}" for side, found in results.items()]
            remarks.append(f"nDCG@10: {', '.join(scores)}")
        return remarks


class GivenModel:
    """What mine_hard_negatives asks of a SentenceTransformer, answered from vectors. Dot products, the faster way."""

    def __init__(self, given: Given) -> None:
        import torch
        from sentence_transformers import util

        self.given, self.device = given, torch.device("cpu")
        self.similarity, self.similarity_pairwise = util.dot_score, util.pairwise_dot_score

    def encode_document(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        assert len(texts) == len(self.given.documents)
        return self.given.documents[:]

    def encode_query(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        assert len(texts) == len(self.given.queries)
        return self.given.queries[:]


class Negatives:
    """(query, positive, 7 negatives) as texts: the closest of 100 documents that are 5 % below the positive.

    One positive for each query, and no near duplicates: there the two mean the same.
    """

    def __init__(self, args: Namespace, folder: Path) -> None:
        import datasets  # noqa: F401  imported before the clock starts
        import sentence_transformers  # noqa: F401

        texts = read_texts(args, 2000)
        single = [row for row, judged in enumerate(texts.judged) if len(judged) == 1]
        self.texts = Texts(
            texts.documents, [texts.queries[row] for row in single], [texts.judged[row] for row in single]
        )
        self.given, self.folder = Given.of(self.texts, folder), folder
        self.positives = np.array([next(iter(judged)) for judged in self.texts.judged])
        self.sides = {"ours": self._ours, "mine_hard_negatives": self._sentence_transformers}
        self.title = f"{len(texts.documents):,} documents, {len(single):,} queries, 384 dimensions, vectors given"

    def _ours(self, seconds: Seconds) -> list[tuple[str, ...]]:
        with cpu_seconds(seconds, "all"):
            positions, scores = self.given.search(self.folder / "work", DEPTH + 1)
            own = np.einsum("ij,ij->i", self.given.queries[:], self.given.documents[self.positives])
            labels, own = (np.clip(values, LABEL_FLOOR, 1 - LABEL_FLOOR) for values in (scores, own))
            rows = []
            for row, positive in enumerate(self.positives.tolist()):
                chosen = select_negatives(
                    labels[row], own[row], positions[row] == positive, margin=MARGIN, num_negatives=NEGATIVES
                )
                if len(chosen) == NEGATIVES:
                    documents = [positive, *positions[row, chosen].tolist()]
                    rows.append((self.texts.queries[row], *(self.texts.documents[place] for place in documents)))
        return rows

    def _sentence_transformers(self, seconds: Seconds) -> list[tuple[str, ...]]:
        from datasets import Dataset
        from sentence_transformers.util import mine_hard_negatives

        with cpu_seconds(seconds, "all"):
            pairs = {
                "query": self.texts.queries,
                "positive": [self.texts.documents[place] for place in self.positives],
            }
            mined = mine_hard_negatives(
                Dataset.from_dict(pairs),
                GivenModel(self.given),
                corpus=self.texts.documents,
                range_max=DEPTH,
                relative_margin=1 - MARGIN,
                num_negatives=NEGATIVES,
                output_format="n-tuple",
                verbose=False,
            )
        return list(zip(*(mined[name] for name in mined.column_names), strict=True))

    def remarks(self, results: Mapping[str, list[tuple[str, ...]]]) -> list[str]:
        ours, theirs = results.values()
        return [
            f"rows: ours {len(ours):,}, theirs {len(theirs):,}; the same in all columns: {len({*ours} & {*theirs}):,}"
        ]


class Grading:
    """A cross-encoder's scores of 20 queries' best 100 documents by dense search."""

    def __init__(self, args: Namespace, folder: Path) -> None:
        import sentence_transformers  # noqa: F401  imported before the clock starts

        texts = read_texts(args, 20)
        self.texts, self.folder = texts, folder
        self.reranker = write_cross_encoder(folder / "reranker", texts.documents[:10_000])
        positions, _ = Given.of(texts, folder).search(folder / "search", DEPTH)
        queries = np.repeat(np.arange(len(positions)), positions.shape[1])
        self.pairs = np.stack([queries, positions.ravel()], axis=1)
        self.tokens: dict[str, tuple[int, int]] = {}
        self.sides = {"ours": self._ours, "predict(all pairs)": self._all, "predict query by query": self._by_query}
        self.title = f"{len(self.pairs):,} pairs, a BERT cross-encoder 128x2, predict's batches of 32"

    def _ours(self, seconds: Seconds) -> np.ndarray:
        teacher = Teacher(kind="cross_encoder", model=str(self.reranker))
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as work,  # a new one: nothing is done before
            cpu_seconds(seconds, "grade"),
            self._counted("ours"),
        ):
            scorer = PairScorer(teacher, Path(work), LOCAL, self.texts.queries, self.texts.documents)
            return scorer.scores(self.pairs, Path(work))

    def _all(self, seconds: Seconds) -> np.ndarray:
        with cpu_seconds(seconds, "grade"), self._counted("predict(all pairs)"):
            return self._model().predict(self._texts(self.pairs), batch_size=32)

    def _by_query(self, seconds: Seconds) -> np.ndarray:
        with cpu_seconds(seconds, "grade"), self._counted("predict query by query"):
            model = self._model()
            blocks = np.split(self.pairs, np.flatnonzero(np.diff(self.pairs[:, 0])) + 1)
            found = [model.predict(self._texts(block), batch_size=32, show_progress_bar=False) for block in blocks]
            return np.concatenate(found)

    def _model(self) -> Any:
        import torch
        from sentence_transformers import CrossEncoder

        return CrossEncoder(str(self.reranker), activation_fn=torch.nn.Identity())

    def _texts(self, pairs: np.ndarray) -> list[tuple[str, str]]:
        return [(self.texts.queries[query], self.texts.documents[place]) for query, place in pairs.tolist()]

    @contextmanager
    def _counted(self, side: str) -> Iterator[None]:
        """Counts what the model's word embedding is asked for: all tokens, and those that are no padding."""
        import torch

        counts = np.zeros(2, np.int64)

        def count(module: Any, inputs: tuple) -> None:
            # of BERT's three embeddings only that of words knows of padding
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                counts[:] += inputs[0].numel(), int((inputs[0] != module.padding_idx).sum())

        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()
        self.tokens[side] = tuple(counts.tolist())

    def remarks(self, results: Mapping[str, np.ndarray]) -> list[str]:
        ours, *others = results.values()
        apart = max(float(np.abs(ours - other).max()) for other in others)
        waste = [f"{side} {computed / needed:.3f}" for side, (computed, needed) in self.tokens.items()]
        needed = self.tokens["ours"][1]
        return [
            f"tokens computed / needed: {', '.join(waste)}; needed {needed:,}, {needed / len(self.pairs):.0f} a pair",
            f"scores differ by at most {apart:.1e}",
        ]


PARTS = {"bm25": Bm25Search, "negatives": Negatives, "grading": Grading}


if __name__ == "__main__":
    run(main)
