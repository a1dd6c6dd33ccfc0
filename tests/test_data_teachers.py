"""Rerankers in batches and shards give the scores of single pairs by their own libraries."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_rerankers import LETTERS, save_causal_lm, save_classifier

from common.cli import InputError
from common.steps import write_arrow
from dataset_builders import teachers
from dataset_builders.columns import TextColumn
from dataset_builders.engines import LocalEngine
from dataset_builders.teachers import PairScorer, Teacher


@pytest.fixture(scope="module")
def causal_lm(tmp_path_factory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("models") / "causal")


def texts_of(lengths) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(LETTERS, length)) for length in lengths]


QUERIES_READ, DOCUMENTS_READ = texts_of((1, 3, 6)), texts_of((2, 30, 9, 4, 70))
ALL_PAIRS = np.array([(query, document) for query in range(3) for document in range(5)])


def scored(teacher: Teacher, folder: Path, texts=DOCUMENTS_READ) -> np.ndarray:
    return PairScorer(teacher, folder, LocalEngine(), QUERIES_READ, texts).scores(ALL_PAIRS, folder)


@pytest.mark.parametrize("max_seq_length", [None, 16])
def test_batched_cross_encoder_scores_are_those_of_single_pairs(classifier, tmp_path, max_seq_length):
    import torch
    from sentence_transformers import CrossEncoder

    model, raw = CrossEncoder(str(classifier), max_length=max_seq_length or 64), torch.nn.Identity()
    teacher = Teacher(
        kind="cross_encoder", model=str(classifier), batch_tokens=90, max_seq_length=max_seq_length or 64
    )
    alone = [
        model.predict([(QUERIES_READ[query], DOCUMENTS_READ[document])], activation_fn=raw)[0]
        for query, document in ALL_PAIRS
    ]
    assert np.std(alone) > 0.01
    np.testing.assert_allclose(scored(teacher, tmp_path), alone, atol=1e-5)
    # the same texts on disk
    schema = pa.schema([("text", pa.string())])
    write_arrow(tmp_path / "texts.arrow", [pa.record_batch([DOCUMENTS_READ], schema=schema)], schema)
    other = tmp_path / "other"
    other.mkdir()
    np.testing.assert_array_equal(
        scored(teacher, other, TextColumn(tmp_path / "texts.arrow")), scored(teacher, tmp_path)
    )


def by_hand(folder: Path, prompt: str | None) -> list[float]:
    """logit(yes) - logit(no) after the chat template, by transformers alone, one pair at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    found = []
    for query, document in ALL_PAIRS:
        system = f"sys {prompt} " if prompt else ""
        text = f"{system}query {QUERIES_READ[query]} doc {DOCUMENTS_READ[document]} judge"
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        found.append(float(logits[yes] - logits[no]))
    return found


@pytest.mark.parametrize("prompt", [None, "a b c"])
@pytest.mark.parametrize("saved", [False, True])
def test_an_llm_reranker_scores_yes_against_no(causal_lm, tmp_path, prompt, saved):
    from sentence_transformers import CrossEncoder

    folder = causal_lm
    if saved:  # modules.json, with the score module, instead of a conversion when it is loaded
        folder = tmp_path / "saved"
        CrossEncoder(str(causal_lm)).save(str(folder))
        modules = json.loads((folder / "modules.json").read_text())
        assert [module["type"].rsplit(".", 1)[-1] for module in modules] == ["Transformer", "LogitScore"]
    teacher = Teacher(kind="cross_encoder", model=str(folder), batch_tokens=150, prompt=prompt, max_seq_length=128)
    expected = by_hand(causal_lm, prompt)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(scored(teacher, tmp_path), expected, atol=2e-5)


def test_a_prompt_saved_with_the_reranker_is_used_unless_the_recipe_has_one(causal_lm, tmp_path):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(causal_lm), prompts={"task": "d e"}, default_prompt_name="task")
    model.save(str(tmp_path / "saved"))
    for prompt, expected in ((None, "d e"), ("a b", "a b"), ("", None)):
        folder = tmp_path / f"scores-{prompt}"
        folder.mkdir()
        teacher = Teacher(kind="cross_encoder", model=str(tmp_path / "saved"), prompt=prompt, max_seq_length=128)
        np.testing.assert_allclose(scored(teacher, folder), by_hand(causal_lm, expected), atol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: save_classifier(folder, num_labels=3), "3 scores a pair"),
        (lambda folder: save_classifier(folder, broken=True), "NaN"),
        (lambda folder: save_causal_lm(folder, template="{{ messages[0].content }}"), "cannot carry a 'query'"),
    ],
)
def test_rerankers_without_one_finite_score_for_a_pair_are_refused(make, message, tmp_path):
    teacher = Teacher(kind="cross_encoder", model=str(make(tmp_path / "model")))
    with pytest.raises(InputError, match=message):
        scored(teacher, tmp_path)


def test_grading_hardly_pads(classifier, tmp_path):
    draw = np.random.default_rng(3)
    lengths = np.clip(draw.lognormal(2.5, 0.8, 3000), 1, 50).astype(int)
    texts = [" ".join(LETTERS[:1] * length) for length in lengths]
    teacher = Teacher(kind="cross_encoder", model=str(classifier), max_seq_length=64, batch_tokens=4096)
    scorer = PairScorer(teacher, tmp_path, LocalEngine(), ["b c"], texts)
    pairs = pa.record_batch([[0] * 3000, list(range(3000))], schema=teachers.PAIRS)
    write_arrow(tmp_path / "pairs.arrow", [pairs], teachers.PAIRS)
    (grades,) = scorer.grade(tmp_path / "pairs.arrow", tmp_path / "teacher.shards")
    np.testing.assert_array_equal(grades["tokens"], 2 + 3 + lengths)  # [CLS] b c [SEP] ... [SEP]
    assert grades["computed"].sum() / grades["tokens"].sum() < 1.1
    assert np.std(grades["score"]) > 0


def graded(teacher: Teacher, folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    queries, texts = (list(side) for side in zip(*pairs, strict=True))
    columns = [list(range(len(pairs)))] * 2
    write_arrow(folder / "pairs.arrow", [pa.record_batch(columns, schema=teachers.PAIRS)], teachers.PAIRS)
    scorer = PairScorer(teacher, folder, LocalEngine(), queries, texts)
    (grades,) = scorer.grade(folder / "pairs.arrow", folder / "teacher.shards")
    return grades


def test_cut_pairs_and_pairs_without_a_word_of_the_document_are_counted(classifier, causal_lm, tmp_path):
    words = "a b c d e f g h"
    pairs = [("a", words), (words, "a b c"), (words, words), (f"{words} {words}", "a b"), (words, "a b c d")]
    for name, model, limit, cut, without in (
        # [CLS] query [SEP] document [SEP], the longer side cut first: a document keeps some of its words
        ("classifier", classifier, 14, [False, False, True, True, True], [False] * 5),
        # query ... doc ... judge, cut from behind, and the template's end kept
        ("causal_lm", causal_lm, 14, [False, False, True, True, True], [False, False, False, True, False]),
    ):
        (tmp_path / name).mkdir()
        teacher = Teacher(kind="cross_encoder", model=str(model), max_seq_length=limit)
        grades = graded(teacher, tmp_path / name, pairs)
        assert grades["tokens"].max() == limit
        assert grades["is_cut"].astype(bool).tolist() == cut
        assert grades["has_no_document"].astype(bool).tolist() == without
