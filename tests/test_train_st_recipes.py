"""Every training recipe that ships is read as training reads it, every accelerate configuration as accelerate does."""

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config
from trl import get_quantization_config

from dataset_builders.sources import registry
from modeling.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
PAGE = ROOT / "docs" / "rented-gpus.md"
TRAIN = sorted(RECIPES.glob("*/train.yaml"))
ACCELERATE = sorted(RECIPES.glob("accelerate/*.yaml"))


ONE_STAGE = ("continue", "encoder")  # finished embedders need no sentence pairs first


def read(path: Path) -> Recipe:
    # 4 bits need a library that the tests do without; what they mean is tested below
    return read_recipe(["--config", str(path), "--load_in_4bit", "false", "--use_cpu", "true"], "")


def test_bfloat16_on_a_machine_without_accelerator_needs_no_further_key():
    recipe = read_recipe(["--config", str(RECIPES / "smollm2" / "train.yaml"), "--bf16", "true"], "")
    assert all(stage.training.bf16 for stage in recipe.stages)
    assert all(stage.training.use_cpu != torch.accelerator.is_available() for stage in recipe.stages)


def test_all_recipes_are_here():
    names = {path.parent.name for path in TRAIN}
    assert names == {
        "demo",
        "mistral-7b",
        "llama-3",
        "qwen3",
        "gemma-3",
        "qlora",
        "smollm2",
        "lg-anna",
        "evidence",
        *ONE_STAGE,
    }
    assert {path.stem for path in ACCELERATE} == {"ddp", "fsdp", "zero3"}


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.parent.name)
def test_recipes_are_read(path):
    recipe = read(path)
    stages = {"sts": "cosent", "retrieval": "soft_info_nce"}
    if path.parent.name in ONE_STAGE:
        del stages["sts"]
    if path.parent.name in ("smollm2", "evidence"):
        stages["mixed"] = "soft_info_nce"
    if path.parent.name == "evidence":
        stages["classes"] = "soft_info_nce"
    assert {stage.name: stage.own.loss for stage in recipe.stages} == stages
    assert recipe.output_dir.parts[0] == "runs"
    assert f"--config recipes/{path.parent.name}/train.yaml" in path.read_text()  # the command at its top is its own


def test_the_whole_systems_recipe_trains_on_every_set_that_its_data_recipe_builds():
    """Each under its own instruction, and rows that share classes without in-batch negatives."""
    built = yaml.safe_load((RECIPES / "lg-anna" / "data.yaml").read_text())["sources"]
    sts, retrieval = read(RECIPES / "lg-anna" / "train.yaml").stages
    assert len(built) == 33 and {*sts.datasets, *retrieval.datasets} == set(built)
    for name, own in {**sts.datasets, **retrieval.datasets}.items():
        entry = registry()[name]
        assert (own.instruction, own.dataset_name) == (entry.instruction, f"runs/lg-anna/data/{name}/hub")
        assert own.dataset_config == ("sts" if entry.task_type == "sts" else "train")
        assert name in sts.datasets or own.in_batch_negatives == entry.in_batch_negatives


@pytest.mark.parametrize("name", ["llama-3", "qwen3", "gemma-3", "qlora"])
def test_backbones_differ_from_mistral_where_they_say_so(name):
    mistral, recipe = (yaml.safe_load((RECIPES / each / "train.yaml").read_text()) for each in ("mistral-7b", name))
    differ = {key for key in mistral.keys() | recipe.keys() if mistral.get(key) != recipe.get(key)} - {"stages"}
    allowed = {"output_dir", "model_name_or_path", "model_revision"}
    if name == "qlora":
        allowed = {"output_dir", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"}
    assert "output_dir" in differ and differ <= allowed
    for stage, expected in zip(recipe["stages"], mistral["stages"], strict=True):
        sizes = ("per_device_train_batch_size", "mini_batch_size")
        assert {**stage, **dict.fromkeys(sizes, 0)} == {**expected, **dict.fromkeys(sizes, 0)}
    stages = read(RECIPES / name / "train.yaml").stages
    assert stages[0].lora_settings == stages[1].lora_settings  # so both stages train one adapter
    assert stages[0].peft_config.task_type == "FEATURE_EXTRACTION"


def test_qlora_is_nf4_with_double_quantisation_and_computes_in_bfloat16():
    recipe = yaml.safe_load((RECIPES / "qlora" / "train.yaml").read_text())
    model = read(RECIPES / "qlora" / "train.yaml").stages[0].model
    model.load_in_4bit = recipe["load_in_4bit"]
    config = get_quantization_config(model).to_dict()
    assert config["load_in_4bit"] and config["bnb_4bit_use_double_quant"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")


def launched(path: Path) -> tuple[Namespace, dict[str, str]]:
    """The arguments and the environment that `accelerate launch --config_file PATH` gives the training processes."""
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "train_st.py"])
    arguments, _, _ = _validate_launch_command(parsed)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # of a DeepSpeed file, which there is not
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))  # refuses unknown keys at the top
    kind = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero3": "DEEPSPEED"}[path.stem]
    assert config.distributed_type == DistributedType[kind]
    assert (config.mixed_precision, config.num_processes, config.use_cpu) == ("bf16", 8, False)
    # it takes unknown keys of a section without a word: each has to be a flag of `accelerate launch`
    flags = vars(launch_command_parser().parse_args(["train_st.py"]))
    sections = {**config.fsdp_config, **config.deepspeed_config}
    assert bool(sections) == (path.stem != "ddp") and sections.keys() <= flags.keys()
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()


def test_fsdp_reaches_the_training_processes():
    arguments, environment = launched(RECIPES / "accelerate" / "fsdp.yaml")
    assert arguments.use_fsdp and arguments.num_processes == 8
    assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", "2")
    assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"


@pytest.mark.parametrize("kind", [MistralConfig, LlamaConfig, Qwen3Config, Gemma3TextConfig])
def test_layers_to_wrap_exist(kind):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    model = AutoModel.from_config(kind(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))
    assert type(model.layers[0]).__name__ in (RECIPES / "accelerate" / "fsdp.yaml").read_text()


# --- docs/rented-gpus.md --------------------------------------------------------------------------------------------


def test_the_page_adds_up():
    rows = re.findall(r"\| ([\d. +]+) \| (\d+) GB \|", PAGE.read_text())
    assert len(rows) == 7
    for parts, together in rows:
        assert round(sum(map(float, parts.split(" + ")))) == int(together)


def test_the_page_names_files_and_flags_that_exist():
    text = PAGE.read_text()
    files = set(re.findall(r"(?:--config|--config_file) (recipes/(?!X/)\S+\.yaml)", text))
    files |= {f"recipes/{name}" for name in re.findall(r"`(accelerate/\w+\.yaml)`", text)}
    files |= {f"recipes/{name}/train.yaml" for name in re.findall(r"GB \| `([\w-]+)`", text)}
    assert len(files) == 9 and all((ROOT / name).is_file() for name in files)
    hf = Path(sys.executable).with_name("hf")
    for command in ("jobs run", "buckets create", "buckets sync"):
        used = {flag for line in re.findall(rf"hf {command} (.*)", text) for flag in re.findall(r"--[a-z]+", line)}
        shown = subprocess.run([hf, *command.split(), "--help"], capture_output=True, text=True, check=True).stdout
        assert used and all(re.search(rf"{flag}\b", shown) for flag in used)
    [task] = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert {"resources", "workdir", "file_mounts", "setup", "run"} <= yaml.safe_load(task).keys()
