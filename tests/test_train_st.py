"""The whole of training on a tiny model: what is written, what it cost, what is trained again, curricula."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_training import distance, train, weights

import train_st
from common.cli import InputError
from common.steps import folder_step, read_manifest
from eval.evidence import read_evidence
from eval.systems import run_systems
from modeling.ledger import write_ledger
from modeling.merging import slerp
from modeling.prompts import baked_prompts
from modeling.recipe import parse_recipe, read_stages
from modeling.trainer import EmbedderTrainer, last_checkpoint

REPOSITORY = Path(__file__).parents[1]
CURRICULA = REPOSITORY / "recipes" / "curricula" / "demo.yaml"
MISTRAL_RECIPE = REPOSITORY / "recipes" / "mistral-7b" / "train.yaml"


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
        assert row["commit"] == json.loads((finished / row["stage"] / "manifest.json").read_text())["commit"]
    assert ledger["commit"] == row["commit"]  # of the last: somebody may commit while a stage trains
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
    flags += ["--min_text_tokens", "2", "--eval_strategy", "no", "--matryoshka_dims", "32", "16"]
    run = train(tmp_path, recipe, *flags)
    assert read_stages(run)["stages"][0]["keys"]["matryoshka_dims"] == [32, 16]
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
    """Reversed, and full training last: no adapter is published. The recipe that is written is the one that ran."""
    output = train(tmp_path, recipe, "--stages", "retrieval,sts", "--total_steps", "3", "--eval_strategy", "no")
    assert not (output / "adapter").exists()
    assert (output / "retrieval" / "adapter" / "adapter_model.safetensors").is_file()
    assert distance(output / "sts", output / "model") == 0
    ledger = json.loads((output / "ledger.json").read_text())
    assert [(row["stage"], row["steps"]) for row in ledger["stages"]] == [("retrieval", 2), ("sts", 1)]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")]
    assert [line.split(",")[0] for line in lines] == ["stage retrieval: 2 steps", "stage sts: 1 steps"]
    written = yaml.safe_load((output / "recipe.yaml").read_text())
    assert [stage["name"] for stage in written["stages"]] == ["retrieval", "sts"]
    assert (written["total_steps"], written["eval_strategy"]) == (3, False)
    train_st.main(["--config", str(output / "recipe.yaml")])
    assert capsys.readouterr().out.count("done before") == 2


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


def test_optimizer_and_schedule_are_a_stages_own(recipe, tmp_path):
    settings = [
        {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": "1e-2"},
        {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 0},
    ]
    stages = [stage | keys for stage, keys in zip(recipe["stages"], settings, strict=True)]
    changes = {"logging_steps": 1, "learning_rate": "1e-3", "learning_rate_mapping": {"norm": "1e-5"}}
    output = train(tmp_path, {**recipe, **changes, "stages": stages}, "--eval_strategy", "no", "--max_steps", "4")
    logs = [json.loads((output / "logs" / f"{name}.json").read_text()) for name in ("sts", "retrieval")]
    rates = [[entry["learning_rate"] for entry in log if "learning_rate" in entry] for log in logs]
    assert rates[0] == [1e-2] * 4
    assert rates[1] == pytest.approx([1e-3, 8.5355e-4, 5e-4, 1.4645e-4], rel=1e-3)  # (1 + cos(pi k / 4)) / 2


def test_model_is_the_average_of_stages_and_comes_without_an_adapter(finished, recipe, tmp_path):
    output = shutil.copytree(finished, tmp_path / "run")
    merged = {**recipe, "merge": {"stages": ["sts", "retrieval"], "method": "slerp", "weights": [1, 3]}}
    train(tmp_path, merged)
    assert not (output / "adapter").exists()
    one, other, average = (weights(output / name) for name in ("sts", "retrieval", "model"))
    assert len([name for name in average if not one[name].equal(other[name])]) == 14
    for name in average:
        assert torch.allclose(average[name], slerp([one[name], other[name]], [1, 3]), atol=1e-7)
    before = (output / "model" / "model.safetensors").stat().st_mtime_ns
    train(tmp_path, merged)
    assert (output / "model" / "model.safetensors").stat().st_mtime_ns == before
    train(tmp_path, recipe)
    assert distance(output / "retrieval", output / "model") == 0
    assert load_file(output / "adapter" / "adapter_model.safetensors")


def test_model_is_the_average_with_the_model_of_another_run(finished, recipe, tmp_path):
    """Another seed's, say: what lies in that folder decides model/, not its name."""
    output, other = (shutil.copytree(finished, tmp_path / name) for name in ("run", "other"))
    merged = {**recipe, "merge": {"stages": [str(other / "sts"), "retrieval"]}}
    train(tmp_path, merged)
    mean = weights(output / "model")
    one, last = weights(other / "sts"), weights(output / "retrieval")
    assert all(torch.allclose(mean[name], (one[name] + last[name]) / 2, atol=1e-7) for name in mean)
    shutil.copyfile(other / "retrieval" / "model.safetensors", other / "sts" / "model.safetensors")
    train(tmp_path, merged)
    assert all(torch.allclose(value, last[name], atol=1e-7) for name, value in weights(output / "model").items())


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["nowhere", "retrieval"], "'nowhere' is no stage that is run and no folder of a model; .*sts"),
        (["run/model", "retrieval"], "'run/model' is written by this run"),
        (["run/../run/sts/", "sts"], "is written by this run"),
        (["other/sts", "other/sts/", "retrieval"], "'other/sts/' is there twice"),
    ],
)
def test_a_model_is_averaged_with_others_and_once(finished, recipe, tmp_path, monkeypatch, names, problem):
    output, _ = (shutil.copytree(finished, tmp_path / name) for name in ("run", "other"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"merge: .*{problem}"):
        train(tmp_path, {**recipe, "merge": {"stages": names}})
    assert distance(output / "retrieval", output / "model") == 0


@pytest.mark.parametrize("name", ["model", "sts"])
def test_a_run_starts_from_nothing_that_it_writes(finished, recipe, name):
    """It would go on from its own result whenever it is run again, and the adapter's base would be gone."""
    start = {"model_name_or_path": str(finished / name), "output_dir": str(finished)}
    with pytest.raises(InputError, match=f"model_name_or_path .*{name}' is written by this run; choose another"):
        parse_recipe({**recipe, **start})


def test_a_model_of_another_recipe_than_the_folder_tells_is_not_told_of(recipe, finished, tmp_path, monkeypatch):
    """Other keys, and the run killed in its first stage: model/ is of the recipe before, recipe.yaml is not."""
    run = shutil.copytree(finished, tmp_path / "run")
    assert read_stages(run)["model"] == read_manifest(run / "model")["inputs"]
    monkeypatch.setattr(train_st, "run_stage", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        train(tmp_path, recipe, "--sts.learning_rate", "7e-4")
    for read in (read_stages, read_evidence, lambda folder: run_systems(folder, folder, folder)):
        with pytest.raises(InputError, match="whose run has not ended; finish it"):
            read(run)
    train(tmp_path, recipe)  # the recipe before, whose stages are there
    assert len(read_stages(run)["stages"]) == 2


def test_the_ledger_tells_what_the_data_cost(recipe, tmp_path):
    """From the manifests that dataset_builders.build leaves beside its hub/."""
    for name in ("corpus", "scores", "hub"):
        with folder_step(tmp_path / "data" / name, {}) as step:
            step.finish()
    stages = parse_recipe({**recipe, "dataset_name": str(tmp_path / "data/hub"), "output_dir": "run"}).stages
    write_ledger(stages, tmp_path)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    places = [(str(tmp_path / "data"), name) for name in ("corpus", "scores", "hub")]
    assert [(row["data"], row["step"]) for row in ledger["data"]] == places and ledger["stages"] == []
    assert all(row["seconds"] >= 0 and row["peak_memory_bytes"] > 0 for row in ledger["data"])
    assert ledger["total"]["seconds"] == pytest.approx(sum(row["seconds"] for row in ledger["data"]), abs=0.01)


# --- curricula and stages of several data sets ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def curricula(tiny_decoder, hub) -> dict:
    """What ships, with a tiny model, tiny data and tiny batches in place of its own."""
    recipe = yaml.safe_load(CURRICULA.read_text())
    del recipe["student"]
    recipe |= {"model_name_or_path": str(tiny_decoder), "dataset_name": str(hub), "per_device_train_batch_size": 8}
    recipe |= {"max_seq_length": 64, "train_max_seq_length": 64, "min_text_tokens": 8, "disable_tqdm": True}
    return {**recipe, "total_steps": 7, "learning_rate": "1e-3", "logging_steps": 2}


def test_every_curriculum_takes_the_budget(curricula):
    commands = [line for line in CURRICULA.read_text().splitlines() if line.startswith("#   $train")]
    selected = {command.split("--stages ")[1].split()[0] for command in commands}
    assert selected == {"sts,retrieval", "retrieval,sts", "sts", "retrieval", "mixed", "sts,classes,retrieval"}
    for names in selected:
        stages = parse_recipe({**curricula, "output_dir": "run"}, names).stages
        assert [stage.name for stage in stages] == names.split(",")
        steps = [stage.training.max_steps for stage in stages]
        assert sum(steps) == 7 and max(steps) - min(steps) <= 1


def test_the_data_sets_of_a_stage_take_turns_by_weight(curricula, tmp_path, monkeypatch, capsys):
    """12 steps at 3 to 1, each by its own loss, prompt and negatives, and logged by its name; both read one folder,
    which is searched once.
    """
    batches = []
    original = EmbedderTrainer.compute_loss

    def recorded(self, model, inputs, *args, **kwargs):
        columns = [key.removesuffix("_input_ids") for key in inputs if key.endswith("_input_ids")]
        losses = {name: type(loss).__name__ for name, loss in self.loss.items()}
        batches.append((inputs["dataset_name"], tuple(columns), losses[inputs["dataset_name"]]))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EmbedderTrainer, "compute_loss", recorded)
    mixed = curricula["stages"][3]
    mixed = {**mixed, "datasets": [{**mixed["datasets"][0], "weight": 3}, mixed["datasets"][1]]}
    changes = {"total_steps": 12, "eval_strategy": "steps", "eval_steps": 12, "eval_queries": 5, "eval_documents": 20}
    output = train(tmp_path, {**curricula, **changes, "stages": [mixed]})
    pairs = ("pairs", ("sentence1", "sentence2"), "CachedCoSENTLoss")
    searches = ("searches", ("query", "positive", "negative_1"), "GradedLoss")
    assert sorted(batches) == [pairs] * 9 + [searches] * 3
    assert batches != sorted(batches)  # in turns

    history = json.loads((output / "logs" / "mixed.json").read_text())
    scores = [key for entry in history for key in entry if key.endswith("ndcg@10")]
    assert scores == ["eval_validation_searches_cosine_ndcg@10"]
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 6 and {"loss_pairs", "loss_searches"} <= {key for entry in logged for key in entry}
    for entry in logged:
        parts = [value for key, value in entry.items() if key.startswith("loss_")]
        assert sum(parts) / len(parts) == pytest.approx(entry["loss"], rel=1e-3)
    told = capsys.readouterr().out
    assert "(pairs " in told
    for name, steps in (("pairs", 9), ("searches", 3)):  # 48 rows each
        [line] = re.findall(rf"^training mixed, {name}: .*", told, flags=re.MULTILINE)
        rows = int(re.search(r"12 steps of (\d+) rows", line)[1])
        assert f", {steps * rows / 48:.2g} passes over its rows" in line


NO_STEP = {
    "too few rows": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 100},
        "data set 'b': 48 rows make no step of 1 x 100 rows",
    ),
    "too small a weight": ({}, "stage 'retrieval': data set 'b': its weight gives it none of 12 steps"),
}


