from dataclasses import dataclass
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rank_bm25 import BM25Okapi
from tiny_data import SHARED_DATA

from common.steps import write_arrow
from dataset_builders import dense
from dataset_builders.bm25 import Bm25, search_bm25, tokenise, top_keys
from dataset_builders.candidates import _ranges, reciprocal_rank_fusion
from dataset_builders.columns import TextColumn
from dataset_builders.dense import Dense, dense_top_k, search_dense
from dataset_builders.embeddings import Vectors
from dataset_builders.engines import LOCAL, compute_shards
from dataset_builders.hits import NONE, merge_keys, positions_and_scores

rankings = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=3)


@given(rankings, st.integers(0, 100))
def test_fusion_is_the_sum_over_ranks(lists, k):
    expected = {
        document: sum(1 / (k + ranking.index(document) + 1) for ranking in lists if document in ranking)
        for document in set().union(*lists)
    }
    assert reciprocal_rank_fusion(lists, k) == sorted(expected.items(), key=lambda item: (-item[1], item[0]))


def test_fusion_by_hand():
    fused = reciprocal_rank_fusion([["b", "a"], ["a", "b"], ["c"]])
    assert fused == [("a", 1 / 62 + 1 / 61), ("b", 1 / 61 + 1 / 62), ("c", 1 / 61)]
    assert reciprocal_rank_fusion([["b", "a"], ["a", "b"]], top_k=1) == [("a", 1 / 62 + 1 / 61)]


@settings(max_examples=50)
@given(
    st.integers(1, 40).flatmap(
        lambda documents: st.tuples(
            hnp.arrays(np.float32, (7, 2), elements=st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.5, 1.0])),
            hnp.arrays(np.float32, (documents, 2), elements=st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])),
        )
    ),
    st.integers(1, 50),
)
def test_blocked_top_k_is_a_full_sort_with_ties_by_position(vectors, top_k):
    queries, documents = vectors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "QUERY_BLOCK", 3)
        patch.setattr(dense, "DOCUMENT_BLOCK", 9)
        patch.setattr(dense, "GROUP", 2)
        positions, found = dense_top_k(queries, documents, top_k)
    scores = queries @ documents.T  # sums of multiples of 1/4: exact, so ties are real ties
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, axis=1))


class LuceneOkapi(BM25Okapi):
    """rank_bm25 with the idf of Lucene, ln(1 + (N - n + 0.5) / (n + 0.5)), which is never negative."""

    def _calc_idf(self, document_frequencies):
        for word, count in document_frequencies.items():
            self.idf[word] = np.log(1 + (self.corpus_size - count + 0.5) / (count + 0.5))


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=1, max_size=30), st.integers(1, 12))
def test_top_keys_are_the_best_positive_scores_with_ties_by_position(scores, top_k):
    positions, found = positions_and_scores(top_keys(np.array(scores), top_k, 100))
    expected = [row for row in np.argsort(-np.array(scores), kind="stable") if scores[row] > 0][:top_k]
    assert positions.tolist() == [100 + row for row in expected]
    assert found.tolist() == [scores[row] for row in expected]


def test_places_without_a_document_sort_last_and_decode_to_none():
    part, empty = top_keys(np.array([1.0, 3.0]), 2, 7)[None], np.full((1, 2), NONE)
    positions, scores = positions_and_scores(merge_keys([empty, part], 3))
    assert positions.tolist() == [[8, 7, -1]] and scores[0, :2].tolist() == [3.0, 1.0]


def retrieved(texts, queries, folder, *, part, block=50, **keys) -> list[list[tuple[int, float]]]:
    """(position, score) of each query's documents, best first, searched in parts of `part` documents."""
    batch = pa.record_batch({"text": texts})
    folder.mkdir()
    write_arrow(folder / "texts.arrow", [batch], batch.schema)
    section, parts, blocks = Bm25(**keys), _ranges(len(texts), part), _ranges(len(queries), block)
    shards = search_bm25(section, TextColumn(folder / "texts.arrow"), parts, queries, blocks, folder, LOCAL)
    assert len(shards) == len(parts) * len(blocks)
    return [
        list(zip(*map(np.ndarray.tolist, positions_and_scores(row[row != NONE])), strict=True))
        for row in merged(shards, len(parts), section.top_k)
    ]


def merged(shards, parts: int, top_k: int) -> np.ndarray:
    shards = list(shards)
    return np.concatenate([merge_keys(shards[at : at + parts], top_k) for at in range(0, len(shards), parts)])


@pytest.fixture(scope="module")
def zipf():
    rng = np.random.default_rng(0)
    vocabulary = [f"{one}{two}" for one in ("kelp", "moss", "fern", "reed", "vine") for two in "bcdfghjklmnpqrstvwxz"]
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    draw = lambda length: " ".join(rng.choice(vocabulary, length, p=weights / weights.sum()))  # noqa: E731
    return [draw(rng.integers(5, 60)) for _ in range(400)], [draw(4) for _ in range(50)]


