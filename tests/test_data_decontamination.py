import numpy as np
import polars as pl
import pytest
from tiny_data import write_set, write_table

from common.steps import read_arrow, read_manifest, read_parquet
from dataset_builders import decontamination
from dataset_builders.corpus import write_corpus
from dataset_builders.decontamination import (
    CONTAMINATION,
    Decontamination,
    Probes,
    contamination_log,
    count_by_kind,
    evaluation_tasks,
    find_matches,
    mteb_tasks,
    read_local,
    read_probes,
    read_task,
    zero_shot,
)
from dataset_builders.near_duplicates import band_keys, text_keys
from dataset_builders.readers import Rows
from dataset_builders.schema import QRELS
from dataset_builders.sources import LocalSource, Splits, read_rows
from dataset_builders.typos import typo_matches

RNG = np.random.default_rng(0)
# As long as ArguAna's test queries, which are whole arguments.
ARGUMENTS = [" ".join(f"a{number:05x}" for number in RNG.integers(16**5, size=160)) + "." for _ in range(8)]


def arguana() -> object:
    """mteb's own ArguAna, holding a small test set: 8 queries that stand in the corpus too, and a train split."""
    import mteb
    from datasets import Dataset

    task = mteb.get_task("ArguAna")
    searched = [{"id": f"d{row}", "title": "On policy", "text": text} for row, text in enumerate(ARGUMENTS)]
    searched += [{"id": "counter", "title": "Against", "text": "A counter argument, which nobody asks about."}]
    split = {
        "queries": Dataset.from_list([{"id": f"q{row}", "text": text} for row, text in enumerate(ARGUMENTS)]),
        "corpus": Dataset.from_list(searched),
        "relevant_docs": {f"q{row}": {"counter": 1} for row in range(8)},
        "top_ranked": None,
    }
    asked_in_training = {**split, "queries": Dataset.from_list([{"id": "t", "text": "What is asked in training?"}])}
    task.dataset, task.data_loaded = {"default": {"test": split, "train": asked_in_training}}, True
    return task


