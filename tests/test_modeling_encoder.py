"""EOS last in every family of tokenizers and after every detour; room for the text; adapters merged, no trace left."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from dataset_builders.cli import InputError
from modeling.encoder import build_encoder, continue_adapter, save_adapter, save_merged
from modeling.prompts import few_shot_prompt, instruction_prompt

TEXTS = ["how do I parse a date", "Instruct: Given a question, retrieve its answer\nQuery: ", "naïve café, 東京", "a"]
PROMPTS = {
    "query": instruction_prompt("Given a question, retrieve its answer"),
    "few": few_shot_prompt("Given a question", [("parse a date", "use strptime")]),
    "document": "",
}


def trained(model, trainer, pre_tokenizer) -> dict:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return json.loads(tokenizer.to_str())["model"]


def llama() -> LlamaTokenizer:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = trained(
        models.BPE(unk_token="<unk>", byte_fallback=True),
        trainers.BpeTrainer(special_tokens=special, vocab_size=400, show_progress=False),
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    )
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def byte_bpe(kind):
    model = trained(
        models.BPE(),
        trainers.BpeTrainer(
            special_tokens=["<|endoftext|>"],
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    return kind(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def word_piece(**special) -> BertTokenizer:
    model = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], vocab_size=200, show_progress=False
        ),
        pre_tokenizers.BertPreTokenizer(),
    )
    return BertTokenizer(vocab=model["vocab"], **special)


def byte_bpe_with_bos() -> PreTrainedTokenizerFast:
    """As Llama 3 ships it: byte-level BPE whose post-processor adds BOS alone."""
    backend = byte_bpe(GPT2Tokenizer).backend_tokenizer
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")


# family -> (how to make its tokenizer, the tokens before and after a text)
FAMILIES = {
    "llama and mistral": (llama, ["<s>"], "</s>"),
    "llama asked for EOS alone": (
        lambda: LlamaTokenizer(vocab=llama().get_vocab(), add_eos_token=True),
        ["<s>"],
        "</s>",
    ),
    "llama 3": (byte_bpe_with_bos, ["<|begin|>"], "<|end|>"),
    "qwen2": (lambda: byte_bpe(Qwen2Tokenizer), [], "<|endoftext|>"),
    "gpt2": (lambda: byte_bpe(GPT2Tokenizer), [], "<|endoftext|>"),
    "bert, CLS and SEP as BOS and EOS": (lambda: word_piece(bos_token="[CLS]", eos_token="[SEP]"), ["[CLS]"], "[SEP]"),
    "bert, EOS alone": (lambda: word_piece(eos_token="[SEP]"), ["[CLS]"], "[SEP]"),
    "bert, tokens of its own": (lambda: word_piece(bos_token="<s>", eos_token="</s>"), ["<s>"], "</s>"),
}


def write_model(folder: Path, tokenizer, **config) -> Path:
    """A random 2-layer Mistral with `tokenizer`, as a plain transformers checkpoint."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    MistralModel(MistralConfig(vocab_size=len(tokenizer), **sizes, **heads, **config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "mistral", llama())


@pytest.mark.parametrize("family", FAMILIES)
def test_eos_is_last_in_every_family(family, tmp_path):
    make, before, eos = FAMILIES[family]
    encoder = build_encoder(write_model(tmp_path / "model", make()), max_seq_length=128, prompts=PROMPTS)
    save_merged(encoder, tmp_path / "saved")
    long = "parse a date " * 200
    texts = ["", "a", "how do I parse a date", long]
    assert len(encoder.tokenizer(long, truncation=False)["input_ids"]) > 128
    eos_id, before_ids = (encoder.tokenizer.convert_tokens_to_ids(tokens) for tokens in (eos, before))
    assert eos_id == encoder.tokenizer.eos_token_id
    expected = None
    for model in (encoder, SentenceTransformer(str(tmp_path / "saved"), device="cpu")):
        found = []
        for name in (None, *PROMPTS):
            features = model.preprocess(texts, prompt=model.prompts[name] if name else None)
            lengths = features["attention_mask"].sum(1).tolist()
            rows = [row[:length] for row, length in zip(features["input_ids"].tolist(), lengths, strict=True)]
            assert max(lengths) == 128
            assert all(row[-1] == eos_id and row[: len(before)] == before_ids for row in rows)
            assert all(row[len(before) : -1].count(eos_id) == 0 for row in rows)
            found += rows
        expected = expected or found
        assert found == expected
    # and with nothing but transformers, as a server would load it
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert plain(texts, truncation=True)["input_ids"] == expected[:4]


