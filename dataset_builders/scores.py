"""candidates/ -> scores/: a teacher grades candidates and judged documents; its scores are calibrated to (0, 1).

The raw score is kept as it came. The soft label is Platt scaling, label = sigmoid(a * score + b): a logistic
regression with balanced classes, labelled positives against the other graded documents. It is fitted for each build,
that is for each teacher and source, on standardised scores with scikit-learn's default penalty, so labels do not
depend on the teacher's unit, and a teacher that never errs does not push a to infinity.

    scorer = PairScorer(teacher, cache, engine, queries, texts)     # also for pairs of queries: symmetric=True
    scorer.scores(pairs, folder)                                    # (n, 2) positions -> (n,) float32

Work goes block by block (a row group of the candidates) and shard by shard (of pairs), so memory does not grow with
the number of queries.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationInfo, field_validator

from common.cli import InputError
from common.steps import ParquetStream, read_arrow, read_parquet, row_groups, write_arrow
from dataset_builders.build_record import Build
from dataset_builders.columns import TextColumn, positions_of, take
from dataset_builders.embeddings import (
    Embedder,
    EncoderSection,
    Texts,
    Vectors,
    load_model,
    longest_first,
    token_batches,
)
from dataset_builders.engines import Engine, Shards, compute_shards
from dataset_builders.families import Families, read_classes
from dataset_builders.schema import CANDIDATES, LABEL_FLOOR, SCORES, check_finite, check_rows

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder

SHARD_PAIRS = 8192  # pairs in a shard: what a killed process loses at most; sorted by length, they hardly need padding
TOKENISED = 256  # pairs tokenised together
MAX_OTHERS = 1_000_000  # other documents that calibration reads, at an even stride; it reads every positive
BINS = 10  # of the reliability table
FLAT = 0.05  # a query whose labels differ by less has nothing to teach
ONE_HOT = 0.99  # share of the odds label / (1 - label) that one document holds: a hard label in disguise
WARN_SHARE = 0.2  # of queries that are flat, or one-hot
WARN_AUC = 0.65  # below, a teacher hardly tells positives from others; 0.5 is chance

# Positions of the query and of the document of a pair. Positive: labelled so, or of the class of one that is.
PAIRS = pa.schema([("query", pa.int32()), ("document", pa.int32()), ("is_positive", pa.bool_())])
# What a teacher says of a pair, the pair's tokens and those computed for it, padding included (0: from vectors).
GRADE = np.dtype([("score", np.float32), ("tokens", np.int32), ("computed", np.int32)])


class Teacher(EncoderSection):
    """A cross-encoder reads query and document together; a bi-encoder compares their vectors.

    Cross-encoders are classification heads, whose logit is the score, and LLM rerankers, whose score is what their
    CrossEncoder folder states: logit(yes) - logit(no) after a chat template, as a rule.
    """

    kind: Literal["cross_encoder", "bi_encoder"]
    prompt: str | None = None  # a cross-encoder's instruction; without one, that saved with the model is used

    @field_validator("kind")
    @classmethod
    def _without_a_bi_encoders_prompts(cls, kind: str, info: ValidationInfo) -> str:
        if kind == "cross_encoder" and (info.data.get("query_prompt") or info.data.get("document_prompt")):
            raise ValueError("query_prompt and document_prompt are a bi_encoder's; a cross_encoder has one `prompt`")
        return kind

    @field_validator("prompt")
    @classmethod
    def _of_a_cross_encoder(cls, prompt: str | None, info: ValidationInfo) -> str | None:
        if prompt is not None and info.data.get("kind") == "bi_encoder":
            raise ValueError("a bi_encoder has a query_prompt and a document_prompt instead")
        return prompt


@dataclass(frozen=True)
class Calibration:
    """label = sigmoid(a * score + b), kept LABEL_FLOOR away from 0 and 1."""

    a: float
    b: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        from scipy.special import expit

        labels = expit(self.a * np.asarray(scores, np.float64) + self.b)
        return np.clip(labels, LABEL_FLOOR, 1 - LABEL_FLOOR).astype(np.float32)


def write_scores(build: Build, folder: Path) -> dict[str, Any]:
    """Write scores.parquet into `folder`; returns counts, calibration and warnings for the manifest."""
    teacher = build.recipe.teacher
    scorer, pairs = pairs_to_grade(build, folder / "pairs.arrow")
    grades = scorer.grade(folder / "pairs.arrow", folder / "teacher.shards")
    calibration, facts = calibrate(*_positives_and_others(pairs, grades))
    counts = {"queries": 0, "graded": 0, "judged_not_retrieved": 0, "flat_rows": 0, "one_hot_rows": 0}
    with ParquetStream(folder / "scores.parquet", SCORES) as stream:
        for block in graded_blocks(build):
            start = counts["graded"]
            scores = _rows(grades, start, start + len(block))["score"]
            labels = calibration(scores)
            block = block.append_column("teacher_score", pa.array(scores, pa.float32()))
            block = block.append_column("label", pa.array(labels, pa.float32()))
            stream.write(block.select(SCORES.names).cast(SCORES))
            starts = np.flatnonzero(np.diff(pairs["query"].slice(start, len(block)).to_numpy(), prepend=-1))
            counts["queries"] += len(starts)
            counts["graded"] += len(block)
            counts["judged_not_retrieved"] += block["rrf_rank"].null_count
            for name, count in count_flat_and_one_hot(labels, starts).items():
                counts[name] += count
    (folder / "pairs.arrow").unlink()
    if teacher.kind == "cross_encoder":
        fields = {"tokens_needed": "tokens", "tokens_computed": "computed"}
        counts |= {name: sum(int(grade[field].sum()) for grade in grades) for name, field in fields.items()}
    warnings = _warnings(counts, facts["auc"])
    for warning in warnings:
        print(f"warning: teacher {teacher.model}: {warning}", file=sys.stderr, flush=True)
    return {**counts, "calibration": facts, "warnings": warnings}


def calibrate(positives: np.ndarray, others: np.ndarray) -> tuple[Calibration, dict[str, Any]]:
    """Platt scaling of a teacher's scores for labelled positives and for the other graded documents.

    Also returns constants, AUC, counts, the reliability table and its expected calibration error. Raises InputError
    when the scores cannot be calibrated: NaN, all equal, one side missing, or positives scored below the others.
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
    check_spread(scores, "teacher scores")
    mean, deviation = scores.mean(), scores.std()
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
    calibration = Calibration(a, b)
    table = reliability(calibration(scores), is_positive)
    facts = {
        "a": a,
        "b": b,
        "auc": round(auc, 4),
        "positives": len(positives),
        "others": len(others),
        "expected_calibration_error": round(calibration_error(table), 4),
        "reliability": table,
    }
    return calibration, facts


