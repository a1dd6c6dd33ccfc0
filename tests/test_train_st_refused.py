"""Ways to shard weights that are refused, and how values of a recipe are read."""

from types import SimpleNamespace

import pytest
from trl import ModelConfig

from common.cli import InputError
from modeling.processes import ZERO3 as ZERO3_SETTINGS
from modeling.processes import refuse_shards
from modeling.recipe import Stage, parse_recipe, read_flags

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


def test_values_keep_their_types(recipe):
    """A recipe's values arrive as their fields type them, null as the default, `no` as no, a flag's text as it is."""
    values = {"mini_batch_size": None, "prompted_columns": ["a", "b"], "alpha": "5e-1", "output_dir": "run"}
    values |= {"report_to": [], "save_strategy": False}
    stage = parse_recipe({**recipe, **values}).stages[1]
    assert (stage.training.report_to, stage.training.save_strategy) == ([], "no")
    own = stage.own
    assert (own.mini_batch_size, own.prompted_columns, own.alpha) == (4, ("a", "b"), 0.5)
    flags = read_flags(["--prompted_columns", "[]", "--document_prompt", "passage: "])
    stage = parse_recipe({**recipe, **values}, overrides=flags).stages[0]
    assert (stage.own.prompted_columns, stage.own.document_prompt) == ((), "passage: ")
    assert stage.training.eval_strategy == "steps"
