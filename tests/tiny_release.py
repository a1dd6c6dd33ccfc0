"""What the tests of publishing share: a model with its adapter, and graded data, small and as they are published."""

from pathlib import Path

import pytest
import torch
from test_data_builders import PUBLISH, STEPS, write_build

from common.steps import folder_step
from dataset_builders import builders
from dataset_builders.card import REPO_ID, card_metadata
from modeling.prompts import baked_prompts
from modeling.reference import write_reference

BASE, REVISION = "org/tiny", "0123456789abcdef0123456789abcdef01234567"
PAGE = f'# A set\n\n```python\nload_dataset("{REPO_ID}", "train")\n```\n'


def save_adapted(decoder: Path, run: Path) -> None:
    """adapter/, on a base of the Hub, and model/, which has it merged, in the folder of a run."""
    from peft import LoraConfig

    from modeling.encoder import build_encoder, save_adapter, save_merged

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    prompts = baked_prompts("Given a question, retrieve its answer", [("sort", "sort a list")])
    encoder = build_encoder(decoder, max_seq_length=64, prompts=prompts, peft_config=lora, min_text_tokens=8)
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with folder_step(run / "adapter", {}) as step:
        save_adapter(encoder, step.path, BASE, REVISION)
        step.finish()
    with folder_step(run / "model", {}) as step:
        save_merged(encoder, step.path)
        write_reference(encoder, step.path)
        step.finish()


def write_published(folder: Path) -> Path:
    """A published data set with shards of a kilobyte, as a build leaves it; its card is the YAML and a few lines."""
    write_build(folder)
    recipe = {"task_type": "classification", "source": {"path": "set"}}
    with pytest.MonkeyPatch.context() as patched, folder_step(folder / "hub", {}) as step:
        patched.setattr(
            builders,
            "render_card",
            lambda configs, facts: f"---\n{card_metadata(configs, recipe, 'CC BY 4.0', None).to_yaml()}\n---\n{PAGE}",
        )
        step.finish(counts=["rows"], **builders.write_hub(folder, STEPS, {}, step.path, "1KB", PUBLISH))
    return folder / "hub"