@pytest.mark.parametrize("case", NO_STEP)
def test_data_that_make_no_step_are_refused_before_the_first_stage(case, recipe, tmp_path):
    keys, message = NO_STEP[case]
    first, second = recipe["stages"]
    second = {**second, **keys, "datasets": [{"name": "b", "weight": 1e-3}, {"name": "a"}]}
    with pytest.raises(InputError, match=message):
        train(tmp_path, {**recipe, "stages": [first, second]})
    assert not (tmp_path / "run").exists()


# --- resumed ---------------------------------------------------------------------------------------------------------


def test_checkpoints_of_another_recipe_are_not_resumed(tmp_path, recipe, monkeypatch):
    """Nor is a half-written one: it has no trainer_state.json yet."""
    recipe = {**recipe, "stages": recipe["stages"][:1], "eval_strategy": "no", "save_steps": 2, "max_steps": 4}

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_st, "write_log", die)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe)
    checkpoints = tmp_path / "run" / "sts.partial" / "checkpoints"
    (checkpoints / "checkpoint-9").mkdir()
    assert Path(last_checkpoint(checkpoints)).name == "checkpoint-4"

    resumed_from = []
    original = EmbedderTrainer.train

    def recorded(self, resume_from_checkpoint=None):
        resumed_from.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return original(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(EmbedderTrainer, "train", recorded)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe, "--resume_from_checkpoint", "true")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe, "--resume_from_checkpoint", "true", "--learning_rate", "1e-4")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe, "--learning_rate", "1e-4")
    assert resumed_from == ["checkpoint-4", None, None]


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
