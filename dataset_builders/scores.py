"""candidates/ -> scores/: a teacher grades candidates and labelled positives; its scores are calibrated to (0, 1).

The raw score is kept as it came. The soft label is Platt scaling, label = sigmoid(a * score + b): a logistic
regression with balanced classes, labelled positives against retrieved documents that nobody labelled. It is fitted
on standardised scores with scikit-learn's default penalty, so labels do not depend on the teacher's unit, and a
teacher that never errs does not push a to infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from dataset_builders.candidates import queries_of
from dataset_builders.cli import InputError
from dataset_builders.embeddings import (
    Embedder,
    EncoderSection,
    count_tokens,
    in_shards,
    load_model,
    longest_first,
    token_batches,
)
from dataset_builders.folders import read_parquet, write_parquet
from dataset_builders.schema import CANDIDATES, LABEL_FLOOR, SCORES, check_finite
from dataset_builders.sources import Splits

PAIR_BLOCK = 65_536  # pairs of vectors gathered at a time
FLAT = 0.05  # a query whose labels differ by less has nothing to teach
ONE_HOT = 0.99  # share of the odds label / (1 - label) that one document holds: a hard label in disguise


class Teacher(EncoderSection):
    """A cross-encoder reads query and document together; a bi-encoder compares their vectors."""

    kind: Literal["cross_encoder", "bi_encoder"]


@dataclass(frozen=True)
class Calibration:
    """label = sigmoid(a * score + b), kept LABEL_FLOOR away from 0 and 1."""

    a: float
    b: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        from scipy.special import expit

        labels = expit(self.a * np.asarray(scores, np.float64) + self.b)
        return np.clip(labels, LABEL_FLOOR, 1 - LABEL_FLOOR).astype(np.float32)


def write_scores(
    corpus: Path, candidates: Path, splits: Splits, teacher: Teacher, cache: Path, folder: Path
) -> dict[str, Any]:
    """Write scores.parquet into `folder`; returns counts and calibration for the manifest."""
    # the texts that were searched for, though fewer are graded: their vectors are in the cache already
    queries = queries_of(corpus, splits.searched)
    documents = read_parquet(corpus / "documents.parquet")
    table = _graded_pairs(candidates, corpus, splits.split)
    pairs = np.stack(
        [
            pc.index_in(table["query_id"], pa.array(list(queries))).to_numpy(),
            pc.index_in(table["document_id"], documents["document_id"]).to_numpy(),
        ],
        axis=1,
    )
    scorer = PairScorer(teacher, cache, list(queries.values()), documents["text"].to_pylist())
    scores = np.array(scorer(pairs, folder / "teacher.npy"))
    is_positive = table["is_positive"].to_numpy()
    calibration, facts = calibrate(scores[is_positive], scores[~is_positive])
    labels = calibration(scores)
    table = table.append_column("teacher_score", pa.array(scores, pa.float32()))
    table = table.append_column("label", pa.array(labels, pa.float32()))
    write_parquet(folder / "scores.parquet", table.select(SCORES.names).cast(SCORES))
    (folder / "teacher.npy").unlink(missing_ok=True)
    starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
    return {
        "queries": len(starts),
        "graded": len(table),
        "positives_not_retrieved": table["rrf_rank"].null_count,
        "calibration": facts,
        **count_flat_and_one_hot(labels, starts),
    }


def calibrate(positives: np.ndarray, others: np.ndarray) -> tuple[Calibration, dict[str, Any]]:
    """Platt scaling of a teacher's scores for labelled positives and for retrieved, unlabelled documents.

    Also returns constants, AUC and counts. Raises InputError when the scores cannot be calibrated: NaN, all equal,
    one side missing, or positives scored below the others.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([positives, others]).astype(np.float64)
    check_finite(scores, "teacher scores")
    if not len(positives) or not len(others):
        raise InputError(
            f"teacher scores: {len(positives)} positives and {len(others)} other candidates; "
            "calibration needs both, retrieve more with --fusion.top_k"
        )
    mean, deviation = scores.mean(), scores.std()
    if deviation <= 1e-6 * max(1.0, abs(mean)):
        raise InputError(f"teacher scores are all {mean:.6g}: this model cannot tell documents apart; use another")
    is_positive = np.arange(len(scores)) < len(positives)
    auc = float(roc_auc_score(is_positive, scores))
    fit = LogisticRegression(class_weight="balanced").fit(((scores - mean) / deviation)[:, None], is_positive)
    a = float(fit.coef_[0, 0] / deviation)
    b = float(fit.intercept_[0] - a * mean)
    if a <= 0:
        raise InputError(
            f"teacher scores run against the labels (AUC {auc:.3f}): positives score below other candidates; "
            "use another teacher, or check its prompts"
        )
    facts = {"a": a, "b": b, "auc": round(auc, 4), "positives": len(positives), "others": len(others)}
    return Calibration(a, b), facts


