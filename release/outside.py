"""What stock libraries make of a published folder, as strangers use it.

verify.in_clean_process runs these functions in a process that cannot import this repository.
"""

import json
import shutil


def describe_model(path: str, lines: str) -> dict:
    """What the SentenceTransformer in `path` does with texts of every kind, under every one of its prompts.

    `lines`: the card's code for transformers alone, which defines `encode(texts, prompt)`; empty where there is none.
    """
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    model = SentenceTransformer(path, trust_remote_code=False, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    special = " ".join(map(str, tokenizer.all_special_tokens[:8]))
    texts = ["", "a", "how do I parse a date", f"text {special} text", "a long text " * model.max_seq_length]
    prompts = sorted({"", *model.prompts.values()})
    other_ids, last = [], set()
    for prompt in prompts:
        features = model.preprocess(texts, prompt=prompt or None)
        masks = features["attention_mask"].bool()
        read = [ids[mask].tolist() for ids, mask in zip(features["input_ids"], masks, strict=True)]
        given = [prompt + text for text in texts]
        expected = tokenizer(given, truncation=True, max_length=model.max_seq_length)["input_ids"]
        other_ids += [prompt] if read != expected else []
        last |= {tokenizer.convert_ids_to_tokens(ids[-1]) if ids else "" for ids in expected}
    longest = max(prompts, key=lambda prompt: len(tokenizer(prompt)["input_ids"]))
    first, second = model.encode(["how do I parse a date", "where is the red house"], prompt=longest)
    alone = None
    if lines:
        names = {"repository": path}
        exec(lines, names)
        found = np.concatenate([names["encode"](texts, prompt).float().numpy() for prompt in ("", longest)])
        expected = np.concatenate([model.encode(texts, prompt=prompt) for prompt in ("", longest)])
        alone = float(np.linalg.norm(found - expected.astype("float32"), axis=1).max())
    reference = read_reference(path)
    found = np.array([model.encode(entry["text"], prompt_name=entry["prompt_name"]) for entry in reference["vectors"]])
    apart = np.linalg.norm(found - np.array([entry["vector"] for entry in reference["vectors"]]), axis=1)
    return {
        "dimensions": model.get_embedding_dimension(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backbone": model[0].config.model_type,
        "prompts": model.prompts,
        "other_ids": other_ids,
        "last_tokens": sorted(last),
        "end_token": reference["end_token"],
        # a prompt that fills max_seq_length gives every text the same vector, without a warning
        "tells_texts_apart": bool(np.abs(first - second).max() > 1e-4),
        "reference_dtype": reference["dtype"],
        "reference_distance": float(apart.max()),
        "alone_distance": alone,
    }


def read_reference(path: str) -> dict:
    """What modeling.reference wrote beside the model."""
    with open(f"{path}/reference_vectors.json", encoding="utf-8") as stream:
        return json.load(stream)


def describe_adapter(path: str, model_path: str) -> dict:
    """How far vectors of the adapter on its base are from those of the merged model; None: the base is not here."""
    import numpy as np
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    entries = read_reference(model_path)["vectors"]
    model = SentenceTransformer(model_path, trust_remote_code=False, local_files_only=True)

    def vectors():
        return np.array([model.encode(entry["text"], prompt_name=entry["prompt_name"]) for entry in entries])

    merged, dtype = vectors(), next(model.parameters()).dtype
    found = {"distance": None, "dtype": str(dtype).removeprefix("torch.")}
    config = PeftConfig.from_pretrained(path)
    try:
        base = AutoModel.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, dtype=dtype, local_files_only=True
        )
    except OSError:  # not in this machine's cache
        return found
    base.load_adapter(path)
    model[0].model = base.to(model.device)
    return {**found, "distance": float(np.linalg.norm(vectors() - merged, axis=1).max())}


def describe_dataset(path: str) -> dict:
    """Rows of every config; `datasets` compares columns and counts with the card."""
    import datasets

    datasets.disable_progress_bars()
    found = {}
    for name in datasets.get_dataset_config_names(path):
        found[name] = datasets.load_dataset(path, name, cache_dir="cache", split="train").num_rows
        shutil.rmtree("cache")
    return found


def describe_expected(path: str) -> dict:
    """Texts, with and without each of the reference's prompts, and their vectors by sentence-transformers in float32,
    each text alone; `cut`: which are longer than the model reads.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    loading = {"dtype": torch.float32}
    model = SentenceTransformer(path, device="cpu", model_kwargs=loading, local_files_only=True)
    entries = read_reference(path)["vectors"]
    prompts = dict.fromkeys(model.prompts[entry["prompt_name"]] if entry["prompt_name"] else "" for entry in entries)
    texts = list(dict.fromkeys(entry["text"] for entry in entries))
    texts += ["", "a", "In 2024, 12345 of  them;   it's 3.5 %!", "a long text " * model.max_seq_length]
    texts = [prompt + text for prompt in prompts for text in texts]
    lengths = [len(ids) for ids in model.tokenizer(texts, verbose=False)["input_ids"]]
    vectors = [model.encode(text).tolist() for text in texts]
    return {"texts": texts, "vectors": vectors, "cut": [length > model.max_seq_length for length in lengths]}


def describe_exported(path: str, file: str, texts: str, lines: str) -> dict:
    """The vectors of all texts in the JSON file `texts`, in one batch, by the card's lines for a runtime's `file`."""
    names = {"repository": path, "file": file}
    exec(lines, names)
    with open(texts, encoding="utf-8") as stream:
        found = names["encode"](json.load(stream))
    return {"vectors": [[float(number) for number in vector] for vector in found]}
