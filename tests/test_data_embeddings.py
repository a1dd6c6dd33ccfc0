import itertools
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import WORDS, write_encoder
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from common.cli import InputError
from common.steps import write_arrow
from dataset_builders import embeddings
from dataset_builders.columns import TextColumn
from dataset_builders.embeddings import Embedder, EncoderSection, count_positions, token_batches, warn_of_cut_texts


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 200))
def test_batches_cover_every_text_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths)
    batches = [batch.tolist() for batch in token_batches(lengths, budget)]
    assert list(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= budget for batch in batches)


@pytest.fixture
def texts():
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, length)) for length in (3, 12, 1, 7, 7, 20)]


def test_vectors_are_those_of_the_plain_model(tmp_path, texts):
    from sentence_transformers import SentenceTransformer

    folder = write_encoder(tmp_path / "model")
    section = EncoderSection(model=str(folder), batch_tokens=16)
    expected = SentenceTransformer(str(folder)).encode(texts, normalize_embeddings=True)
    found = Embedder(section, tmp_path / "cache").documents(texts)
    np.testing.assert_allclose(found, expected, atol=5e-4)  # kept as float16
    assert np.array(found).dtype == np.float32 and found.shape == expected.shape
    assert 0 < np.abs(found[:] @ expected[0] - expected @ expected[0]).max() < 2e-4
    exact = section.model_copy(update={"vector_dtype": "float32"})
    np.testing.assert_allclose(Embedder(exact, tmp_path / "cache").documents(texts), expected, atol=1e-6)


def test_vectors_of_many_shards_are_indexed_as_one_array(tmp_path, texts, monkeypatch):
    section = EncoderSection(model=str(write_encoder(tmp_path / "model")))
    whole = np.array(Embedder(section, tmp_path / "one").documents(texts))
    monkeypatch.setattr(embeddings, "SHARD", 2)
    parts = pickle.loads(pickle.dumps(Embedder(section, tmp_path / "many").documents(texts)))
    assert len(list((tmp_path / "many").glob("*/*.npy"))) == 3
    assert parts.shape == whole.shape and len(parts) == len(texts)
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(parts[1:5], whole[1:5])
    np.testing.assert_array_equal(parts[np.array([5, 0, 3, 3])], whole[[5, 0, 3, 3]])
    assert parts[4:4].shape == (0, 32)
    monkeypatch.setattr(embeddings, "MAX_SHARDS", 2)  # then shards grow instead
    np.testing.assert_array_equal(Embedder(section, tmp_path / "fewer").documents(texts), whole)
    assert len(list((tmp_path / "fewer").glob("*/*.npy"))) == 2


def test_a_memory_mapped_column_gives_the_same_vectors_from_the_same_cache(tmp_path, texts, monkeypatch):
    section = EncoderSection(model=str(write_encoder(tmp_path / "model")))
    first = np.array(Embedder(section, tmp_path / "cache").documents(texts))
    batch = pa.record_batch({"text": texts})
    write_arrow(tmp_path / "texts.arrow", [batch[:4], batch[4:]], batch.schema)
    column = TextColumn(tmp_path / "texts.arrow")
    assert len(column) == 6 and column[3:5] == texts[3:5] and column[np.array([5, 0])] == [texts[5], texts[0]]
    assert len(pickle.dumps(column)) < 300 and pickle.loads(pickle.dumps(column))[:] == texts
    monkeypatch.setattr(embeddings, "load_model", None)  # nothing is computed
    np.testing.assert_array_equal(Embedder(section, tmp_path / "cache").documents(column), first)


def test_prompts_saved_with_the_model_are_used_and_the_recipes_own_go_first(tmp_path, tiny_encoder, texts):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_encoder))
    texts = ["how do i parse a date", "write file", "sort list"]
    saved = Embedder(EncoderSection(model=str(tiny_encoder)), tmp_path).queries(texts)
    np.testing.assert_allclose(saved, model.encode_query(texts), atol=5e-4)
    own = Embedder(EncoderSection(model=str(tiny_encoder), query_prompt="question "), tmp_path).queries(texts)
    np.testing.assert_allclose(own, model.encode(texts, prompt="question "), atol=5e-4)
    assert np.abs(saved[:] - own[:]).max() > 1e-2


