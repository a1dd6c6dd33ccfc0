import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import SHARED_DATA, WORDS, write_encoder, write_table

from common.cli import InputError
from common.recipes import read_yaml
from common.steps import read_manifest
from dataset_builders import pydocs, sources
from dataset_builders.build import main
from dataset_builders.data_recipe import load_recipes
from dataset_builders.readers import Rows, draw
from dataset_builders.sources import (
    TASK_LAYOUTS,
    HubSource,
    LocalSource,
    PydocsSource,
    RegistrySource,
    Splits,
    check_task_type,
    describe_source,
    find_source,
    read_rows,
    read_sts,
    registry,
)

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
DATA_RECIPES = [path for path in RECIPES if path.parent.name == "data" or path.name in ("data.yaml", "medquad.yaml")]


@pytest.mark.parametrize("path", DATA_RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_that_ships_is_read(path, tmp_path, monkeypatch):
    """Without a set on this machine, but for those of recipes/own and MedQuAD, which is on no Hub."""
    monkeypatch.delenv("DATA_ROOT", raising=False)
    (tmp_path / "medquad").mkdir()
    for file in ("faq.csv", "medquad/train.csv"):
        (tmp_path / file).write_text("question,answer\nwhy,so\n")
    flags = ["--data_root", str(tmp_path)] if path.parent.name in ("own", "smollm2") else []
    recipes = load_recipes(str(path), flags, Path("data"))
    for recipe in recipes.values():
        assert recipe.source.kind in ("pydocs", "local", "hub", "registry") and recipe.instruction
    assert recipes and ".." not in path.read_text() and "data_root:" not in path.read_text()


def test_recipes_of_data_name_sets_of_the_hub_at_a_commit(monkeypatch):
    import mteb

    monkeypatch.delenv("DATA_ROOT", raising=False)
    paths = [path for path in DATA_RECIPES if path.parent.name == "data"]
    sources_ = [load_recipes(str(path), [], Path("data"))[Path("data")].source for path in paths]
    assert len(sources_) >= 7 and {source.kind for source in sources_} == {"hub", "registry"}
    for source in sources_:
        if source.kind == "hub":
            known = mteb.get_task(source.training_datasets[0]).metadata
            assert {"path": source.dataset, "revision": source.revision} == known.dataset
            assert source.split not in known.eval_splits and set(source.eval_splits) <= set(known.eval_splits)


@pytest.mark.parametrize("words", [False, True], ids=["as on the Hub", "as in the shared sets"])
def test_a_recipe_of_data_is_built_from_a_copy(tmp_path, monkeypatch, capsys, words):
    """The copy of snli.yaml: with the Hub's columns and numbers, or with our names and words."""
    encoder, copy = write_encoder(tmp_path / "encoder"), tmp_path / "sets" / "snli_eval"
    words_ = [(WORDS[row], WORDS[row + 15], WORDS[(7 * row + 5) % 36]) for row in range(15)]
    asks, entailed, contradicted = ([" ".join(row[:end]) for row in words_] for end in (3, 2, 1))
    names = ("text1", "text2", "label_text") if words else ("premise", "hypothesis", "label")
    labels = ["entailment", "contradiction"] if words else [0, 2]
    copy.mkdir(parents=True)
    for split, rows in (("validation", range(12)), ("test", range(12, 15))):
        pairs = [(asks[row], entailed[row], labels[0]) for row in rows]
        pairs += [(asks[row], contradicted[row - 1], labels[1]) for row in rows]
        write_table(copy / f"{split}.parquet", **dict(zip(names, zip(*pairs, strict=True), strict=True)))
    (recipe,) = (path for path in DATA_RECIPES if path.name == "snli.yaml")
    models = ["--dense.model", str(encoder), "--teacher.model", str(encoder), "--num_negatives", "1", "--margin", "1"]
    asked = ["--config", str(recipe), *models, "--margin_type", "none"]
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "sets"))
    main([*asked, "--output_dir", str(tmp_path / "data")])
    assert f"reads {copy} in place of stanfordnlp/snli on the Hub" in capsys.readouterr().err
    assert "license: cc-by-sa-4.0" in (tmp_path / "data" / "hub" / "README.md").read_text()
    corpus = read_manifest(tmp_path / "data" / "corpus")
    assert corpus["queries"] == {"test": 3, "validation": 12} and corpus["pairs_seen"] == 30
    rows = pl.read_parquet(tmp_path / "data" / "mined" / "mined.parquet")
    assert len(rows) and {*rows.select("query", "positive").iter_rows()} <= {*zip(asks, entailed, strict=True)}
    # another folder by the same recipe
    monkeypatch.delenv("DATA_ROOT")
    splits = ["--split", "validation", "--eval_splits", "[test]", "--label_scores", "{'0': 1, '2': 0, entailment: 1}"]
    main([*asked, *splits, "--source.path", str(copy), "--output_dir", str(tmp_path / "other")])
    assert read_manifest(tmp_path / "other" / "corpus")["queries"] == corpus["queries"]


