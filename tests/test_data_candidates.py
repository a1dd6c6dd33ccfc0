import math
import re
from dataclasses import dataclass

import bm25s
import ir_measures
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import Stemmer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rank_bm25 import BM25Okapi
from tiny_data import SHARED_DATA

from common.steps import write_arrow
from dataset_builders import bm25, dense
from dataset_builders.bm25 import Bm25, search_bm25, tokenise
from dataset_builders.candidates import fuse
from dataset_builders.columns import TextColumn
from dataset_builders.dense import Dense, dense_top_k, exact_search, search_dense
from dataset_builders.embeddings import Vectors, vector_shard
from dataset_builders.engines import LOCAL, compute_shards
from dataset_builders.fusion import Fusion, best_weight, convex_fusion, reciprocal_rank_fusion
from dataset_builders.top_k import FOUND, NOTHING, best, merge, ranges

# --- fusion ---------------------------------------------------------------------------------------------------------

documents = st.lists(st.integers(0, 9), unique=True, max_size=8)


def test_fusion_by_hand():
    fused = reciprocal_rank_fusion([["b", "a"], ["a", "b"], ["c"]])
    assert fused == [("a", 1 / 62 + 1 / 61), ("b", 1 / 61 + 1 / 62), ("c", 1 / 61)]
    assert reciprocal_rank_fusion([["b", "a"], ["a", "b"]], top_k=1) == [("a", 1 / 62 + 1 / 61)]


@given(st.lists(st.tuples(documents, documents, st.integers(-1, 9)), min_size=1, max_size=4), st.integers(1, 12))
def test_queries_fused_together_are_fused_as_each_alone(queries, top_k):
    def found(side):
        rows = np.full((len(queries), 8), NOTHING)
        for row, query in enumerate(queries):
            rows["document"][row, : len(query[side])] = query[side]
            rows["score"][row, : len(query[side])] = [1 / (1 + rank) for rank in range(len(query[side]))]
        return rows

    own, scores = np.array([[query[2]] for query in queries]), [1 / (1 + rank) for rank in range(8)]
    table = fuse(found(0), found(1), own, Fusion(rrf_k=5, top_k=top_k), 0.3).to_dicts()
    whole = fuse(found(0), found(1), own, Fusion(kind="convex"), 0.3).to_dicts()
    for number, (*lists, own_document) in enumerate(queries):
        rows = [row for row in table if row["query"] == number]
        scored = [{d: score for d, score in zip(one, scores, strict=False) if d != own_document} for one in lists]
        lists = [list(one) for one in scored]
        convex = [(row["document"], row["convex_score"]) for row in whole if row["query"] == number]
        expected = convex_fusion(*scored, 0.3)
        assert dict(convex) == pytest.approx(dict(expected)) and len(convex) == len(expected)
        assert [(row["document"], row["rrf_score"]) for row in rows] == reciprocal_rank_fusion(lists, 5, top_k)
        assert [row["rrf_rank"] for row in rows] == list(range(1, len(rows) + 1))
        for name, one in zip(("bm25", "dense"), lists, strict=True):
            ranks = {row["document"]: row[f"{name}_rank"] for row in rows}
            assert ranks == {document: one.index(document) + 1 if document in one else None for document in ranks}
            assert all((row[f"{name}_score"] is None) == (row[f"{name}_rank"] is None) for row in rows)


