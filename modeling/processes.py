"""Several processes of one run: rank and world size, steps made jointly, supported ways to shard weights."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError
from common.steps import Step, folder_step

if TYPE_CHECKING:
    from accelerate import PartialState

    from modeling.recipe import Stage

# What `accelerate launch` has to say of shards: FSDP_KEY, ACCELERATE_DEEPSPEED_KEY
FSDP = {"VERSION": "2", "STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
ZERO3 = {"ZERO_STAGE": "3", "ZERO3_INIT": "false", "OFFLOAD_OPTIMIZER_DEVICE": "none", "OFFLOAD_PARAM_DEVICE": "none"}


def processes() -> PartialState:
    """Rank and world size: one process, or as many as `accelerate launch` or torchrun started."""
    from accelerate import PartialState

    return PartialState()


def launched_with(kind: str) -> bool:
    """Whether `accelerate launch` said so: FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{kind}") == "true"


def refuse_shards(stages: Sequence[Stage]) -> None:
    """Refuse, before hours of training, sharding strategies that were not seen to train and save correctly."""
    for key, name in (("fsdp", "fsdp"), ("deepspeed", "zero3")):
        if any(getattr(stage.training, key) for stage in stages):
            raise InputError(
                f"{key} is the launcher's: drop it from the recipe, and use recipes/accelerate/{name}.yaml"
            )
    fsdp, deepspeed = launched_with("FSDP"), launched_with("DEEPSPEED")
    if not (fsdp or deepspeed):
        return
    if fsdp and any(os.environ.get(f"FSDP_{key}") != value for key, value in FSDP.items()):
        raise InputError(
            "of FSDP, version 2 with SHARDED_STATE_DICT alone is supported; use recipes/accelerate/fsdp.yaml"
        )
    if deepspeed and any(os.environ.get(f"ACCELERATE_DEEPSPEED_{key}") != value for key, value in ZERO3.items()):
        raise InputError("of DeepSpeed, ZeRO-3 as in recipes/accelerate/zero3.yaml alone is supported; use that file")
    if any(stage.model.load_in_4bit or stage.model.load_in_8bit for stage in stages):
        raise InputError("load_in_4bit and load_in_8bit of shards are not supported; use recipes/accelerate/ddp.yaml")
    if deepspeed and any(stage.training.gradient_accumulation_steps > 1 for stage in stages):
        raise InputError(
            "gradient_accumulation_steps with ZeRO-3 is not supported; raise per_device_train_batch_size, and set "
            "mini_batch_size, which memory depends on"
        )
    if deepspeed and any(stage.training.mixed_precision == "fp16" for stage in stages):
        raise InputError("fp16 with ZeRO-3 is not supported; set bf16")
    if processes().distributed_type.value in ("NO", "MULTI_CPU"):
        raise InputError("accelerate shares weights out among two GPUs or more alone; use recipes/accelerate/ddp.yaml")


@contextlib.contextmanager
def joint_step(folder: Path, inputs: Mapping[str, Any]) -> Iterator[Step]:
    """`folder_step` of all processes: the main one makes the folder and finishes it, and they leave together."""
    if processes().is_main_process:
        with folder_step(folder, inputs) as step:
            processes().wait_for_everyone()
            yield step
    else:
        processes().wait_for_everyone()  # until the partial folder is there
        yield Step(folder, inputs)
    processes().wait_for_everyone()


def make_once(folder: Path, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> str:
    """Have the main process make `folder` by `make(path)`, unless it is made already; returns the step's key."""
    with joint_step(folder, inputs) as step:
        if not step.done and processes().is_main_process:
            make(step.path)
            step.finish()
    return step.key


def keep_freed_memory(size: int = 1 << 30) -> None:
    """Have glibc keep up to `size` bytes of what is freed for the tensors that come next.

    It hands tensors back to the kernel one by one, which clears every page before it hands it out again: on a CPU a
    fifth of a step. Other C libraries stay as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        libc.mallopt(M_TRIM_THRESHOLD, size)
