"""Search: the right documents in the right order, embedded once, and never from a stale cache."""

import shutil

import pytest

from common.steps import read_arrow, write_arrow
from eval.retrieval import load_documents
from eval.search import Hit, format_hits, main, search


@pytest.fixture
def data(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "data", tmp_path / "data", ignore=shutil.ignore_patterns("embeddings"))
    return tmp_path / "data"


def cached(data):
    return sorted(path.name for path in (data / "embeddings").iterdir())


def test_hits_are_those_of_sentence_transformers(tiny_encoder, data):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import semantic_search

    documents = load_documents(data)
    model = SentenceTransformer(str(tiny_encoder))
    [expected] = semantic_search(
        model.encode_query(["how do i parse a date"], convert_to_tensor=True),
        model.encode_document(documents.texts, convert_to_tensor=True),
        top_k=3,
    )
    hits = search(str(tiny_encoder), "how do i parse a date", documents, data / "embeddings", top_k=3)
    assert [hit.document_id for hit in hits] == [documents.ids[hit["corpus_id"]] for hit in expected]
    assert [hit.score for hit in hits] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)


def test_documents_are_embedded_once(tiny_encoder, data, capsys):
    main(["--model", str(tiny_encoder), "--data", str(data), "how do i parse a date"])
    first, shown = cached(data), capsys.readouterr().out
    assert len(first) == 1
    assert [line[:3] for line in shown.splitlines() if not line.startswith("   ")] == [f"{n}. " for n in range(1, 6)]
    main(["--model", str(tiny_encoder), "--data", str(data), "how do i parse a date"])
    assert (cached(data), capsys.readouterr().out) == (first, shown)


def test_other_documents_are_embedded_anew(tiny_encoder, data):
    path = data / "corpus" / "documents.arrow"
    before = search(str(tiny_encoder), "sort", load_documents(data), data / "embeddings", top_k=6)
    table = read_arrow(path)
    texts = table["text"].to_pylist()[::-1]
    table = table.set_column(1, "text", [texts])
    write_arrow(path, table.to_batches(), table.schema)
    after = search(str(tiny_encoder), "sort", load_documents(data), data / "embeddings", top_k=6)
    assert len(cached(data)) == 2
    assert {hit.text: round(hit.score, 5) for hit in after} == {hit.text: round(hit.score, 5) for hit in before}
    assert [hit.document_id for hit in after] != [hit.document_id for hit in before]


def test_more_documents_than_there_are(tiny_encoder, data):
    assert len(search(str(tiny_encoder), "sort", load_documents(data), data / "embeddings", top_k=50)) == 6


def test_format_shows_rank_score_id_and_the_beginning_of_the_text():
    shown = format_hits([Hit(0.5, "a.b", "word " * 200), Hit(-0.25, "c", "line one\n\n  line two")]).splitlines()
    assert shown[0] == "1. 0.500  a.b"
    assert shown[-2:] == ["2. -0.250  c", "   line one line two"]
    assert max(map(len, shown)) <= 110 and "..." in "".join(shown)
