"""EOS last in every family of tokenizers and after every detour; room for the text; adapters merged, no trace left."""

import json
import string
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
    RobertaConfig,
)
from trl import ModelConfig

from common.cli import InputError
from modeling.adapters import continue_adapter, quantization
from modeling.encoder import POOLING, build_encoder, save_adapter, save_merged
from modeling.prompts import few_shot_prompt, instruction_prompt

TEXTS = ["how do I parse a date", "Instruct: Given a question, retrieve its answer\nQuery: ", "naïve café, 東京", "a"]
PROMPTS = {
    "query": instruction_prompt("Given a question, retrieve its answer"),
    "few": few_shot_prompt("Given a question", [("parse a date", "use strptime")]),
    "document": "",
}


def metaspace_bpe(kind, special: list[str], **kwargs):
    """Spaces are a letter of their own and bytes the last resort, as in the vocabularies of Llama 2 and Gemma."""
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters]
    return kind(vocab={token: row for row, token in enumerate(tokens)}, merges=[], **kwargs)


def llama(**kwargs) -> LlamaTokenizer:
    """With the BOS that the post-processors of published checkpoints put first."""
    return metaspace_bpe(LlamaTokenizer, ["<unk>", "<s>", "</s>"], **{"add_bos_token": True, **kwargs})


def gemma() -> GemmaTokenizer:
    tokenizer = metaspace_bpe(GemmaTokenizer, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    bos = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    return tokenizer


def byte_bpe(kind):
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return kind(vocab={token: row for row, token in enumerate(tokens)}, merges=[])


def llama_3() -> PreTrainedTokenizerFast:
    """As published: byte-level BPE, no class of its own, no padding token, a post-processor that adds BOS alone."""
    backend = byte_bpe(GPT2Tokenizer).backend_tokenizer
    bos, eos = special = ["<|begin_of_text|>", "<|end_of_text|>"]
    backend.add_special_tokens(special)
    bos_alone = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos_alone])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def word_piece(**special) -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    tokens += [f"##{letter}" for letter in string.ascii_lowercase] + [":"]
    return BertTokenizer(vocab={token: row for row, token in enumerate(tokens)}, **special)


# family -> (how to make its tokenizer, the tokens before and after a text, its configuration)
FAMILIES = {
    "mistral": (llama, ["<s>"], "</s>", MistralConfig),
    "llama 2": (llama, ["<s>"], "</s>", LlamaConfig),
    "llama 2, without BOS": (lambda: llama(add_bos_token=False), [], "</s>", LlamaConfig),
    "llama 2, asked for EOS": (lambda: llama(add_eos_token=True), ["<s>"], "</s>", LlamaConfig),
    "llama 3": (llama_3, ["<|begin_of_text|>"], "<|end_of_text|>", LlamaConfig),
    "qwen 2": (lambda: byte_bpe(Qwen2Tokenizer), [], "<|endoftext|>", Qwen2Config),
    "qwen 3": (lambda: byte_bpe(Qwen2Tokenizer), [], "<|endoftext|>", Qwen3Config),
    "gemma 2": (gemma, ["<bos>"], "<eos>", Gemma2Config),
    "gemma 3": (gemma, ["<bos>"], "<eos>", Gemma3TextConfig),
    "phi 3": (llama, ["<s>"], "</s>", Phi3Config),
    "olmo 2": (lambda: byte_bpe(GPT2Tokenizer), [], "<|endoftext|>", Olmo2Config),
    "bert's tokens, CLS and SEP as BOS and EOS": (
        lambda: word_piece(bos_token="[CLS]", eos_token="[SEP]"),
        ["[CLS]"],
        "[SEP]",
        MistralConfig,
    ),
    "bert's tokens, EOS alone": (lambda: word_piece(eos_token="[SEP]"), ["[CLS]"], "[SEP]", MistralConfig),
    "bert's tokens and two more": (
        lambda: word_piece(bos_token="<s>", eos_token="</s>"),
        ["[CLS]"],
        "</s>",
        MistralConfig,
    ),
}


