"""Reference vectors: saved beside a model, they tell later, elsewhere, whether what was loaded is that model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.steps import write_json
from modeling.prompts import few_shot_prompts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

REFERENCE = "reference_vectors.json"
_TEXTS = [
    "how do I parse a date",
    "Return a copy of the list, sorted; the original is left as it was.",
    "naïve café, 東京, 🙂 and\ttabs\nand lines",
]


def write_reference(encoder: SentenceTransformer, folder: Path) -> None:
    """Write the vectors of `encoder`, as it is in memory, to `folder`: of a few texts, bare and with the prompts
    `query` and `query-K-shot` where the model has them. `end_token` is the token that ends every text; None where the
    tokenizer adds none.
    """
    own = ["query", *(f"query-{shots}-shot" for shots in few_shot_prompts(encoder.prompts))]
    vectors = []
    for name in [None, *(name for name in own if name in encoder.prompts)]:
        found = encoder.encode(_TEXTS, prompt_name=name, show_progress_bar=False)
        for text, vector in zip(_TEXTS, found, strict=True):
            vectors.append({"text": text, "prompt_name": name, "vector": [round(float(x), 7) for x in vector]})
    tokenizer = encoder.tokenizer
    last = tokenizer("a")["input_ids"][-1]
    end = tokenizer.convert_ids_to_tokens(last) if last in tokenizer.all_special_ids else None
    dtype = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    write_json(folder / REFERENCE, {"dtype": dtype, "end_token": end, "vectors": vectors})
