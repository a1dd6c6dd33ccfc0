"""Every training recipe that ships is read as training reads it, every accelerate configuration as accelerate does."""

from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config
from trl import get_quantization_config

from modeling.recipe import Recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
TRAIN = sorted(RECIPES.glob("*/train.yaml"))
ACCELERATE = sorted(RECIPES.glob("accelerate/*.yaml"))


def read(path: Path) -> Recipe:
    # 4 bits need a library that the tests do without; what they mean is tested below
    return read_recipe(["--config", str(path), "--load_in_4bit", "false", "--use_cpu", "true"], "")


def test_all_recipes_are_here():
    assert {path.parent.name for path in TRAIN} == {"demo", "mistral-7b", "llama-3", "qwen3", "gemma-3", "qlora"}
    assert {path.stem for path in ACCELERATE} == {"ddp", "fsdp", "zero3"}


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.parent.name)
def test_recipes_are_read(path):
    recipe = read(path)
    assert [(stage.name, stage.own.loss) for stage in recipe.stages] == [
        ("sts", "cosent"),
        ("retrieval", "soft_info_nce"),
    ]
    assert recipe.output_dir.parts[0] == "runs"
    assert f"--config recipes/{path.parent.name}/train.yaml" in path.read_text()  # the command at its top is its own


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
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("kind", [MistralConfig, LlamaConfig, Qwen3Config, Gemma3TextConfig])
def test_layers_to_wrap_exist(kind):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    model = AutoModel.from_config(kind(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))
    assert type(model.layers[0]).__name__ in (RECIPES / "accelerate" / "fsdp.yaml").read_text()