def test_padding_does_not_change_vectors(mistral):
    encoder = build_encoder(mistral, max_seq_length=128)
    together = encoder.encode(TEXTS, convert_to_tensor=True)
    alone = torch.stack([encoder.encode(text, convert_to_tensor=True) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


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
        ({"max_seq_length": 24}, "prompt 'few' leaves 0 of 24 tokens"),
        ({"max_seq_length": 64, "min_text_tokens": 60}, "at least 60 are needed"),
        ({"max_seq_length": 4096}, "goes to 512"),
        ({"pooling": "cls"}, "choose one of eos, mean"),
    ],
)
def test_encoders_that_would_be_silently_wrong(mistral, kwargs, message):
    with pytest.raises(InputError, match=message):
        build_encoder(mistral, prompts=PROMPTS, **kwargs)


def test_a_prompt_may_take_all_but_the_stated_room(mistral):
    length = len(build_encoder(mistral).tokenizer(PROMPTS["query"])["input_ids"]) + 16
    build_encoder(mistral, prompts={"query": PROMPTS["query"]}, max_seq_length=length)
    with pytest.raises(InputError, match="leaves 15 of"):
        build_encoder(mistral, prompts={"query": PROMPTS["query"]}, max_seq_length=length - 1)


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


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_merging_keeps_vectors_and_leaves_no_trace(mistral, tmp_path, kwargs):
    encoder = build_encoder(mistral, max_seq_length=128, prompts=PROMPTS, peft_config=lora(**kwargs))
    before = build_encoder(mistral, max_seq_length=128).encode(TEXTS)
    adapted = encoder.encode(TEXTS)
    assert abs(adapted - before).max() > 1e-3
    save_merged(encoder, tmp_path / "merged")
    merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert abs(merged.encode(TEXTS) - adapted).max() < 1e-5
    names = sorted(path.relative_to(tmp_path / "merged").as_posix() for path in (tmp_path / "merged").rglob("*"))
    assert "model.safetensors" in names
    assert not [name for name in names if "adapter" in name or name.endswith((".bin", ".py"))]
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(mistral / "model.safetensors").keys()
    )
    texts = [path.read_text() for path in (tmp_path / "merged").rglob("*.json")]
    assert len(texts) >= 6
    assert not [text for text in texts if str(mistral) in text or str(tmp_path) in text or "lora" in text]
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_adapter_alone_gives_the_same_vectors(mistral, tmp_path):
    """In peft format, under the name of its base that we give it, and by sentence-transformers' own loader too."""
    encoder = build_encoder(mistral, max_seq_length=128, prompts=PROMPTS, peft_config=lora())
    expected = encoder.encode(TEXTS, prompt_name="query")
    save_adapter(encoder, tmp_path / "adapter", "mistralai/Mistral-7B-v0.1", "0123abc")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("mistralai/Mistral-7B-v0.1", "0123abc")
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert not [path for path in (tmp_path / "adapter").rglob("*.json") if str(mistral) in path.read_text()]

    resumed = build_encoder(mistral, max_seq_length=128, prompts=PROMPTS)
    continue_adapter(resumed, tmp_path / "adapter")
    assert abs(resumed.encode(TEXTS, prompt_name="query") - expected).max() < 1e-6
    trainable = [name for name, parameter in resumed.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 7  # A and B of 7 linear layers in 2 blocks
    assert all("lora_" in name for name in trainable)

    from peft import PeftModel

    by_peft = build_encoder(mistral, max_seq_length=128, prompts=PROMPTS)
    by_peft[0].model = PeftModel.from_pretrained(AutoModel.from_pretrained(mistral), tmp_path / "adapter")
    assert abs(by_peft.encode(TEXTS, prompt_name="query") - expected).max() < 1e-6


def test_adapter_weights_train_in_float32_over_bfloat16(mistral):
    encoder = build_encoder(mistral, dtype="bfloat16", peft_config=lora())
    types = {parameter.requires_grad: parameter.dtype for parameter in encoder.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
