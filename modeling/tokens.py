"""What a text becomes before the model reads it: the tokenizer's ids of prompt + text, then the end token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase


def finish_texts(tokenizer: PreTrainedTokenizerBase, published_pooling: str | None, pooling: str | None) -> None:
    """The end of texts that pooling needs: as published where a finished embedder's pooling stays (its name in
    `published_pooling`), else EOS: at the last token that is what is pooled, and a mean is then never one of no token
    (an encoder without EOS ends texts in a token of its own). Padding goes to the right, where GradCache can trim it;
    the unknown token pads where there is no padding token.
    """
    pooling = pooling or published_pooling or "eos"
    if pooling == published_pooling:
        restore_end(tokenizer)
    elif pooling == "eos" or (tokenizer.eos_token and not tokenizer("")["input_ids"][1:]):
        guarantee_eos(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # saving writes what init_kwargs names
    tokenizer.truncation_side = "right"


def guarantee_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `tokenizer` end every text in EOS, whatever its family, its flags and the version of transformers.

    The rule is written into the post-processor, where truncation makes room for it and saving keeps it. Appending the
    EOS string to texts is lost to truncation; `add_eos_token` is not saved. What the base puts before a text (BOS for
    Mistral and Llama, nothing for Qwen and SmolLM2, CLS for BERT) stays. Raises InputError without an EOS token, or
    without a fast tokenizer.
    """
    from tokenizers.processors import TemplateProcessing

    name = tokenizer.name_or_path
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer of {name!r} has no EOS token to pool at; set pooling: mean or cls for an encoder, or "
            "eos_token in its tokenizer_config.json for a decoder"
        )
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer of {name!r} is not a fast one (no tokenizer.json); convert it first")
    before = before_text(tokenizer)
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", eos],
        pair=[*before, "$A", "$B:1", eos],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, eos])],
    )


def restore_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """EOS at the end of texts where a published embedder's settings ask for it and transformers 5 forgets it.

    transformers 5 passes over `add_eos_token` where tokenizer.json exists (e5-mistral lost its `</s>` that way:
    embeddings-benchmark/mteb#5237). All other tokenizers stay as published.
    """
    if tokenizer.init_kwargs.get("add_eos_token") and tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        guarantee_eos(tokenizer)


def before_text(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that the tokenizer itself puts before a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    return tokenizer.convert_ids_to_tokens(encoding["input_ids"][: encoding["special_tokens_mask"].index(0)])


def check_text(encoder: SentenceTransformer) -> None:
    """Assert that the encoder reads the tokenizer's own ids of prompt + text: short, long, and with each prompt.

    What sentence-transformers infers from files beside the weights (a chat template, a processor) changes the input
    without a word; a comparison of it with itself would not tell. Raises InputError when it reads anything else.
    """
    tokenizer, length = encoder.tokenizer, encoder.max_seq_length
    end = tokenizer("a")["input_ids"][-1]
    ends_alike = encoder[1].pooling_mode == "lasttoken" and end in tokenizer.all_special_ids
    prompts = {"": "", **encoder.prompts}
    longest = max(prompts, key=lambda name: len(prompts[name]))
    for name, prompt in prompts.items():
        texts = ["a", "how do i parse a date", *(["text " * length] if name in ("", longest) else [])]
        features = encoder.preprocess(texts, prompt=prompt or None)
        wanted = tokenizer([prompt + text for text in texts], truncation=True, max_length=length)["input_ids"]
        for ids, mask, expected in zip(features["input_ids"], features["attention_mask"], wanted, strict=True):
            found = ids[mask.bool()].tolist()
            if found != expected or (ends_alike and found[-1] != end):
                raise InputError(
                    f"tokenizer of {tokenizer.name_or_path!r}: with prompt {name!r} the model would read "
                    f"{tokenizer.decode(found)[-200:]!r} instead of {tokenizer.decode(expected)[-200:]!r}"
                )


def check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, str],
    max_seq_length: int,
    min_text_tokens: int,
    key: str = "max_seq_length",
) -> None:
    """Refuse a prompt that leaves fewer than `min_text_tokens` of `max_seq_length`, which `key` sets, for the text.

    A prompt of max_seq_length tokens gives every query the same vector, and nothing says so.
    """
    for name, prompt in {"": "", **prompts}.items():
        taken = len(tokenizer(prompt, verbose=False)["input_ids"])  # BOS and EOS are in it
        if max_seq_length - taken < min_text_tokens:
            raise InputError(
                f"prompt {name!r} leaves {max(max_seq_length - taken, 0)} of {max_seq_length} tokens for the text, at "
                f"least {min_text_tokens} are needed; shorten the prompt or raise {key}"
            )


def check_saved_text(encoder: SentenceTransformer, folder: Path) -> None:
    """Assert that the tokenizer in `folder` gives the ids that `encoder` was trained on."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(str(folder))
    prompts = dict.fromkeys(["", *encoder.prompts.values()])
    texts = [prompt + text for prompt in prompts for text in ("", "a", "text " * encoder.max_seq_length)]
    expected, read = (tokenizer(texts, truncation=True)["input_ids"] for tokenizer in (encoder.tokenizer, saved))
    if read != expected or saved.chat_template:
        raise InputError(f"{folder}: the saved tokenizer does not give the ids the model was trained on")