def write_model(folder: Path, tokenizer, kind=MistralConfig, **config) -> Path:
    """Two random layers of the family `kind` with `tokenizer`, as a plain transformers checkpoint."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {"vocab_size": len(tokenizer), **sizes, **heads, **tokens, **config}
    AutoModel.from_config(kind(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "mistral", llama())


@pytest.mark.parametrize("family", FAMILIES)
def test_eos_is_last_in_every_family(family, tmp_path):
    make, before, eos, kind = FAMILIES[family]
    encoder = build_encoder(write_model(tmp_path / "model", make(), kind), max_seq_length=128, prompts=PROMPTS)
    assert encoder.transformers_model.config.model_type == kind.model_type
    save_merged(encoder, tmp_path / "saved")
    long = "parse a date " * 200
    texts = ["", "a", "how do I parse a date", long]
    assert len(encoder.tokenizer(long, truncation=False)["input_ids"]) > 128
    eos_id, before_ids = (encoder.tokenizer.convert_tokens_to_ids(tokens) for tokens in (eos, before))
    assert eos_id == encoder.tokenizer.eos_token_id
    reloaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    left = SentenceTransformer(str(tmp_path / "saved"), device="cpu", processor_kwargs={"padding_side": "left"})
    expected = None
    for model, side in ((encoder, "right"), (reloaded, "right"), (left, "left")):
        assert type(model.tokenizer) is type(encoder.tokenizer) and model.tokenizer.padding_side == side
        found = []
        for name in (None, *PROMPTS):
            features = model.preprocess(texts, prompt=model.prompts[name] if name else None)
            mask = features["attention_mask"].bool()
            assert mask[:, 0 if side == "right" else -1].all() and not mask.all()
            rows = [row[kept].tolist() for row, kept in zip(features["input_ids"], mask, strict=True)]
            assert max(map(len, rows)) == 128
            assert all(row[-1] == eos_id and row[: len(before)] == before_ids for row in rows)
            assert all(row[len(before) : -1].count(eos_id) == 0 for row in rows)
            found += rows
        expected = expected or found
        assert found == expected
    # and with nothing but transformers, as a server would load it
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert plain(texts, truncation=True)["input_ids"] == expected[:4]

    # the state of that EOS is the vector, whatever stands beside it
    together = encoder.encode(texts, prompt_name="query")
    assert abs(together[1] - together[2]).max() > 1e-3
    for model in (reloaded, left):
        assert abs(model.encode(texts, prompt_name="query") - together).max() < 1e-5
    alone = [encoder.encode(text, prompt_name="query") for text in texts]
    assert max(abs(one - row).max() for one, row in zip(alone, together, strict=True)) < 1e-5


def states(encoder, features, row: int) -> torch.Tensor:
    """(tokens, hidden) last hidden states of a row's tokens, by transformers, without padding."""
    model = AutoModel.from_pretrained(encoder.transformers_model.name_or_path).eval()
    with torch.no_grad():
        hidden = model(input_ids=features["input_ids"], attention_mask=features["attention_mask"]).last_hidden_state
    return hidden[row][features["attention_mask"][row].bool()]


# what each pooling makes of the (tokens, hidden) states of a text whose prompt has `prompt` tokens, BOS included
BY_HAND = {
    "eos": lambda states, prompt: states[-1],
    "mean": lambda states, prompt: states.mean(0),
    "cls": lambda states, prompt: states[0],
    "mean_without_prompt": lambda states, prompt: states[prompt:].mean(0),
    "weighted_mean": lambda states, prompt: (
        sum((position + 1) * state for position, state in enumerate(states)) / sum(range(1, len(states) + 1))
    ),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLING)
def test_pooling_is_what_its_name_says(mistral, tmp_path, pooling, side):
    assert BY_HAND.keys() == POOLING.keys()
    build_encoder(mistral, max_seq_length=128, prompts=PROMPTS, pooling=pooling).save(str(tmp_path / "saved"))
    encoder = SentenceTransformer(str(tmp_path / "saved"), device="cpu", processor_kwargs={"padding_side": side})
    texts = ["a", "how do I parse a date", ""]
    for name in ("query", "document"):
        prompt = PROMPTS[name]
        taken = len(encoder.tokenizer(prompt)["input_ids"]) - 1 if prompt else 0  # without EOS
        features = encoder.preprocess(texts, prompt=prompt)
        vectors = encoder.encode(texts, prompt=prompt, convert_to_tensor=True)
        for row, vector in enumerate(vectors):
            pooled = BY_HAND[pooling](states(encoder, features, row), taken)
            torch.testing.assert_close(vector, pooled / pooled.norm(), atol=1e-6, rtol=0)


