"""The whole of training on a tiny model: what is written, that it loads alone, that bad input is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_training import distance, own_cache, train, two_stages, weights, write_hub

import train_st
from common.cli import InputError, run
from modeling.keys import read_flags
from modeling.processes import ZERO3 as ZERO3_SETTINGS
from modeling.prompts import baked_prompts
from modeling.recipe import parse_recipe

REPOSITORY = Path(__file__).parents[1]
MISTRAL_RECIPE = REPOSITORY / "recipes" / "mistral-7b" / "train.yaml"


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    with own_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    return write_hub(tmp_path_factory.mktemp("data") / "hub")


@pytest.fixture(scope="module")
def recipe(tiny_decoder, hub) -> dict:
    return two_stages(tiny_decoder, hub)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe) -> Path:
    return train(tmp_path_factory.mktemp("finished"), recipe)


def test_a_run_writes_all_that_the_contract_names(finished, recipe, tiny_decoder):
    for stage in ("sts", "retrieval", "model"):
        files = {"modules.json", "model.safetensors", "manifest.json", "tokenizer.json", "reference_vectors.json"}
        assert files <= set(os.listdir(finished / stage))
    assert not list(finished.rglob("checkpoint*")) + list(finished.glob("*.partial"))
    written = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert written == {**recipe, "output_dir": str(finished)}

    # both stages trained, the first one all weights, and model/ is the last
    assert distance(tiny_decoder, finished / "sts") > 1e-3
    assert distance(finished / "sts", finished / "retrieval") > 1e-3
    assert distance(finished / "retrieval", finished / "model") == 0
    changed = {
        name for name, value in weights(finished / "sts").items() if not value.equal(weights(tiny_decoder)[name])
    }
    assert "embed_tokens.weight" in changed
    adapted = {n for n, value in weights(finished / "model").items() if not value.equal(weights(finished / "sts")[n])}
    assert len(adapted) == 2 * 7
    assert all("proj" in name for name in adapted)

    for stage in ("sts", "retrieval"):
        history = json.loads((finished / "logs" / f"{stage}.json").read_text())
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 6
        assert sum(losses[3:]) < sum(losses[:3])
        scores = [entry["eval_validation_cosine_ndcg@10"] for entry in history if "eval_runtime" in entry]
        assert len(scores) == 2
        assert all(0 <= score <= 1 for score in scores)
        seconds = [entry["seconds"] for entry in history]
        assert seconds == sorted(seconds)
    ledger = json.loads((finished / "ledger.json").read_text())
    assert [(row["stage"], row["steps"]) for row in ledger["stages"]] == [("sts", 12), ("retrieval", 12)]
    for row in ledger["stages"]:
        assert row["device"] == "cpu"
        assert row["device_seconds"] == row["training_seconds"] > 0
        assert row["seconds"] >= row["training_seconds"] > row["evaluation_seconds"] > 0
        assert row["peak_memory_bytes"] > 100e6
        assert row["share_prefix"] is None
        assert row["commit"] == ledger["commit"] == json.loads((finished / "sts/manifest.json").read_text())["commit"]
    assert ledger["total"]["tokens"] == sum(row["tokens"] for row in ledger["stages"])


def count_tokens(model: SentenceTransformer, hub: Path) -> int:
    """Of one epoch of the retrieval stage, by the tokenizer: prompts and special tokens included."""
    rows = pq.read_table(hub / "train.parquet")
    count = 0
    for name in ("query", "positive", "negative_1", "negative_2", "negative_3"):
        prompt = model.prompts["query"] if name == "query" else None
        count += int(model.preprocess(rows[name].to_pylist(), prompt=prompt)["attention_mask"].sum())
    return count


def test_tokens_are_those_of_the_texts(finished, hub):
    model = SentenceTransformer(str(finished / "model"), device="cpu")
    ledger = json.loads((finished / "ledger.json").read_text())
    assert ledger["stages"][1]["tokens"] == 2 * count_tokens(model, hub)


def test_a_model_may_read_more_than_it_was_trained_on(tmp_path, recipe, hub):
    flags = ["--stages", "retrieval", "--num_train_epochs", "1", "--train_max_seq_length", "15"]
    run = train(tmp_path, recipe, *flags, "--min_text_tokens", "2", "--eval_strategy", "no")
    model = SentenceTransformer(str(run / "model"), device="cpu")
    assert model.max_seq_length == 64
    tokenizer = json.loads((run / "model" / "tokenizer.json").read_text())
    assert tokenizer["truncation"] is tokenizer["padding"] is None  # not those of the last batch of 15 tokens
    whole = count_tokens(model, hub)
    model.max_seq_length = 15
    assert json.loads((run / "ledger.json").read_text())["total"]["tokens"] == count_tokens(model, hub) < whole


def test_a_finished_run_is_not_trained_again(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert len(before) == 5
    train_st.main(["--config", str(finished / "recipe.yaml")])
    assert capsys.readouterr().out.count("done before") == 2
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_stages_are_selected_and_ordered(tmp_path, recipe, capsys):
    """Reversed, and full training last: no adapter is published."""
    output = train(tmp_path, recipe, "--stages", "retrieval,sts", "--max_steps", "1", "--eval_strategy", "no")
    assert not (output / "adapter").exists()
    assert (output / "retrieval" / "adapter" / "adapter_model.safetensors").is_file()
    assert distance(output / "sts", output / "model") == 0
    ledger = json.loads((output / "ledger.json").read_text())
    assert [(row["stage"], row["steps"]) for row in ledger["stages"]] == [("retrieval", 1), ("sts", 1)]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")]
    assert [line.split(":")[0] for line in lines] == ["stage retrieval", "stage sts"]
    assert "1 steps" in lines[0]
    # the recipe that was written is the one that ran
    written = yaml.safe_load((output / "recipe.yaml").read_text())
    assert [stage["name"] for stage in written["stages"]] == ["retrieval", "sts"]
    assert (written["max_steps"], written["eval_strategy"]) == (1, False)


def test_equal_lora_stages_go_on_with_one_adapter(tmp_path, recipe, tiny_decoder):
    """Its base stays the first stage's; another rank starts a new one, on the stage before."""
    shared = {**recipe, **recipe["stages"][1], "eval_strategy": "no", "max_steps": 2}
    del shared["name"]
    stages = [{"name": "one"}, {"name": "two", "learning_rate": "1e-2"}, {"name": "three", "lora_r": 2}]
    output = train(tmp_path, {**shared, "stages": stages})
    adapters = {stage: load_file(output / stage / "adapter" / "adapter_model.safetensors") for stage in ("one", "two")}
    first = "base_model.model.layers.0.mlp.up_proj.lora_A.weight"
    moved = (adapters["one"][first] - adapters["two"][first]).abs().max()
    assert 0 < moved < 0.1  # gone on with, and not drawn anew
    bases = [
        json.loads((output / name / "adapter_config.json").read_text()) for name in ("one/adapter", "two/adapter")
    ]
    base = os.path.relpath(tiny_decoder, output / "two" / "adapter")
    assert [config["base_model_name_or_path"] for config in bases] == [base, base]
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("../two", 2)