def test_the_weight_is_the_one_whose_fusion_has_the_best_ndcg():
    rng = np.random.default_rng(0)
    names = ["query", "document", "bm25", "dense", "gain"]
    rows = [(q, d, *rng.random(2), int(rng.random() < 0.1)) for q in range(30) for d in range(40)]
    table = pl.DataFrame(rows, schema=names, orient="row")
    # relevance mostly follows one of the two, so the best weight is no end of the range
    table = table.with_columns(
        bm25=pl.col("bm25") + 0.4 * pl.col("gain"), dense=pl.col("dense") + 0.7 * pl.col("gain")
    )
    gains = table.filter(pl.col("gain") > 0).select("query", "document", "gain")
    weight = best_weight(table.drop("gain"), gains)

    def ndcg(weight):
        run = [
            ir_measures.ScoredDoc(str(q), str(d), weight * bm25 + (1 - weight) * dense)
            for q, d, bm25, dense, _ in table.iter_rows()
        ]
        qrels = [ir_measures.Qrel(str(q), str(d), gain) for q, d, gain in gains.iter_rows()]
        return ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]

    best = max(map(ndcg, np.linspace(0, 1, 21).tolist()))
    assert 0 < weight < 1 and ndcg(weight) == pytest.approx(best) and best > max(ndcg(0), ndcg(1))
    assert best_weight(table.drop("gain"), gains.with_columns(document=pl.lit(99))) == 0.35


# --- the best of a matrix, and of parts -----------------------------------------------------------------------------

matrices = st.integers(1, 40).flatmap(
    lambda width: hnp.arrays(np.float32, (5, width), elements=st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.5, 1.0]))
)


@given(matrices, st.integers(1, 45), st.integers(1, 40), st.sampled_from([-np.inf, 0.0]))
def test_the_best_of_parts_are_those_of_a_full_sort_with_ties_by_position(scores, top_k, size, above):
    parts = [
        best(scores[:, part.start : part.stop], top_k, part.start, above) for part in ranges(scores.shape[1], size)
    ]
    found = merge(parts, top_k)
    for row, expected in zip(found, scores, strict=True):
        order = [place for place in np.argsort(-expected, kind="stable") if expected[place] > above][:top_k]
        assert row["document"].tolist() == order + [-1] * (len(row) - len(order))
        assert row["score"].tolist() == [*expected[order].tolist(), *[-math.inf] * (len(row) - len(order))]
        assert not np.signbit(row["score"][row["score"] == 0]).any()


@settings(max_examples=60)
@given(matrices, st.integers(1, 50), st.booleans())
def test_blocked_inner_products_are_a_full_sort(vectors, top_k, bfloat16):
    texts = vectors.T[:, :2].copy() if vectors.shape[1] > 1 else vectors[:, :1].copy()
    queries = texts[::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "QUERY_BLOCK", 3)
        patch.setattr(dense, "DOCUMENT_BLOCK", 9)
        patch.setattr(dense, "_multiplies_bfloat16", lambda: bfloat16)
        positions, found = dense_top_k(queries, texts, top_k)
    scores = queries @ texts.T  # sums of multiples of 1/4: exact, so ties are real ties
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, axis=1))


@pytest.mark.parametrize("spread", [1.0, 0.05, 1e-6])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_exact_search_in_bfloat16_finds_what_float64_ranks_highest(spread, bfloat16, monkeypatch):
    """Of vectors of other lengths than 1, half of them twice, in a cone too narrow for bfloat16 to tell them apart."""
    monkeypatch.setattr(dense, "DOCUMENT_BLOCK", 300)
    rng = np.random.default_rng(0)
    axis = rng.normal(size=48)
    texts = (axis + spread * rng.normal(size=(1000, 48))).astype(np.float32) * rng.uniform(0.5, 3, (1000, 1))
    texts = np.concatenate([texts, texts[::2]]).astype(np.float32)
    queries = (axis + spread * rng.normal(size=(300, 48))).astype(np.float32)
    found = exact_search(queries, texts, 20, bfloat16)
    scores = queries.astype(np.float64) @ texts.astype(np.float64).T
    np.testing.assert_allclose(found["score"], np.take_along_axis(scores, found["document"], 1), rtol=1e-5)
    np.testing.assert_allclose(found["score"], -np.sort(-scores, axis=1)[:, :20], rtol=1e-5)
    order = np.lexsort((found["document"], -found["score"]))  # equal documents: by position, though blocks apart
    np.testing.assert_array_equal(order, np.broadcast_to(np.arange(20), order.shape))
    text = np.where(found["document"] < 1000, found["document"], 2 * (found["document"] - 1000))
    twins = text[:, 1:] == text[:, :-1]
    assert twins.sum() > 1000 and (np.diff(found["score"])[twins] == 0).all()
    np.testing.assert_array_equal(found, exact_search(queries, texts, 20, not bfloat16))