def test_eos_vector_trains_in_a_checkpoint_that_pads_with_eos(tmp_path):
    """nn.Embedding gives no gradient to padding_idx, which such checkpoints set to EOS."""
    tokenizer = llama()
    encoder = build_encoder(write_model(tmp_path / "model", tokenizer, pad_token_id=tokenizer.eos_token_id))
    encoder(encoder.preprocess(["a"]))["sentence_embedding"][0, 0].backward()
    embedding = encoder.transformers_model.get_input_embeddings()
    assert embedding.weight.grad[tokenizer.eos_token_id].abs().max() > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_seq_length": 24}, "leaves 0 of 24 tokens"),
        ({"max_seq_length": 64, "min_text_tokens": 60}, "at least 60 are needed"),
        ({"max_seq_length": 513}, "goes to 512; lower it"),
        ({"pooling": "max"}, "choose one of eos, mean"),
    ],
)
def test_encoders_that_would_be_silently_wrong(mistral, kwargs, message):
    with pytest.raises(InputError, match=message):
        build_encoder(mistral, prompts=PROMPTS, **kwargs)


def test_an_encoder_that_counts_positions_from_behind_its_padding_reads_so_many_fewer(tmp_path):
    folder = write_model(tmp_path / "model", word_piece(), RobertaConfig, max_position_embeddings=64)
    encoder = build_encoder(folder, max_seq_length=63, pooling="mean")
    save_merged(encoder, tmp_path / "saved")
    settings = tmp_path / "saved" / "sentence_bert_config.json"
    settings.write_text(settings.read_text().replace("63", "64"))
    for read in (encoder, build_encoder(tmp_path / "saved")):
        assert read.max_seq_length == 63 and read.encode("a " * 99).any()
    for model in (folder, tmp_path / "saved"):
        with pytest.raises(InputError, match="goes to 63; lower it"):
            build_encoder(model, max_seq_length=64, pooling="mean")


def test_a_prompt_may_take_all_but_the_stated_room(mistral):
    length = len(build_encoder(mistral).tokenizer(PROMPTS["query"])["input_ids"]) + 16
    build_encoder(mistral, prompts={"query": PROMPTS["query"]}, max_seq_length=length)
    with pytest.raises(InputError, match="leaves 15 of"):
        build_encoder(mistral, prompts={"query": PROMPTS["query"]}, max_seq_length=length - 1)


def test_weights_of_other_shapes_than_the_configuration_says_are_told_in_a_line(tmp_path):
    folder = write_model(tmp_path / "model", llama())
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 5}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded"):
        build_encoder(folder)


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        build_encoder(tmp_path)
    with pytest.raises(InputError, match="no EOS token"):
        build_encoder(write_model(tmp_path / "bert", word_piece()))


# --- adapters -------------------------------------------------------------------------------------------------------


