"""A saved folder that more programs read than the libraries which wrote it.

transformers 5 writes RoPE as `rope_parameters`; transformers 4 and text-embeddings-inference look for `rope_theta`,
`rope_scaling` and Gemma 3's `rope_local_base_freq`, and take their defaults, silently, where these are missing. Its
class names for tokenizers are unknown to transformers 4, and safetensors writes files that only their owner may read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.steps import write_json


def make_portable(folder: Path) -> None:
    """Add to the files of a model saved by transformers 5 what older readers need; transformers 5 reads it as before.

    A chat template goes: an embedder reads text, and sentence-transformers would make a chat message of it.
    """
    config = folder / "config.json"
    if config.is_file():  # an adapter has none
        write_json(config, with_flat_rope(json.loads(config.read_text(encoding="utf-8"))))
    tokenizer = folder / "tokenizer_config.json"
    write_json(tokenizer, for_older_tokenizers(json.loads(tokenizer.read_text(encoding="utf-8"))))
    for template in (*folder.glob("chat_template.*"), *folder.glob("additional_chat_templates/*")):
        template.unlink()
    mode = tokenizer.stat().st_mode  # as the umask has it
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def with_flat_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with `rope_theta` and `rope_scaling` beside `rope_parameters`.

    >>> with_flat_rope({"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0}})["rope_scaling"]
    {'rope_type': 'linear', 'factor': 2.0}
    """
    rope = config.get("rope_parameters") or {}
    flat = {}
    if "full_attention" in rope:  # one set a kind of layer
        if config["model_type"] != "gemma3_text":
            return config  # transformers 4 knows no other architecture of this kind by flat keys
        flat["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    flat |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        flat["rope_scaling"] = rope
    return config | flat


def for_older_tokenizers(config: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` under the names of transformers 4, without chat template."""
    config = {key: value for key, value in config.items() if key != "chat_template"}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # a mapping in transformers 4
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