def test_another_folder_keeps_what_the_registry_knows_of_the_set(tmp_path):
    """Without the range of its scores sts is refused; without training_datasets the card cannot say what was seen."""
    (path,) = (path for path in DATA_RECIPES if path.name == "stsb.yaml")
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\na,b,5\n")
    flags = ["--source.path", "pairs.csv", "--source.split", "dev", "--data_root", str(tmp_path)]
    flags += ["--decontamination", "null"]
    [recipe] = load_recipes(str(path), flags, Path("data")).values()
    source, entry = recipe.source, registry()["STSBenchmark"]
    assert (source.kind, source.path, source.split) == ("local", "pairs.csv", "dev")
    assert source.score_range == entry.score_range and source.training_datasets == entry.training_datasets


def test_recipes_cover_every_task_type_and_every_set_of_the_registry():
    values = [read_yaml(path) for path in DATA_RECIPES]
    assert len(values) >= 9 and {value["task_type"] for value in values if "source" in value} == set(TASK_LAYOUTS)
    (path,) = (path for path in DATA_RECIPES if path.parent.name == "lg-anna")
    recipes = load_recipes(str(path), [], Path("data"))
    assert {folder.name for folder in recipes} == {name for name, entry in registry().items() if entry.split}
    assert all(recipe.task_type == registry()[folder.name].task_type for folder, recipe in recipes.items())


@pytest.fixture
def docstrings(monkeypatch):
    pairs = [pydocs.DocstringPair(f"module.name{row}", f"Summary number {row}", f"Body {row}") for row in range(200)]
    monkeypatch.setattr(pydocs, "docstring_pairs", lambda: pairs)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_whole_queries_are_drawn_up_to_the_number_of_pairs(positives, number, more, seed):
    scores = [[1] * count + [0] for count in positives]
    qrels = pl.DataFrame({"query_id": [f"q{row}" for row in range(len(positives))], "score": scores}).explode("score")
    others, qrels = (qrels.with_columns(split=pl.lit(split)) for split in ("test", "train"))
    small, large = (
        draw(pl.concat([others, qrels]), Splits(num_pairs=count, seed=seed)) for count in (number, number + more)
    )
    assert draw(qrels, Splits()).equals(qrels) and small.filter(split="test").equals(others)
    small, large = (drawn.filter(split="train") for drawn in (small, large))
    assert len(small) and set(small["query_id"]) <= set(large["query_id"])
    for query_id, found in small.group_by("query_id"):
        assert len(found) == positives[int(query_id[0][1:])] + 1
    assert small["score"].sum() <= number or small["query_id"].n_unique() == 1


def test_a_pydocs_build_knows_what_its_pairs_depend_on(docstrings, monkeypatch):
    source = PydocsSource(kind="pydocs", num_pairs=20)
    rows, described = read_rows(source, None), describe_source(source, None)
    assert rows.seen == 200 and len(rows.documents) == 20 and rows.qrels["split"].null_count() == 20
    assert "numpy" in described["packages"] and described["num_pairs"] == 20
    monkeypatch.setattr(sources.platform, "python_version", lambda: "4.0")
    assert describe_source(source, None) != described


def judged(rows: Rows) -> list[tuple[str, str, int, str | None]]:
    """The qrels, with texts for ids."""
    queries = dict(rows.queries.iter_rows())
    documents = dict(rows.documents.select("document_id", "text").iter_rows())
    assert len(queries) == len(rows.queries) and len(documents) == len(rows.documents)
    return sorted(((queries[q], documents[d], score, split) for q, d, score, split in rows.qrels.iter_rows()), key=str)


def texts(table: pl.DataFrame) -> list[str]:
    return sorted(table["text"])


def write_rows(path: Path, **columns) -> str:
    path.parent.mkdir(exist_ok=True)
    write_table(path, **columns)
    return str(path.parent)


def hub(folder: str, **keys) -> HubSource:
    return HubSource(kind="hub", dataset=folder, **keys)


def local(folder: str, **keys) -> LocalSource:
    return LocalSource(kind="local", path=folder, **keys)