def count_flat_and_one_hot(labels: np.ndarray, starts: np.ndarray) -> dict[str, int]:
    """How many rows of labels teach nothing by their grades. Row i runs from starts[i] to starts[i + 1].

    >>> count_flat_and_one_hot(np.array([0.5, 0.5, 0.999, 0.001, 0.7, 0.4]), np.array([0, 2, 4]))
    {'flat_rows': 1, 'one_hot_rows': 1}
    """
    odds = labels.astype(np.float64) / (1 - labels.astype(np.float64))
    share = np.maximum.reduceat(odds, starts) / np.add.reduceat(odds, starts)
    several = np.diff(starts, append=len(labels)) > 1
    flat = np.maximum.reduceat(labels, starts) - np.minimum.reduceat(labels, starts) < FLAT
    return {"flat_rows": int((flat & several).sum()), "one_hot_rows": int(((share > ONE_HOT) & several).sum())}


@dataclass(frozen=True)
class PairScorer:
    """The teacher's raw scores for pairs of a query and a text (a document, or for STS another query)."""

    teacher: Teacher
    cache: Path
    queries: Sequence[str]
    texts: Sequence[str]
    symmetric: bool = False  # the texts are queries too

    def __call__(self, pairs: np.ndarray, path: Path) -> np.ndarray:
        """(n,) scores of (n, 2) positions in queries and in texts; shards are kept beside `path` until done."""
        return self._compare(pairs) if self.teacher.kind == "bi_encoder" else self._read_together(pairs, path)

    def _compare(self, pairs: np.ndarray) -> np.ndarray:
        embedder = Embedder(self.teacher, self.cache)
        queries = embedder.queries(self.queries)
        texts = embedder.queries(self.texts) if self.symmetric else embedder.documents(self.texts)
        scores = np.empty(len(pairs), np.float32)
        for start in range(0, len(pairs), PAIR_BLOCK):
            block = pairs[start : start + PAIR_BLOCK]
            left, right = queries[block[:, 0]].astype(np.float32), texts[block[:, 1]].astype(np.float32)
            scores[start : start + PAIR_BLOCK] = np.einsum("ij,ij->i", left, right)
        return scores

    def _read_together(self, pairs: np.ndarray, path: Path) -> np.ndarray:
        """Logits: a sigmoid over them, which many rerankers are saved with, would crowd the best pairs near 1."""
        from sentence_transformers import CrossEncoder
        from torch.nn import Identity

        logits = Identity()
        model = load_model(CrossEncoder, self.teacher, max_length=self.teacher.max_seq_length)
        lengths = count_tokens(model.tokenizer, self.queries)[pairs[:, 0]]
        lengths = lengths + count_tokens(model.tokenizer, self.texts)[pairs[:, 1]]
        lengths = np.minimum(lengths, model.max_seq_length or lengths.max(initial=1))

        def scores(rows: np.ndarray) -> np.ndarray:
            found = []
            for batch in token_batches(lengths[rows], self.teacher.batch_tokens):
                inputs = [(self.queries[query], self.texts[text]) for query, text in pairs[rows[batch]]]
                answer = model.predict(inputs, batch_size=len(inputs), show_progress_bar=False, activation_fn=logits)
                if answer.ndim != 1:
                    raise InputError(f"teacher {self.teacher.model!r}: {answer.shape[1]} scores a pair; one is needed")
                found.append(answer.astype(np.float32))
                progress.update(len(batch))
            return np.concatenate(found)

        with tqdm(total=len(pairs), desc="teacher", unit=" pairs", smoothing=0) as progress:
            return in_shards(path, longest_first(lengths), scores, progress)


def _graded_pairs(candidates: Path, corpus: Path, split: str) -> pa.Table:
    """Candidates of the split's queries and, below them, their labelled positives that no retriever returned."""
    table = read_parquet(candidates / "candidates.parquet", CANDIDATES.names)
    table = table.filter(pc.is_in(table["query_id"], pa.array(list(queries_of(corpus, [split])))))
    positives = positives_of(corpus, split)
    retrieved = list(zip(table["query_id"].to_pylist(), table["document_id"].to_pylist(), strict=True))
    missing = sorted(positives - set(retrieved))
    extra = pa.table(
        {"query_id": [query for query, _ in missing], "document_id": [document for _, document in missing]},
        schema=pa.schema(list(CANDIDATES)[:2]),
    )
    table = pa.concat_tables([table, extra], promote_options="default")
    flags = [pair in positives for pair in retrieved] + [True] * len(missing)
    table = table.append_column("is_positive", pa.array(flags, pa.bool_()))
    return table.sort_by([("query_id", "ascending"), ("rrf_rank", "ascending"), ("document_id", "ascending")])


def positives_of(corpus: Path, split: str) -> set[tuple[str, str]]:
    """(query_id, document_id) of the split's labelled positives."""
    qrels = read_parquet(corpus / "qrels.parquet")
    qrels = qrels.filter((pc.field("split") == split) & (pc.field("score") > 0))
    return set(zip(qrels["query_id"].to_pylist(), qrels["document_id"].to_pylist(), strict=True))
