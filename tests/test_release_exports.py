"""ONNX, OpenVINO and GGUF files give the model's vectors in the real runtimes, or are not published."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import push_to_hub
from common.cli import InputError
from common.steps import folder_step
from modeling.encoder import build_encoder, save_merged
from modeling.reference import write_reference
from release import exports, gguf_file
from release.exports import FILES, export, lowest_cosine
from release.outside import describe_lines, settings_of
from release.usage import reader_lines

for package in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "gguf", "xllamacpp"):
    pytest.importorskip(package, reason="an optional package of the extra `export`")

TEXTS = ["how do i parse a date", "", "read " * 100, "sort a list 12345 times"]
NAME = "org/name"

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def settings(adapted_run):
    return settings_of(SentenceTransformer(str(adapted_run / "model"), device="cpu"))


def save(encoder, folder):
    with folder_step(folder, {}) as step:
        save_merged(encoder, step.path)
        write_reference(encoder, step.path)
        step.finish()
    return folder


# --- ONNX and OpenVINO ----------------------------------------------------------------------------------------------


def test_published_with_a_card_that_tells_what_read_them(adapted_run, tmp_path, capsys):
    flags = ["--onnx", "--openvino", "--dry_run", "--output_dir", str(tmp_path)]
    push_to_hub.main(["model", str(adapted_run / "model"), NAME, *flags])
    card = (tmp_path / "README.md").read_text()
    for kind in ("onnx", "openvino"):
        rows = re.findall(
            rf"\| `({kind}/.*?)` \| {exports.READERS[kind]} [\d.]+ \| (\w+) \| ([\d.]+) \| (\d+) \|", card
        )
        assert [row[:2] for row in rows] == list(FILES[kind].items())
        assert all(float(cosine) > 0.99 and int(texts) >= 14 for *_, cosine, texts in rows)
    assert "llama.cpp" not in card
    needed = re.findall(r'^(?:file = )?hf_hub_download\(repository, "(.*?)"\)', card, flags=re.MULTILINE)
    assert needed == ["onnx/model.onnx", "openvino/openvino_model.xml", "openvino/openvino_model.bin"]
    # nothing of this machine is in what is published: graphs hold lines of source files, if they are let
    files = [path for path in (adapted_run / "exports").rglob("*") if path.suffix in (".onnx", ".xml", ".bin")]
    assert len(files) == 7  # with the graph that both are made of
    for path in files:
        content = path.read_bytes()
        assert not [
            text for text in (b"/home/", b"site-packages", bytes(adapted_run), b"exports.py") if text in content
        ]
    made = [path.stat().st_mtime_ns for path in files]
    release = push_to_hub.prepare_model(push_to_hub._parse(["model", str(adapted_run / "model"), NAME, "--onnx"]))[0]
    assert {name for name in release.files if "onnx" in name} == set(FILES["onnx"])
    assert [path.stat().st_mtime_ns for path in files] == made and "making" in capsys.readouterr().err


def test_onnx_pooled_by_hand(adapted_run, settings):
    """onnxruntime, tokenizers and numpy alone: no transformers, no line of ours."""
    import onnxruntime

    made = export("onnx", adapted_run / "model", adapted_run / "exports", settings)
    session = onnxruntime.InferenceSession(made["files"]["onnx/model.onnx"])
    tokenizer = Tokenizer.from_file(str(adapted_run / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    encodings = [tokenizer.encode(text).ids for text in TEXTS]
    ids, mask = np.full((2, len(TEXTS), max(map(len, encodings))), 2)
    mask[:] = 0
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)], mask[row, : len(encoding)] = encoding, 1
    states, vectors = session.run(
        ["last_hidden_state", "sentence_embedding"], {"input_ids": ids, "attention_mask": mask}
    )
    last = states[np.arange(len(TEXTS)), mask.sum(axis=1) - 1]
    pooled = last / np.linalg.norm(last, axis=1, keepdims=True)
    expected = SentenceTransformer(str(adapted_run / "model"), device="cpu").encode(TEXTS)
    assert np.abs(expected[0] - expected[3]).max() > 0.01
    assert pooled == pytest.approx(expected, abs=1e-5) and vectors == pytest.approx(expected, abs=1e-5)


def test_weights_of_more_than_a_file_lie_beside_it(adapted_run, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "ONE_FILE", 10_000)
    made = export("onnx", adapted_run / "model", tmp_path, settings)
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_quantized.onnx"} < set(made["files"])
    assert [row["file"] for row in made["compared"]] == list(FILES["onnx"])


def test_another_model_is_not_published(adapted_run, settings, monkeypatch):
    """A graph of which one weight is wrong; nothing is left of it."""
    import onnx

    def write_wrong(graph, target):
        exports.write_onnx(graph, target)
        model = onnx.load(target / "onnx" / "model.onnx")
        matrix = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        matrix.raw_data = (np.frombuffer(matrix.raw_data, np.float32) * np.float32(1.01)).tobytes()
        onnx.save(model, target / "onnx" / "model.onnx")

    export("onnx", adapted_run / "model", adapted_run / "exports", settings)
    monkeypatch.setitem(exports._WRITERS, "onnx", write_wrong)
    shutil.rmtree(adapted_run / "exports" / "onnx")
    with pytest.raises(InputError, match=r"onnx/model.onnx: its vectors have a cosine of [01]\.\d+ to the model's"):
        export("onnx", adapted_run / "model", adapted_run / "exports", settings)
    assert [path.name for path in (adapted_run / "exports").iterdir() if "onnx" in path.name] == []


def test_eight_bits_that_lose_too_much_are_left_out_and_told(adapted_run, settings, tmp_path, monkeypatch, capsys):
    export("openvino", adapted_run / "model", adapted_run / "exports", settings)
    shutil.copytree(adapted_run / "exports" / "openvino", tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(exports.LOWEST, "int8", 1.0)
    told = exports._compare("openvino", adapted_run / "model", tmp_path, settings)
    [row] = told["left_out"]
    assert row["file"] == "openvino/openvino_model_qint8_quantized.xml" and 0.9 < row["cosine"] < 1
    left = {path.name for path in (tmp_path / "openvino").iterdir()}
    assert left == {"openvino_model.xml", "openvino_model.bin"}
    assert f"{row['file']}: its vectors have a cosine of" in capsys.readouterr().err


# --- GGUF -----------------------------------------------------------------------------------------------------------

CORPUS = [
    "How do I parse a date? I've 12 dates, 1 of 2024; we'll sort them all.",
    "a  b  c  d  e  f  1  2   and   so   on",
    "Return a copy of the list, sorted;  the original is left as it was.\n\nnaïve café, 東京\tand tabs",
]
QWEN_SPLIT, LLAMA_SPLIT = gguf_file._SPLITS


def byte_level(*first):
    backend = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not first or "Digits" in repr(first[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece():
    """Llama 2's and Mistral's kind: spaces are letters, what is unknown is spelt in bytes."""
    octets = [f"<0x{number:02X}>" for number in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator([text.replace("naïve", "naive") for text in CORPUS], trainer)
    rules = json.loads(backend.to_str())
    for octet in octets:
        rules["model"]["vocab"].setdefault(octet, len(rules["model"]["vocab"]))
    return Tokenizer.from_str(json.dumps(rules))


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"])
    )
    return backend


SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
KEYS = {"num_key_value_heads": 2, "head_dim": 16}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def split(rule):
    return pre_tokenizers.Split(Regex(rule), behavior="isolated")


FAMILIES = {
    "smollm": (LlamaConfig, KEYS, byte_level(pre_tokenizers.Digits(individual_digits=True)), "</s>", "eos"),
    "llama 3": (LlamaConfig, KEYS | {"rope_parameters": LLAMA_3}, byte_level(split(LLAMA_SPLIT)), "both", "eos"),
    "mistral": (MistralConfig, KEYS | {"sliding_window": None}, sentencepiece(), "both", "mean"),
    "qwen 2": (Qwen2Config, KEYS, byte_level(split(QWEN_SPLIT)), "</s>", "eos"),
    "qwen 3": (Qwen3Config, KEYS | {"rope_parameters": LINEAR}, byte_level(split(QWEN_SPLIT)), "</s>", "eos"),
    "gpt-2's rule": (MistralConfig, KEYS, byte_level(), "both", "eos"),
    "demo's student": (MistralConfig, KEYS | {"sliding_window": None}, word_piece(), "both", "eos"),
    "bert": (BertConfig, {"layer_norm_eps": 1e-12}, word_piece(), "both", "cls"),
}


def tiny_model(family, folder):
    config, keys, backend, ends, pooling = FAMILIES[family]
    backend = Tokenizer.from_str(backend.to_str())
    single = "<s> $A </s>" if ends == "both" else "$A </s>"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    torch.manual_seed(0)
    model = AutoModel.from_config(config(vocab_size=backend.get_vocab_size(), **SHAPE, **keys))
    for parameter in model.parameters():
        if parameter.ndim == 2:  # so large that positions and order matter
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "start")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "start")
    prompts = {"query": "Instruct: sort\nQuery: "}
    return build_encoder(folder / "start", max_seq_length=100, prompts=prompts, pooling=pooling, min_text_tokens=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_gives_the_same_vectors(family, tmp_path):
    encoder = tiny_model(family, tmp_path)
    folder = save(encoder, tmp_path / "model")
    gguf_file.write_gguf(folder, tmp_path / "model.gguf", "F32", settings_of(encoder))
    texts = [*CORPUS, "a", "", "  12345 is  it's", "Instruct: sort\nQuery: parse 東京", "</s> in a text"]
    lines = reader_lines("gguf", settings_of(encoder))
    asked = [("", text) for text in texts]
    found = describe_lines(str(folder), str(tmp_path / "model.gguf"), lines, asked)["vectors"]
    expected = encoder.encode(texts)
    assert lowest_cosine(expected[:1], expected[1:2]) < 0.9  # they tell texts apart
    assert lowest_cosine(expected, found) > 1 - 1e-5


def test_gguf_in_two_precisions(tmp_path):
    encoder = tiny_model("smollm", tmp_path)
    made = export("gguf", save(encoder, tmp_path / "model"), tmp_path / "exports", settings_of(encoder))
    assert [row["file"] for row in made["compared"]] == list(made["files"]) == ["model-F16.gguf", "model-Q8_0.gguf"]
    assert made["texts"] == 12 and made["left_out"] == []  # 7 with and without the prompt, less those that are cut


# --- what cannot be made --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gguf", {}, "GGUF cannot say its tokenizer: WordLevel after Whitespace; publish it without --gguf"),
        ("gguf", {"pooling": "weighted_mean"}, "llama.cpp cannot pool as it does"),
        ("onnx", {"pooling": "mean_without_prompt"}, "no graph knows where a prompt ends; publish it without --onnx"),
    ],
)
def test_a_model_without_the_wanted_backend(tiny_decoder, tmp_path, kind, options, message):
    encoder = build_encoder(tiny_decoder, max_seq_length=64, **options)
    folder = save(encoder, tmp_path / "model")
    with pytest.raises(InputError, match=message):
        export(kind, folder, tmp_path / "exports", settings_of(encoder))
    assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize(
    ("similarity", "message"), [("dot", "unit length, and its own are compared by dot"), ("cosine", "its tokenizer")]
)
def test_lengths_that_count_are_not_lost_to_llama_cpp(tiny_decoder, tmp_path, similarity, message):
    """Its server makes every vector a unit vector: other rankings by dot product, the same by cosine."""
    modules = [*build_encoder(tiny_decoder, max_seq_length=64)][:2]
    encoder = SentenceTransformer(modules=modules, similarity_fn_name=similarity)
    lengths = np.linalg.norm(encoder.encode(TEXTS), axis=1)
    assert np.abs(lengths - 1).max() > 0.1, "the case this test is about"
    encoder.save(str(tmp_path / "model"))
    with pytest.raises(InputError, match=message):
        gguf_file.write_gguf(tmp_path / "model", tmp_path / "x.gguf", "F32", settings_of(encoder))


def test_a_missing_package_is_named_with_its_extra(adapted_run, settings, monkeypatch):
    monkeypatch.setitem(exports._NEEDS, "onnx", ("onnx", "no-such-package"))
    with pytest.raises(InputError, match=r"--onnx needs no-such-package; pip install '\.\[export\]'"):
        export("onnx", adapted_run / "model", adapted_run / "exports", settings)
