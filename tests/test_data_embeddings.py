import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import WORDS, write_encoder

from dataset_builders import embeddings
from dataset_builders.embeddings import Embedder, EncoderSection, in_shards, longest_first, token_batches


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 200))
def test_batches_cover_every_text_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths)
    batches = [batch.tolist() for batch in token_batches(lengths, budget)]
    assert list(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= budget for batch in batches)


def test_shards_are_not_computed_twice_and_rows_come_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD", 3)
    computed = []

    def compute(rows):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(rows.tolist())
        return rows * 10

    order = longest_first(np.array([5, 9, 1, 7, 3, 8, 2]))
    with pytest.raises(KeyboardInterrupt):
        in_shards(tmp_path / "x.npy", order, compute)
    assert not (tmp_path / "x.npy").exists()
    first, computed[:] = list(computed), []
    assert in_shards(tmp_path / "x.npy", order, compute).tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert sorted(itertools.chain(*first, *computed)) == list(range(7)) and len(computed) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@pytest.fixture
def texts():
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, length)) for length in (3, 12, 1, 7, 7, 20)]


def test_vectors_are_those_of_the_plain_model(tmp_path, texts):
    from sentence_transformers import SentenceTransformer

    folder = write_encoder(tmp_path / "model")
    section = EncoderSection(model=str(folder), batch_tokens=16)
    expected = SentenceTransformer(str(folder)).encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(Embedder(section, tmp_path / "cache").documents(texts), expected, atol=1e-6)


def test_prompts_saved_with_the_model_are_used_and_the_recipes_own_go_first(tmp_path, tiny_encoder, texts):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_encoder))
    texts = ["how do i parse a date", "write file", "sort list"]
    saved = Embedder(EncoderSection(model=str(tiny_encoder)), tmp_path).queries(texts)
    np.testing.assert_allclose(saved, model.encode_query(texts), atol=1e-5)
    own = Embedder(EncoderSection(model=str(tiny_encoder), query_prompt="question "), tmp_path).queries(texts)
    np.testing.assert_allclose(own, model.encode(texts, prompt="question "), atol=1e-5)
    assert np.abs(saved - own).max() > 1e-3


def test_the_cache_knows_weights_prompt_length_and_texts(tmp_path, texts):
    one, other = write_encoder(tmp_path / "one"), write_encoder(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    first = np.array(Embedder(EncoderSection(model=str(one)), cache).queries(texts))
    assert len(list(cache.iterdir())) == 1
    assert np.abs(Embedder(EncoderSection(model=str(other)), cache).queries(texts) - first).max() > 0.1
    Embedder(EncoderSection(model=str(one), query_prompt="bala "), cache).queries(texts)
    Embedder(EncoderSection(model=str(one), dtype="float16"), cache).queries(texts)
    Embedder(EncoderSection(model=str(one)), cache).queries(texts[:3])
    assert len(list(cache.iterdir())) == 5
    # the weights change under the same path, as they do after training: the old vectors must not come back
    (one / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert np.abs(Embedder(EncoderSection(model=str(one)), cache).queries(texts) - first).max() > 0.1


def test_a_second_reader_computes_nothing(tmp_path, texts, monkeypatch):
    section = EncoderSection(model=str(write_encoder(tmp_path / "model")))
    first = np.array(Embedder(section, tmp_path / "cache").documents(texts))
    monkeypatch.setattr(embeddings, "load_model", None)
    np.testing.assert_array_equal(Embedder(section, tmp_path / "cache").documents(texts), first)
