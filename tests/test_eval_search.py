"""Search: the right documents in the right order, embedded once, never from a stale cache, and fused with BM25."""

import shutil

import pytest
from tiny_data import write_encoder, write_recipe, write_set

from dataset_builders import build
from dataset_builders.bm25 import Bm25, tokenise
from dataset_builders.fusion import convex_fusion
from eval.held_out import candidate_rankings, load_documents, load_held_out
from eval.search import Result, format_results, main, search, search_bm25


@pytest.fixture
def data(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "data", tmp_path / "data", ignore=shutil.ignore_patterns("embeddings"))
    return tmp_path / "data"


def cached(data):
    return sorted(path.name for path in (data / "embeddings").iterdir())


def test_results_are_those_of_sentence_transformers(tiny_encoder, data):
    """All of them where fewer documents than asked for are there."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import semantic_search

    documents = load_documents(data)
    model = SentenceTransformer(str(tiny_encoder))
    [expected] = semantic_search(
        model.encode_query(["how do i parse a date"], convert_to_tensor=True),
        model.encode_document(list(documents.values()), convert_to_tensor=True),
        top_k=50,
    )
    found = search(str(tiny_encoder), "how do i parse a date", documents, data / "embeddings", top_k=50)
    assert len(found) == 6
    ids = list(documents)
    assert [result.document_id for result in found] == [ids[hit["corpus_id"]] for hit in expected]
    assert [result.score for result in found] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)


def test_documents_are_embedded_once(tiny_encoder, data, capsys):
    for shown in range(2):
        main(["--model", str(tiny_encoder), "--data", str(data), "how do i parse a date"])
        lines = [line[:3] for line in capsys.readouterr().out.splitlines() if not line.startswith("   ")]
        assert lines == [f"{rank}. " for rank in range(1, 6)] and len(cached(data)) == 1, shown


def test_a_hybrid_search_is_the_convex_sum_of_both(tiny_encoder, data):
    documents = load_documents(data)
    ask = "sort a list"
    dense = search(str(tiny_encoder), ask, documents, data / "embeddings", top_k=6)
    texts = list(documents.values())
    bm25 = search_bm25(ask, texts, 6, Bm25(), None, data / "embeddings")
    assert texts[max(bm25, key=bm25.get)] == ask and 0 < len(bm25) < 6
    places = {document_id: place for place, document_id in enumerate(documents)}
    for weight in (0.0, 0.4, 1.0):
        found = search(str(tiny_encoder), ask, documents, data / "embeddings", 3, hybrid=weight)
        cosines = {places[result.document_id]: result.score for result in dense}
        expected = convex_fusion(bm25, cosines, weight, 3)
        assert [places[result.document_id] for result in found] == [place for place, _ in expected]
        assert [result.score for result in found] == pytest.approx([score for _, score in expected])
    assert found[0].text == ask


@pytest.mark.parametrize("backend", ["bm25s", "rank_bm25"])
def test_bm25_is_the_builds(backend, tmp_path, capsys):
    """Its weight was chosen for these scores: k1, b and backend are not the library's defaults."""
    folder, keys = write_set(tmp_path / "set"), {"backend": backend, "top_k": 20, "k1": 0.4, "b": 0.1}
    recipe = write_recipe(tmp_path / "data.yaml", folder, write_encoder(tmp_path / "encoder"), bm25=keys, fusion={})
    build.main(["--config", str(recipe), "--output_dir", str(tmp_path / "data")])
    asked = load_held_out(tmp_path / "data", "test")
    [bm25, *_] = candidate_rankings(tmp_path / "data", asked).values()
    ids = list(asked.documents)
    for query_id, question in asked.queries.items():
        found = search_bm25(question, list(asked.documents.values()), 20, Bm25(**keys), None, tmp_path / "e")
        assert {ids[place]: score for place, score in found.items()} == pytest.approx(bm25[0][query_id], abs=1e-5)
    shown = search(str(tmp_path / "encoder"), question, asked.documents, tmp_path / "e", 3, 0.4, Bm25(**keys))
    default = search(str(tmp_path / "encoder"), question, asked.documents, tmp_path / "e", 3, 0.4)
    assert shown != default
    arguments = ["--model", str(tmp_path / "encoder"), "--data", str(tmp_path / "data"), "--top_k", "3"]
    main([*arguments, "--hybrid", "0.4", question])
    assert capsys.readouterr().out.endswith(f"{format_results(shown)}\n")


def test_a_question_of_stop_words_has_no_bm25_scores(tmp_path):
    assert search_bm25("is it the", ["is it the list", "a date"], 2, Bm25(), None, tmp_path) == {}


def test_documents_are_indexed_once_and_again_when_they_change(tmp_path, monkeypatch):
    texts, tokenised = ["sort a list", "read a file"], []
    monkeypatch.setattr("eval.search.tokenise", lambda texts, language: tokenised.append(texts) or tokenise(texts))
    first, again = (search_bm25("a list", texts, 2, Bm25(), None, tmp_path) for _ in range(2))
    assert first == again and [*first] == [0] and tokenised.count(texts) == 1
    assert [*search_bm25("a list", texts[::-1], 2, Bm25(), None, tmp_path)] == [1]
    assert search_bm25("a list", texts, 2, Bm25(k1=0.5), None, tmp_path) != first


def test_rank_score_id_and_the_beginning_of_the_text_are_shown():
    shown = format_results([Result(0.5, "a.b", "word " * 200), Result(-0.25, "c", "line one\n\n  line two")])
    lines = shown.splitlines()
    assert lines[0] == "1. 0.500  a.b"
    assert lines[-2:] == ["2. -0.250  c", "   line one line two"]
    assert max(map(len, lines)) <= 110 and "..." in shown