def test_pairs_come_from_load_dataset_with_their_columns_renamed(tmp_path):
    columns = {"question": ["who", "what", "who", "who"], "answer": ["he", "it", "she", "he"]}
    folder = write_rows(tmp_path / "pairs" / "train.parquet", **columns, other=[1, 2, 3, 4])
    source = hub(folder, columns={"query": "question", "positive": "answer"})
    rows = read_rows(source, None)
    assert judged(rows) == [("what", "it", 1, "train"), ("who", "he", 1, "train"), ("who", "she", 1, "train")]
    assert rows.seen == 4 and texts(rows.queries) == ["what", "who"]
    assert judged(read_rows(local(folder, columns=source.columns), None)) == judged(rows)
    assert judged(read_rows(hub(folder), None)) == judged(rows), "known by their names"
    with pytest.raises(InputError, match="no column 'query'"):
        read_rows(hub(folder, columns={"query": "query"}), None)
    with pytest.raises(InputError, match="dev"):
        read_rows(source.model_copy(update={"split": "dev"}), None)


def test_negatives_are_read_from_a_folder_of_ones_own_and_from_the_hub_where_they_are_asked_for(tmp_path):
    columns = {"query": ["q1", "q2"], "positive": [["a", "b"], ["c"]], "negative": [["d"], []]}
    folder = write_rows(tmp_path / "set" / "train.parquet", **columns)
    expected = [("q1", "a", 1, "train"), ("q1", "b", 1, "train"), ("q1", "d", 0, "train"), ("q2", "c", 1, "train")]
    assert judged(read_rows(local(folder), None)) == expected
    assert judged(read_rows(hub(folder, columns={"negative": "negative"}), None)) == expected
    without = read_rows(hub(folder), None)
    assert judged(without) == [row for row in expected if row[2]] and "d" not in texts(without.documents)


def test_a_published_row_without_text_is_left_out_and_counted(tmp_path, capsys):
    columns = {"query": ["q1", " ", "q3", "q4"], "positive": ["a", "b", None, "d"]}
    rows = read_rows(hub(write_rows(tmp_path / "pairs" / "train.parquet", **columns)), None)
    assert judged(rows) == [("q1", "a", 1, "train"), ("q4", "d", 1, "train")] and rows.seen == 4
    assert capsys.readouterr().err.count("1 rows without") == 2


@pytest.mark.parametrize("judged_ids", [["d0", "d9", "d1"], ["0", "1", "2"]])
def test_published_judgements_of_texts_that_are_not_there(tmp_path, capsys, judged_ids):
    """Some are the publisher's loss, and left out; where no id is known, the columns are not what they seem."""
    parts = [("default", "train", "qrels"), ("corpus", "corpus", "corpus"), ("queries", "queries", "queries")]
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{path}.parquet"}]}
        for name, split, path in parts
    ]
    folder = write_rows(tmp_path / "set" / "corpus.parquet", _id=["d0", "d1"], title=["", ""], text=["a", "b"])
    write_rows(tmp_path / "set" / "queries.parquet", _id=["q0", "q1"], text=["x", "y"])
    qrels = {"query-id": ["q0", "q0", "q1"], "corpus-id": judged_ids, "gain": [1] * 3}
    write_rows(tmp_path / "set" / "qrels.parquet", **qrels)
    (tmp_path / "set" / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    source = hub(folder, layout="corpus", columns={"score": "gain"})
    if "d0" in judged_ids:
        rows = read_rows(source, None)
        assert judged(rows) == [("x", "a", 1, "train"), ("y", "b", 1, "train")] and rows.seen == 3
        assert "1 rows whose document_id is not in corpus left out" in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match=r"document_id '0' \(and 2 more\) is not in"):
            read_rows(source, None)


LABELLED = {"text": ["a", "b", "c", "x", "y", "alone", "A "], "label_text": [*"111", *"222"[:2], "3", "1"]}