# --- resumed ---------------------------------------------------------------------------------------------------------


def test_checkpoints_of_another_recipe_are_not_resumed(tmp_path, recipe, monkeypatch):
    """Nor is a half-written one: it has no trainer_state.json yet."""
    recipe = {**recipe, "stages": recipe["stages"][:1], "eval_strategy": "no", "save_steps": 4, "max_steps": 8}
    import modeling.trainer

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_st, "write_log", die)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe)
    checkpoints = tmp_path / "run" / "sts.partial" / "checkpoints"
    (checkpoints / "checkpoint-9").mkdir()
    assert Path(modeling.trainer.last_checkpoint(checkpoints)).name == "checkpoint-8"

    resumed_from = []
    original = modeling.trainer.EmbedderTrainer.train

    def recorded(self, resume_from_checkpoint=None):
        resumed_from.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return original(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(modeling.trainer.EmbedderTrainer, "train", recorded)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe, "--resume_from_checkpoint", "true")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe, "--resume_from_checkpoint", "true", "--learning_rate", "1e-4")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe, "--learning_rate", "1e-4")
    assert resumed_from == ["checkpoint-8", None, None]


# --- the Mistral-7B recipe ------------------------------------------------------------------------------------------


def test_mistral_recipe_runs_on_a_tiny_mistral(tmp_path, hub):
    """As it ships, from its Hub id and revision (a tiny model in an offline Hub cache): only data and steps differ."""
    from test_modeling_encoder import llama, write_model

    shipped = yaml.safe_load(MISTRAL_RECIPE.read_text())
    name, revision = shipped["model_name_or_path"], shipped["model_revision"]
    cache = tmp_path / "hf" / "hub" / f"models--{name.replace('/', '--')}"
    write_model(cache / "snapshots" / revision, llama())
    command = [sys.executable, "train_st.py", "--config", str(MISTRAL_RECIPE), "--output_dir", str(tmp_path / "run")]
    overrides = ["--dataset_name", str(hub), "--max_steps", "2", "--use_cpu", "true"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([*command, *overrides], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("stage ")]
    assert [line.split(",")[0] for line in lines] == ["stage sts: 2 steps", "stage retrieval: 2 steps"]

    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (name, revision)
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32)
    assert len({name.rsplit(".", 1)[-1] for name in adapter["target_modules"]}) == 7  # all linear layers
    model = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert model.max_seq_length == 512
    assert model.dtype == torch.bfloat16
    assert model.tokenizer("a")["input_ids"][0] == model.tokenizer.bos_token_id
    assert model.tokenizer("a")["input_ids"][-1] == model.tokenizer.eos_token_id
    assert model.prompts == baked_prompts(shipped["stages"][1]["instruction"])
    # every value has its reason or its source beside it, or on the line above
    lines = MISTRAL_RECIPE.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if ":" in line.split("#")[0] and not line.startswith("stages:")]
    keys = [i for i in keys if not lines[i].strip().startswith(("- name", "dataset_", "loss: soft_info_nce"))]
    assert len(keys) > 25
    assert [lines[i] for i in keys if "#" not in lines[i] and not lines[i - 1].strip().startswith("#")] == []


