"""Curricula by --stages alone: equal budgets, stages of their own settings, several data sets, averages of stages."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_training import distance, train, two_stages, weights

from modeling.merging import slerp
from modeling.recipe import parse_recipe

CURRICULA = Path(__file__).parents[1] / "recipes" / "curricula" / "demo.yaml"


@pytest.fixture(scope="module")
def recipe(tiny_decoder, hub) -> dict:
    """What ships, with a tiny model, tiny data and tiny batches in place of its own."""
    recipe = yaml.safe_load(CURRICULA.read_text())
    del recipe["student"]
    recipe |= {"model_name_or_path": str(tiny_decoder), "dataset_name": str(hub), "per_device_train_batch_size": 8}
    recipe |= {"max_seq_length": 64, "train_max_seq_length": 64, "min_text_tokens": 8, "disable_tqdm": True}
    recipe["stages"][1]["dataset_name"] = str(hub)
    return {**recipe, "total_steps": 7, "learning_rate": "1e-3", "logging_steps": 1}


def ledger_of(output: Path) -> dict:
    return json.loads((output / "ledger.json").read_text())


COMMANDS = [line for line in CURRICULA.read_text().splitlines() if line.startswith("#   $train")]


def test_every_curriculum_takes_the_budget(recipe):
    selected = {command.split("--stages ")[1].split()[0] for command in COMMANDS}
    assert selected == {"sts,retrieval", "retrieval,sts", "sts", "retrieval", "mixed", "sts,classes,retrieval"}
    for names in selected:
        stages = parse_recipe({**recipe, "output_dir": "run"}, "here", names).stages
        assert [stage.name for stage in stages] == names.split(",")
        steps = [stage.training.max_steps for stage in stages]
        assert sum(steps) == 7 and max(steps) - min(steps) <= 1


def test_stages_learn_one_after_the_other(recipe, tmp_path, tiny_decoder):
    names = ["sts", "classes", "retrieval"]
    output = train(tmp_path, recipe, "--stages", ",".join(names))
    assert [(row["stage"], row["steps"]) for row in ledger_of(output)["stages"]] == list(
        zip(names, [3, 2, 2], strict=True)
    )
    for before, name in itertools.pairwise([tiny_decoder, *(output / name for name in names)]):
        assert distance(before, name) > 1e-4
    assert distance(output / names[-1], output / "model") == 0
    # the schedule begins anew in each: up at first, and down to the same in the end
    history = json.loads((output / "logs" / "sts.json").read_text())
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates[-1] < max(rates)


def test_what_is_written_runs_the_same_again(recipe, tmp_path, capsys):
    import train_st

    output = train(tmp_path, recipe, "--stages", "retrieval,sts", "--total_steps", "3")
    assert [row["steps"] for row in ledger_of(output)["stages"]] == [2, 1]
    capsys.readouterr()
    train_st.main(["--config", str(output / "recipe.yaml")])
    assert capsys.readouterr().out.count("done before") == 2


def test_optimizer_and_schedule_are_a_stages_own(recipe, tmp_path):
    stages = [
        {**recipe["stages"][0], "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": "1e-2"},
        {**recipe["stages"][2], "optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 0},
    ]
    shared = {**recipe, "stages": stages, "total_steps": 8, "save_steps": 4, "learning_rate_mapping": {"norm": "1e-5"}}
    output = train(tmp_path, shared)
    logs = [json.loads((output / "logs" / f"{name}.json").read_text()) for name in ("sts", "retrieval")]
    rates = [[entry["learning_rate"] for entry in log if "learning_rate" in entry] for log in logs]
    assert rates[0] == [1e-2] * 4
    assert rates[1] == pytest.approx([1e-3, 8.5355e-4, 5e-4, 1.4645e-4], rel=1e-3)  # (1 + cos(pi k / 4)) / 2


def test_the_data_sets_of_a_stage_take_turns_by_weight(recipe, tmp_path, monkeypatch):
    """Each by its own loss, prompt and negatives; 12 steps at 3 to 1."""
    from modeling.trainer import EmbedderTrainer

    batches = []
    original = EmbedderTrainer.compute_loss

    def recorded(self, model, inputs, *args, **kwargs):
        columns = [key.removesuffix("_input_ids") for key in inputs if key.endswith("_input_ids")]
        losses = {name: type(loss).__name__ for name, loss in self.loss.items()}
        batches.append((inputs["dataset_name"], tuple(columns), losses[inputs["dataset_name"]]))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EmbedderTrainer, "compute_loss", recorded)
    mixed = recipe["stages"][3]
    mixed = {**mixed, "datasets": [{**mixed["datasets"][0], "weight": 3}, mixed["datasets"][1]]}
    train(tmp_path, {**recipe, "stages": [mixed], "total_steps": 12})
    pairs = ("pairs", ("sentence1", "sentence2"), "CachedCoSENTLoss")
    searches = ("searches", ("query", "positive", "negative_1"), "GradedLoss")
    assert sorted(batches) == [pairs] * 9 + [searches] * 3
    assert batches != sorted(batches)  # in turns


def test_a_mixed_stage_is_validated_on_what_can_be_searched(recipe, tmp_path):
    flags = ["--stages", "mixed", "--eval_strategy", "steps", "--eval_steps", "7"]
    output = train(tmp_path, recipe, *flags, "--eval_queries", "5", "--eval_documents", "20")
    history = json.loads((output / "logs" / "mixed.json").read_text())
    scores = [key for entry in history for key in entry if key.endswith("ndcg@10")]
    assert scores == ["eval_validation_searches_cosine_ndcg@10"]  # both read one data set, which is searched once


def test_demonstrations_and_a_shared_prefix_come_from_the_recipe(recipe, tmp_path):
    """More tokens are read than without shots; computing the prefix once comes to the same weights."""
    shots = {**recipe, "max_seq_length": 128, "train_max_seq_length": 128, "shots": 2, "zero_shot_probability": 0.25}
    outputs = {}
    for name, changes in {"none": {"shots": 0}, "shots": {}, "shared": {"share_prefix": True}}.items():
        (tmp_path / name).mkdir()
        outputs[name] = train(tmp_path / name, {**shots, **changes}, "--stages", "retrieval")
    tokens = {name: ledger_of(output)["total"]["tokens"] for name, output in outputs.items()}
    assert tokens["shots"] > 1.3 * tokens["none"]
    assert tokens["shared"] == tokens["shots"]
    assert distance(outputs["none"] / "model", outputs["shots"] / "model") > 1e-4
    assert distance(outputs["shared"] / "model", outputs["shots"] / "model") < 1e-4  # Adam amplifies 1e-6


def test_model_is_the_average_of_stages_and_comes_without_an_adapter(tiny_decoder, hub, tmp_path):
    recipe = {**two_stages(tiny_decoder, hub), "eval_strategy": "no", "max_steps": 2}
    output = train(tmp_path, recipe)
    assert (output / "adapter").is_dir()
    merge = {"stages": ["sts", "retrieval"], "method": "slerp", "weights": [1, 3]}
    train(tmp_path, {**recipe, "merge": merge})
    assert not (output / "adapter").exists()
    one, other, merged = (weights(output / name) for name in ("sts", "retrieval", "model"))
    moved = [name for name in merged if not one[name].equal(other[name])]
    assert len(moved) == 14
    for name in merged:
        assert torch.allclose(merged[name], slerp([one[name], other[name]], [1, 3]), atol=1e-7)
    before = (output / "model" / "model.safetensors").stat().st_mtime_ns
    train(tmp_path, {**recipe, "merge": merge})
    assert (output / "model" / "model.safetensors").stat().st_mtime_ns == before
    train(tmp_path, recipe)
    assert distance(output / "retrieval", output / "model") == 0
    assert load_file(output / "adapter" / "adapter_model.safetensors")


def test_the_ledger_tells_what_the_data_cost(tiny_decoder, hub, tmp_path):
    """From the manifests that dataset_builders.build leaves beside its hub/."""
    import shutil

    from common.steps import folder_step

    for name, table in {"corpus": {}, "scores": {}}.items():
        with folder_step(tmp_path / "data" / name, table) as step:
            step.finish()
    with folder_step(tmp_path / "data" / "hub", {}) as step:
        shutil.copytree(hub, step.path, dirs_exist_ok=True)
        step.finish()
    recipe = {**two_stages(tiny_decoder, tmp_path / "data" / "hub"), "eval_strategy": "no", "max_steps": 1}
    ledger = ledger_of(train(tmp_path, recipe))
    assert [(row["data"], row["step"]) for row in ledger["data"]] == [
        (str(tmp_path / "data"), name) for name in ("corpus", "scores", "hub")
    ]
    assert all(row["seconds"] >= 0 and row["peak_memory_bytes"] > 0 for row in ledger["data"])
    seconds = [row["seconds"] for row in [*ledger["data"], *ledger["stages"]]]
    assert ledger["total"]["seconds"] == pytest.approx(sum(seconds), abs=0.01)
