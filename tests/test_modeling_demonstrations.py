"""Shots in training: never from the batch, never at a query's cost, and the same whenever the same batch comes."""

import random

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from dataset_builders.cli import InputError
from modeling.demonstrations import DemonstrationCollator, Demonstrations, fitting_prompt
from modeling.prompts import few_shot_prompt, instruction_prompt

INSTRUCTION = "retrieve answer"
VOCABULARY = ["how", "do", "i", "parse", "date", "read", "write", "file", "open", "close", "sort", "list"]


def pool(count: int = 60) -> Dataset:
    """Three rows a query, two rows a positive: batches have rows of their queries and positives left outside."""
    pair = [(f"q{i // 3}", f"p{i % 30}") for i in range(count)]
    return Dataset.from_dict({"query": [q for q, _ in pair], "positive": [p for _, p in pair]})


@settings(deadline=None, max_examples=60)
@given(batch=st.sets(st.integers(0, 59), min_size=1, max_size=8), shots=st.integers(1, 5), seed=st.integers(0, 9))
def test_shots_have_nothing_in_common_with_the_batch(batch, shots, seed):
    rows = pool()
    texts = {text for row in batch for text in rows[row].values()}
    drawn = Demonstrations(rows, INSTRUCTION, shots, seed=seed).draw(texts)
    pairs = set(zip(rows["query"], rows["positive"], strict=True))
    shown = [text for pair in drawn for text in pair]
    assert 1 <= len(drawn) <= shots
    assert set(drawn) <= pairs
    assert not texts & set(shown)
    assert len(set(shown)) == len(shown)
    assert Demonstrations(rows, INSTRUCTION, shots, seed=seed).draw(sorted(texts, reverse=True)) == drawn


def test_the_number_of_shots_is_drawn_as_the_recipe_says():
    counts = [
        len(Demonstrations(pool(), INSTRUCTION, 3, zero_shot_probability=0.4, seed=seed).draw({"x"}))
        for seed in range(600)
    ]
    share = [counts.count(count) / 600 for count in range(4)]
    assert share == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.06)
    assert Demonstrations(pool(), INSTRUCTION, 3, zero_shot_probability=1).draw({"x"}) == []


def test_a_batch_that_holds_all_rows_goes_without():
    rows = pool(3)
    assert Demonstrations(rows, INSTRUCTION, 2).draw({*rows["query"], *rows["positive"]}) == []


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 6), max_size=4),
    texts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    window=st.integers(4, 40),
    budget=st.none() | st.integers(4, 40),
)
def test_the_most_shots_that_cost_no_text_a_token(lengths, texts, window, budget):
    """Against the definition: of all numbers of shots, the largest that is allowed."""

    def words(strings):
        return [len(string.split()) for string in strings]

    shots = [("q" + " q" * (length - 1), "p") for length in lengths]
    texts = ["t " * length for length in texts]
    allowed = [
        count
        for count in range(1, len(shots) + 1)
        if all(words([few_shot_prompt("x", shots[:count]) + text])[0] <= window for text in texts)
        and (budget is None or words([few_shot_prompt("x", shots[:count])])[0] <= budget)
    ]
    expected = few_shot_prompt("x", shots[: max(allowed, default=0)])
    assert fitting_prompt("x", shots, texts, words, window, budget) == expected


@pytest.fixture(scope="module")
def model(tiny_encoder) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_encoder), device="cpu")


def rows_of_words(count: int) -> Dataset:
    generator = random.Random(0)
    texts = [" ".join(generator.choices(VOCABULARY, k=generator.randint(1, 8))) for _ in range(2 * count)]
    return Dataset.from_dict({"query": texts[:count], "positive": texts[count:], "label": [[1.0]] * count})


@pytest.mark.parametrize("window", [12, 16, 24, 32, 48, 64])
def test_every_query_is_whole_after_the_prompt_of_its_batch(model, window, monkeypatch):
    """By the ids that the model gets: one prompt for all rows, then all of the query, then EOS."""
    rows = rows_of_words(80)
    prompts = {"tasks": {"query": instruction_prompt(INSTRUCTION)}}
    demonstrations = {"tasks": Demonstrations(rows, INSTRUCTION, shots=3)}
    collate = DemonstrationCollator(model.preprocess, prompts=prompts, model=model, demonstrations=demonstrations)
    monkeypatch.setattr(model, "max_seq_length", window)
    shown = 0
    for begin in range(0, 80, 4):
        features = [{**rows[row], "dataset_name": "tasks"} for row in range(begin, begin + 4)]
        batch = collate(features)
        zero_shot = model.preprocess([instruction_prompt(INSTRUCTION)])["input_ids"].shape[1]
        alone = model.tokenizer([row["query"] for row in features])["input_ids"]
        cut = max(zero_shot + len(ids) - 2 for ids in alone) > window
        lengths = batch["query_attention_mask"].sum(dim=1).tolist()
        prompt_ids = {
            tuple(ids[: length - (len(own) - 1)])
            for ids, length, own in zip(batch["query_input_ids"].tolist(), lengths, alone, strict=True)
        }
        if not cut:
            assert len(prompt_ids) == 1
            for ids, length, own in zip(batch["query_input_ids"].tolist(), lengths, alone, strict=True):
                assert ids[length - (len(own) - 1) : length] == own[1:]  # without BOS
            shown += len(prompt_ids.pop()) > zero_shot - 1
        assert max(lengths) <= window
        # documents stay bare
        assert batch["positive_input_ids"].equal(model.preprocess([row["positive"] for row in features])["input_ids"])
    assert shown >= {12: 0, 16: 0, 24: 1, 32: 8, 48: 16, 64: 20}[window]


def test_other_data_sets_keep_their_prompts(model):
    rows = rows_of_words(8)
    prompts = {"shown": {"query": instruction_prompt(INSTRUCTION)}, "plain": {"query": "query : "}, "bare": {}}
    demonstrations = {"shown": Demonstrations(rows, INSTRUCTION, shots=1)}
    collate = DemonstrationCollator(model.preprocess, prompts=prompts, model=model, demonstrations=demonstrations)
    for name, prompt in (("plain", "query : "), ("bare", None)):
        batch = collate([{"query": "read", "positive": "file", "dataset_name": name}])
        assert batch["query_input_ids"].equal(model.preprocess(["read"], prompt=prompt)["input_ids"])


BAD = {
    "columns": ({"rows": Dataset.from_dict({"sentence1": ["a"]})}, "rows without column 'positive'"),
    "shots": ({"shots": 0}, "shots is 0"),
    "budget": ({"shots_budget": 0}, "shots_budget is 0"),
    "probability": ({"zero_shot_probability": 1.5}, "zero_shot_probability is 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    changed, message = BAD[case]
    with pytest.raises(InputError, match=message):
        Demonstrations(**{"rows": pool(), "instruction": INSTRUCTION, "shots": 1, **changed})


def test_shots_without_an_instruction_to_stand_before(model):
    with pytest.raises(InputError, match="data set 'tasks': shots stand before an instruction"):
        DemonstrationCollator(
            model.preprocess, prompts={"tasks": {}}, demonstrations={"tasks": Demonstrations(pool(), INSTRUCTION, 1)}
        )
