"""Bad input to every command: one line that starts with `error:` and says what and where, exit code 2, nothing left.

A case is (what is done to a folder of sound inputs, arguments added to the command, words of the answer). Commands run
in that folder and in this process; a few run in processes of their own, and must answer the same.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_data import write_encoder, write_recipe, write_set
from tiny_training import own_cache, two_stages, write_hub

from common.cli import run
from common.steps import read_arrow, read_parquet, write_arrow, write_parquet

REPOSITORY = Path(__file__).parents[1]
NAN, INF = float("nan"), float("inf")

# --- what is done to the inputs -------------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    pass


def both(*changes):
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def delete(name):
    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def write(name, content):
    def change(folder: Path) -> None:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def cut(name, edit):
    """A file whose bytes are changed."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def link(name, target):
    def change(folder: Path) -> None:
        if os.path.lexists(folder / name):
            delete(name)(folder)
        (folder / name).symlink_to(target)

    return change


def directory(name):
    return both(delete(name), lambda folder: (folder / name).mkdir())


def keys(**changed):
    """Keys of the recipe: `mining__margin` is margin in the section mining."""

    def change(folder: Path) -> None:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        for path, value in changed.items():
            *sections, last = path.split("__")
            target = recipe
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = value
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    return change


def columns(name, **changed):
    """Columns of a Parquet file: values, a function of those there, or None to leave one out."""

    def change(folder: Path) -> None:
        table = {column: values.to_pylist() for column, values in zip(*_columns(folder / name), strict=True)}
        for column, values in changed.items():
            table[column] = values(table[column]) if callable(values) else values
        kept = {column: values for column, values in table.items() if values is not None}
        pq.write_table(pa.table(kept), folder / name)

    return change


def _columns(path: Path):
    table = pq.read_table(path)
    return table.column_names, table.columns


def rows(name, edit):
    """A table of ours, Parquet or Arrow, as `edit` makes it."""

    def change(folder: Path) -> None:
        if name.endswith(".arrow"):
            table = edit(read_arrow(folder / name))
            write_arrow(folder / name, table.to_batches(), table.schema)
        else:
            write_parquet(folder / name, edit(read_parquet(folder / name)))

    return change


def column(name, column, values):
    """One column of a table of ours."""
    return rows(name, lambda table: table.set_column(table.column_names.index(column), column, pa.array(values)))


# The same for every command that reads a recipe: (the file's content, words of the answer).
HOSTILE_YAML = {
    "empty": ("", "a mapping of names"),
    "number for a name": ("1: x\n", "a mapping of names"),
    "unclosed": ("source: [", "not a YAML file"),
    "not UTF-8": (b"\xff\xfes\x00o\x00", "not a YAML file"),
    "key twice": ("seed: 1\nseed: 2\n", "key 'seed' is there twice"),
    "key twice, deep": ("a: {b: [{c: 1, d: 2, c: 3}]}\n", "key 'c' is there twice"),
    "Python object": ("a: !!python/object/apply:os.system ['touch hacked']\n", "could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 2\n", "expected a single document"),
}
HOSTILE_FILES = {
    f"YAML: {name}": (write("recipe.yaml", text), [], said) for name, (text, said) in HOSTILE_YAML.items()
}
HOSTILE_RECIPES = {
    **HOSTILE_FILES,
    "recipe is missing": (delete("recipe.yaml"), [], "recipe.yaml: no such recipe"),
    "recipe is a folder": (directory("recipe.yaml"), [], "recipe.yaml: not a YAML file"),
    "recipe is a loop of links": (link("recipe.yaml", "recipe.yaml"), [], "symbolic links"),
}

# --- dataset_builders.build -----------------------------------------------------------------------------------------

CORPUS, QUERIES, QRELS = "set/corpus.parquet", "set/queries.parquet", "set/qrels.parquet"
DOCUMENTS_IN_SET, JUDGED = 62, 60


def not_utf8(count: int) -> pa.Array:
    """Strings of which the last is no UTF-8, as some writers leave them in Parquet."""
    data = pa.array([b"text"] * (count - 1) + [b"caf\xe9"])
    return pa.StringArray.from_buffers(len(data), data.buffers()[1], data.buffers()[2])


def same_column_twice(name, column):
    def change(folder: Path) -> None:
        names, values = _columns(folder / name)
        twice = pa.Table.from_arrays([*values, values[names.index(column)]], names=[*names, column])
        pq.write_table(twice, folder / name)

    return change


def split(task_type, **values):
    """A set of one file instead of a corpus."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder / "set")
        (folder / "set").mkdir()
        pq.write_table(pa.table(values), folder / "set" / "train.parquet")
        keys(task_type=task_type, source__eval_splits=[])(folder)

    return change


def sts(score_range=(0, 5), **values):
    """A recipe of graded pairs, and its set."""
    recipe = {"task_type": "sts", "instruction": "x"}
    recipe["source"] = {"kind": "local", "path": "set", "score_range": list(score_range)}
    pairs = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [1.0, 2.0], **values}
    return both(split("sts", **pairs), write("recipe.yaml", yaml.safe_dump(recipe)))


def evaluated(change):
    """A recipe that keeps another local set's test queries out, and what is done to that set."""
    return both(
        keys(decontamination={"local": {"Other": "other"}}),
        lambda folder: shutil.copytree(folder / "set", folder / "other"),
        change,
    )


def hub_source(**values):
    return keys(source={"kind": "hub", "dataset": "org/none", **values})


def registry_source(**values):
    return keys(source={"kind": "registry", **values})


