"""LoRA adapters: injected, gone on with, merged into the weights; and the quantised weights that they train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import InputError

if TYPE_CHECKING:
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformer
    from transformers import BitsAndBytesConfig
    from trl import ModelConfig


def quantization(model: ModelConfig) -> BitsAndBytesConfig | None:
    """How to load the frozen weights of a QLoRA stage (arXiv 2305.14314); None when the recipe does not ask for it.

    Quantised weights are for training: merged into them, an adapter would be rounded to 4 bits too. Publish it merged
    into the weights as they were: `build_encoder` without `quantization_config`, `continue_adapter`, `save_merged`.
    Raises InputError for quantised weights that nothing would train, or without bitsandbytes.
    """
    from transformers import utils
    from trl import get_quantization_config

    if not (model.load_in_4bit or model.load_in_8bit):
        return None
    if not model.use_peft:
        raise InputError("load_in_4bit and load_in_8bit freeze the weights; add an adapter to train: use_peft: true")
    if not utils.is_bitsandbytes_available():
        raise InputError("load_in_4bit and load_in_8bit need bitsandbytes; pip install bitsandbytes, or drop them")
    return get_quantization_config(model)


def add_adapter(encoder: SentenceTransformer, peft_config: PeftConfig) -> None:
    """Freeze the weights and inject a new adapter to train, in float32."""
    encoder.add_adapter(peft_config)
    _train_in_float32(encoder)


def continue_adapter(encoder: SentenceTransformer, folder: Path) -> None:
    """Freeze the weights and go on training the adapter that `save_adapter` wrote into `folder`."""
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    add_adapter(encoder, config)
    # by peft: load_adapter of transformers (5.23) starts DoRA's magnitudes anew, and renames what is saved after it
    weights = load_peft_weights(str(folder), device="cpu")
    weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    set_peft_model_state_dict(encoder.transformers_model, weights)


def _train_in_float32(encoder: SentenceTransformer) -> None:
    # a step of 1e-4 is below what bfloat16 can add to a weight of 0.1
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_adapter(encoder: SentenceTransformer) -> None:
    """Add the adapter to the weights it was injected into, and take its layers out again.

    peft's `merge_and_unload` is a method of its own wrapper, which an injected adapter does not have. Raises
    ValueError for quantised weights, see `quantization`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    backbone = encoder.transformers_model
    if getattr(backbone, "is_quantized", False):
        raise ValueError("an adapter merged into quantised weights would be rounded with them; load them unquantised")
    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            backbone.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):  # lora_modules_to_save
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            backbone.set_submodule(name, merged)
    if getattr(backbone, "_hf_peft_config_loaded", False):
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False
    encoder.requires_grad_(True)