def lora(**kwargs) -> LoraConfig:
    # random B too, so that the adapter changes something before it is trained
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"}
    return LoraConfig(init_lora_weights=False, **settings, **kwargs)


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [("mistral", {"use_dora": True}), ("qwen 3", {"modules_to_save": ["norm"]}), ("gemma 3", {}), ("phi 3", {})],
)
def test_merging_keeps_vectors_and_leaves_no_trace(family, kwargs, tmp_path):
    """Also of an adapter that a second stage goes on with: all names of the weights stay the base's."""
    make, _, _, kind = FAMILIES[family]
    base = write_model(tmp_path / "base", make(), kind)
    encoder = build_encoder(base, max_seq_length=128, prompts=PROMPTS, peft_config=lora(**kwargs))
    adapted = encoder.encode(TEXTS, prompt_name="query")
    save_adapter(encoder, tmp_path / "adapter", "org/base")
    save_merged(encoder, tmp_path / "merged")
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    continued = build_encoder(base, max_seq_length=128, prompts=PROMPTS)
    assert abs(continued.encode(TEXTS, prompt_name="query") - adapted).max() > 1e-3
    continue_adapter(continued, tmp_path / "adapter")
    save_adapter(continued, tmp_path / "continued", "org/base")
    save_merged(continued, tmp_path / "merged again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "continued"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for folder in (tmp_path / "merged", tmp_path / "merged again"):
        merged = SentenceTransformer(str(folder), device="cpu")
        assert abs(merged.encode(TEXTS, prompt_name="query") - adapted).max() < 1e-5
        assert load_file(folder / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
        assert not [path for path in folder.rglob("*") if "adapter" in path.name or path.suffix in (".bin", ".py")]
        texts = [path.read_text() for path in folder.rglob("*.json")]
        assert len(texts) >= 6 and not [text for text in texts if str(tmp_path) in text or "lora" in text]


def test_adapter_weights_train_in_float32_over_bfloat16(mistral):
    encoder = build_encoder(mistral, dtype="bfloat16", peft_config=lora())
    types = {parameter.requires_grad: parameter.dtype for parameter in encoder.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}


# --- quantised weights ----------------------------------------------------------------------------------------------


def qlora(**kwargs) -> ModelConfig:
    return ModelConfig(**{"load_in_4bit": True, "use_bnb_nested_quant": True, "use_peft": True, **kwargs})


def test_quantisation_that_cannot_work_is_refused(monkeypatch):
    assert quantization(ModelConfig()) is None
    with pytest.raises(InputError, match="use_peft: true"):
        quantization(qlora(use_peft=False))
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        quantization(qlora())


def test_an_adapter_trained_on_quantised_weights_is_merged_into_the_whole_ones(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    mistral = write_model(tmp_path / "wide", llama(), hidden_size=64, head_dim=16)
    loading = {"max_seq_length": 128, "prompts": PROMPTS, "dtype": "bfloat16"}
    quantized = build_encoder(
        mistral, **loading, quantization_config=quantization(qlora(dtype="bfloat16")), peft_config=lora()
    )
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in quantized.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.uint8), (False, torch.bfloat16)}
    quantized(quantized.preprocess(TEXTS))["sentence_embedding"][:, 0].sum().backward()
    trained = [parameter for parameter in quantized.parameters() if parameter.requires_grad]
    assert len(trained) == 28 and all(parameter.grad.abs().max() > 0 for parameter in trained)
    save_adapter(quantized, tmp_path / "adapter", "org/base")
    with pytest.raises(ValueError, match="load them unquantised"):
        save_merged(quantized, tmp_path / "merged")
    whole = build_encoder(mistral, **loading)
    continue_adapter(whole, tmp_path / "adapter")
    save_merged(whole, tmp_path / "merged")
    merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    cosines = (merged.encode(TEXTS, convert_to_tensor=True) * quantized.encode(TEXTS, convert_to_tensor=True)).sum(1)
    assert cosines.float().min() > 0.97


@pytest.mark.parametrize("width", [32, 64])  # kernels of some processors take multiples of 64
def test_an_evaluation_leaves_the_gradients_of_quantised_weights(width, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = write_model(tmp_path / "wide", llama(), hidden_size=width, head_dim=16)
    encoder = build_encoder(wide, quantization_config=quantization(qlora(dtype="float32")), peft_config=lora())

    def gradients():
        encoder.train().zero_grad()
        encoder(encoder.preprocess(TEXTS))["sentence_embedding"][:, 0].sum().backward()
        return torch.cat([weight.grad.flatten() for weight in encoder.parameters() if weight.requires_grad])

    encoder.encode(TEXTS)
    found = gradients()
    for name, module in [*encoder.named_modules()]:
        if isinstance(module, bnb.nn.Linear4bit):
            whole = torch.nn.Linear(module.in_features, module.out_features, bias=False).requires_grad_(False)
            whole.weight.data = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            encoder.set_submodule(name, whole)
    assert torch.allclose(found, gradients(), atol=1e-5)
