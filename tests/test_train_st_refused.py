"""Recipes and data that cannot be trained on: one line, before anything is written; how values are read."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_training import two_stages, write_hub
from trl import ModelConfig

import train_st
from common.cli import InputError, run
from modeling.keys import read_flags
from modeling.processes import ZERO3 as ZERO3_SETTINGS
from modeling.processes import refuse_shards
from modeling.recipe import Stage, parse_recipe

pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    return write_hub(tmp_path_factory.mktemp("data") / "hub")


@pytest.fixture(scope="module")
def recipe(tiny_decoder, hub) -> dict:
    return two_stages(tiny_decoder, hub)


def rows_of(hub: Path, config: str) -> list[dict]:
    return pq.read_table(hub / f"{config}.parquet").to_pylist()


# what is wrong -> (change to the recipe, flags, what the one line says)
BAD_RECIPES = {
    "longer in training": (
        {},
        ["--train_max_seq_length", "4000"],
        "train_max_seq_length 4000 is above max_seq_length",
    ),
    "no negatives for soft labels": ({}, ["--num_negatives", "0"], "num_negatives is 0; soft_info_nce needs more"),
    "merge of what does not run": (
        {"merge": {"stages": ["sts", "retrieval"]}},
        ["--stages", "sts"],
        "no stage 'retrieval' is run; there are sts",
    ),
    "merge by another name": (
        {"merge": {"stages": ["sts", "retrieval"], "method": "mean"}},
        [],
        "key 'merge.method' is 'mean'",
    ),
    "merge weights": ({"merge": {"stages": ["sts", "retrieval"], "weights": [1]}}, [], "one a stage is needed"),
    "shots without instruction": ({"shots": 2, "instruction": None}, [], "shots stand before an instruction"),
    "quantised": ({"load_in_4bit": True}, [], "stage 'sts': load_in_4bit and load_in_8bit freeze"),
    "batch sampler": ({"batch_sampler": "no_duplicates"}, [], "batch_sampler has no effect"),
    "a module that is not there": (
        {},
        ["--stages", "retrieval", "--lora_modules_to_save", "norm", "nrm"],
        "has no 'nrm'",
    ),
    "a target that is not there": (
        {"stages": [{"name": "a", "use_peft": True, "lora_target_modules": ["q_proj", "p_proj"]}]},
        [],
        "lora_target_modules: model",
    ),
    "a module's rate is a word": ({"learning_rate_mapping": {"norm": "fast"}}, [], "string to float: 'fast'"),
    "a module's rate is no number": ({"learning_rate_mapping": {"norm": "nan"}}, [], "learning_rate_mapping' is nan"),
    "revision of a folder": ({"model_revision": "v1"}, [], "is a folder, which has none"),
    "two revisions": ({"model_name_or_path": "org/name@v1", "model_revision": "v2"}, [], "names another"),
    "model in a stage": (
        {"stages": [{"name": "a", "model_name_or_path": "b"}]},
        [],
        "stage 'a': model_name_or_path: stages go on from one another",
    ),
    "unknown key in a stage": ({"stages": [{"name": "a", "los": 1}]}, [], "stage 'a': unknown key 'los'"),
    "model package missing": ({"model_name_or_path": "package:nowhere"}, [], "no installed package"),
    "unknown student key": (
        {"model_name_or_path": None, "student": {"hiden_size": 64}},
        [],
        "unknown key 'student.hiden_size'",
    ),
    "columns of another loss": (
        {"stages": [{"name": "a", "loss": "cosent", "dataset_config": "train"}]},
        [],
        "no column 'sentence1', which cosent needs",
    ),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes(case, recipe, tmp_path, capsys, monkeypatch):
    changes, flags, message = BAD_RECIPES[case]
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    check_refused(["--config", "train.yaml", "--output_dir", "run", *flags], message, capsys)
    assert os.listdir() == ["train.yaml"]


ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true"} | {
    f"ACCELERATE_DEEPSPEED_{key}": value for key, value in ZERO3_SETTINGS.items()
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
SHARDS = [
    ({**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "of DeepSpeed, ZeRO-3 as in"),
    ({**ZERO3, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "of DeepSpeed, ZeRO-3 as in"),
    (ZERO3, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps with ZeRO-3"),
    (ZERO3, {"mixed_precision": "fp16"}, "fp16 with ZeRO-3"),
    (ZERO3, {}, "among two GPUs or more alone"),
    ({}, {"deepspeed": "zero3.json"}, "deepspeed is the launcher's"),
    ({**FSDP, "FSDP_VERSION": "1"}, {}, "version 2 with SHARDED_STATE_DICT alone is supported"),
    ({**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {}, "version 2 with SHARDED_STATE_DICT alone"),
    (FSDP, {}, "among two GPUs or more alone"),  # this process is one, on a CPU
    ({}, {"fsdp": "full_shard"}, "fsdp is the launcher's"),
]


@pytest.mark.parametrize(("environment", "changes", "message"), SHARDS)
def test_what_was_not_seen_to_train_and_save_is_not_trained(environment, changes, message, monkeypatch):
    """As `accelerate launch` tells its processes of FSDP and DeepSpeed."""
    training = {"fsdp": None, "deepspeed": None, "gradient_accumulation_steps": 1, "mixed_precision": "no", **changes}
    stage = Stage("a", {}, None, {}, ModelConfig(), SimpleNamespace(**training))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        refuse_shards([stage])


def check_refused(argv, message, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(train_st.main, argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert out == ""


BAD_DATA = {
    "no rows": ("train", lambda rows: pa.Table.from_pylist(rows)[:0], "no rows"),
    "no negatives": (
        "train",
        lambda rows: [{k: r[k] for k in ("query", "positive", "label")} for r in rows],
        "negative_1",
    ),
    "pair label": (
        "sts",
        lambda rows: [*rows[:4], {**rows[4], "label": float("inf")}],
        "row 4: label is not a finite",
    ),
    "unknown document": ("documents", lambda rows: rows[5:], "qrels name document 'd0'"),
    "unknown query": ("queries", lambda rows: rows[5:], "qrels name query 'q0'"),
    "no validation": ("qrels", lambda rows: [{**row, "split": "train"} for row in rows], "no split 'validation'"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, hub, recipe, tmp_path, capsys, monkeypatch):
    """Found in any stage before the first one is trained."""
    config, change, message = BAD_DATA[case]
    monkeypatch.chdir(tmp_path)
    write_hub(tmp_path / "hub", **{config: change(rows_of(hub, config))})
    Path("train.yaml").write_text(yaml.safe_dump({**recipe, "dataset_name": "hub", "eval_queries": 100}))
    check_refused(["--config", "train.yaml", "--output_dir", "run"], message, capsys)
    assert not Path("run").exists()


def test_a_data_folder_built_anew_is_read_anew(hub, tmp_path):
    """datasets caches a folder by name and README: a rebuilt hub/, or another run's, would give the old rows."""
    from modeling.training_data import data_key, load_config

    rows = rows_of(hub, "train")
    for folder, count in (("a", 5), ("b", 7), ("a", 9)):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        name = str(write_hub(tmp_path / folder / "hub", train=rows[:count]))
        assert len(load_config(name, "train", None, data_key(name, None, "here"), "here")) == count


