"""Shots in training: never from the batch, never at a query's cost, and the same whenever the same batch comes."""

import json
import math
import random

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tiny_training import INSTRUCTION as TRAINED
from tiny_training import distance, train

from common.cli import InputError
from modeling.demonstrations import DemonstrationCollator, Demonstrations
from modeling.losses import GradedLoss
from modeling.prompts import baked_prompts, few_shot_prompt, instruction_prompt

INSTRUCTION = "retrieve answer"
VOCABULARY = ["how", "do", "i", "parse", "date", "read", "write", "file", "open", "close", "sort", "list"]


def pool(count: int = 60) -> Dataset:
    """Three rows a query, two rows a positive: batches have rows of their queries and positives left outside."""
    pair = [(f"q{i // 3}", f"p{i % 30}") for i in range(count)]
    return Dataset.from_dict({"query": [q for q, _ in pair], "positive": [p for _, p in pair]})


def words(strings):
    return [len(string.split()) for string in strings]


@settings(max_examples=25)
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
    rows = pool()
    counts = [
        len(Demonstrations(rows, INSTRUCTION, 3, zero_shot_probability=0.4, seed=seed).draw({"x"}))
        for seed in range(300)
    ]
    share = [counts.count(count) / 300 for count in range(4)]
    assert share == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.08)
    assert Demonstrations(rows, INSTRUCTION, 3, zero_shot_probability=1).draw({"x"}) == []


def test_a_batch_that_holds_all_rows_goes_without():
    rows = pool(3)
    assert Demonstrations(rows, INSTRUCTION, 2).draw({*rows["query"], *rows["positive"]}) == []


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 6), max_size=4),
    texts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    window=st.integers(4, 40),
    budget=st.none() | st.integers(4, 40),
)
def test_the_most_shots_that_cost_no_text_a_token(lengths, texts, window, budget):
    """Against the definition: of all numbers of shots, the largest that is allowed."""
    shots = [("q" + " q" * (length - 1), "p") for length in lengths]
    texts = ["t " * length for length in texts]
    allowed = [
        count
        for count in range(1, len(shots) + 1)
        if all(words([few_shot_prompt("x", shots[:count]) + text])[0] <= window for text in texts)
        and (budget is None or words([few_shot_prompt("x", shots[:count])])[0] <= budget)
    ]
    expected = few_shot_prompt("x", shots[: max(allowed, default=0)])
    assert Demonstrations(pool(), "x", 1, budget).fit(shots, texts, words, window) == expected


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    shots=st.integers(1, 4),
    window=st.integers(6, 60),
    seed=st.integers(0, 3),
)
def test_a_frozen_prompt_has_all_its_shots_and_no_token_too_many(lengths, shots, window, seed):
    texts = [(f"q{row}" + " q" * (length - 1), f"p{row % 7}") for row, length in enumerate(lengths)]
    rows = Dataset.from_dict({"query": [q for q, _ in texts], "positive": [p for _, p in texts]})
    shown = Demonstrations(rows, "x", 1, seed=seed)
    try:
        frozen = shown.freeze(shots, words, window)
    except InputError as error:
        # by the rule: `shots` of the shortest, of unlike positives, would not fit an equal share each
        assert f"prompt_shots is {shots}: only" in str(error)
        share = (window - words([instruction_prompt("x")])[0]) // shots
        fits = {p for q, p in texts if len(f"Instruct: x Query: {q} Response: {p}".split()) <= share}
        assert len(fits) < shots
        return
    assert frozen == shown.freeze(shots, words, window)
    assert len(frozen) == shots and set(frozen) <= set(texts)
    assert len({text for pair in frozen for text in pair}) == 2 * shots
    assert words([few_shot_prompt("x", frozen)])[0] <= window


