"""Saved folders for older readers. docs/serving.md tells what transformers 4.57.6 made of them."""

import json
import os
import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer, Gemma3TextConfig, LlamaConfig

from modeling.portable import make_portable, with_flat_rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
CASES = {
    "llama": (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e5}), {"rope_theta": 1e5}),
    "llama3": (
        LlamaConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    "gemma3": (
        Gemma3TextConfig(rope_parameters=GEMMA3),
        {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}


@pytest.fixture
def saved(tiny_decoder, tmp_path):
    """A folder as transformers 5 writes it, with a chat template and further special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|query|>"]})
    shutil.copytree(tiny_decoder, tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_older_readers_find_rope_and_transformers_5_the_same_configuration(name, saved):
    config, expected = CASES[name]
    config.save_pretrained(saved)
    before = AutoConfig.from_pretrained(saved)
    make_portable(saved)
    written = read(saved / "config.json")
    assert {key: value for key, value in written.items() if key.startswith("rope_")} == {
        "rope_parameters": config.rope_parameters,
        **expected,
    }
    assert AutoConfig.from_pretrained(saved).__dict__ == before.__dict__


def test_partial_rotary_embeddings_are_flat_as_well():
    rope = {"rope_theta": 3e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    expected = {"rope_parameters": rope, "rope_theta": 3e4, "partial_rotary_factor": 0.5}
    assert with_flat_rope({"rope_parameters": rope}) == expected
    assert with_flat_rope({"model_type": "bert"}) == {"model_type": "bert"}


def test_the_tokenizer_has_a_class_that_transformers_4_knows_and_cuts_texts_as_before(saved):
    assert read(saved / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"  # else there is no need
    assert (saved / "chat_template.jinja").is_file()
    text = "how do i <|query|> parse"
    before = AutoTokenizer.from_pretrained(saved)
    make_portable(saved)
    written = read(saved / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|query|>"] and "extra_special_tokens" not in written
    after = AutoTokenizer.from_pretrained(saved)
    assert after(text) == before(text)
    assert after.all_special_tokens == before.all_special_tokens
    assert after.chat_template is None and not list(saved.glob("chat_template*"))


def test_files_are_as_readable_as_the_umask_says(saved):
    assert (saved / "model.safetensors").stat().st_mode & 0o777 == 0o600  # as safetensors writes it
    umask = os.umask(0o022)
    try:
        make_portable(saved)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o644}