def test_the_first_negatives_of_a_row_can_be_enough(hub):
    from modeling.training_data import data_key, load_config, training_rows

    rows = load_config(str(hub), "train", None, data_key(str(hub), None, ""), "")
    fewer = training_rows(rows, "soft_info_nce", ["query"], "", num_negatives=2)
    assert fewer.column_names == ["query", "positive", "negative_1", "negative_2", "label"]
    assert len(fewer) == len(rows) > 0
    for kept, whole in zip(fewer, rows, strict=True):
        assert kept == {**{name: whole[name] for name in fewer.column_names}, "label": whole["label"][:3]}
    assert training_rows(rows, "info_nce", [], "", num_negatives=0).column_names == ["query", "positive"]
    with pytest.raises(InputError, match="rows have 3 negatives; num_negatives is 4"):
        training_rows(rows, "soft_info_nce", [], "", num_negatives=4)


def test_values_keep_their_types(recipe):
    """A recipe's values arrive as their fields type them, null as the default, `no` as no, a flag's text as it is."""
    values = {"mini_batch_size": None, "prompted_columns": ["a", "b"], "alpha": "5e-1", "output_dir": "run"}
    values |= {"report_to": [], "save_strategy": False}
    stage = parse_recipe({**recipe, **values}, "here").stages[1]
    assert (stage.training.report_to, stage.training.save_strategy) == ([], "no")
    own = stage.own
    assert (own.mini_batch_size, own.prompted_columns, own.alpha) == (4, ("a", "b"), 0.5)
    flags = read_flags(["--prompted_columns", "[]", "--document_prompt", "passage: "], {"document_prompt"})
    stage = parse_recipe({**recipe, **values}, "here", overrides=flags).stages[0]
    assert (stage.own.prompted_columns, stage.own.document_prompt) == ((), "passage: ")
    assert stage.training.eval_strategy == "steps"