@pytest.mark.parametrize("part", [400, 150, 1])
def test_bm25_by_parts_ranks_as_one_index_of_rank_bm25_with_lucenes_idf(part, zipf, tmp_path):
    texts, queries = zipf
    reference = LuceneOkapi(tokenise(texts))
    found = retrieved(texts, queries, tmp_path / "x", part=part, block=20, top_k=10)
    assert len(found) == 50
    for query, hits in zip(queries, found, strict=True):
        expected = reference.get_scores(tokenise([query])[0]) / 2.5  # Okapi's factor k1 + 1
        positions, scores = zip(*hits, strict=True)
        np.testing.assert_allclose(scores, expected[list(positions)], rtol=1e-4)
        # equal up to ties: the reference's scores of our ten are its own ten best scores
        np.testing.assert_allclose(scores, np.sort(expected)[::-1][:10], rtol=1e-4)


def test_bm25_is_what_bm25s_itself_finds(zipf, tmp_path):
    import bm25s

    texts, queries = zipf
    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    index.index(tokenise(texts), show_progress=False)
    for query, hits in zip(queries, retrieved(texts, queries, tmp_path / "x", part=64, k1=0.9, b=0.4), strict=True):
        positions, scores = zip(*hits, strict=True)
        expected = index.get_scores(tokenise([query])[0])
        np.testing.assert_allclose(scores, expected[list(positions)], rtol=1e-5)
        assert len(hits) == min(100, np.count_nonzero(expected))


def test_rank_bm25_is_its_own_ranking_whatever_the_parts(zipf, tmp_path):
    texts, queries = zipf
    found = retrieved(texts, queries, tmp_path / "x", part=150, top_k=10, backend="rank_bm25")
    reference = BM25Okapi(tokenise(texts))
    overlap = []
    for query, hits, other in zip(
        queries, found, retrieved(texts, queries, tmp_path / "y", part=150, top_k=10), strict=True
    ):
        scores = reference.get_scores(tokenise([query])[0])
        best = np.sort(scores[scores > 0])[::-1][:10]
        np.testing.assert_allclose([score for _, score in hits], best, rtol=1e-6)
        overlap.append(len({position for position, _ in hits} & {position for position, _ in other}))
    assert np.mean(overlap) < 10  # its own idf ranks differently, which is why parity is tested with Lucene's


@pytest.mark.parametrize("backend", ["bm25s", "rank_bm25"])
@pytest.mark.parametrize("query", ["", "the of and", "unseenword"])
def test_a_query_without_known_words_finds_nothing(query, backend, tmp_path):
    found = retrieved(["kelp moss", "fern", "ivy oak"], [query, "fern"], tmp_path / "x", part=2, backend=backend)
    assert found[0] == [] and [position for position, _ in found[1]] == [1]


def vectors_on_disk(values: np.ndarray, folder: Path) -> Vectors:
    """As an Embedder would keep them."""
    return Vectors(compute_shards(Rows(values), [len(values)], folder, LOCAL, description="", unit=""))


@dataclass(frozen=True)
class Rows:
    values: np.ndarray

    def __call__(self, number):
        return self.values


@pytest.mark.parametrize("faiss", [False, True])
def test_dense_search_by_parts_finds_the_whole_corpus_best(faiss, tmp_path):
    if faiss:
        pytest.importorskip("faiss", reason="FAISS is not installed")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    texts = (centres[rng.integers(20, size=3000)] + 0.3 * rng.normal(size=(3000, 16))).astype(np.float32)
    asked = (texts[:60] + 0.1 * rng.normal(size=(60, 16))).astype(np.float32)
    section = Dense(model="x", top_k=10, faiss_from=1 if faiss else 10_000, faiss_probes=8)
    parts, blocks = _ranges(3000, 1100), _ranges(60, 25)
    queries, documents = vectors_on_disk(asked, tmp_path / "q"), vectors_on_disk(texts, tmp_path / "d")
    shards = search_dense(section, queries, blocks, documents, parts, tmp_path, LOCAL)
    found, _ = positions_and_scores(merged(shards, 3, 10))
    expected = np.argsort(-(asked @ texts.T), axis=1, kind="stable")[:, :10]
    shared = np.mean([len({*one} & {*other}) / 10 for one, other in zip(found, expected, strict=True)])
    assert shared == 1 if not faiss else 0.9 < shared <= 1


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
        for query_id, hits in zip(judged, found, strict=True)
        for position, score in hits
    ]
    labels = [ir_measures.Qrel(row["query_id"], row["corpus_id"], row["score"]) for row in qrels]
    ndcg = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], labels, run)[ir_measures.nDCG @ 10]
    assert len(judged) == 300
    assert ndcg == pytest.approx(0.687, abs=0.005)  # bm25s's own figure for SciFact: 0.6874