BUILD = {
    # the recipe
    **HOSTILE_RECIPES,
    "task type that clears the screen": (keys(task_type="\x1b[2J"), [], "\\x1b[2J"),
    "unknown key": (keys(minning={}), [], "unknown key 'minning'; did you mean 'mining'"),
    "unknown key in a section": (keys(mining__margins=0.9), [], "unknown key 'mining.margins'; did you mean"),
    "missing section": (keys(teacher=None), [], "key 'teacher' is None"),
    "no task type": (keys(task_type=None), [], "key 'task_type' is None; it can be"),
    "task types are a list": (keys(task_type=["retrieval"]), [], "'task_type' is ['retrieval']; it can be"),
    "task types are a mapping": (keys(task_type={"a": 1}), [], "'task_type' is {'a': 1}; it can be"),
    "unknown task type": (keys(task_type="poetry"), [], "'task_type' is 'poetry'"),
    "source is a word": (keys(source="set"), [], "key 'source' is 'set'"),
    "source is a list": (keys(source=[1]), [], "key 'source' is [1]"),
    "source of no kind": (keys(source={"path": "set"}), [], "Unable to extract tag"),
    "source of unknown kind": (keys(source__kind="web"), [], "'web' found using 'kind'"),
    "source of many kinds": (keys(source__kind=["local"]), [], "found using 'kind'"),
    "instruction is a number": (keys(instruction=5), [], "key 'instruction' is 5: Input should be a valid string"),
    "instruction is nothing": (keys(instruction=None), [], "key 'instruction' is None"),
    "instruction is a list": (keys(instruction=["a"]), [], "key 'instruction' is ['a']"),
    "margin is NaN": (keys(mining__margin=NAN), [], "'mining.margin' is nan: Input should be a finite number"),
    "margin is infinite": (keys(mining__margin=INF), [], "'mining.margin' is inf"),
    "margin is 0": (keys(mining__margin=0), [], "'mining.margin' is 0"),
    "margin above 1": (keys(mining__margin=1.5), [], "'mining.margin' is 1.5"),
    "margin is a word": (keys(mining__margin="wide"), [], "'mining.margin' is 'wide'"),
    "margin is true": (keys(mining__margin=True), [], "'mining.margin' is 'true': Input should be a valid number"),
    "no negatives": (keys(mining__num_negatives=0), [], "'mining.num_negatives' is 0"),
    "half a negative": (keys(mining__num_negatives=1.5), [], "'mining.num_negatives' is 1.5"),
    "negatives are yes": (keys(mining__num_negatives=True), [], "'mining.num_negatives' is 'true'"),
    "a billion negatives": (keys(mining__num_negatives=10**9), [], "less than or equal to 1000"),
    "negative seed": (keys(mining__seed=-1), [], "'mining.seed' is -1"),
    "seed is a word": (keys(mining__seed="x"), [], "'mining.seed' is 'x'"),
    "negative seed of sts": (keys(sts={"seed": -1}), [], "'sts.seed' is -1"),
    "sts of no rows": (keys(sts={"num_rows": 0}), [], "'sts.num_rows' is 0"),
    "sts is a list": (keys(sts=[1]), [], "key 'sts' is [1]"),
    "unknown strategy": (keys(mining__strategy="best"), [], "'mining.strategy' is 'best'"),
    "negative rrf_k": (keys(fusion__rrf_k=-1), [], "'fusion.rrf_k' is -1"),
    "rrf_k of 400 digits": (keys(fusion__rrf_k=10**399), [], "'fusion.rrf_k' is 1000"),
    "nothing fused": (keys(fusion__top_k=0), [], "'fusion.top_k' is 0"),
    "negative top_k": (keys(bm25__top_k=-5), [], "'bm25.top_k' is -5"),
    "negative k1": (keys(bm25__k1=-1), [], "'bm25.k1' is -1"),
    "k1 is NaN": (keys(bm25__k1=NAN), [], "'bm25.k1' is nan"),
    "b above 1": (keys(bm25__b=2), [], "'bm25.b' is 2"),
    "unknown backend": (keys(bm25__backend="lucene"), [], "'bm25.backend' is 'lucene'"),
    "batches of nothing": (keys(dense__batch_tokens=0), [], "'dense.batch_tokens' is 0"),
    "unknown dtype": (keys(dense__dtype="float8"), [], "'dense.dtype' is 'float8'"),
    "unknown dtype of vectors": (keys(dense__vector_dtype="int8"), [], "'dense.vector_dtype' is 'int8'"),
    "texts of two tokens": (keys(dense__max_seq_length=2), [], "'dense.max_seq_length' is 2"),
    "FAISS from 0": (keys(dense__faiss_from=0), [], "'dense.faiss_from' is 0"),
    "10^20 probes": (keys(dense__faiss_probes=10**20), [], "'dense.faiss_probes' is 1000"),
    "unknown teacher": (keys(teacher__kind="llm"), [], "'teacher.kind' is 'llm'"),
    "prompt of a bi-encoder": (keys(teacher__prompt="x"), [], "a bi_encoder has a query_prompt"),
    "query prompt of a cross-encoder": (
        keys(teacher={"kind": "cross_encoder", "model": "encoder", "query_prompt": "x"}),
        [],
        "a cross_encoder has one `prompt`",
    ),
    "publish is a mapping": (keys(publish={"margin": 0.9}), [], "key 'publish' is"),
    "publish with a typo": (keys(publish=[{"margn": 0.9}]), [], "unknown key"),
    "publish the same twice": (
        keys(publish=[{"num_negatives": 3}, {"num_negatives": 3, "margin": 0.95}]),
        [],
        "train-n3 is there twice",
    ),
    "no workers": (keys(ray={"workers": 0}), [], "'ray.workers' is 0"),
    "infinite cores": (keys(ray={"cpus_per_worker": INF}), [], "'ray.cpus_per_worker' is inf"),
    "licence is a number": (keys(source__licence=3), [], "'source.licence' is 3"),
    "training_datasets is a word": (keys(source__training_datasets="x"), [], "'source.training_datasets' is 'x'"),
    "data_root is a number": (keys(data_root=3), [], "key 'data_root' is 3"),
    "key of another source": (keys(source__dataset="x"), [], "'source.dataset' does not go with"),
    # models
    "model is a number": (keys(dense__model=3), [], "'dense.model' is 3"),
    "model is empty": (keys(dense__model=""), [], "model reference ''"),
    "model is nothing": (keys(dense__model=None), [], "'dense.model' is None"),
    "model folder missing": (keys(dense__model="../x"), [], "model '../x': no such folder"),
    "model is a web address": (keys(dense__model="https://hub/org/name"), [], "no such folder or file, and no Hub id"),
    "model of nobody's home": (keys(dense__model="~nobody-here/x"), [], "model '~nobody-here/x': no such folder"),
    "model with a blank": (keys(dense__model="a b"), [], "model 'a b': not a local folder"),
    "model climbs": (keys(dense__model="org/.."), [], "model 'org/..'"),
    "model in other letters": (keys(dense__model="órg/ñ"), [], "model 'órg/ñ'"),
    "model of 100,000 letters": (keys(dense__model="x" * 100_000), [], " ... "),
    "model on a Hub out of reach": (keys(dense__model="org/none"), [], "model 'org/none': not a local folder"),
    "model of a package that is missing": (keys(dense__model="package:none_of_that"), [], "no installed package"),
    "model of a package inside": (keys(dense__model="package:os.path"), [], "'package:os.path': no installed"),
    "package without a model": (keys(dense__model="package:numpy"), [], "the package holds no model"),
    "model is a data set": (keys(dense__model="set"), [], "set: no model in this folder"),
    "teacher folder missing": (keys(teacher__model="./none"), [], "model './none': no such folder"),
    "model folder is empty": (both(delete("encoder"), lambda folder: (folder / "encoder").mkdir()), [], "no model in"),
    "weights are text": (write("encoder/model.safetensors", "x"), [], "model.safetensors: not readable"),
    "weights are cut": (cut("encoder/model.safetensors", lambda data: data[:-9]), [], "not readable as safetensors"),
    "modules are no JSON": (write("encoder/modules.json", "{"), [], "modules.json: not readable as JSON"),
    "modules are numbers": (write("encoder/modules.json", "[1]"), [], "modules.json: not a list of modules"),
    "no modules": (write("encoder/modules.json", "[]"), [], "modules.json: not a list of modules"),
    "module is code": (
        write("encoder/modules.json", '[{"idx": 0, "name": "0", "path": "", "type": "os.system"}]'),
        [],
        "module os.system is not one of sentence-transformers' own",
    ),
    "module climbs": (
        write("encoder/modules.json", '[{"path": "../../etc", "type": "sentence_transformers.models.Pooling"}]'),
        [],
        "has no folder '../../etc' here",
    ),
    "tokenizer is no JSON": (write("encoder/tokenizer.json", "{"), [], "tokenizer.json: not readable as JSON"),
    "tokenizer is none": (write("encoder/tokenizer.json", "{}"), [], "tokenizer.json: no tokenizer's"),
    "settings are a list": (write("encoder/config_sentence_transformers.json", "[]"), [], "not a mapping"),
    "prompt is a number": (
        write("encoder/config_sentence_transformers.json", '{"prompts": {"query": 3}}'),
        [],
        "prompt 'query' is 3, which is no text",
    ),
    # the set
    "set is missing": (delete("set"), [], "source.path 'set': no such folder"),
    "set is a file": (write("set", "x"), [], "source.path 'set': no such folder"),
    "set is a loop of links": (link("set", "set"), [], "source.path 'set': no such folder"),
    "set is empty": (both(delete("set"), lambda folder: (folder / "set").mkdir()), [], "train.parquet: no such file"),
    "set of nobody's home": (keys(source__path="~nobody-here/x"), [], "no such folder"),
    "set by a number": (keys(source__path=3), [], "'source.path' is 3"),
    "no queries": (delete(QUERIES), [], "queries.parquet: no such file"),
    "queries are a folder": (directory(QUERIES), [], "queries.parquet: not a readable Parquet file"),
    "queries are a loop of links": (link(QUERIES, "queries.parquet"), [], "symbolic link"),
    "queries lead nowhere": (link(QUERIES, "nowhere"), [], "queries.parquet: no such file"),
    "empty file": (write(CORPUS, ""), [], "corpus.parquet: not a readable Parquet file"),
    "CSV": (write(CORPUS, "_id,text\n1,a\n"), [], "corpus.parquet: not a readable Parquet file"),
    "file cut in half": (cut(CORPUS, lambda data: data[: len(data) // 2]), [], "not a readable Parquet file"),
    "file without its end": (cut(CORPUS, lambda data: data[:-9]), [], "not a readable Parquet file"),
    "wrong magic": (cut(CORPUS, lambda data: data[:-4] + b"PAR2"), [], "not a readable Parquet file"),
    "footer of nonsense": (write(CORPUS, b"PAR1" + b"\xff" * 64 + b"\x40\0\0\0PAR1"), [], "not a readable Parquet"),
    "footer of 2 GB": (write(CORPUS, b"PAR1\xff\xff\xff\x7fPAR1"), [], "not a readable Parquet file"),
    "pages of nonsense": (cut(CORPUS, lambda data: data[:99] + b"\xff" * 200 + data[299:]), [], "not a readable"),
    "no rows": (columns(CORPUS, _id=[], title=[], text=[]), [], "corpus.parquet"),
    "no columns": (lambda folder: pq.write_table(pa.table({}), folder / CORPUS), [], "corpus.parquet: no rows"),
    "no text": (columns(CORPUS, text=None), [], "corpus.parquet: no column 'text'"),
    "no ids": (columns(QUERIES, _id=None), [], "queries.parquet: no column '_id'"),
    "no scores": (columns(QRELS, score=None), [], "qrels.parquet: no column 'score'"),
    "no splits": (columns(QRELS, split=None), [], "qrels.parquet: no column 'split'"),
    "column twice": (same_column_twice(CORPUS, "text"), [], "Multiple matches for FieldRef.Name(text)"),
    "texts are lists": (columns(CORPUS, text=[["a"]] * DOCUMENTS_IN_SET), [], "'text' cannot be read as string"),
    "texts are structs": (columns(CORPUS, text=[{"a": 1}] * DOCUMENTS_IN_SET), [], "'text' cannot be read as string"),
    "titles are lists": (columns(CORPUS, title=[["a"]] * DOCUMENTS_IN_SET), [], "'text' cannot be read as string"),
    "ids are structs": (columns(CORPUS, _id=[{"a": 1}] * DOCUMENTS_IN_SET), [], "'id' cannot be read as string"),
    "texts are bytes": (columns(CORPUS, text=[b"\xff"] * DOCUMENTS_IN_SET), [], "Invalid UTF8 payload"),
    "text not UTF-8": (
        columns(CORPUS, text=not_utf8(DOCUMENTS_IN_SET)),
        [],
        "'text' cannot be read as string: In chunk 0: Invalid: Invalid UTF8",
    ),
    "title not UTF-8": (
        columns(CORPUS, title=not_utf8(DOCUMENTS_IN_SET)),
        [],
        "'text' cannot be read as string: In chunk 0: Invalid: Invalid UTF8",
    ),
    "id not UTF-8": (
        columns(QUERIES, _id=not_utf8(JUDGED)),
        [],
        "'id' cannot be read as string: In chunk 0: Invalid: Invalid UTF8",
    ),
    "blank text": (columns(CORPUS, text=lambda texts: ["  ", *texts[1:]]), [], "corpus.parquet: row 0 has no 'text'"),
    "text of wide blanks": (
        columns(QUERIES, text=lambda texts: ["\u2003\u00a0", *texts[1:]]),
        [],
        "row 0 has no 'text'",
    ),
    "null text": (columns(QUERIES, text=lambda texts: [None, *texts[1:]]), [], "row 0 has no 'text'"),
    "null id": (columns(CORPUS, _id=lambda ids: [None, *ids[1:]]), [], "row 0 has no 'id'"),
    "document twice": (columns(CORPUS, _id=lambda ids: [ids[1], *ids[1:]]), [], "id 'd01' occurs twice"),
    "query twice": (columns(QUERIES, _id=lambda ids: [ids[1], *ids[1:]]), [], "id 'q01' occurs twice"),
    "unknown document": (columns(QRELS, corpus_id=lambda ids: ["d9x", *ids[1:]]), [], "'d9x' (and 0 more) is not in"),
    "unknown query": (columns(QRELS, query_id=lambda ids: ["q9x", *ids[1:]]), [], "'q9x' (and 0 more) is not in"),
    "scores are words": (columns(QRELS, score=["good"] * JUDGED), [], "'score' cannot be read as int32"),
    "scores are lists": (columns(QRELS, score=[[1]] * JUDGED), [], "'score' cannot be read as int32"),
    "score of a half": (columns(QRELS, score=[0.5] * JUDGED), [], "'score' cannot be read as int32"),
    "score of NaN": (columns(QRELS, score=[NAN] * JUDGED), [], "'score' cannot be read as int32"),
    "score of 2^40": (columns(QRELS, score=[2**40] * JUDGED), [], "not in range"),
    "null score": (columns(QRELS, score=[None] + [1] * (JUDGED - 1)), [], "row 0 has no 'score'"),
    "negative scores alone": (columns(QRELS, score=[-1] * JUDGED), [], "no query with a positive document"),
    "null split": (columns(QRELS, split=[None] * JUDGED), [], "row 0 has no 'split'"),
    "split is a list": (columns(QRELS, split=[["train"]] * JUDGED), [], "'split' cannot be read as string"),
    "no such split": (keys(source__split="dev"), [], "split 'dev': no query with a positive document"),
    "no such eval split": (keys(source__eval_splits=["dev"]), [], "split 'dev': no query with"),
    "split climbs": (keys(source__split="../train"), [], "split '../train': no query with"),
    "trained on what is evaluated": (keys(source__eval_splits=["train"]), [], "cannot be an eval split too"),
    "eval split twice": (keys(source__eval_splits=["test", "test"]), [], "name each once"),
    "every query the same": (columns(QUERIES, text=["the same"] * JUDGED), [], "nothing to train on"),
    # sets of other layouts
    "split of other columns": (split("retrieval", a=["x"]), [], "train.parquet: columns a; a split has"),
    "labels for retrieval": (split("retrieval", text=["a"], label_text=["x"]), [], "holds 'texts', which is for"),
    "text without a label": (split("clustering", text=["a", "b"], label_text=["x", None]), [], "row 1 has no 'label'"),
    "empty labelled text": (split("clustering", text=["a", ""], label_text=["x", "x"]), [], "row 1 has no 'text'"),
    "pair without positive": (split("retrieval", query=["a"], positive=[None]), [], "row 0 has no 'positive'"),
    "pairs of no rows": (split("nli", text1=[], text2=[], label_text=[]), [], "no rows"),
    "label that nothing means": (split("nli", text1=["a"], text2=["b"], label_text=["z"]), [], "no label is one of"),
    "not as many labels": (
        split("classification", text=[["a", "b"]], label_text=[["x"]]),
        [],
        "not as many labels as texts",
    ),
    "graded pairs for retrieval": (
        split("retrieval", sentence1=["a"], sentence2=["b"], score=[1]),
        [],
        "which is for",
    ),
    "score outside its range": (sts(score=[1.0, 7.0]), [], "score 7.0 in row 1 is outside score_range"),
    "sts score of NaN": (sts(score=[1.0, NAN]), [], "score nan in row 1 is outside"),
    "sts score is a word": (sts(score=["a", "b"]), [], "column 'score' cannot be read as double"),
    "sts without a score": (sts(score=[1.0, None]), [], "row 1 has no 'score'"),
    "empty sentence": (sts(sentence2=["c", " "]), [], "row 1 has no 'sentence2'"),
    "range upside down": (sts(score_range=(5, 0)), [], "score_range is written [lowest, highest]"),
    "infinite range": (sts(score_range=(0, INF)), [], "'source.score_range"),
    "range of one number": (sts(score_range=(0,)), [], "'source.score_range"),
    # the Hub and the registry
    "Hub out of reach": (hub_source(), [], "dataset 'org/none': not a local folder, and the Hub did not serve it"),
    "Hub id that climbs": (hub_source(dataset="../../x/y"), [], "dataset '../../x/y': not a local folder"),
    "Hub id is empty": (hub_source(dataset=""), [], "'source.dataset' is ''"),
    "Hub id is a list": (hub_source(dataset=["x"]), [], "'source.dataset' is ['x']"),
    "Hub revision is a number": (hub_source(revision=3), [], "'source.revision' is 3"),
    "unknown column of ours": (hub_source(columns={"question": "q"}), [], "has no column 'question'"),
    "unknown layout": (hub_source(layout="rows"), [], "'source.layout' is 'rows'"),
    "layout of another task": (hub_source(layout="graded_pairs"), [], "which is for sts"),
    "label scores are words": (hub_source(label_scores={"a": "b"}), [], "'source.label_scores.a' is 'b'"),
    "no pairs": (hub_source(num_pairs=0), [], "'source.num_pairs' is 0"),
    "separator of nothing": (hub_source(label_separator=""), [], "'source.label_separator' is ''"),
    "not registered": (registry_source(name="fever"), [], "not in the registry; did you mean 'FEVER'"),
    "registered name climbs": (registry_source(name="../x"), [], "not in the registry; see --list_sources"),
    "registered name is a number": (registry_source(name=3), [], "'source.name' is 3"),
    "registered for evaluation alone": (registry_source(name="ArguAna"), [], "ArguAna has a test split alone"),
    "registered for another task": (registry_source(name="Banking77Classification"), [], "'classification', not"),
    "registered split": (registry_source(name="FEVER", split="test"), [], "its split to train on is 'train'"),
    # decontamination
    "nothing to compare with": (keys(decontamination={}), [], "name a benchmark, tasks or local sets"),
    "similarity above 1": (keys(decontamination={"tasks": ["X"], "similarity": 2}), [], "similarity' is 2"),
    "compared set is missing": (keys(decontamination={"local": {"A": "none"}}), [], "'none': no such folder"),
    "compared set is cut": (evaluated(cut("other/corpus.parquet", lambda data: data[:9])), [], "not a readable"),
    "compared without ids": (evaluated(columns("other/queries.parquet", _id=None)), [], "no column '_id'"),
    "compared without splits": (evaluated(columns("other/qrels.parquet", split=None)), [], "no column 'split'"),
    "compared without texts": (evaluated(columns("other/corpus.parquet", text=None)), [], "no column 'text'"),
    "compared with nulls": (
        evaluated(columns("other/corpus.parquet", text=lambda texts: [None, *texts[1:]])),
        [],
        "row 0 has no 'text'",
    ),
    "compared with lists": (
        evaluated(columns("other/queries.parquet", text=[["a"]] * JUDGED)),
        [],
        "'text' cannot be read as string",
    ),
    # flags
    "unknown flag": (nothing, ["--num_negative", "3"], "did you mean"),
    "ambiguous flag": (nothing, ["--top_k", "5"], "could be any of"),
    "flag without value": (nothing, ["--margin"], "--margin needs a value"),
    "value without flag": (nothing, ["stray"], "unexpected argument 'stray'"),
    "flag of 100,000 letters": (nothing, ["--" + "x" * 100_000, "1"], " ... "),
    "flag that is a date": (nothing, ["--num_negatives", "2026-13-45"], "'mining.num_negatives' is '2026-13-45'"),
    "unknown engine": (nothing, ["--engine", "spark"], "invalid choice: 'spark'"),
    "unknown step": (nothing, ["--from_step", "teacher"], "invalid choice: 'teacher'"),
    "pairs to check are a word": (nothing, ["--check_teacher", "x"], "invalid int value: 'x'"),
    "one pair to check": (nothing, ["--check_teacher", "1"], "--check_teacher 1: use 2 or more"),
    "-1 pairs to check": (nothing, ["--check_teacher", "-1"], "--check_teacher -1: use 2 or more"),
    "no teacher to check": (sts(), ["--check_teacher", "5"], "sts, which has no teacher"),
    "output of no name": (nothing, ["--output_dir", ""], "argument --output_dir: '' names no folder"),
    "output with a NUL": (nothing, ["--output_dir", "a\0b"], "names no folder"),
    "output is a loop of links": (link("out", "out"), [], "a symbolic link leads back to itself"),
    "output inside a loop of links": (link("loop", "loop"), ["--output_dir", "loop/out"], "leads back to itself"),
    "output is a file": (write("out", "x"), [], "a file stands where a folder is needed"),
    "output inside a file": (write("file", "x"), ["--output_dir", "file/out"], "a file stands where a folder"),
    "output of 300 letters": (nothing, ["--output_dir", "x" * 300], "the path is too long"),
}

# --- train_st -------------------------------------------------------------------------------------------------------

ONE = ["--stages", "retrieval"]


def entry(**values):
    return keys(datasets=[{"name": "a", **values}])


def student(**values):
    return keys(model_name_or_path=None, student={"teacher": "model", "corpus": "corpus", **values})


def merge(*weights):
    return keys(merge={"stages": ["sts", "retrieval"], "weights": list(weights)})


# Numbers out of their range -> what the answer says the value is; as flags, since a stage may say otherwise.
OUT_OF_RANGE = {
    "temperature": {".inf": "inf", ".nan": "nan", "0": "0"},
    "target_temperature": {".inf": "inf", "-1": "-1"},
    "false_negative_margin": {".inf": "inf", ".nan": "nan", "-1": "-1"},
    "weight": {".inf": "inf", ".nan": "nan", "0": "0"},
    "alpha": {".nan": "nan", "2": "2"},
    "learning_rate": {".nan": "nan", "-1": "-1.0", "1e400": "inf"},
    "num_train_epochs": {".nan": "nan", ".inf": "inf", "-1": "-1.0", "0": "0.0"},
    "weight_decay": {".nan": "nan", "-1": "-1.0"},
    "max_grad_norm": {".nan": "nan", ".inf": "inf", "-1": "-1.0"},
    "adam_beta1": {".nan": "nan", ".inf": "inf", "-1": "-1.0", "1": "1.0"},
    "adam_epsilon": {"0": "0.0"},
    "lora_dropout": {"1": "1.0", "-0.1": "-0.1"},
    "lora_r": {"0": "0"},
    "lora_alpha": {"-4": "-4"},
    "max_steps": {"0": "0", "-2": "-2", "99999999999": "99999999999"},
    "seed": {"-1": "-1", "4294967296": "4294967296"},
    "mini_batch_size": {"0": "0"},
    "per_device_train_batch_size": {"0": "0"},
    "gradient_accumulation_steps": {"0": "0"},
    "dataloader_num_workers": {"-1": "-1"},
    "min_text_tokens": {"-5": "-5"},
    "shots_budget": {"0": "0"},
    "save_total_limit": {"0": "0"},
    "eval_steps": {"-1": "-1.0"},
}
# Flags of the libraries' arguments that cannot work, or have no place here.
NOT_HERE = {
    "push_to_hub": ("true", "push_to_hub.py"),
    "hub_model_id": ("a/b", "push_to_hub.py"),
    "neftune_noise_alpha": ("5", "neftune_noise_alpha needs embeddings"),
    "use_liger_kernel": ("true", "use_liger_kernel has no effect"),
    "lora_task_type": ("CAUSAL_LM", "FEATURE_EXTRACTION"),
    "lora_target_modules": ("nothing", "Target modules nothing not found"),
    "attn_implementation": ("fast", 'attn_implementation="fast"` is not supported'),
    "report_to": ("nothing", "report_to: 'nothing' is not installed"),
    "optim": ("galore_adamw", "install `galore_torch`"),
    "optim_args": ("fast", "training cannot start so"),
    "lr_scheduler_type": ("cosine_with_min_lr", "min_lr_rate should be set"),
    "lr_scheduler_kwargs": ("{a: 1}", "unexpected keyword argument 'a'"),
    "learning_rate_mapping": ('{"(": 1.0}', "unterminated subpattern"),
    "accelerator_config": ("none.json", "No such file or directory: 'none.json'"),
    "metric_for_best_model": ("loss", "metric_for_best_model is 'loss'"),
    "resume_from_checkpoint": ("out/checkpoint-9", "true goes on from a stage's last checkpoint"),
}

TRAIN = {
    **HOSTILE_RECIPES,
    **{
        f"{key} of {value}": (nothing, [*ONE, f"--{key}", value], f"stage 'retrieval': key {key!r} is {told}: ")
        for key, cases in OUT_OF_RANGE.items()
        for value, told in cases.items()
    },
    **{f"{key} here": (nothing, [*ONE, f"--{key}", value], said) for key, (value, said) in NOT_HERE.items()},
    "warm-up of NaN": (nothing, ["--warmup_ratio", ".nan"], "is nan: it must be a finite number"),
    "student is a list": (keys(student=[1]), [], "key 'student' is [1]: write a mapping"),
    "student is a word": (nothing, ["--student", "x"], "key 'student' is 'x': write a mapping"),
    "student and model": (
        keys(student={"teacher": "model", "corpus": "corpus"}),
        [],
        "one of the two alone",
    ),
    "stage's name is true": (keys(stages=[{"name": True}]), [], "stage {'name': True}: a stage is a mapping"),
    "stage's name is nothing": (keys(stages=[{"name": None}]), [], "stage {'name': None}: a stage is a mapping"),
    "stage's name of 300 letters": (keys(stages=[{"name": "x" * 300}]), [], "100 at most"),
    "no stage asked for": (nothing, ["--stages", ""], "no stage ''"),
    "output of no name": (nothing, ["--output_dir", ""], "name one output_dir"),
    "output with a NUL": (nothing, ["--output_dir", "a\0b"], "name one output_dir"),
    "flag that is a date": (nothing, ["--seed", "2026-13-45"], "invalid int value: '2026-13-45'"),
    "flag that is no YAML": (nothing, ["--loss", "a: ["], "key 'loss' is 'a: ['"),
    "budget is true": (keys(total_steps=True), [], "key 'total_steps' is 'true'"),
    "unknown key": (keys(learning_rat=1), [], "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    "unknown key of nothing": (keys(null=1), [], "unknown key 'null'"),
    "unknown key in a data set": (entry(lora_r=2), [], "data set 'a': unknown key 'lora_r'"),
    "rank is a word": (keys(lora_alpha="many"), [], "invalid int value: 'many'"),
    "rate is a word": (keys(learning_rate="fast"), [], "invalid float value: 'fast'"),
    "rate is a mapping": (keys(learning_rate={"a": 1}), [], "invalid float value"),
    "rate is a list": (keys(learning_rate=[1, 2]), [], "['2']"),
    "half a text": (keys(per_device_train_batch_size=1.5), [], "invalid int value: '1.5'"),
    "maybe": (keys(share_prefix="maybe"), [], "key 'share_prefix' is 'maybe'"),
    "unknown loss": (keys(loss="triplet"), ONE, "key 'loss' is 'triplet'"),
    "unknown optimizer": (keys(optim="sgdd"), [], "invalid choice: 'sgdd'"),
    "unknown schedule": (keys(lr_scheduler_type="zigzag"), [], "invalid choice: 'zigzag'"),
    "unknown dtype": (keys(dtype="float8"), [], "invalid choice: 'float8'"),
    "unknown pooling": (keys(pooling="max"), [], "key 'pooling' is 'max'"),
    "unknown strategy": (keys(save_strategy="sometimes"), [], "invalid choice: 'sometimes'"),
    "schedule's keys are no JSON": (keys(lr_scheduler_kwargs="{"), [], "stage 'sts': Expecting property name"),
    "best model of other steps": (keys(load_best_model_at_end=True, save_steps=4), [], "round multiple"),
    "negative weight": (entry(weight=-1), [], "data set 'a': key 'weight' is -1"),
    "negative shots": (keys(shots=-3), [], "key 'shots' is -3"),
    "shots of no instruction": (keys(shots=2, instruction=None), [], "shots stand before an instruction"),
    "zero shots more than always": (keys(zero_shot_probability=2), [], "key 'zero_shot_probability' is 2"),
    "no negatives": (keys(num_negatives=0), ONE, "num_negatives is 0"),
    "no text": (keys(train_max_seq_length=0), [], "key 'train_max_seq_length' is 0"),
    "no queries to evaluate": (keys(eval_queries=0), [], "key 'eval_queries' is 0"),
    "negative documents": (keys(eval_documents=-3), [], "key 'eval_documents' is -3"),
    "no room for text": (keys(max_seq_length=16), [], "at least 8 are needed"),
    "prompts": (keys(prompts={"query": "q: "}), [], "prompted_columns"),
    "sampler of another": (keys(batch_sampler="no_duplicates"), [], "batch_sampler has no effect"),
    "no stages": (keys(stages=None), [], "`stages` must be a list"),
    "stages are a mapping": (keys(stages={"a": 1}), [], "`stages` must be a list"),
    "stages are a word": (keys(stages="sts"), [], "`stages` must be a list"),
    "stage is a list": (keys(stages=[["a"]]), [], "stage ['a']: a stage is a mapping"),
    "stage without name": (keys(stages=[{"loss": "cosent"}]), [], "a stage is a mapping with a name"),
    "stage's name climbs": (keys(stages=[{"name": "../x"}]), [], "stage {'name': '../x'}"),
    "stage's name is a number": (keys(stages=[{"name": 3}]), [], "stage {'name': 3}"),
    "stage's name is a face": (keys(stages=[{"name": "🙂"}]), [], "a stage is a mapping with a name"),
    "stage's name is taken": (keys(stages=[{"name": "model"}]), [], "stage name 'model' is taken"),
    "stage twice": (keys(stages=[{"name": "a"}, {"name": "a"}]), [], "stage name 'a' is taken"),
    "unknown stage asked for": (nothing, ["--stages", "mining"], "no stage 'mining'; the recipe has sts, retrieval"),
    "stage asked for twice": (nothing, ["--stages", "sts,sts"], "a stage twice"),
    "stage of nothing asked for": (nothing, ["--stages", "sts,"], "no stage ''"),
    "data sets are a number": (keys(datasets=3), [], "`datasets` must be a list"),
    "data sets are none": (keys(datasets=[]), [], "`datasets` must be a list"),
    "data set's name climbs": (keys(datasets=[{"name": "../a"}]), [], "data set {'name': '../a'}"),
    "data set twice": (keys(datasets=[{"name": "a"}, {"name": "a"}]), [], "data set name 'a' is taken"),
    "budget of a half": (keys(total_steps=1.5), [], "key 'total_steps' is 1.5"),
    "budget is a word": (keys(total_steps="ten"), [], "key 'total_steps' is 'ten'"),
    "budget below a step": (keys(total_steps=1), [], "total_steps is 1"),
    "two budgets": (keys(total_steps=10, max_steps=5), [], "both say how long"),
    "merge is a list": (keys(merge=[1]), [], "key 'merge' is [1]: write a mapping"),
    "merge with a typo": (
        keys(merge={"stage": ["sts"]}),
        [],
        "did you mean 'merge.stages'",
    ),
    "merge of one": (keys(merge={"stages": ["sts"]}), [], "name two stages or more"),
    "merge of the same": (keys(merge={"stages": ["sts", "sts"]}), [], "name two stages or more"),
    "negative share of a merge": (
        merge(-1, 1),
        [],
        "key 'merge.weights.0' is",
    ),
    "infinite share of a merge": (merge(INF, 1), [], "key 'merge.weights.0' is"),
    "merge of NaN": (merge(NAN, 1), [], "key 'merge.weights.0' is"),
    "merge of nothing": (merge(0, 0), [], "not all 0"),
    "model folder missing": (keys(model_name_or_path="../../x"), [], "model '../../x': no such folder"),
    "model on a Hub out of reach": (keys(model_name_or_path="org/none"), [], "model 'org/none': not a local folder"),
    "model is a data set": (keys(model_name_or_path="hub"), [], "model 'hub' has no tokenizer"),
    "no model": (keys(model_name_or_path=None), [], "name the model to start from"),
    "student of unknown keys": (student(hiden_size=1), [], "unknown key 'student.hiden_size'"),
    "student without a corpus": (
        keys(model_name_or_path=None, student={"teacher": "model"}),
        [],
        "key 'student.corpus' is missing",
    ),
    "student's corpus is missing": (student(), [], "corpus/documents.arrow: no such file"),
    "student's teacher is missing": (student(teacher="package:none_of_that"), [], "no installed package"),
    "student of odd size": (student(hidden_size=100), [], "key 'student.hidden_size' is 100"),
    "student of -1 layers": (student(num_hidden_layers=-1), [], "key 'student.num_hidden_layers' is -1"),
    "student's sif is NaN": (student(sif=NAN), [], "key 'student.sif' is nan"),
    "data missing": (keys(dataset_name="../../x"), [], "dataset '../../x': no such folder"),
    "data on a Hub out of reach": (keys(dataset_name="org/none"), [], "dataset 'org/none': not a local folder"),
    "data by another name": (keys(dataset_name="a b"), [], "dataset 'a b'"),
    "config climbs": (keys(dataset_config="../x"), ONE, "config '../x' of dataset 'hub' cannot be read"),
    "prompt for no column": (keys(prompted_columns="question"), ONE, "no column 'question' to prompt"),
    "rows are cut": (cut("hub/train.parquet", lambda data: data[:99]), ONE, "config 'train' of dataset 'hub'"),
    "rows are missing": (delete("hub/train.parquet"), ONE, "config 'train' of dataset 'hub'"),
    "no labels": (columns("hub/train.parquet", label=None), ONE, "no column 'label'"),
    "no negatives in the rows": (
        columns("hub/train.parquet", negative_1=None, negative_2=None, negative_3=None),
        ONE,
        "negative_1",
    ),
    "raw scores for labels": (
        columns("hub/train.parquet", label=[[7.1, 3, 2, 1]] * 48),
        ONE,
        "row 0: labels must lie",
    ),
    "labels of NaN": (columns("hub/train.parquet", label=[[0.9, NAN, 0.2, 0.1]] * 48), ONE, "row 0: labels must"),
    "too few labels": (columns("hub/train.parquet", label=[[0.9]] * 48), ONE, "row 0: label must hold 4"),
    "blank query": (columns("hub/train.parquet", query=lambda texts: [*texts[:-1], " "]), ONE, "row 47"),
    "flag without value": (nothing, ["--lora_r"], "--lora_r needs a value"),
    "value without flag": (nothing, ["stray"], "stray"),
    "unknown flag": (nothing, ["--lora_rr", "4"], "did you mean 'lora_r'"),
    "output is a file": (write("out", "x"), [], "a file stands where"),
}

# --- eval -----------------------------------------------------------------------------------------------------------

DOCUMENTS, ASKED, JUDGEMENTS = (
    "data/corpus/documents.arrow",
    "data/corpus/queries.parquet",
    "data/corpus/qrels.parquet",
)
CANDIDATES, MANIFEST = "data/candidates/candidates.parquet", "data/candidates/manifest.json"
SAVED = "model/config.json"
BAD_MODEL = {
    "no model": (delete("model"), [], "model"),
    "model is a file": (write("model", "x"), [], "model"),
    "model is no SentenceTransformer": (delete("model/modules.json"), [], "modules.json"),
    "settings are no JSON": (write(SAVED, "{"), [], "config.json: not readable as JSON"),
    "settings are a list": (write(SAVED, "[]"), [], "config.json: not a mapping"),
    "weights are text": (write("model/model.safetensors", "x"), [], "not readable as safetensors"),
    "modules are a mapping": (write("model/modules.json", "{}"), [], "modules.json: not a list of modules"),
    "pooling is gone": (delete("model/1_Pooling"), [], "has no folder '1_Pooling' here"),
    "tokenizer is none": (write("model/tokenizer.json", "{}"), [], "tokenizer.json: no tokenizer's"),
}
BAD_DOCUMENTS = {
    "no data": (delete("data"), [], "documents.arrow: no such file"),
    "data is a file": (write("data", "x"), [], "documents.arrow"),
    "documents are none": (rows(DOCUMENTS, lambda table: table.slice(0, 0)), [], "no documents"),
    "documents are cut": (cut(DOCUMENTS, lambda data: data[:-40]), [], "documents.arrow: not a readable Arrow file"),
    "documents are Parquet": (
        lambda folder: shutil.copy(folder / ASKED, folder / DOCUMENTS),
        [],
        "documents.arrow: not a readable Arrow file",
    ),
    "documents are a loop of links": (link(DOCUMENTS, "documents.arrow"), [], "documents.arrow: not a readable"),
    "documents are a folder": (directory(DOCUMENTS), [], "documents.arrow: not a readable"),
    "wrong columns": (rows(DOCUMENTS, lambda table: table.rename_columns(["id", "text"])), [], "no column 'document"),
    "document without text": (column(DOCUMENTS, "text", ["a", None, "b", "c", "d", "e"]), [], "row 1 has no 'text'"),
    "texts are lists": (column(DOCUMENTS, "text", [["a"]] * 6), [], "'text' cannot be read as string"),
    "ids are equal": (column(DOCUMENTS, "document_id", ["d0"] * 6), [], "id 'd0' occurs 6 times"),
}
RETRIEVAL = {
    **BAD_MODEL,
    **BAD_DOCUMENTS,
    "no stages": (delete("stages.json"), [], "not a training run"),
    "no run": (nothing, ["--run", "none"], "none: not a training run"),
    "run is a file": (nothing, ["--run", "recipe.yaml"], "not a training run"),
    "weights of a stage are text": (write("sts/model.safetensors", "x"), [], "sts/model.safetensors: not readable"),
    "start of the run is gone": (delete("student"), [], "student"),
    "unknown document judged": (rows(DOCUMENTS, lambda table: table.slice(1)), [], "is not in documents.arrow"),
    "queries of no text": (column(ASKED, "text", [None] * 4), [], "row 0 has no 'text'"),
    "queries of no split": (column(ASKED, "split", [None] * 4), [], "row 0 has no 'split'"),
    "queries are one": (column(ASKED, "query_id", ["q0"] * 4), [], "id 'q0' occurs 3 times"),
    "queries are none": (rows(ASKED, lambda table: table.slice(0, 0)), [], "split 'test' has no query"),
    "judgements are none": (rows(JUDGEMENTS, lambda table: table.slice(0, 0)), [], "split 'test' has no query"),
    "judgements are words": (column(JUDGEMENTS, "score", ["good"] * 4), [], "'score' cannot be read as int32"),
    "judgements are halves": (column(JUDGEMENTS, "score", [0.5] * 4), [], "'score' cannot be read as int32"),
    "judgements are null": (column(JUDGEMENTS, "score", [None] * 4), [], "row 0 has no 'score'"),
    "judgements are negative": (column(JUDGEMENTS, "score", [-1] * 4), [], "split 'test' has no query"),
    "judged queries are unknown": (column(JUDGEMENTS, "query_id", ["x"] * 4), [], "split 'test' has no query"),
    "unknown split": (nothing, ["--split", "dev"], "splits: test, train"),
    "split of nothing": (nothing, ["--split", ""], "split '' has no query"),
    "split of two lines": (nothing, ["--split", "a\nerror: b"], "split 'a\\nerror: b' has no query"),
    "split of 100,000 letters": (nothing, ["--split", "x" * 100_000], " ... "),
    "split without candidates": (nothing, ["--split", "train"], "source.eval_splits"),
    "unfinished candidates": (delete(MANIFEST), [], "candidates: not a finished folder"),
    "manifest is a list": (write(MANIFEST, "[]"), [], "manifest.json: not a manifest"),
    "manifest says nothing": (write(MANIFEST, "{}"), [], "no inputs.fusion.top_k"),
    "manifest says a word": (write(MANIFEST, '{"inputs": {"fusion": {"top_k": "a"}}}'), [], "no inputs.fusion.top_k"),
    "manifest is not UTF-8": (write(MANIFEST, b"\xff\xfe"), [], "manifest.json: not a manifest"),
    "candidates without a rank": (rows(CANDIDATES, lambda table: table.drop_columns(["rrf_rank"])), [], "'rrf_rank'"),
    "candidates are none": (rows(CANDIDATES, lambda table: table.slice(0, 0)), [], "no candidates for the queries"),
    "unknown flag": (nothing, ["--top", "5"], "unrecognized arguments"),
    "output is a file": (write("out", "x"), [], "a file stands where"),
}
SEARCH = {
    **BAD_MODEL,
    **BAD_DOCUMENTS,
    "two questions": (nothing, ["again"], "unrecognized arguments: again"),
    "no documents asked for": (nothing, ["--top_k", "0"], "--top_k 0: use 1 or more"),
    "-1 documents asked for": (nothing, ["--top_k", "-1"], "--top_k -1: use 1 or more"),
    "NaN documents asked for": (nothing, ["--top_k", "nan"], "invalid int value: 'nan'"),
    "model of no name": (nothing, ["--model", ""], "model reference ''"),
    "model is a web address": (nothing, ["--model", "https://hub/x/y"], "no such folder or file, and no Hub id"),
    "model climbs": (nothing, ["--model", "../../x"], "model '../../x': no such folder"),
    "package without a model": (nothing, ["--model", "package:json"], "the package holds no model"),
}
MTEB = {
    **BAD_MODEL,
    "unknown task": (nothing, ["--tasks", "STSBenchmar"], "Did you mean: 'STSBenchmark'"),
    "task that climbs": (nothing, ["--tasks", "../../x"], "'../../x' not found"),
    "no task": (nothing, ["--tasks"], "expected at least one argument"),
    "task and benchmark": (nothing, ["--benchmark", "MTEB(eng, v2)"], "not allowed with"),
    "no batch": (nothing, ["--batch_size", "0"], "--batch_size 0: use 1 or more"),
    "half a batch": (nothing, ["--batch_size", "1.5"], "invalid int value: '1.5'"),
    "Hub out of reach": (nothing, ["--model", "org/none"], "not a local folder, and the Hub did not serve it"),
}
SYSTEM = {"name": "x", "kind": "model", "nDCG@10": 0.5}
METRICS = {"key": "k", "command": "c", "run": "..", "data": "../data", "split": "test", "measures": ["nDCG@10"]}
METRICS |= {"counts": {"queries": 3, "documents": 6}, "baseline": "bm25", "compared": "nDCG@10", "systems": [SYSTEM]}
METRICS |= {"not_evaluated": [], "versions": {}}


def measured(**changed):
    return write("results/metrics.json", json.dumps({**METRICS, **changed}))


REPORT = {
    "not evaluated": (nothing, [], "metrics.json: no such file"),
    "metrics are no JSON": (write("results/metrics.json", "{"), [], "not readable as JSON"),
    "metrics are not UTF-8": (write("results/metrics.json", b"\xff"), [], "not readable as JSON"),
    "metrics of another": (write("results/metrics.json", "{}"), [], "not written by eval.retrieval"),
    "systems are a word": (measured(systems="x"), [], "metrics.json: systems is not as eval.retrieval writes it"),
    "systems are numbers": (measured(systems=[1]), [], "systems[0] is not as"),
    "system without measures": (measured(systems=[{"name": "x", "kind": "model"}]), [], "systems[0] is not as"),
    "measure is a word": (measured(systems=[{**SYSTEM, "nDCG@10": "good"}]), [], "systems[0] is not as"),
    "half a difference": (measured(systems=[{**SYSTEM, "difference": {"mean": 0.1}}]), [], "systems[0] is not as"),
    "measures are a mapping": (measured(measures={}), [], "measures is not as"),
    "counts are a list": (measured(counts=[1]), [], "counts is not as"),
    "counts are words": (measured(counts={"queries": "many", "documents": 6}), [], "counts.queries is not as"),
    "run is a number": (measured(run=3), [], "run is not as"),
    "run is elsewhere": (measured(run="none"), [], "none: not a training run"),
    "metrics are a list": (write("results/metrics.json", "[1]"), [], "not written by eval.retrieval"),
    "results are a file": (write("results", "x"), [], "metrics.json"),
    "unknown flag": (nothing, ["--top", "5"], "unrecognized arguments"),
}
VARIANTS = {"soft": {}, "kl": {"retrieval.loss": "kl"}}
ABLATE = {
    **HOSTILE_RECIPES,
    "unknown key": (keys(sead=[1]), [], "unknown key 'sead'"),
    "no seeds": (keys(seeds=[]), [], "key 'seeds' is []"),
    "seeds are words": (keys(seeds=["a"]), [], "is 'a'"),
    "seed twice": (keys(seeds=[1, 1]), [], "a seed is there twice"),
    "nothing to compare": (keys(variants={}), [], "nothing to compare"),
    "variants are a list": (keys(variants=["soft"]), [], "key 'variants' is ['soft']"),
    "variant that climbs": (keys(variants={"../x": {}, "soft": {}}), [], "variants are also folders"),
    "unknown baseline": (keys(baseline="none"), [], "no variant 'none' for a baseline"),
    "unknown stage of a variant": (keys(variants={"soft": {}, "b": {"mining2.loss": "kl"}}), [], "no stage 'mining2'"),
    "unknown key of a variant": (keys(variants={"soft": {}, "b": {"retrieval.los": "kl"}}), [], "unknown key 'los'"),
    "unknown loss of a variant": (
        keys(variants={"soft": {}, "b": {"retrieval.loss": "x"}}),
        [],
        "key 'loss' is 'x'",
    ),
    "base is missing": (delete("base.yaml"), [], "base.yaml: no such recipe"),
}

# --- push_to_hub ----------------------------------------------------------------------------------------------------

REPO_IDS = ["c", "a b/c", "../x", "a/../c", "a//c", "/c", "a/", "a/b/c", "a/b.git", "a/b--c", "a/b..c", "a/é"]
REPO_IDS += ["a/" + "x" * 100, "https://hub/a/b", "a/b\nerror: c", "a/🙂", ""]
PUSH = {
    **{f"repository {repo_id[:20]!r}": (nothing, [repo_id], "repositor") for repo_id in REPO_IDS},
    "repository like a flag": (nothing, ["-a/b"], "ORG/NAME"),
    "no repository": (nothing, [], "ORG/NAME"),
    "no model": (delete("model"), ["org/name"], "model"),
    "no SentenceTransformer": (delete("model/modules.json"), ["org/name"], "not a SentenceTransformer folder"),
    "no weights": (delete("model/model.safetensors"), ["org/name"], "no .safetensors weights"),
    "pickled weights": (write("model/pytorch_model.bin", "x"), ["org/name"], "pytorch_model.bin"),
    "code": (write("model/modeling_x.py", "x"), ["org/name"], "modeling_x.py"),
    "unknown flag": (nothing, ["org/name", "--pubic"], "unrecognized arguments: --pubic"),
}
MODEL_META = {
    "name without an owner": (nothing, ["name"], "mteb knows models as ORG/NAME"),
    "name that climbs": (nothing, ["../name"], "and no Hub id"),
    "name of a folder": (nothing, ["model"], "model: a folder"),
    "code is no address": (nothing, ["org/name", "--code", "my code"], "--code 'my code': give an address"),
    "output_dir is empty": (nothing, ["org/name", "--output_dir", ""], "names no folder"),
    "unknown flag": (nothing, ["org/name", "--data", "x"], "unrecognized arguments: --data"),
    "no recipe": (delete("recipe.yaml"), ["org/name"], "recipe.yaml: no such file"),
    "no model": (delete("model"), ["org/name"], "model"),
    "saved by others": (nothing, ["org/name"], "reference_vectors.json: no such file"),
}

# --- benchmarks -----------------------------------------------------------------------------------------------------

BENCHMARK = {
    "unknown flag": (nothing, ["--round", "5"], "unrecognized arguments: --round"),
    "flag without value": (nothing, ["--documents"], "expected"),
    "number is a word": (nothing, ["--documents", "many"], "'many' is no whole number"),
    "number is 0": (nothing, ["--documents", "0"], "argument --documents: '0' is no whole number from 1 on"),
}
BENCH_MINING = {
    **BENCHMARK,
    "unknown part": (nothing, ["sorting"], "part 'sorting': the parts are"),
    "-1 rounds": (nothing, ["--rounds", "-1"], "-1"),
}
BENCH_SCALE = {**BENCHMARK, "unknown step": (nothing, ["--last_step", "x"], "invalid choice: 'x'")}
BENCH_PREFIX = {
    "unknown flag": BENCHMARK["unknown flag"],
    "unknown part": BENCH_MINING["unknown part"],
    "no prompt": (nothing, ["--prompts"], "expected at least one argument"),
    "prompt of 0": (nothing, ["--prompts", "32", "0"], "argument --prompts: '0' is no whole number"),
    "half a text": (nothing, ["--texts", "1.5"], "'1.5' is no whole number"),
    "unknown device": (nothing, ["--device", "tpu"], "invalid choice: 'tpu'"),
}

# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    module: str
    inputs: str  # the fixture of its sound inputs
    arguments: list[str]
    cases: dict


RUN = ["--run", ".", "--data", "data", "--output_dir", "out"]
RECIPE = ["--config", "recipe.yaml", "--output_dir", "out"]
COMMANDS = {
    "build": Command("dataset_builders.build", "build_inputs", RECIPE, BUILD),
    "train_st": Command("train_st", "train_inputs", RECIPE, TRAIN),
    "retrieval": Command("eval.retrieval", "run_inputs", RUN, RETRIEVAL),
    "search": Command("eval.search", "run_inputs", ["how do i", "--model", "model", "--data", "data"], SEARCH),
    "run_mteb": Command(
        "eval.run_mteb", "run_inputs", ["--model", "model", "--output_dir", "out", "--tasks", "STSBenchmark"], MTEB
    ),
    "ablate": Command("eval.ablate", "ablation_inputs", RECIPE, ABLATE),
    "report": Command("eval.report", "run_inputs", ["results", "--output_dir", "out"], REPORT),
    "model_meta": Command("eval.model_meta", "run_inputs", ["--run", ".", "--dry_run"], MODEL_META),
    "push_to_hub": Command("push_to_hub", "run_inputs", ["model", "model", "--dry_run"], PUSH),
    "bench_mining": Command("benchmarks.bench_mining", "run_inputs", [], BENCH_MINING),
    "bench_prefix": Command("benchmarks.bench_prefix", "run_inputs", [], BENCH_PREFIX),
    "bench_scale": Command("benchmarks.bench_scale", "run_inputs", [], BENCH_SCALE),
}
CASES = [(name, case) for name, command in COMMANDS.items() for case in command.cases]


def test_there_are_enough_cases_of_every_command():
    count = Counter(name for name, _ in CASES)
    assert sum(count.values()) >= 200
    assert count.keys() == COMMANDS.keys() and min(count.values()) >= 5
    entries = {path.stem for path in (REPOSITORY / "eval").glob("*.py") if "if __name__" in path.read_text()}
    entries |= {path.stem for path in REPOSITORY.glob("*.py") if "if __name__" in path.read_text()}
    assert entries <= COMMANDS.keys()


@pytest.fixture(scope="module")
def build_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    write_set(folder / "set")
    write_encoder(folder / "encoder")
    write_recipe(folder / "recipe.yaml", Path("set"), Path("encoder"))
    return folder


@pytest.fixture(scope="module")
def train_inputs(tmp_path_factory, tiny_decoder):
    folder = tmp_path_factory.mktemp("train")
    shutil.copytree(tiny_decoder, folder / "model")
    write_hub(folder / "hub")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(two_stages(Path("model"), Path("hub"))))
    return folder


@pytest.fixture(scope="module")
def ablation_inputs(train_inputs, tmp_path_factory):
    folder = shutil.copytree(train_inputs, tmp_path_factory.mktemp("ablate") / "work")
    (folder / "recipe.yaml").rename(folder / "base.yaml")
    recipe = {"base": "base.yaml", "data": "data", "baseline": "soft", "seeds": [0], "variants": VARIANTS}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def run_inputs(tiny_run, tmp_path_factory):
    return shutil.copytree(
        tiny_run, tmp_path_factory.mktemp("run") / "run", ignore=shutil.ignore_patterns("embeddings", "results")
    )


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, and the cache of `datasets` not the user's."""
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch, own_cache(tmp_path_factory.mktemp("cache")):
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.delenv("DATA_ROOT", raising=False)
        yield


def spoilt(command, case, request, tmp_path):
    """A copy of the command's inputs with the case's change, and the arguments to call it with there."""
    change, added, answer = command.cases[case]
    folder = shutil.copytree(request.getfixturevalue(command.inputs), tmp_path / "work", symlinks=True)
    change(folder)
    return folder, [*command.arguments, *added], answer


def everything(folder):
    """What lies in a folder, and when it was written; empty folders for vectors aside."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or path.suffix == ".partial")
    return {path: path.lstat().st_mtime_ns for path in paths}


def refusal(shown: str) -> str:
    """The one line that is no progress bar."""
    lines = [line for line in shown.replace("\r", "\n").splitlines() if line.strip()]
    assert "Traceback" not in shown
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert len(lines[-1]) <= 2010 and lines[-1].isprintable()
    assert not [line for line in lines[:-1] if "it/s" not in line and "examples" not in line and "%|" not in line]
    return lines[-1]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}: {case}" for name, case in CASES])
def test_bad_input_is_refused_in_one_line(name, case, request, tmp_path, capsys, monkeypatch):
    command = COMMANDS[name]
    main = importlib.import_module(command.module).main
    folder, arguments, answer = spoilt(command, case, request, tmp_path)
    before = everything(tmp_path)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(main, arguments)
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert answer in refusal(shown)
    assert everything(tmp_path) == before


ALONE = [("build", "YAML: key twice"), ("build", "margin is true"), ("search", "two questions")]
ALONE += [
    ("retrieval", "no run"),
    ("train_st", "stage's name climbs"),
    ("report", "metrics are a list"),
]


@pytest.mark.parametrize(("name", "case"), ALONE)
def test_a_process_of_its_own_answers_the_same(name, case, request, tmp_path):
    command = COMMANDS[name]
    folder, arguments, answer = spoilt(command, case, request, tmp_path)
    before = everything(tmp_path)
    done = process(command, arguments, folder)
    assert done.returncode == 2
    assert answer in refusal(done.stderr) and done.stdout == ""
    assert everything(tmp_path) == before


def process(command, arguments, folder, **variables):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", **variables}
    line = [sys.executable, "-m", command.module, *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_data_root_that_is_not_there_is_named(build_inputs, tmp_path):
    folder = shutil.copytree(build_inputs, tmp_path / "work")
    keys(source__path="elsewhere")(folder)
    done = process(COMMANDS["build"], RECIPE, folder, DATA_ROOT="/no/such/root")
    assert done.returncode == 2 and "searched: /no/such/root/elsewhere, elsewhere" in refusal(done.stderr)


def test_a_further_set_without_rows_is_told_before_the_first_is_mined(build_inputs, tmp_path, monkeypatch, capsys):
    from dataset_builders import build

    folder = shutil.copytree(build_inputs, tmp_path / "work")
    keys(publish=[{"num_negatives": 2}, {"num_negatives": 900}])(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        run(build.main, RECIPE)
    assert stop.value.code == 2
    assert "publish: train-n900: " in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in (folder / "out").iterdir()} == {"corpus", "candidates", "scores", "embeddings"}


@pytest.mark.parametrize(
    ("variables", "answer"),
    [
        ({}, "dataset 'org/none': not a local folder, and the Hub did not serve it: [Errno 111]"),
        ({"HF_TOKEN": "hf_secret\nhf_more"}, "dataset 'org/none': not a local folder"),
        ({"HF_TOKEN": "hf_secret_é"}, "HF_TOKEN holds a character that no token has"),
        ({"HF_ENDPOINT": "nonsense"}, "missing an 'http://'"),
    ],
)
def test_a_hub_that_cannot_be_asked_is_told_without_the_token(variables, answer, build_inputs, tmp_path):
    folder = shutil.copytree(build_inputs, tmp_path / "work")
    hub_source()(folder)
    nobody = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "home")}
    done = process(COMMANDS["build"], RECIPE, folder, **{**nobody, **variables})
    assert done.returncode == 2 and answer in refusal(done.stderr)
    assert "secret" not in done.stderr and not (folder / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    from eval import report

    with pytest.raises(Exception, match="no such file") as raised:
        run(report.main, [str(tmp_path), "--output_dir", str(tmp_path / "out"), "--debug"])
    assert not isinstance(raised.value, SystemExit)


@pytest.mark.parametrize(("question", "answer"), [("\u2003 ", "is empty"), ("a\udcff", "is not UTF-8")])
def test_questions_that_are_none(question, answer, capsys):
    from eval import search

    with pytest.raises(SystemExit) as stop:
        run(search.main, ["--model", "m", "--data", "d", question])
    assert stop.value.code == 2 and answer in refusal(capsys.readouterr().err)
