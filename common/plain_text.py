"""What an encoder reads is prompt + text as its bare tokenizer splits it, whatever files lie beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase


def use_plain_text(model: SentenceTransformer, name_or_path: str, revision: str | None = None) -> None:
    """Pin `model`, as loaded from `name_or_path`, to plain text; a folder that is saved from it stays pinned.

    sentence-transformers (6.2) renders every text as a chat message, and its prompt as a system message, as soon as
    the tokenizer has a chat template. For an embedder that template is a leftover of its base model, and some write
    today's date: vectors would change overnight. Modules that read no tokens stay as they are.

    Raises InputError for an embedder whose own sentence_bert_config.json says that it was made with chat messages:
    read as plain text it would be another model, and no vector of its own could be cached or reproduced elsewhere.
    """
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.util import load_file_path

    path = load_file_path(name_or_path, "sentence_bert_config.json", revision=revision)
    chosen = json.loads(Path(path).read_text(encoding="utf-8")).get("modality_config") if path else None
    for module in model.modules():
        if not isinstance(module, Transformer):
            continue
        if "message" in (chosen or {}):  # what the folder does not say, the library inferred from the template
            raise InputError(
                f"model {name_or_path!r} reads its texts as chat messages (modality_config in its "
                "sentence_bert_config.json); only embedders of plain text can be used, name another"
            )
        if module.tokenizer is None or "text" not in module.modalities:
            raise InputError(f"model {name_or_path!r} reads {', '.join(map(str, module.modalities))}, no plain text")
        check_words(module.tokenizer, name_or_path)
        module.processor = module.tokenizer  # not the one for images or sound around it
        module.modality_config = {"text": module.modality_config["text"]}
        module.input_formatter.processor = module.tokenizer
        module.input_formatter.supported_modalities = module.modalities


def check_words(tokenizer: PreTrainedTokenizerBase, reference: str) -> None:
    """Refuse a tokenizer of special tokens alone, which transformers 5 makes where a folder has no tokenizer's files:
    all texts would read the same.
    """
    if len({*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens}) < 2:  # T5's knows a space
        raise InputError(
            f"model {reference!r} has no tokenizer: its files (such as tokenizer.json) are missing; fetch them, too"
        )