def test_a_text_is_a_query_whose_positive_is_another_of_its_class(tmp_path):
    folder = write_rows(tmp_path / "set" / "train.parquet", **LABELLED, label=[0] * 7)
    write_rows(tmp_path / "set" / "test.parquet", text=["new", " B", "stranger"], label_text=["2", "3", "9"])
    source = local(folder, eval_splits=["test"])
    rows = read_rows(source, None)
    assert rows.seen == 10 and rows.documents.columns == ["document_id", "text", "class"]
    # "A " says the same as "a", and "b" is asked in the test
    assert texts(rows.documents) == sorted(["a", "c", "x", "y", "alone"])
    assert texts(rows.queries) == sorted(["a", "b", " B", "c", "x", "y", "alone", "new", "stranger"])
    classes = dict(zip(LABELLED["text"], LABELLED["label_text"], strict=True)) | {"new": "2", " B": "3"}
    found = judged(rows)
    # "alone" has no other of its class, "stranger" no class
    assert [query for query, *_ in found] == sorted(["a", "b", " B", "c", "x", "y", "new"])
    for query, document, score, split in found:
        assert classes[query] == classes[document] and query != document and score == 1
        assert (split == "test") == (query in ("new", " B"))
    assert judged(read_rows(source, None)) == found
    drawn = {tuple(judged(read_rows(source.model_copy(update={"seed": seed}), None))) for seed in range(32)}
    assert len(drawn) > 3
    write_rows(tmp_path / "set" / "test.parquet", text=LABELLED["text"], label_text=["1"] * 7)
    with pytest.raises(InputError, match=r"train\.parquet: every text also stands in test: no rows"):
        read_rows(source, None)


def test_labels_are_split_or_looked_up_as_the_keys_say(tmp_path):
    folder = write_rows(tmp_path / "classes" / "train.parquet", title=["a", "b", "c"], label=["x y", "y", "x"])
    rows = read_rows(hub(folder, layout="texts", columns={"text": ["title"]}, label_separator=" "), None)
    assert sorted(rows.documents.select("text", "class").rows()) == [("a", "x"), ("a", "y"), ("b", "y"), ("c", "x")]
    columns = {"text1": ["p"] * 3, "text2": ["yes", "no", "maybe"], "label": [0, 2, -1]}
    folder = write_rows(tmp_path / "hub" / "train.parquet", **columns)
    rows = read_rows(hub(folder, layout="text_pairs", label_scores={"0": 1, "2": 0}), None)
    assert judged(rows) == [("p", "no", 0, "train"), ("p", "yes", 1, "train")] and rows.seen == 3
    with pytest.raises(InputError, match=r"no label is one of entailment, .*; found: 0, 2, -1"):
        read_rows(hub(folder, layout="text_pairs"), None)


def test_local_folders_are_found_under_data_root_then_the_variable_then_here(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name / "set").mkdir(parents=True)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "two"))
    assert find_source("set", str(tmp_path / "one")) == tmp_path / "one" / "set"
    assert find_source("set", None) == tmp_path / "two" / "set"
    monkeypatch.delenv("DATA_ROOT")
    monkeypatch.chdir(tmp_path / "one")
    assert find_source("set", None) == Path("set")
    with pytest.raises(InputError, match="data_root"):
        find_source("nothing", None)


def test_sts_scores_are_moved_into_the_open_interval(tmp_path):
    sentences = {"sentence1": list("abc"), "sentence2": list("def")}
    source = local(
        write_rows(tmp_path / "set" / "train.parquet", **sentences, score=[1.0, 2.0, 5.0]), score_range=(1, 5)
    )
    np.testing.assert_allclose(read_sts(source, None)["label"].to_numpy(), [1e-4, 0.25, 1 - 1e-4], atol=1e-6)
    for scores in ([0.5, 2.0, 5.0], [float("nan"), 2.0, 5.0]):
        write_rows(tmp_path / "set" / "train.parquet", **sentences, score=scores)
        with pytest.raises(InputError, match="row 0 is outside score_range"):
            read_sts(source, None)


def pairs(path: Path) -> set[frozenset[str]]:
    table = pl.read_parquet(path, columns=["sentence1", "sentence2"])
    return {frozenset(" ".join(text.lower().split()) for text in row) for row in table.iter_rows()}


@pytest.mark.skipif(not (SHARED_DATA / "stsb").is_dir(), reason="the STS benchmark is not on this machine")
def test_the_sts_recipe_builds(tmp_path, capsys):
    recipe = next(path for path in DATA_RECIPES if path.name == "stsb.yaml")
    main(["--config", str(recipe), "--data_root", str(SHARED_DATA), "--output_dir", str(tmp_path / "data")])
    trained, tests = pairs(tmp_path / "data" / "hub" / "sts"), set()
    for name in ("sts12", "sts14", "sts16"):
        tests |= pairs(SHARED_DATA / name / "test.parquet")
    assert len(tests) > 5000 and not trained & tests, "STS-B's training split repeats test pairs of other sets"
    assert read_manifest(tmp_path / "data" / "hub")["rows"] == {"sts": 2367} and len(trained) > 2000
    assert "config_name: sts" in (tmp_path / "data" / "hub" / "README.md").read_text()