# --- bad input ------------------------------------------------------------------------------------------------------


def without(rows: list[dict], column: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


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
    "merge of one": ({"merge": {"stages": ["sts"]}}, [], "name two stages or more"),
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
    "budget below one step": ({"total_steps": 1}, [], "total_steps is 1; it must be at least 1 for each"),
    "shots without instruction": ({"shots": 2, "instruction": None}, [], "shots stand before an instruction"),
    "data set without name": ({"datasets": [{"weight": 2}]}, [], "a data set is a mapping with a name"),
    "quantised": ({"load_in_4bit": True}, [], "stage 'sts': load_in_4bit and load_in_8bit freeze"),
    "batch sampler": ({"batch_sampler": "no_duplicates"}, [], "batch_sampler has no effect"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, [], "label_smoothing_factor has no effect"),
    "batch size by trial": ({"auto_find_batch_size": True}, [], "auto_find_batch_size has no effect"),
    "checkpoints without optimizer": ({"save_only_model": True}, [], "save_only_model leaves nothing"),
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
    "a module's rate is a word": (
        {"learning_rate_mapping": {"norm": "fast"}},
        [],
        "string to float: 'fast'",
    ),
    "a module's rate is no number": (
        {"learning_rate_mapping": {"norm": "nan"}},
        [],
        "learning_rate_mapping' is nan",
    ),
    "revision of a folder": ({"model_revision": "v1"}, [], "is a folder, which has none"),
    "two revisions": ({"model_name_or_path": "org/name@v1", "model_revision": "v2"}, [], "names another"),
    "model in a stage": (
        {"stages": [{"name": "a", "model_name_or_path": "b"}]},
        [],
        "stage 'a': model_name_or_path: stages go on from one another",
    ),
    "two stages of a name": ({"stages": [{"name": "a"}, {"name": "a"}]}, [], "stage name 'a' is taken"),
    "unknown key in a stage": ({"stages": [{"name": "a", "los": 1}]}, [], "stage 'a': unknown key 'los'"),
    "model package missing": ({"model_name_or_path": "package:nowhere"}, [], "no installed package"),
    "unknown student key": (
        {"model_name_or_path": None, "student": {"hiden_size": 64}},
        [],
        "unknown key 'student.hiden_size'",
    ),
    "no dataset": ({"dataset_name": None}, [], "dataset_name"),
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


@pytest.mark.parametrize(
    "environment, changes, message",
    [
        ({**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "of DeepSpeed, ZeRO-3 as in"),
        ({**ZERO3, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, {}, "of DeepSpeed, ZeRO-3 as in"),
        ({**ZERO3, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "of DeepSpeed, ZeRO-3 as in"),
        (ZERO3, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps with ZeRO-3"),
        (ZERO3, {"mixed_precision": "fp16"}, "fp16 with ZeRO-3"),
        (ZERO3, {}, "among two GPUs or more alone"),
        ({}, {"deepspeed": "zero3.json"}, "deepspeed is the launcher's"),
        ({**FSDP, "FSDP_VERSION": "1"}, {}, "version 2 with SHARDED_STATE_DICT alone is supported"),
        (
            {**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
            {},
            "version 2 with SHARDED_STATE_DICT alone is supported",
        ),
        (FSDP, {}, "among two GPUs or more alone"),  # this process is one, on a CPU
        ({}, {"fsdp": "full_shard"}, "fsdp is the launcher's"),
    ],
)
def test_what_was_not_seen_to_train_and_save_is_not_trained(
    environment, changes, message, recipe, tmp_path, capsys, monkeypatch
):
    """As `accelerate launch` tells its processes of FSDP and DeepSpeed."""
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(yaml.safe_dump(recipe))
    recipe_read = train_st.read_recipe(["--config", "train.yaml", "--output_dir", "run"], "")
    for key, value in changes.items():
        setattr(recipe_read.stages[0].training, key, value)
    monkeypatch.setattr(train_st, "read_recipe", lambda *_, **__: recipe_read)  # without deepspeed, it ends there
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_refused(["--config", "train.yaml", "--output_dir", "run"], message, capsys)
    assert not Path("run").exists()


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
    "missing text": ("train", lambda rows: [*rows[:3], {**rows[3], "query": None}], "row 3: column 'query' is empty"),
    "NaN": ("train", lambda rows: [*rows[:5], {**rows[5], "label": [0.9, float("nan"), 0.2, 0.1]}], "row 5: labels"),
    "short label": ("train", lambda rows: [*rows[:2], {**rows[2], "label": [0.9]}], "row 2: label must hold 4"),
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
