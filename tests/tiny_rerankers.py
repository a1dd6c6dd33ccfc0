"""Rerankers small enough to make on the spot: a random BERT with a head, and a random Qwen3 that says yes or no."""

from pathlib import Path

from tiny_data import WORDS

LETTERS = list("abcdefghijklmnop")
TEMPLATE = (
    "{%- for m in messages %}{%- if m.role == 'system' %}sys {{ m.content }} {% endif %}"
    "{%- if m.role == 'query' %}query {{ m.content }} {% endif %}"
    "{%- if m.role == 'document' %}doc {{ m.content }} {% endif %}{%- endfor %}judge"
)


def save_tokenizer(folder, specials, words, **keywords):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*specials, *words]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token=specials[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "[CLS]" in words:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], unk_token=specials[1], **keywords
    )
    saved.save_pretrained(folder)
    return len(words)


def save_classifier(folder, *, num_labels=1, broken=False) -> Path:
    """A random BERT with a classification head."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    size = save_tokenizer(folder, specials, [*LETTERS, *WORDS], cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=size, max_position_embeddings=64, num_labels=num_labels, initializer_range=0.5, **sizes
    )
    model = BertForSequenceClassification(config)
    if broken:
        torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(folder)
    return folder


def save_causal_lm(folder, *, template=TEMPLATE, answers=("yes", "no")) -> Path:
    """A random Qwen3, as a reranker of its family is published: a causal model and a chat template."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = ["sys", "query", "doc", "judge", *answers, *LETTERS]
    keywords = {"chat_template": template, "eos_token": "<end>", "model_max_length": 64}
    size = save_tokenizer(folder, ["<pad>", "<unk>", "<end>"], words, **keywords)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = Qwen3Config(
        vocab_size=size,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.5,
        tie_word_embeddings=False,
        pad_token_id=0,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