def planted() -> tuple[Rows, dict[str, str]]:
    """Training rows with copies of test queries on both sides, as mteb#1372 found in a published training set."""
    words = ARGUMENTS[2].split()
    copies = {
        "exact": ARGUMENTS[0],
        "spaced": "  " + ARGUMENTS[1].upper().replace(" ", "\n ", 9),
        "one-word": " ".join([*words[:70], "otherwise", *words[71:]]),
        "truncated": ARGUMENTS[3][: int(len(ARGUMENTS[3]) * 0.9)],
        "titled": "On policy " + ARGUMENTS[4],
    }
    queries = {
        **copies,
        "half": ARGUMENTS[5][: len(ARGUMENTS[5]) // 2],  # shows half of a test item: not similar enough
        "training": "What is asked in training?",  # a training query of the same task
        "clean": "Is this a question of our own?",
        "left": "What will this one be answered by?",
    }
    documents = {
        "answer": "An answer to all of that.",
        "counter": "A counter argument, which nobody asks about.",
        "copy": ARGUMENTS[6] + " Indeed.",
        "shared": ARGUMENTS[7],
    }
    qrels = [(query, "answer", 1, "train") for query in queries if query != "left"]
    qrels += [("clean", "counter", 1, "train"), ("clean", "copy", 0, "train"), ("left", "copy", 1, "train")]
    qrels += [("clean", "shared", 1, "train"), ("evaluation", "shared", 1, "test"), ("eval-copy", "answer", 1, "test")]
    queries |= {"evaluation": "Is it held out?", "eval-copy": ARGUMENTS[6]}
    sides = {"document_id": documents, "query_id": queries}
    tables = [pl.DataFrame({name: list(side), "text": list(side.values())}) for name, side in sides.items()]
    return Rows(*tables, pl.DataFrame(qrels, QRELS.names, orient="row"), len(qrels)), copies


@pytest.fixture
def evaluated(monkeypatch) -> Decontamination:
    """A recipe's section whose one task is `arguana`, without the Hub."""
    monkeypatch.setattr(decontamination, "mteb_tasks", lambda *_: [arguana()])
    return Decontamination(tasks=("ArguAna",))


def test_test_queries_inside_training_data_are_dropped_and_logged(tmp_path, evaluated):
    rows, copies = planted()
    counts = write_corpus(rows, Splits(eval_splits=("test",)), tmp_path, evaluated)
    queries = read_parquet(tmp_path / "queries.parquet").to_pylist()
    assert [(row["query_id"], row["split"]) for row in queries] == [
        ("clean", "train"),
        ("eval-copy", "test"),  # other splits stay as they are
        ("evaluation", "test"),
        ("half", "train"),
        ("training", "train"),
    ]
    assert read_arrow(tmp_path / "documents.arrow")["document_id"].to_pylist() == ["answer", "counter", "shared"]
    qrels = [tuple(row.values()) for row in read_parquet(tmp_path / "qrels.parquet").to_pylist()]
    assert qrels == [
        ("clean", "answer", 1, "train"),
        ("clean", "counter", 1, "train"),
        ("eval-copy", "answer", 1, "test"),
        ("evaluation", "shared", 1, "test"),  # and no longer for `clean`
        ("half", "answer", 1, "train"),
        ("training", "answer", 1, "train"),
    ]
    log = read_parquet(tmp_path / "contamination.parquet")
    assert log.schema.equals(CONTAMINATION)
    found = {row["id"]: row for row in log.to_pylist()}
    assert len(found) == len(log) == 7 and {row["task"] for row in found.values()} == {"ArguAna"}
    kinds = {name: row["kind"] for name, row in found.items()}
    assert kinds == {
        "exact": "exact",
        "spaced": "exact",
        "one-word": "near",
        "truncated": "near",
        "titled": "near",
        "copy": "near",
        "shared": "exact",
    }
    assert [found[name]["matched_text"] for name in copies] == ARGUMENTS[:5]
    assert all((row["similarity"] == 1) == (row["kind"] == "exact") for row in found.values())
    assert all(0.8 <= row["similarity"] <= 1 for row in found.values())
    assert {name for name, row in found.items() if not row["dropped"]} == {"shared"}
    assert counts["contamination"] == {
        "queries_dropped": 5,
        "documents_dropped": 1,
        "documents_kept_for_other_splits": 1,
        "queries_left_without_positive_dropped": 1,
        "matches": {"ArguAna": {"queries": 5, "documents": 2}},
        "by_kind": {"exact": 3, "near": 4, "typo": 0},
        "documents_that_tasks_search": {"ArguAna": 2},
    }


def test_documents_that_are_said_to_stay_are_in_the_corpus(tmp_path):
    """A task that asks about what it searches, as ArguAna does: what it asks about does not stay."""
    source = LocalSource(kind="local", path=str(write_set(tmp_path / "set")))
    texts = read_parquet(tmp_path / "set" / "corpus.parquet")["text"].to_pylist()[:4]
    (tmp_path / "task").mkdir()
    write_table(tmp_path / "task" / "corpus.parquet", _id=list("abcd"), text=texts)
    write_table(tmp_path / "task" / "queries.parquet", _id=["q"], text=texts[3:])
    write_table(tmp_path / "task" / "qrels.parquet", query_id=["q"], corpus_id=["a"], score=[1], split=["test"])
    section = Decontamination(local={"task": str(tmp_path / "task")})
    counts = write_corpus(read_rows(source, None), source, tmp_path, section)["contamination"]
    here = set(read_arrow(tmp_path / "documents.arrow")["text"].to_pylist()).intersection(texts)
    assert here == {*texts[:3]} and counts["documents_dropped"] == 1
    assert counts["documents_that_tasks_search"] == {"task": len(here)}


def test_a_text_of_two_tasks_is_logged_for_both(tmp_path):
    """The best match of each task, and the same probe in two tasks."""
    rows, _ = planted()
    labels = {"label_text": ["x", "y"]}
    write_table(tmp_path / "test.parquet", text=[ARGUMENTS[0], ARGUMENTS[0] + " Yes."], **labels)
    (tmp_path / "other").mkdir()
    write_table(tmp_path / "other" / "test.parquet", text=[ARGUMENTS[0], ARGUMENTS[1]], **labels)
    section = Decontamination(local={"first": str(tmp_path), "second": str(tmp_path / "other")})
    counts = write_corpus(rows, Splits(), tmp_path, section)
    log = read_parquet(tmp_path / "contamination.parquet").to_pylist()
    assert [(row["id"], row["task"], row["kind"]) for row in log] == [
        ("exact", "first", "exact"),
        ("exact", "second", "exact"),
        ("spaced", "second", "exact"),
    ]
    assert counts["contamination"]["queries_dropped"] == 2
    matches = {"first": {"queries": 1, "documents": 0}, "second": {"queries": 2, "documents": 0}}
    assert counts["contamination"]["matches"] == matches


def edits_of(text: str) -> set[str]:
    """All texts that are one typo apart, by trying every place."""
    letters = "abo "
    places = range(len(text) + 1)
    left_out = {text[:place] + text[place + 1 :] for place in places}
    put_in = {text[:place] + letter + text[place:] for place in places for letter in letters}
    changed = {text[:place] + letter + text[place + 1 :] for place in places[:-1] for letter in letters}
    swapped = {text[:place] + text[place : place + 2][::-1] + text[place + 2 :] for place in places}
    return (left_out | put_in | changed | swapped) - {text}


def test_short_texts_that_are_one_typo_apart_are_found_and_no_others():
    rng = np.random.default_rng(0)
    texts = pl.Series(sorted({"".join(rng.choice([*"abo"], size)) for size in rng.integers(3, 7, 120)}))
    expected = {(a, b) for a in range(len(texts)) for b in range(len(texts)) if texts[b] in edits_of(texts[a])}
    found = typo_matches(texts, texts, 0)
    assert len(expected) > 100 and len(expected) < len(texts) ** 2 / 2
    assert set(found.select("row", "other").iter_rows()) == expected
    longest = [max(len(texts[row]), len(texts[other])) for row, other, _ in found.iter_rows()]
    np.testing.assert_allclose(found["similarity"], 1 - 1 / np.array(longest))
    assert len(typo_matches(texts, texts, 0.8)) == sum(length >= 5 for length in longest)


def test_a_typo_in_a_short_text_is_found_and_counted_apart(tmp_path):
    """In 5-grams a sentence of 24 letters with a typo is as far from itself as another sentence."""
    probes = ["A man is riding a horse.", "Three dogs run over snow.", "It rains in the old town today."]
    asked = ["A man is ridnig a horse!", "three dogs run over  snow.", "It rains in the old town today, today.", "No."]
    write_table(tmp_path / "test.parquet", text=probes, label_text=["x", "y", "z"])
    probes = read_probes(Decontamination(local={"task": str(tmp_path)}, similarity=0.75), None)
    texts = pl.Series("text", asked)
    table = pl.DataFrame({"id": ["a", "b", "c", "d"], "text": texts, "key": text_keys(texts)})
    found = find_matches(table, band_keys(texts), probes)
    assert found.select("id", "kind").rows() == [("a", "typo"), ("b", "exact"), ("c", "near")]
    log = contamination_log(query=found.with_columns(dropped=pl.lit(True)))
    assert count_by_kind(log) == {"exact": 1, "near": 1, "typo": 1}
    whole = Probes(**{**vars(probes), "similarity": 1.0})
    assert find_matches(table, band_keys(texts), whole)["id"].to_list() == ["b"], "as asked for"


def test_a_task_of_mteb_is_read_from_a_copy_where_one_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    section = Decontamination(tasks=["STS12", "STS14"], local={"STS12": "sts12", "STS14": "sts14", "Own": "own"})
    (tmp_path / "sts14").mkdir()
    found = {root: evaluation_tasks(section, root) for root in (None, str(tmp_path))}
    local = {root: [name for name, task in tasks.items() if isinstance(task, str)] for root, tasks in found.items()}
    assert local == {None: ["Own"], str(tmp_path): ["STS14", "Own"]}
    assert [[*tasks] for tasks in found.values()] == [["Own", "STS12", "STS14"], ["STS14", "Own", "STS12"]]


@pytest.mark.parametrize(
    ("name", "asked", "searched"),
    [
        ("MockRetrievalTask", "This is a test sentence", "Title of d1 This is a positive sentence"),
        ("MockRetrievalDialogTask", "What is the capital of France?", "This is a positive sentence"),
        ("MockRerankingTask", "This is a test sentence", "This is a positive sentence"),
        ("MockSTSTask", "This is a test sentence", None),
        ("MockPairClassificationTask", "This is a test sentence", None),
        ("MockMultilingualClassificationTask", "This is a test sentence", None),
        ("LegacyMockClusteringFastTask", "This is a test sentence", None),
        ("MockSummarizationTask", "This is a test sentence", None),
        ("MockBitextMiningTask", "This is a test sentence", None),
        ("MockMultilingualBitextMiningTask", "This is a test sentence", None),
        ("MockMultilingualParallelBitextMiningTask", "This is a test sentence", None),
    ],
)
def test_mteb_stores_texts_by_task_type(name, asked, searched):
    import mteb.mocks

    found, documents = read_task(getattr(mteb.mocks, name)())
    assert asked in found and all(isinstance(text, str) for text in found)
    keys = text_keys(pl.Series([searched] if searched else [], dtype=pl.String))
    assert keys.is_in(documents.implode()).all() and bool(len(documents)) == bool(searched)


@pytest.mark.parametrize(
    ("benchmark", "size"), [("MTEB(eng, v2)", 41), ("MTEB(Multilingual, v2)", 131), ("RTEB(eng, beta)", 21)]
)
def test_every_task_of_a_benchmark_names_its_texts(benchmark, size):
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    tasks = mteb_tasks(benchmark)
    assert len(tasks) == size
    for task in tasks:
        assert isinstance(task, AbsTaskRetrieval) or decontamination._text_columns(task), task.metadata.name
        assert task.eval_splits and task.metadata.dataset["revision"]


def test_a_task_that_others_make_up_gives_way_to_them():
    """ArguAna once; CQADupstack's 12 forums, of which the benchmark has two."""
    tasks = mteb_tasks("MTEB(eng, v2)", ["ArguAna", "CQADupstackRetrieval"])
    assert len(tasks) == 41 + 10 and not any(task.is_aggregate for task in tasks)


def test_local_sets_are_read_by_their_layout(tmp_path):
    asked, searched = read_local(str(write_set(tmp_path / "set")), None)
    assert len(asked) == 20  # the test queries alone
    assert len(searched) == 61  # every text, of which one stands there twice
    write_table(tmp_path / "set" / "corpus.parquet", _id=["a", "b"], title=["One", "Two"], text=["text", "word"])
    searched = read_local(str(tmp_path / "set"), None)[1]
    expected = text_keys(pl.Series(["text", "word", "one text", "two word"]))
    assert len(searched) == 4 and expected.is_in(searched.implode()).all()
    write_table(tmp_path / "test.parquet", text1=["a b", "c"], text2=["d", "e"], label_text=["0", "1"])
    asked, searched = read_local(str(tmp_path), None)
    assert asked.to_list() == ["a b", "c", "d", "e"] and len(searched) == 0


def test_zero_shot_is_what_mteb_says_of_a_published_model():
    import mteb

    meta = mteb.get_model_meta("intfloat/e5-mistral-7b-instruct", fetch_from_hf=False)
    found = zero_shot(sorted(meta.training_datasets), "MTEB(eng, v2)")
    percentage = meta.zero_shot_percentage(mteb.get_benchmark("MTEB(eng, v2)").tasks)
    assert found["zero_shot_percentage"] == percentage == int(100 - 100 * 2 / 41)
    assert found["trained_on"] == ["FEVERHardNegatives", "HotpotQAHardNegatives"]
    parts = zero_shot(["CQADupstackRetrieval"], "MTEB(eng, v2)")["trained_on"]
    assert parts == ["CQADupstackGamingRetrieval", "CQADupstackUnixRetrieval"]
    nothing = zero_shot([], "MTEB(eng, v2)")
    assert (nothing["zero_shot_percentage"], nothing["trained_on"]) == (100, [])


def test_graded_pairs_lose_those_that_an_evaluation_task_asks_about(tmp_path, capsys):
    """Both sentences count: STSBenchmark's training split repeats sentences of other sets' test splits."""
    from dataset_builders.build import main

    long = "Three dogs run over the fresh snow near the shore of a frozen lake while two people watch them from afar."
    sets = {
        "test": {
            "sentence1": ["A man is playing a flute in the park.", long],
            "sentence2": ["It snows.", "He sleeps."],
        },
        "train": {
            "sentence1": ["a MAN is playing a flute  in the park.", "Two women talk.", "It rains."],
            "sentence2": ["Somebody cooks.", long.replace("shore", "edge"), "The sun sets."],
        },
    }
    for name, columns in sets.items():
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / f"{name}.parquet", **columns, score=[1.0] * len(columns["sentence1"]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"source: {{kind: local, path: {tmp_path}/train, score_range: [0, 5]}}\ntask_type: sts\ninstruction: x\n"
        f"decontamination: {{local: {{MySTS: {tmp_path}/test}}}}\n"
    )
    main(["--config", str(recipe), "--output_dir", str(tmp_path / "out")])
    manifest = read_manifest(tmp_path / "out" / "sts")
    assert manifest["contamination"] == {
        "pairs_dropped": 2,
        "sentences": {"MySTS": 2},
        "by_kind": {"exact": 1, "near": 1, "typo": 0},
    }
    assert read_parquet(tmp_path / "out" / "sts" / "sts.parquet")["sentence1"].to_pylist() == ["It rains."]
    log = read_parquet(tmp_path / "out" / "sts" / "contamination.parquet").to_pylist()
    assert [(row["id"], row["kind"]) for row in log] == [("0", "exact"), ("1", "near")]
    assert (
        "2 of 3 pairs were dropped, for sentences that match (1 equal, 1 nearly so, 0 by a typo); by task: MySTS 2."
        in (tmp_path / "out" / "hub" / "README.md").read_text()
    )
