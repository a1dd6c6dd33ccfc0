"""The ids an encoder sees are the bare tokenizer's of prompt + text, on layouts of real bases with chat templates."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tiny_data import write_encoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.utils import chat_template_utils

from common.cli import InputError
from common.plain_text import use_plain_text

PROMPT, TEXT = "Instruct: Find the answer\nQuery: ", " sort the list "


@dataclass(frozen=True)
class Layout:
    config: str
    bos: str | None
    eos: str
    turn: str  # how its template writes a message
    start: str = ""


IM = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
DATE = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
LAYOUTS = {
    "Qwen3 chat": Layout("Qwen3", None, "<|im_end|>", IM),
    "Llama 3 Instruct": Layout(
        "Llama", "<bos>", "<|eot_id|>", "<|turn|>{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>", "{{ bos_token }}"
    ),
    "Llama 3.2": Layout("Llama", "<bos>", "<|eot_id|>", "{{ m.content }}<|eot_id|>", DATE),
    "Gemma-it": Layout("Gemma2", "<bos>", "<eos>", "<|turn|>{{ m.role }}\n{{ m.content }}\n", "{{ bos_token }}"),
    "Phi-3": Layout("Phi3", None, "<|endoftext|>", "<|turn|>{{ m.content }}\n{{ eos_token }}"),
    "SmolLM2": Layout("Llama", None, "<|im_end|>", IM),
}


def write_base(folder: Path, layout: Layout) -> Path:
    """A random decoder and a byte-level tokenizer with the layout's special tokens and chat template."""
    specials = ["<pad>", "<bos>", layout.eos, "<|turn|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = list(dict.fromkeys([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]))
    tokenizer = Tokenizer(models.BPE({token: row for row, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(dict.fromkeys(specials)))
    if layout.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{layout.bos} $A", special_tokens=[(layout.bos, vocabulary.index(layout.bos))]
        )
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=layout.bos, eos_token=layout.eos, pad_token="<pad>"
    )
    saved.chat_template = f"{layout.start}{{% for m in messages %}}{layout.turn}{{% endfor %}}"
    saved.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": saved.eos_token_id, "bos_token_id": saved.bos_token_id}
    config = getattr(transformers, f"{layout.config}Config")(
        vocab_size=len(vocabulary), num_key_value_heads=1, head_dim=8, **sizes, **ids
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def ids_of(model, prompt: str, text: str = TEXT) -> list[int]:
    features = model.preprocess([text], prompt=prompt)
    return features["input_ids"][0][features["attention_mask"][0].bool()].tolist()


@pytest.mark.parametrize("name", ["Qwen3 chat", "Llama 3 Instruct", "Gemma-it", "Phi-3"])
def test_ids_are_those_of_the_bare_tokenizer(name, tmp_path):
    base = write_base(tmp_path / "base", LAYOUTS[name])
    plain = transformers.AutoTokenizer.from_pretrained(base)
    expected = {prompt: plain(prompt + TEXT)["input_ids"] for prompt in ("", PROMPT)}
    model = SentenceTransformer(str(base))
    assert "message" in model[0].modalities and ids_of(model, PROMPT) != expected[PROMPT]  # or nothing is tested
    use_plain_text(model, str(base))
    assert {prompt: ids_of(model, prompt) for prompt in expected} == expected
    model.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"))  # by the library alone
    assert {prompt: ids_of(again, prompt) for prompt in expected} == expected
    use_plain_text(again, str(tmp_path / "saved"))  # it says text, so it may go on


def test_an_address_of_a_picture_is_a_text_though_a_processor_lies_beside_the_weights(tmp_path):
    base = write_base(tmp_path / "base", LAYOUTS["Gemma-it"])
    # left from the model for images that this text model was cut out of
    files = {"processor_class": "CLIPProcessor", "image_processor_type": "CLIPImageProcessor"}
    (base / "preprocessor_config.json").write_text(json.dumps(files))
    model, address = SentenceTransformer(str(base)), "https://example.org/list.png"
    assert "image" in model[0].modalities
    use_plain_text(model, str(base))
    assert ids_of(model, PROMPT, address) == model.tokenizer(PROMPT + address)["input_ids"]


def test_the_date_moves_no_vector(tmp_path, monkeypatch):
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 5, 17)

    base = str(write_base(tmp_path / "base", LAYOUTS["Llama 3.2"]))
    chatting, model = SentenceTransformer(base), SentenceTransformer(base)
    use_plain_text(model, base)
    today = [encoder.encode(TEXT, prompt=PROMPT) for encoder in (chatting, model)]
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tomorrow = [encoder.encode(TEXT, prompt=PROMPT) for encoder in (chatting, model)]
    assert np.abs(today[0] - tomorrow[0]).max() > 1e-3  # the template does write the date
    np.testing.assert_array_equal(today[1], tomorrow[1])


def test_an_embedder_made_with_messages_is_refused_by_name(tmp_path):
    base = write_base(tmp_path / "base", LAYOUTS["SmolLM2"])
    SentenceTransformer(str(base)).save(str(tmp_path / "chatty"))
    with pytest.raises(InputError, match="chatty' reads its texts as chat messages"):
        use_plain_text(SentenceTransformer(str(tmp_path / "chatty")), str(tmp_path / "chatty"))
    path = next((tmp_path / "chatty").rglob("sentence_bert_config.json"))
    config = json.loads(path.read_text())
    # as embedders were saved before there was such a choice, Qwen3-Embedding among them
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "modality_config"}))
    use_plain_text(SentenceTransformer(str(tmp_path / "chatty")), str(tmp_path / "chatty"))
    del config["modality_config"]["text"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="as chat messages"):
        use_plain_text(SentenceTransformer(str(tmp_path / "chatty")), str(tmp_path / "chatty"))


def test_static_embeddings_are_left_alone(tmp_path):
    folder = str(write_encoder(tmp_path / "encoder"))
    model = SentenceTransformer(folder)
    before = model.encode([TEXT])
    use_plain_text(model, folder)
    np.testing.assert_array_equal(model.encode([TEXT]), before)