def test_the_cache_knows_weights_prompt_length_and_texts(tmp_path, texts):
    one, other = write_encoder(tmp_path / "one"), write_encoder(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    first = np.array(Embedder(EncoderSection(model=str(one)), cache).queries(texts))
    assert len(list(cache.iterdir())) == 1
    assert np.abs(Embedder(EncoderSection(model=str(other)), cache).queries(texts)[:] - first).max() > 0.1
    Embedder(EncoderSection(model=str(one), query_prompt="bala "), cache).queries(texts)
    Embedder(EncoderSection(model=str(one), dtype="float16"), cache).queries(texts)
    Embedder(EncoderSection(model=str(one)), cache).queries(texts[:3])
    assert len(list(cache.iterdir())) == 5
    # the weights change under the same path, as they do after training: the old vectors must not come back
    (one / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert np.abs(Embedder(EncoderSection(model=str(one)), cache).queries(texts)[:] - first).max() > 0.1


def test_a_vector_of_nan_is_refused_and_leaves_nothing(tmp_path, texts):
    folder = write_encoder(tmp_path / "model", sign=float("nan"))
    with pytest.raises(InputError, match="NaN"):
        Embedder(EncoderSection(model=str(folder)), tmp_path / "cache").documents(texts)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("config", "longest"),
    [("BertConfig", 64), ("RobertaConfig", 62), ("MPNetConfig", 62), ("T5Config", None)],
)
def test_more_tokens_than_a_model_has_positions_are_refused_before_it_is_loaded(config, longest, tmp_path):
    import transformers

    sizes = {"pad_token_id": 1, "max_position_embeddings": 64} if config != "T5Config" else {}
    getattr(transformers, config)(**sizes).save_pretrained(tmp_path)
    assert count_positions(str(tmp_path), None) == longest
    if longest:
        EncoderSection(model=str(tmp_path), max_seq_length=longest).describe()
        with pytest.raises(InputError, match=f"max_seq_length {longest + 1}: .* goes to {longest}; lower it"):
            EncoderSection(model=str(tmp_path), max_seq_length=longest + 1).describe()


def test_a_model_whose_files_say_more_tokens_than_it_has_positions_reads_what_it_can(tmp_path, texts, tiny_encoder):
    shutil.copytree(tiny_encoder, tmp_path / "model")
    settings = tmp_path / "model" / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": 1024}))
    section = EncoderSection(model=str(tmp_path / "model"), document_prompt="")
    vectors = Embedder(section, tmp_path / "cache").documents(["how " * 200, "how " * 126, *texts])
    assert vectors.count_cut == 1 and np.array_equal(vectors[:1], vectors[1:2])


def test_cut_texts_are_counted_and_told_where_they_are_most(tmp_path, tiny_encoder, capsys):
    from transformers import AutoTokenizer

    head = "how do i parse a date " * 3
    texts = ["sort list", "write file", *(f"{head}{word}" for word in ("sort", "list", "file"))]
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(tiny_encoder)(texts)["input_ids"]]
    section = EncoderSection(model=str(tiny_encoder), max_seq_length=12, document_prompt="")
    vectors = Embedder(section, tmp_path).documents(texts)
    assert vectors.count_cut == sum(length > 12 for length in lengths) == 3 and not vectors.all_equal()
    [warning] = warn_of_cut_texts(vectors, section)
    assert warning.startswith("3 of 5 documents are cut to 12 tokens;")
    assert capsys.readouterr().err.count("warning: ") == 1
    [warning] = warn_of_cut_texts(Embedder(section, tmp_path).documents(texts[2:]), section)
    assert "and then all documents are equal" in warning
    whole = section.model_copy(update={"max_seq_length": max(lengths)})
    assert warn_of_cut_texts(Embedder(whole, tmp_path).documents(texts), whole) == []


def test_encoders_read_plain_text_whatever_chat_template_they_carry(tmp_path):
    from sentence_transformers import SentenceTransformer
    from test_common_plain_text import LAYOUTS, write_base

    base = write_base(tmp_path / "base", LAYOUTS["SmolLM2"])
    section = EncoderSection(model=str(base), query_prompt="find: ", vector_dtype="float32")
    found = np.array(Embedder(section, tmp_path / "cache").queries(["sort the list"]))
    plain = SentenceTransformer(str(base))
    chatting = plain.encode(["sort the list"], prompt="find: ", normalize_embeddings=True)
    plain[0].tokenizer.chat_template = None
    plain[0].modality_config.pop("message")
    expected = plain.encode(["sort the list"], prompt="find: ", normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - chatting).max() > 1e-2


def word_pieces(pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    texts = ["parsing dates, parsed date-times", "Café ça 植物园 end", " ".join(WORDS)]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


BERT = word_pieces(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


@pytest.mark.parametrize("tokenizer", [BERT, word_pieces(pre_tokenizers.Whitespace(), normalizers.Lowercase())])
@given(
    texts=st.lists(st.text(st.sampled_from("parsedt  \t\n\u00a0\u3000é\u0301ç植园,-İ\x00[UNK]")), min_size=1),
    prompt=st.sampled_from([None, "", "query: ", "pars"]),
)
def test_a_static_model_reads_each_distinct_word_once_and_the_same_tokens(tokenizer, texts, prompt):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    assert embeddings.ends_at_spaces(tokenizer)
    expected = StaticEmbedding(tokenizer, embedding_dim=2).preprocess(texts, prompt=prompt)
    words = embeddings._Words(tokenizer)
    for _ in range(2):  # the second time from memory
        found = words.preprocess(texts, prompt=prompt)
        assert found.keys() == expected.keys()
        assert all(found[key].tolist() == value.tolist() for key, value in expected.items())


def test_words_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(embeddings, "KNOWN", 3)
    words = embeddings._Words(BERT)
    for text in ("parse dates parsed end", "parse end"):
        found = words.preprocess([text])["input_ids"].tolist()
        assert found == BERT.encode(text, add_special_tokens=False).ids and len(words._known) <= 4


def test_a_tokenizer_that_reads_across_spaces_is_asked_for_whole_texts():
    cut = word_pieces(pre_tokenizers.Whitespace())
    cut.enable_truncation(4)
    named = word_pieces(pre_tokenizers.Whitespace())
    named.add_tokens([AddedToken("parse date")])
    others = [word_pieces(pre_tokenizers.Metaspace()), word_pieces(pre_tokenizers.ByteLevel()), cut, named]
    assert not any(map(embeddings.ends_at_spaces, others))