def test_shots_are_drawn_among_rows_that_fit():
    """Two of three rows are too long for their share; without asking, most batches would lose shots by it."""
    lengths = [2 if i % 3 == 0 else 30 for i in range(300)]
    texts = [f"q{i}" + " x" * length for i, length in enumerate(lengths)]
    rows = Dataset.from_dict({"query": texts, "positive": [f"p{i}" for i in range(300)]})
    counts, bare = [], words([few_shot_prompt("x", [])])[0]
    for seed in range(60):
        shown = Demonstrations(rows, "x", 3, shots_budget=bare + 3 * 9, seed=seed)
        batch = ["how do i"]
        fits = shown.room(batch, words, 100)
        shots = shown.draw(batch, fits)
        assert shown.fit(shots, batch, words, 100) == few_shot_prompt("x", shots)  # none is lost again
        counts.append(len(shots))
    assert [round(counts.count(count) / 60, 1) for count in (0, 1, 2, 3)] == pytest.approx(
        [0, 1 / 3, 1 / 3, 1 / 3], abs=0.11
    )
    assert shown.draw(["how"], shown.room(["t " * 97], words, 100)) == []  # a text that leaves no room


def test_the_share_of_rows_that_fit_is_counted_over_all_of_few_rows():
    texts = [f"q{i}" + " x" * i for i in range(10)]
    shown = Demonstrations(Dataset.from_dict({"query": texts, "positive": texts}), "x", 1)
    lengths = sorted(words([few_shot_prompt("x", [(text, text)]) for text in texts]))
    assert len(set(lengths)) == 10
    for most in (lengths[0] - 1, lengths[3], lengths[-1]):
        assert shown.share_that_fits(words, most) == sum(length <= most for length in lengths) / 10


@pytest.fixture(scope="module")
def model(tiny_encoder) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_encoder), device="cpu")


def rows_of_words(count: int) -> Dataset:
    generator = random.Random(0)
    texts = [" ".join(generator.choices(VOCABULARY, k=generator.randint(1, 8))) for _ in range(2 * count)]
    return Dataset.from_dict({"query": texts[:count], "positive": texts[count:], "label": [[1.0]] * count})


@pytest.mark.parametrize("window", [12, 64])
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
    assert shown >= {12: 0, 64: 20}[window]


def test_other_data_sets_keep_their_prompts(model):
    rows = rows_of_words(8)
    prompts = {"shown": {"query": instruction_prompt(INSTRUCTION)}, "plain": {"query": "query : "}, "bare": {}}
    demonstrations = {"shown": Demonstrations(rows, INSTRUCTION, shots=1)}
    collate = DemonstrationCollator(model.preprocess, prompts=prompts, model=model, demonstrations=demonstrations)
    for name, prompt in (("plain", "query : "), ("bare", None)):
        batch = collate([{"query": "read", "positive": "file", "dataset_name": name}])
        assert batch["query_input_ids"].equal(model.preprocess(["read"], prompt=prompt)["input_ids"])


def test_a_query_that_is_a_document_is_no_negative_of_itself(model):
    """Duplicates are asked both ways. At a temperature of 1000 the loss is the log of the documents compared."""
    rows = [("parse date", "how do i parse date", "sort"), ("how do i parse date", "parse date", "close file")]
    rows = [*rows, ("read file", "open file", "parse date")]
    names = ("query", "positive", "negative_1")
    features = [{**dict(zip(names, row, strict=True)), "dataset_name": "pairs"} for row in rows]
    collate = DemonstrationCollator(model.preprocess, prompts={"pairs": {"query": "query : "}}, model=model)
    batch = collate(features)
    columns = [
        {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}
        for name in names
    ]
    loss = GradedLoss(model, "info_nce", temperature=1000)(columns)
    # of three positives and three negatives: its own text is left out, and what equals an own document
    compared = [6 - 2, 6 - 1 - 1, 6 - 1]
    assert float(loss) == pytest.approx(sum(map(math.log, compared)) / 3, abs=2e-3)


def test_rows_without_positives_make_no_demonstrations():
    with pytest.raises(InputError, match="rows without column 'positive'"):
        Demonstrations(Dataset.from_dict({"sentence1": ["a"]}), INSTRUCTION, 1)


SHORT = ("--max_steps", "2", "--eval_strategy", "no")


