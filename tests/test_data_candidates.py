import ir_measures
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rank_bm25 import BM25Okapi
from tiny_data import SHARED_DATA

from dataset_builders import candidates
from dataset_builders.candidates import bm25_scorer, dense_top_k, reciprocal_rank_fusion, tokenise

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


@settings(deadline=None, max_examples=50)
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
        patch.setattr(candidates, "QUERY_BLOCK", 3)
        patch.setattr(candidates, "DOCUMENT_BLOCK", 4)
        hits = dense_top_k(queries, documents, top_k)
    scores = queries @ documents.T  # sums of multiples of 1/4: exact, so ties are real ties
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(hits["position"], expected)
    np.testing.assert_array_equal(hits["score"], np.take_along_axis(scores, expected, axis=1))


class LuceneOkapi(BM25Okapi):
    """rank_bm25 with the idf of Lucene, ln(1 + (N - n + 0.5) / (n + 0.5)), which is never negative."""

    def _calc_idf(self, document_frequencies):
        for word, count in document_frequencies.items():
            self.idf[word] = np.log(1 + (self.corpus_size - count + 0.5) / (count + 0.5))


def test_bm25s_ranks_as_rank_bm25_does_with_the_same_idf():
    rng = np.random.default_rng(0)
    vocabulary = [f"{one}{two}" for one in ("kelp", "moss", "fern", "reed", "vine") for two in "bcdfghjklmnpqrstvwxz"]
    weights = 1 / np.arange(1, len(vocabulary) + 1)  # Zipf
    draw = lambda length: " ".join(rng.choice(vocabulary, length, p=weights / weights.sum()))  # noqa: E731
    texts, queries = [draw(rng.integers(5, 60)) for _ in range(400)], [draw(4) for _ in range(50)]
    ours, reference = bm25_scorer(texts, "bm25s"), LuceneOkapi(tokenise(texts))
    okapi, overlap = bm25_scorer(texts, "rank_bm25"), []
    for query in queries:
        scores, expected = ours(query), reference.get_scores(tokenise([query])[0]) / 2.5  # Okapi's factor k1 + 1
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
        best = np.argsort(-scores, kind="stable")[:10]
        # equal up to ties: the reference's scores of our ten are its own ten best scores
        np.testing.assert_allclose(expected[best], np.sort(expected)[::-1][:10], rtol=1e-4, atol=1e-5)
        overlap.append(len(set(best) & set(np.argsort(-okapi(query), kind="stable")[:10])))
    assert np.mean(overlap) < 10  # its own idf ranks differently, which is why parity is tested with ours


@pytest.mark.parametrize("query", ["", "the of and", "unseenword"])
def test_a_query_without_known_words_finds_nothing(query):
    assert not bm25_scorer(["kelp moss", "fern"], "bm25s")(query).any()


@pytest.mark.skipif(not (SHARED_DATA / "scifact").is_dir(), reason="the SciFact files are not on this machine")
def test_bm25s_reaches_the_published_ndcg_on_scifact():
    folder = SHARED_DATA / "scifact"
    corpus = pq.read_table(folder / "corpus.parquet").to_pylist()
    qrels = [row for row in pq.read_table(folder / "qrels.parquet").to_pylist() if row["split"] == "test"]
    judged = {row["query_id"] for row in qrels}
    queries = {row["_id"]: row["text"] for row in pq.read_table(folder / "queries.parquet").to_pylist()}
    score = bm25_scorer([f"{row['title']} {row['text']}" for row in corpus], "bm25s")
    run = []
    for query_id in judged:
        scores = score(queries[query_id])
        best = np.argsort(-scores, kind="stable")[:10]
        run += [ir_measures.ScoredDoc(query_id, corpus[row]["_id"], float(scores[row])) for row in best]
    labels = [ir_measures.Qrel(row["query_id"], row["corpus_id"], row["score"]) for row in qrels]
    ndcg = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], labels, run)[ir_measures.nDCG @ 10]
    assert len(judged) == 300
    assert ndcg == pytest.approx(0.687, abs=0.005)  # bm25s's own figure for SciFact: 0.6874