# --- BM25 -----------------------------------------------------------------------------------------------------------


class LuceneOkapi(BM25Okapi):
    """rank_bm25 with the idf of Lucene, ln(1 + (N - n + 0.5) / (n + 0.5)), which is never negative."""

    def _calc_idf(self, document_frequencies):
        for word, count in document_frequencies.items():
            self.idf[word] = np.log(1 + (self.corpus_size - count + 0.5) / (count + 0.5))


def retrieved(texts, queries, folder, *, part, block=50, **keys) -> list[list[tuple[int, float]]]:
    """(position, score) of each query's documents, best first, searched in parts of `part` documents."""
    batch = pa.record_batch({"text": texts})
    folder.mkdir()
    write_arrow(folder / "texts.arrow", [batch], batch.schema)
    section, parts, blocks = Bm25(**keys), ranges(len(texts), part), ranges(len(queries), block)
    ranking = search_bm25(section, TextColumn(folder / "texts.arrow"), parts, queries, blocks, folder, LOCAL)
    found = np.concatenate([ranking[rows] for rows in blocks])
    return [row[row["document"] >= 0].tolist() for row in found]


@pytest.fixture(scope="module")
def zipf():
    rng = np.random.default_rng(0)
    vocabulary = [f"{one}{two}" for one in ("kelp", "moss", "fern", "reed", "vine") for two in "bcdfghjklmnpqrstvwxz"]
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    draw = lambda length: " ".join(rng.choice(vocabulary, length, p=weights / weights.sum()))  # noqa: E731
    return [draw(rng.integers(5, 60)) for _ in range(200)], [draw(4) for _ in range(50)]


@given(
    st.lists(st.text(st.sampled_from("aB_9 .é猫タา²ßİ\nthe"), max_size=12), max_size=6), st.sampled_from(["en", "vi"])
)
def test_words_are_those_of_bm25s(texts, language):
    """By its one pattern, where ours has a faster way for ASCII; in Vietnamese neither stop words nor stems."""
    spaced = [re.sub(bm25._SPACELESS, bm25._bigrams, text) for text in texts]
    keys = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english")} if language == "en" else {"stopwords": None}
    expected = bm25s.tokenize(spaced, token_pattern=bm25._term(), return_ids=False, show_progress=False, **keys)
    assert tokenise(texts, language) == expected


@pytest.mark.parametrize(("part", "columns"), [(200, 5), (70, 0), (64, 5), (3, 100)])
def test_bm25_by_parts_is_bm25s_and_rank_bm25_with_lucenes_idf(part, columns, zipf, tmp_path, monkeypatch):
    """Whether the most frequent terms are added as whole columns, or none."""
    monkeypatch.setattr(bm25, "COLUMNS", columns * 4 * part)
    texts, queries = zipf
    index, reference = bm25s.BM25(method="lucene", k1=0.9, b=0.4), LuceneOkapi(tokenise(texts), k1=0.9, b=0.4)
    index.index(tokenise(texts), show_progress=False)
    found = retrieved(texts, queries, tmp_path / "x", part=part, block=20, k1=0.9, b=0.4)
    assert len(found) == 50
    for query, row in zip(tokenise(queries), found, strict=True):
        positions, scores = zip(*row, strict=True)
        # equal up to ties: the scores of the documents that were found are the best scores
        for expected in (index.get_scores(query), reference.get_scores(query) / 1.9):  # Okapi's factor k1 + 1
            np.testing.assert_allclose(scores, expected[list(positions)], rtol=1e-5)
            np.testing.assert_allclose(scores, np.sort(expected[expected > 0])[::-1][:100], rtol=1e-5)