@pytest.fixture(scope="module")
def few_shot_run(recipe, tmp_path_factory):
    """A run whose adapter trains with shots, and whose model carries a prompt of two."""
    stage = {**recipe["stages"][1], "shots": 2, "prompt_shots": 2, "shots_budget": 60, "lora_dropout": 0.0}
    recipe = {**recipe, "max_seq_length": 120, "stages": [stage]}
    return train(tmp_path_factory.mktemp("few_shot"), recipe, *SHORT), recipe


def test_a_saved_model_carries_its_few_shot_prompt(few_shot_run, hub):
    """By prompt_name alone, and the adapter with it; zero-shot stays what it is."""
    run, _ = few_shot_run
    model = SentenceTransformer(str(run / "model"), device="cpu")
    prompt = model.prompts.pop("query-2-shot")
    assert model.prompts == baked_prompts(TRAINED)
    rows = pq.read_table(hub / "train.parquet")
    pairs = list(zip(rows["query"].to_pylist(), rows["positive"].to_pylist(), strict=True))
    [shots] = [[a, b] for a in pairs for b in pairs if few_shot_prompt(TRAINED, [a, b]) == prompt]
    assert shots[0] != shots[1]
    assert len(model.tokenizer(prompt)["input_ids"]) <= 60
    model.prompts["query-2-shot"] = prompt
    few, zero = (model.encode("how do i parse a date", prompt_name=name) for name in ("query-2-shot", "query"))
    assert few == pytest.approx(model.encode(prompt + "how do i parse a date"), abs=1e-6)
    assert abs(few - zero).max() > 1e-3
    name = "config_sentence_transformers.json"
    assert (run / "adapter" / name).read_bytes() == (run / "model" / name).read_bytes()


def test_a_prompt_that_a_batch_shares_is_computed_once_to_the_same_weights(few_shot_run, tmp_path):
    run, recipe = few_shot_run
    shared = train(tmp_path, recipe, *SHORT, "--share_prefix", "true")
    one, other = (json.loads((each / "ledger.json").read_text())["stages"][0] for each in (run, shared))
    assert one["tokens"] == other["tokens"] and one["share_prefix"] is None
    assert other["share_prefix"]["tokens_computed"] < 0.9 * other["share_prefix"]["tokens_padded"]
    assert distance(run / "model", shared / "model") < 1e-4  # Adam amplifies 1e-6


FEW_SHOT = {
    "not trained with shots": ({"shots": 0}, "no data set of it trains with shots"),
    "no rows that fit": (
        {"shots_budget": 20},
        "stage 'retrieval': prompt_shots is 2: only 0 fit into 20 tokens, of 48 rows",
    ),
    "no row that fits in training": (
        {"shots_budget": 20, "prompt_shots": 0},
        "stage 'retrieval': shots: no row fits into a prompt of 20 tokens as a demonstration; raise shots_budget",
    ),
}


@pytest.mark.parametrize("case", FEW_SHOT)
def test_few_shot_prompts_that_cannot_be_made_are_refused_before_training(few_shot_run, tmp_path, case):
    _, recipe = few_shot_run
    changed, message = FEW_SHOT[case]
    recipe = {**recipe, "stages": [{**recipe["stages"][0], **changed}]}
    with pytest.raises(InputError, match=message):
        train(tmp_path, recipe)
    assert not (tmp_path / "run").exists()


def test_a_data_set_without_demonstrations_is_told_by_name_before_any_stage_is_trained(recipe, tmp_path):
    pairs = {"name": "pairs", "dataset_config": "sts", "loss": "cosent", "prompted_columns": ["sentence1"]}
    mixed = {**recipe["stages"][1], "shots": 2, "datasets": [{"name": "questions"}, pairs]}
    with pytest.raises(InputError, match="'retrieval': data set 'pairs': shots: rows without column 'positive'"):
        train(tmp_path, {**recipe, "stages": [recipe["stages"][0], mixed]}, *SHORT)
    assert not (tmp_path / "run").exists()
