"""What is wrong with a saved model is found before it is published, by a process that knows no code of ours."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from common.cli import InputError
from modeling import verify
from modeling.prompts import baked_prompts
from modeling.verify import (
    REFERENCE,
    TOLERANCE,
    describe_model,
    published_files,
    verify_adapter,
    verify_model,
    write_reference,
)

PROMPTS = baked_prompts("Given a question, retrieve its answer", [("sort", "sort a list")])


@pytest.fixture(scope="module")
def whole(tiny_encoder, tmp_path_factory):
    """A model as train_st.py saves it."""
    folder = shutil.copytree(tiny_encoder, tmp_path_factory.mktemp("model") / "model")
    model = SentenceTransformer(str(folder), device="cpu")
    model.prompts = PROMPTS
    model.save_pretrained(str(folder), create_model_card=False)
    write_reference(model, folder)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def encoder(whole, tmp_path):
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "encoder")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_clean_process_sees_what_this_one_sees(whole):
    facts = verify_model(whole)
    assert facts == json.loads(json.dumps(describe_model(str(whole))))
    assert facts["dimensions"] == 32
    assert facts["prompts"] == PROMPTS
    assert facts["reference_dtype"] == "float32" and 0 <= facts["reference_distance"] < 1e-5


def test_the_clean_process_cannot_import_this_repository(whole, monkeypatch):
    """A model that needs our code would load here and nowhere else."""
    source = "def describe_model(path):\n    import modeling.prompts\n    return {}\n"
    monkeypatch.setattr("inspect.getsource", lambda function: source)
    with pytest.raises(InputError, match="plain sentence-transformers cannot use it: ModuleNotFoundError"):
        verify_model(whole)


def test_the_clean_process_has_no_token(whole, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    source = "def describe_model(path):\n    import os\n    return dict(os.environ)\n"
    monkeypatch.setattr("inspect.getsource", lambda function: source)
    monkeypatch.setattr(verify, "_check_facts", lambda folder, facts: None)
    environment = verify_model(whole)
    assert environment["HF_HUB_OFFLINE"] == "1" and "hf_secret" not in environment.values()


def test_reference_vectors_are_those_of_the_model(whole):
    reference = json.loads((whole / REFERENCE).read_text())
    names = [entry["prompt_name"] for entry in reference["vectors"]]
    assert names == [None] * 3 + ["query"] * 3 + ["query-1-shot"] * 3
    model = SentenceTransformer(str(whole), device="cpu")
    for entry in reference["vectors"]:
        features = model.preprocess([PROMPTS.get(entry["prompt_name"], "") + entry["text"]])
        with torch.no_grad():
            expected = model(features)["sentence_embedding"][0].numpy()
        np.testing.assert_allclose(entry["vector"], expected, atol=2e-6)


def test_only_files_that_readers_read_are_published(encoder):
    (encoder / "README.md").write_text("written by hand")
    (encoder / "notes.md").write_text("")
    (encoder / "adapter").mkdir()
    (encoder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    names = list(published_files(encoder))
    assert names == sorted(names)
    assert {"config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", REFERENCE} <= set(names)
    assert not {"manifest.json", "README.md", "notes.md", "adapter/adapter_model.safetensors"} & set(names)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_custom.py", "1_Pooling/state.pt"])
def test_pickles_and_code_are_refused(encoder, name):
    (encoder / name).write_bytes(b"")
    with pytest.raises(InputError, match="run this as code"):
        published_files(encoder)


def write(text):
    return lambda path: path.write_text(text)


def change_weights(path):
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    weights["norm.weight"] = weights["norm.weight"].flip(0) * torch.linspace(0.1, 3, 32)
    save_file(weights, path, metadata={"format": "pt"})


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_post_processor(path):
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer))


def drop_normalize(path):
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))


def replace(old, new):
    return lambda path: edit(path, old, new)


SETTINGS = "config_sentence_transformers.json"
BROKEN = {
    "a module of ours": (
        "modules.json",
        replace("sentence_transformers.base.modules.transformer", "modeling.encoder"),
        "not one of sentence-transformers",
    ),
    "modules.json is no JSON": ("modules.json", write("{"), "modules.json: not JSON"),
    "modules.json is no list": ("modules.json", write('{"a": 1}'), "not a list of modules"),
    "a module elsewhere": ("modules.json", replace("1_Pooling", "../1_Pooling"), "leaves the folder"),
    "a local path": ("config.json", replace('"model_type"', '"_name_or_path": "/tmp", "model_type"'), "path of this"),
    "a lost prompt": (
        SETTINGS,
        replace('"ArguAna-query"', '"ArguAna-question"'),
        "1 prompts are missing, the first of them 'ArguAna-query'",
    ),
    "a prompt that leaves no room": (
        SETTINGS,
        replace("Given a question, retrieve its answer", "date " * 80),
        "leaves no room",
    ),
    "no EOS": ("tokenizer.json", drop_post_processor, "do not end in EOS"),
    "vectors of any length": ("modules.json", drop_normalize, "not of unit length"),
    "no reference": (REFERENCE, lambda path: path.unlink(), f"{REFERENCE} is missing"),
    "a shot altered": (SETTINGS, replace("Response: sort a list", "Response: read a file"), "are not that model"),
    "other weights": ("model.safetensors", change_weights, r"more than 0.001 \(float32\)"),
    "weights of another dtype": (REFERENCE, replace('"float32"', '"int8"'), "its weights were int8"),
}


@pytest.fixture
def in_this_process(monkeypatch):
    """Which is quicker; that a clean one sees the same is tested above."""
    monkeypatch.setattr(verify, "in_clean_process", lambda describe, *paths, library: describe(*map(str, paths)))


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.usefixtures("in_this_process")
def test_what_is_broken_is_refused(case, encoder):
    name, spoil, message = BROKEN[case]
    spoil(encoder / name)
    with pytest.raises(InputError, match=message):
        verify_model(encoder)


def test_what_does_not_load_is_refused(encoder):
    cut(encoder / "model.safetensors")
    with pytest.raises(InputError, match=r"plain sentence-transformers cannot use it: .*afetensor"):
        verify_model(encoder)


@pytest.mark.usefixtures("in_this_process")
def test_half_precision_is_within_its_tolerance(whole, tmp_path):
    """bfloat16 in another batch, as the vectors are compared one by one."""
    folder = shutil.copytree(whole, tmp_path / "half")
    model = SentenceTransformer(str(folder), device="cpu").bfloat16()
    model.save_pretrained(str(folder), create_model_card=False)
    write_reference(model, folder)
    facts = verify_model(folder)
    assert facts["dtype"] == facts["reference_dtype"] == "bfloat16"
    assert facts["reference_distance"] < TOLERANCE["bfloat16"]


# --- adapter --------------------------------------------------------------------------------------------------------

BASE, REVISION = "org/tiny", "0123456789abcdef0123456789abcdef01234567"


def save_adapted(decoder, run):
    """adapter/, on a base of the Hub, and model/, which has it merged, in the folder of a run."""
    from peft import LoraConfig

    from modeling.encoder import build_encoder, save_adapter, save_merged

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    prompts = baked_prompts("Given a question, retrieve its answer")
    encoder = build_encoder(decoder, max_seq_length=64, prompts=prompts, peft_config=lora, min_text_tokens=8)
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(encoder, run / "adapter", BASE, REVISION)
    save_merged(encoder, run / "model")
    write_reference(encoder, run / "model")


@pytest.fixture(scope="module")
def adapted(tiny_decoder, tmp_path_factory):
    """With a cache that has the base."""
    run = tmp_path_factory.mktemp("adapted")
    save_adapted(tiny_decoder, run)
    shutil.copytree(tiny_decoder, run / "cache" / "models--org--tiny" / "snapshots" / REVISION)
    return run


@pytest.fixture
def cached(adapted, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(adapted / "cache"))


def test_an_adapter_on_its_base_is_compared_with_the_merged_model(adapted, cached):
    facts = verify_adapter(adapted / "adapter", adapted / "model")
    assert (facts["base"], facts["revision"], facts["dtype"]) == (BASE, REVISION, "float32")
    assert 0 <= facts["distance"] < 1e-5


def test_an_adapter_of_another_run_is_refused(adapted, cached, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapted / "adapter", tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {name: -tensor if "lora_A" in name else tensor for name, tensor in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"on org/tiny@0123.* its vectors are .* more than 0.001 \(float32\)"):
        verify_adapter(folder, adapted / "model")


@pytest.mark.usefixtures("in_this_process")
def test_a_base_that_is_not_here_is_not_fetched(adapted):
    facts = verify_adapter(adapted / "adapter", adapted / "model")
    assert facts["distance"] is None


def set_config(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


CONFIG = "adapter_config.json"
BROKEN_ADAPTERS = {
    "a local base": (CONFIG, set_config(base_model_name_or_path="/models/mistral"), "its base is '/models/mistral'"),
    "a relative base": (CONFIG, set_config(base_model_name_or_path="../sts"), "its base is '../sts'"),
    "a base beside it": (CONFIG, set_config(base_model_name_or_path="1_Pooling"), "its base is '1_Pooling'"),
    "no base": (CONFIG, set_config(base_model_name_or_path=None), "its base is None"),
    "no revision": (CONFIG, set_config(revision=None), "names no revision of its base org/tiny"),
    "no adapter": (CONFIG, lambda path: path.unlink(), "adapter_config.json is missing"),
    "another tokenizer": ("tokenizer.json", write("{}"), "tokenizer.json differs"),
    "pickled weights": ("adapter_model.bin", write(""), "run this as code"),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_an_adapter_that_others_could_not_use_is_refused(case, adapted, tmp_path):
    name, spoil, message = BROKEN_ADAPTERS[case]
    folder = shutil.copytree(adapted / "adapter", tmp_path / "adapter")
    spoil(folder / name)
    with pytest.raises(InputError, match=message):
        verify_adapter(folder, adapted / "model")