def test_a_task_type_reads_the_layouts_that_hold_it(tmp_path):
    texts = local(write_rows(tmp_path / "set" / "train.parquet", **LABELLED))
    pairs = local(write_rows(tmp_path / "sts" / "train.parquet", sentence1=["a"], sentence2=["b"], score=[1.0]))
    scored = pairs.model_copy(update={"score_range": (0, 5)})
    check_task_type("clustering", texts, None)
    check_task_type("retrieval", PydocsSource(kind="pydocs"), None)
    check_task_type("sts", RegistrySource(kind="registry", name="STS12"), None)
    check_task_type("sts", scored, None)
    for task_type, wrong, message in [
        ("retrieval", texts, "holds 'texts', which is for classification, clustering"),
        ("sts", PydocsSource(kind="pydocs"), "holds 'pairs', which is for retrieval"),
        ("clustering", RegistrySource(kind="registry", name="Banking77Classification"), "is for task_type 'classif"),
        ("sts", pairs, "score_range"),
        ("sts", scored.model_copy(update={"eval_splits": ("test",)}), "eval_splits"),
        ("clustering", texts.model_copy(update={"score_range": (0, 5)}), "score_range"),
    ]:
        with pytest.raises(InputError, match=message):
            check_task_type(task_type, wrong, None)


def test_the_fingerprint_of_a_set_is_its_files_and_keys(tmp_path):
    folder, other = (write_rows(tmp_path / name / "train.parquet", **LABELLED) for name in ("set", "other"))
    source = local(folder)
    described = describe_source(source, None)
    same = {"path": other, "training_datasets": ("ELI5",)}
    assert describe_source(source.model_copy(update=same), None) == described
    assert describe_source(source.model_copy(update={"seed": 1}), None) != described
    with pytest.raises(InputError, match=r"source\.training_datasets: .*STS-B.*; write none"):
        describe_source(local(folder, training_datasets=["STS-B"]), None)
    declared = [local(folder, training_datasets=names).training_datasets for names in ([], "none", ["ELI5"], None)]
    assert declared == [(), (), ("ELI5",), None]
    write_rows(tmp_path / "set" / "train.parquet", text=["a", "b"], label_text=["1", "1"])
    assert describe_source(source, None) != described


# Sets of others, where they are on this machine


@pytest.mark.skipif(not (SHARED_DATA / "banking77").is_dir(), reason="the labelled sets are not on this machine")
@pytest.mark.parametrize(
    ("path", "split", "task_type", "counts"),
    [
        ("scifact", "train", "retrieval", (5183, 1109, 1258)),
        ("banking77", "train", "classification", (9999, 9999, 9999)),
        ("stackoverflow20", "test", "clustering", (19980, 19980, 19980)),
        ("quora_pairs", "test", "duplicates", (9669, 9691, 9995)),
        ("snli_eval", "test", "nli", (6462, 3306, 6605)),
    ],
)
def test_sets_of_every_task_type_are_read(path, split, task_type, counts):
    source = LocalSource(kind="local", path=path, split=split)
    check_task_type(task_type, source, str(SHARED_DATA))
    rows = read_rows(source, str(SHARED_DATA))
    assert (len(rows.documents), len(rows.queries), len(rows.qrels)) == counts


def test_a_collection_reads_the_copies_that_lie_below_data_root(tmp_path, capsys):
    """recipes/lg-anna by a folder: each set's own split and layout, and no word with the Hub."""
    (path,) = (path for path in DATA_RECIPES if path.parent.name == "lg-anna")
    write_rows(tmp_path / "banking77" / "train.parquet", text=["a", "b", "c"], label=[0, 0, 1])
    write_rows(tmp_path / "stsb" / "train.parquet", sentence1=["a"], sentence2=["b"], score=[5.0])
    flags = ["--sources", "[Banking77Classification, STSBenchmark]", "--data_root", str(tmp_path), "--num_pairs", "2"]
    recipes = load_recipes(str(path), flags, Path("data"))
    texts_, pairs = (recipe.source for recipe in recipes.values())
    assert (texts_.kind, texts_.path, texts_.num_pairs) == ("local", "banking77", 2)
    assert (pairs.kind, pairs.path, pairs.score_range) == ("local", "stsb", (0, 5))
    assert capsys.readouterr().err.count("in place of") == 2
    recipes = load_recipes(str(path), [*flags[:3], str(tmp_path / "empty")], Path("data"))
    assert {recipe.source.kind for recipe in recipes.values()} == {"registry"}
