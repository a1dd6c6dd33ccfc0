"""What stock libraries make of a published folder, as strangers use it.

release.verify.in_clean_process runs these functions in a process that cannot import this repository.
"""

import json
import shutil


def settings_of(model) -> dict:
    """How a SentenceTransformer makes a vector of a text, as far as other libraries must know it."""
    names = [type(module).__name__ for module in model]
    pooling = model[names.index("Pooling")] if "Pooling" in names else None
    return {
        "modules": names,
        # of several, whose vectors are joined, no other library knows the like
        "pooling_mode": pooling and (mode if isinstance(mode := pooling.pooling_mode, str) else "+".join(mode)),
        "include_prompt": pooling is None or pooling.include_prompt,
        "normalised": "Normalize" in names,
        "similarity": str(model.similarity_fn_name),
        "max_seq_length": model.max_seq_length,
    }


def describe_model(path: str, dtype: str, device: str | None) -> dict:
    """What sentence-transformers makes of texts of every kind with the model in `path`, loaded as `dtype`.

    `asked`: (prompt, text) pairs, without a prompt, with the longest one and with those of reference_vectors.json;
    their `vectors`; `is_cut`: which of them are longer than the model reads. `other_ids`: prompts with which it reads
    other tokens than its tokenizer gives for prompt + text. `last_tokens`: of all texts.
    """
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    loading = {"trust_remote_code": False, "local_files_only": True, "model_kwargs": {"dtype": dtype}}
    model = SentenceTransformer(path, device=device, **loading)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    with open(f"{path}/reference_vectors.json", encoding="utf-8") as stream:
        reference = json.load(stream)
    with open(f"{path}/modules.json", encoding="utf-8") as stream:
        module_types = [module["type"] for module in json.load(stream)]
    texts = list(dict.fromkeys(entry["text"] for entry in reference["vectors"]))
    texts += ["", "a", "In 2024, 12345 of  them;   it's 3.5 %!", "a long text " * model.max_seq_length]
    with_special = [*texts, f"text {' '.join(map(str, tokenizer.all_special_tokens[:8]))} text"]
    prompts = sorted({"", *model.prompts.values()})
    other_ids, last = [], set()
    for prompt in prompts:
        features = model.preprocess(with_special, prompt=prompt or None)
        rows = zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
        given = [prompt + text for text in with_special]
        expected = tokenizer(given, truncation=True, max_length=model.max_seq_length)["input_ids"]
        other_ids += [prompt] if [ids[mask].tolist() for ids, mask in rows] != expected else []
        last |= {tokenizer.convert_ids_to_tokens(ids[-1]) if ids else "" for ids in expected}
    longest = max(prompts, key=lambda prompt: len(tokenizer(prompt)["input_ids"]))
    names = [entry["prompt_name"] or model.default_prompt_name for entry in reference["vectors"]]
    named = [model.prompts.get(name, "") for name in names]
    found = {}
    for prompt in dict.fromkeys(["", longest, *named]):
        found |= {(prompt, text): row for text, row in zip(texts, model.encode(texts, prompt=prompt), strict=True)}
    apart = [
        np.linalg.norm(found[prompt, entry["text"]] - np.array(entry["vector"]))
        for prompt, entry in zip(named, reference["vectors"], strict=True)
    ]
    lengths = [len(ids) for ids in tokenizer([prompt + text for prompt, text in found], verbose=False)["input_ids"]]
    return settings_of(model) | {
        "module_types": module_types,
        "dimensions": model.get_embedding_dimension(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backbone": model[0].config.model_type,
        "prompts": model.prompts,
        "end_token": reference["end_token"],
        "other_ids": other_ids,
        "last_tokens": sorted(last),
        "reference_dtype": reference["dtype"],
        "reference_distance": float(np.max(apart)),
        "asked": list(found),
        "vectors": [vector.tolist() for vector in found.values()],
        "is_cut": [length > model.max_seq_length for length in lengths],
    }


def describe_lines(path: str, file: str | None, lines: str, asked: list) -> dict:
    """`vectors` of (prompt, text) pairs by lines of a card, which define `encode(texts, prompt)` of the `repository`
    in `path` and, for a runtime, of its `file`.
    """
    names = {"repository": path, "file": file}
    exec(lines, names)
    by_prompt = {prompt: [text for other, text in asked if other == prompt] for prompt, _ in asked}
    rows = [row for prompt, texts in by_prompt.items() for row in names["encode"](texts, prompt)]
    return {"vectors": [[float(number) for number in row] for row in rows]}


def describe_dataset(path: str) -> dict:
    """Rows of every config; `datasets` compares columns and counts with the card."""
    import datasets

    datasets.disable_progress_bars()
    found = {}
    for name in datasets.get_dataset_config_names(path):
        found[name] = datasets.load_dataset(path, name, cache_dir="cache", split="train").num_rows
        shutil.rmtree("cache")
    return found