def test_rank_bm25_is_its_own_ranking(zipf, tmp_path):
    texts, queries = zipf
    reference = BM25Okapi(tokenise(texts))
    found = retrieved(texts, queries, tmp_path / "x", part=70, block=20, top_k=10, backend="rank_bm25")
    for query, row in zip(queries, found, strict=True):
        scores = reference.get_scores(tokenise([query])[0])
        np.testing.assert_allclose([score for _, score in row], np.sort(scores[scores > 0])[::-1][:10], rtol=1e-6)


@pytest.mark.parametrize("backend", ["bm25s", "rank_bm25"])
@pytest.mark.parametrize("query", ["", "the of and", "unseenword"])
def test_a_query_without_known_words_finds_nothing(query, backend, tmp_path):
    found = retrieved(["kelp moss", "fern", "ivy oak"], [query, "fern"], tmp_path / "x", part=2, backend=backend)
    assert found[0] == [] and [position for position, _ in found[1]] == [1]


@pytest.mark.skipif(not (SHARED_DATA / "scifact").is_dir(), reason="the SciFact files are not on this machine")
def test_bm25_reaches_the_published_ndcg_on_scifact(tmp_path):
    folder = SHARED_DATA / "scifact"
    corpus = pq.read_table(folder / "corpus.parquet").to_pylist()
    qrels = [row for row in pq.read_table(folder / "qrels.parquet").to_pylist() if row["split"] == "test"]
    judged = sorted({row["query_id"] for row in qrels})
    queries = {row["_id"]: row["text"] for row in pq.read_table(folder / "queries.parquet").to_pylist()}
    texts = [f"{row['title']} {row['text']}" for row in corpus]
    found = retrieved(texts, [queries[query_id] for query_id in judged], tmp_path / "x", part=2000, top_k=10)
    run = [
        ir_measures.ScoredDoc(query_id, corpus[position]["_id"], score)
        for query_id, row in zip(judged, found, strict=True)
        for position, score in row
    ]
    labels = [ir_measures.Qrel(row["query_id"], row["corpus_id"], row["score"]) for row in qrels]
    ndcg = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], labels, run)[ir_measures.nDCG @ 10]
    assert len(judged) == 300
    assert ndcg == pytest.approx(0.687, abs=0.005)  # bm25s's own figure for SciFact: 0.6874


# --- dense ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    values: np.ndarray

    def __call__(self, number):
        return self.values


def vectors_on_disk(values: np.ndarray, folder) -> Vectors:
    """As an Embedder would keep them."""
    shard = vector_shard(values, np.zeros(len(values)))
    return Vectors(compute_shards(Rows(shard), [len(values)], folder, LOCAL, description="", unit=""))


@pytest.mark.parametrize("faiss", [False, True])
def test_dense_search_by_parts_finds_the_whole_corpus_best(faiss, tmp_path):
    if faiss:
        pytest.importorskip("faiss", reason="FAISS is not installed")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    texts = (centres[rng.integers(20, size=3000)] + 0.3 * rng.normal(size=(3000, 16))).astype(np.float32)
    asked = (texts[:60] + 0.1 * rng.normal(size=(60, 16))).astype(np.float32)
    section = Dense(model="x", top_k=10, faiss_from=1 if faiss else 10_000, faiss_probes=8)
    parts, blocks = ranges(3000, 1100), ranges(60, 25)
    queries, corpus = vectors_on_disk(asked, tmp_path / "q"), vectors_on_disk(texts, tmp_path / "d")
    ranking = search_dense(section, queries, blocks, corpus, parts, tmp_path, LOCAL)
    found = np.concatenate([ranking[rows] for rows in blocks])
    assert found.dtype == FOUND and found.shape == (60, 10)
    expected = np.argsort(-(asked @ texts.T), axis=1, kind="stable")[:, :10]
    shared = np.mean([len({*one} & {*other}) / 10 for one, other in zip(found["document"], expected, strict=True)])
    assert shared == 1 if not faiss else 0.9 < shared <= 1