def check_spread(scores: np.ndarray, what: str) -> None:
    """Raises InputError for scores that are all the same, up to rounding."""
    mean, deviation = float(np.mean(scores)), float(np.std(scores))
    if deviation <= 1e-6 * max(1.0, abs(mean)):
        raise InputError(f"{what} are all {mean:.6g}: this model cannot tell documents apart; use another")


def reliability(labels: np.ndarray, is_positive: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """For each equal-width bin of labels that is not empty: mean label, observed share of positives, counts.

    Both are weighted as the fit is, all positives together as much as all others: where labels mean what they say,
    `observed` equals `label`.

    >>> reliability(np.array([0.1, 0.9, 0.9]), np.array([False, False, True]), bins=2)
    [{'label': 0.1, 'observed': 0.0, 'positives': 0, 'others': 1}, {'label': 0.9, 'observed': 0.6667, \
'positives': 1, 'others': 1}]
    """
    labels, is_positive = np.asarray(labels, np.float64), np.asarray(is_positive, bool)
    weights = np.where(is_positive, 1 / max(is_positive.sum(), 1), 1 / max((~is_positive).sum(), 1))
    number = np.minimum((labels * bins).astype(np.int64), bins - 1)
    table = []
    for members in (number == place for place in range(bins)):
        if members.any():
            weight, positive = weights[members], is_positive[members]
            table.append(
                {
                    "label": round(float(np.average(labels[members], weights=weight)), 4),
                    "observed": round(float(weight[positive].sum() / weight.sum()), 4),
                    "positives": int(positive.sum()),
                    "others": int((~positive).sum()),
                }
            )
    return table


def calibration_error(table: Sequence[dict[str, Any]]) -> float:
    """Expected calibration error: the mean over bins of |label - observed|, by their balanced weight; 0 is best.

    >>> calibration_error([{"label": 0.25, "observed": 0.0, "positives": 0, "others": 4},
    ...                    {"label": 0.75, "observed": 1.0, "positives": 4, "others": 0}])
    0.25
    """
    positives, others = (max(sum(row[name] for row in table), 1) for name in ("positives", "others"))
    weights = np.array([row["positives"] / positives + row["others"] / others for row in table])
    return float(np.average([abs(row["label"] - row["observed"]) for row in table], weights=weights))


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


def _warnings(counts: dict[str, int], auc: float) -> list[str]:
    """What to know about a teacher before training on its grades: one line each."""
    found = []
    flat, one_hot = (counts[name] / counts["queries"] for name in ("flat_rows", "one_hot_rows"))
    if flat > WARN_SHARE:
        found.append(f"{flat:.0%} of queries are flat (labels within {FLAT}): retrieve deeper, or use another teacher")
    if one_hot > WARN_SHARE:
        found.append(
            f"{one_hot:.0%} of queries are one-hot (a document with {ONE_HOT:.0%} of the odds), as good as hard "
            "labels: train with a higher target_temperature, or use another teacher"
        )
    if auc < WARN_AUC:
        found.append(
            f"AUC {auc:.3f}: the teacher hardly tells positives from other candidates; check its prompt, compare it "
            "with --check_teacher, or use another"
        )
    return found


@dataclass(frozen=True)
class PairScorer:
    """The teacher's raw scores for pairs of a query and a text (a document, or for STS another query)."""

    teacher: Teacher
    cache: Path
    engine: Engine
    queries: Texts
    texts: Texts
    symmetric: bool = False  # the texts are queries too

    def scores(self, pairs: np.ndarray, folder: Path) -> np.ndarray:
        """(n,) float32 scores of (n, 2) positions in queries and texts; finished shards stay in `folder`."""
        columns = [*np.asarray(pairs, np.int32).T, np.zeros(len(pairs), bool)]
        write_arrow(folder / "pairs.arrow", [pa.record_batch(columns, schema=PAIRS)], PAIRS)
        grades = self.grade(folder / "pairs.arrow", folder / "teacher.shards")
        (folder / "pairs.arrow").unlink()
        return np.concatenate([grade["score"] for grade in grades])

    def grade(self, pairs: Path, folder: Path) -> Shards:
        """GRADE arrays, SHARD_PAIRS pairs each, of the Arrow file `pairs`."""
        if self.teacher.kind == "bi_encoder":
            embedder = Embedder(self.teacher, self.cache, self.engine)
            queries = embedder.queries(self.queries)
            texts = embedder.queries(self.texts) if self.symmetric else embedder.documents(self.texts)
            work = _Comparison(pairs, self.teacher, queries, texts)
        else:
            work = _Reading(pairs, self.teacher, self.queries, self.texts)
        count = len(read_arrow(pairs))
        sizes = [min(SHARD_PAIRS, count - start) for start in range(0, count, SHARD_PAIRS)]
        return compute_shards(work, sizes, folder, self.engine, description="teacher", unit="pairs")


@dataclass(frozen=True)
class _Shard:
    """Shard i: the grades of the i-th SHARD_PAIRS pairs in an Arrow file."""

    pairs: Path
    teacher: Teacher

    def __call__(self, number: int) -> np.ndarray:
        table = read_arrow(self.pairs).slice(number * SHARD_PAIRS, SHARD_PAIRS)
        grades = self._grade(table["query"].to_numpy(), table["document"].to_numpy())
        check_finite(grades["score"], f"scores of teacher {self.teacher.model}")
        return grades


@dataclass(frozen=True)
class _Comparison(_Shard):
    """Dot products of stored vectors. Their float16 moves a cosine by less than 1e-3, as a rule by some 1e-5."""

    queries: Vectors
    texts: Vectors

    def _grade(self, queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
        grades = np.zeros(len(queries), GRADE)
        grades["score"] = np.einsum("ij,ij->i", self.queries[queries], self.texts[texts])
        return grades


@dataclass(frozen=True)
class _Reading(_Shard):
    """A cross-encoder's logits, in batches of pairs of like length.

    Logits, since a sigmoid over them, which many rerankers are saved with, would crowd the best pairs near 1.
    """

    queries: Texts
    texts: Texts

    def _grade(self, queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
        import torch

        model = self._model
        prompt = model.prompts.get(model.default_prompt_name) if self.teacher.prompt is None else self.teacher.prompt
        tokenised = []
        for start in range(0, len(queries), TOKENISED):
            part = slice(start, start + TOKENISED)
            read = zip(take_texts(self.queries, queries[part]), take_texts(self.texts, texts[part]), strict=True)
            tokenised += _unpadded(model.preprocess(list(read), prompt=prompt))
        grades = np.zeros(len(queries), GRADE)
        grades["tokens"] = lengths = np.array([len(row["input_ids"]) for row in tokenised])
        order = longest_first(lengths)
        for batch in token_batches(lengths[order], self.teacher.batch_tokens):
            rows = order[batch]
            with torch.inference_mode():
                scores = model(_padded([tokenised[row] for row in rows], model))["scores"]
            grades["score"][rows] = scores[:, 0].float().cpu().numpy()
            grades["computed"][rows] = lengths[rows].max()
        return grades

    @cached_property
    def _model(self) -> CrossEncoder:
        return load_reranker(self.teacher).eval()


def load_reranker(teacher: Teacher) -> CrossEncoder:
    """The cross-encoder of `teacher`. Raises InputError when it does not give one score for a query and a document."""
    from sentence_transformers import CrossEncoder

    model = load_model(CrossEncoder, teacher, max_length=teacher.max_seq_length)
    if model.num_labels != 1:
        raise InputError(f"teacher {teacher.model!r}: {model.num_labels} scores a pair; a reranker gives one")
    try:
        model.preprocess([("query", "document")], prompt=teacher.prompt)
    except ValueError as error:  # a causal model whose chat template knows nothing of queries and documents
        raise InputError(f"teacher {teacher.model!r}: {str(error).splitlines()[0]}") from None
    return model


def _unpadded(features: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of a tokenised batch, one by one: each its tokens alone, and what holds for the whole batch."""
    import torch

    mask = features["attention_mask"].bool()
    by_token = {key: value for key, value in features.items() if torch.is_tensor(value) and value.shape == mask.shape}
    common = {key: value for key, value in features.items() if key not in by_token}
    return [{**{key: value[row][mask[row]] for key, value in by_token.items()}, **common} for row in range(len(mask))]


def _padded(rows: Sequence[dict[str, Any]], model: CrossEncoder) -> dict[str, torch.Tensor]:
    """A batch of `_unpadded` pairs, as the model's own tokenizer would pad it, on the model's device."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokenizer, batch = model.tokenizer, dict(rows[0])
    for key, value in rows[0].items():
        if torch.is_tensor(value) and value.shape == rows[0]["input_ids"].shape:
            padding = tokenizer.pad_token_id if key == "input_ids" else 0
            columns = [row[key] for row in rows]
            padded = pad_sequence(columns, True, padding_value=padding, padding_side=tokenizer.padding_side)
            batch[key] = padded.to(model.device)
    return batch


def take_texts(texts: Texts, rows: np.ndarray) -> list[str]:
    if isinstance(texts, TextColumn):
        return texts[rows]
    if isinstance(texts, pa.ChunkedArray):
        return take(texts, rows).to_pylist()
    return [texts[row] for row in rows]


def graded_blocks(build: Build) -> Iterator[pa.Table]:
    """CANDIDATES and is_positive of the split's queries, block by block: those retrieved by rank, and below them,
    with null ranks, the judged documents (also those judged not relevant) that no retriever returned.

    Documents that an evaluation task asks about, and that stay for another split's sake, are left out.
    A query's rows are together, queries in order of their ids. Raises InputError when there is nothing to grade.
    """
    split = build.splits.split
    split_queries = pa.array(list(build.queries_of(split)), pa.string())
    judged = read_parquet(build.corpus / "qrels.parquet")
    judged = judged.filter((pc.field("split") == split) & pc.field("query_id").isin(split_queries))
    judged = judged.append_column("is_positive", pc.greater(judged["score"], 0)).drop_columns(["score", "split"])
    asked_about = _asked_about(build.corpus)
    path = build.candidates / "candidates.parquet"
    # after the last block, the queries for which nothing at all was retrieved
    for retrieved in chain(filter(len, row_groups(path, CANDIDATES.names)), [CANDIDATES.empty_table()]):
        here = judged
        if len(retrieved):
            is_here = pc.less_equal(judged["query_id"], retrieved["query_id"][-1])
            here, judged = judged.filter(is_here), judged.filter(pc.invert(is_here))
        retrieved = retrieved.filter(pc.is_in(retrieved["query_id"], split_queries))
        retrieved = retrieved.filter(pc.invert(pc.is_in(retrieved["document_id"], asked_about)))
        block = retrieved.join(here, ["query_id", "document_id"], join_type="full outer")
        if len(block):
            block = block.set_column(len(CANDIDATES), "is_positive", block["is_positive"].fill_null(False))
            yield block.sort_by([(name, "ascending") for name in ("query_id", "rrf_rank", "document_id")])


def _asked_about(corpus: Path) -> pa.Array:
    """Ids of the documents in the corpus that match what an evaluation task asks about."""
    log = corpus / "contamination.parquet"
    if not log.exists():
        return pa.array([], pa.string())
    rows = read_parquet(log, ["side", "id", "dropped"])
    return rows.filter((pc.field("side") == "document") & ~pc.field("dropped"))["id"].combine_chunks()


def pairs_to_grade(build: Build, path: Path) -> tuple[PairScorer, pa.Table]:
    """The scorer, and the pairs of all graded blocks (PAIRS), written to `path` and memory-mapped."""
    query_ids = pa.chunked_array([list(build.queries)], pa.string())
    classes = Families.of(read_classes(build.corpus), "class", build.document_ids)

    def batches() -> Iterator[pa.RecordBatch]:
        for block in graded_blocks(build):
            asked = positions_of(block["query_id"].combine_chunks(), query_ids, "graded candidates")
            found = positions_of(block["document_id"].combine_chunks(), build.document_ids, "graded candidates")
            labelled = block["is_positive"].to_numpy()
            is_positive = labelled | classes.meet_positive(asked, found, labelled)
            columns = [asked.astype(np.int32), found.astype(np.int32), is_positive]
            yield pa.record_batch(columns, schema=PAIRS)

    write_arrow(path, batches(), PAIRS)
    pairs = read_arrow(path)
    check_rows(pairs, f"{build.candidates}: nothing to grade for split {build.splits.split!r}")
    queries = list(build.queries.values())
    return PairScorer(build.recipe.teacher, build.cache, build.engine, queries, build.documents), pairs


def _positives_and_others(pairs: pa.Table, grades: Shards) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all positives, and of at most MAX_OTHERS other documents at an even stride."""
    others_in_all = len(pairs) - (pc.sum(pairs["is_positive"]).as_py() or 0)
    stride = max(math.ceil(others_in_all / MAX_OTHERS), 1)
    positives, others, seen = [], [], 0
    for number, grade in enumerate(grades):
        is_positive = pairs["is_positive"].slice(number * SHARD_PAIRS, len(grade)).to_numpy()
        rest = grade["score"][~is_positive]
        positives.append(grade["score"][is_positive])
        others.append(rest[-seen % stride :: stride])
        seen += len(rest)
    return np.concatenate(positives), np.concatenate(others)


def _rows(shards: Shards, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of all shards together, each of which has SHARD_PAIRS rows but for the last."""
    numbers = range(start // SHARD_PAIRS, math.ceil(stop / SHARD_PAIRS))
    parts = [shards[n][max(start - n * SHARD_PAIRS, 0) : stop - n * SHARD_PAIRS] for n in numbers]
    return np.concatenate(parts)
