"""Shared prefix and packing against plain sentence-transformers: encoding, and a training step.

    python -m benchmarks.bench_prefix [encode] [train] [--prompts 32 400] [--texts 128] [--rounds 3]
    python -m benchmarks.bench_prefix --device cuda --architecture mistral-7b --batch_size 256

| part | sides |
|---|---|
| encode | SentenceTransformer.encode with a prompt, in batches of 32 and of 8; the same two within `share_prefix` |
| train | loss and gradients of one step, LoRA of rank 16 on all linear layers, GradCache: |
| | CachedMultipleNegativesRankingLoss; the same within `share_prefix`; SoftInfoNCELoss within `share_prefix` |

Weights are random, texts synthetic: of 8 to 48 tokens (encode), or queries of 30 and documents of 30 to 200 (train).
The sides take turns in one process. Seconds are those of the processor, medians over the rounds; ratios are of one
round each, with their range. Tokens are those that go through the layers, padding included, divided by those needed:
every one of a text, and the prompt once in all. That of the plain side is how many times faster it could be if only
tokens cost. Memory is the highest sum of live tensors on top of those from before.

On a GPU everything is in bfloat16, seconds are those of the clock, memory is what the allocator held, MFU is useful
work (needed tokens, GradCache's second forward pass left out) by the rate of plain matrix products, and `--attention`
is what the plain side runs with. That has not been run yet.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import environment, markdown, median_and_range
from benchmarks.synthetic import word_tokenizer, zipf_texts
from common.cli import ArgumentParser, InputError, at_least_1, run

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PARTS = ("encode", "train")
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "num_attention_heads": 8},
    "base": {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8},
    "mistral-7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
VOCABULARY = 8000
TEXT_TOKENS, QUERY_TOKENS, DOCUMENT_TOKENS = (8, 48), (30, 30), (30, 200)
NEGATIVES = 3


@dataclass
class Side:
    """Work to be timed, and the context that it runs in."""

    work: Callable[[], Any]
    shared: bool = False


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    print(environment("sentence-transformers", "transformers", "torch", "peft"), flush=True)
    rate = matmul_rate(args) if args.device == "cuda" else None
    if rate:
        print(f"matrix products in bfloat16: {rate / 1e12:.0f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder), args)
        parameters = sum(layer.numel() for layer in model[0].model.layers.parameters())
        print(f"{args.architecture}: {parameters / 1e6:,.1f} M parameters in its layers", flush=True)
        for name in args.parts:
            rows = [row for prompt in args.prompts for row in PARTS_BY_NAME[name](model, prompt, args, rate)]
            print(f"\n{name}, {args.rounds} rounds\n\n{markdown(HEADER, rows)}", flush=True)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.bench_prefix", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; both, if none is named")
    parser.add_argument("--prompts", type=at_least_1, nargs="+", default=[32, 400], help="tokens (default: 32 400)")
    parser.add_argument("--texts", type=at_least_1, default=128, help="texts to encode (default: 128)")
    parser.add_argument("--batch_size", type=at_least_1, default=32, help="queries in a training step (default: 32)")
    parser.add_argument("--mini_batch_size", type=at_least_1, default=16, help="of GradCache (default: 16)")
    parser.add_argument("--rounds", type=at_least_1, default=3)
    parser.add_argument("--architecture", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--attention", default="sdpa", help="of the plain side: sdpa or flash_attention_2")
    args = parser.parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise InputError(f"part {name!r}: the parts are {', '.join(PARTS)}")
    args.parts = args.parts or list(PARTS)
    return args


def build_model(folder: Path, args: Namespace) -> SentenceTransformer:
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
    tokenizer.save_pretrained(folder)
    size = {"num_attention_heads": 32, **SIZES[args.architecture]}
    heads = size["num_attention_heads"]
    settings = {"num_key_value_heads": heads // 4, "head_dim": size["hidden_size"] // heads, "sliding_window": None}
    config = MistralConfig(vocab_size=max(len(tokenizer), VOCABULARY), **size, **settings)
    config.use_cache = False
    tiny = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    MistralModel(tiny).save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=4096)
    torch.manual_seed(0)
    with torch.device(args.device):
        config.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        transformer.model = MistralModel._from_config(config, attn_implementation=args.attention).to(config.dtype)
    transformer.unpad_inputs = None  # decide again, for this model: flash attention takes texts without padding
    pooling = Pooling(config.hidden_size, pooling_mode="lasttoken")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=args.device)


# --- parts ----------------------------------------------------------------------------------------------------------

HEADER = [
    *("prompt", "side", "seconds", "times faster", "tokens", "memory, MiB", "of the plain side's"),
    *("vectors or gradients differ by", "tokens/s", "MFU"),
]


def encode(model: SentenceTransformer, prompt_tokens: int, args: Namespace, rate: float | None) -> list[list[str]]:
    """Rows of the table: texts behind a prompt of `prompt_tokens` tokens, BOS included."""
    prompt = prompt_of(prompt_tokens)
    texts = zipf_texts(args.texts, words(TEXT_TOKENS), seed=1)

    def side(batch_size: int) -> Callable[[], Any]:
        return lambda: model.encode(texts, prompt=prompt, batch_size=batch_size, convert_to_tensor=True)

    sides = {
        "sentence-transformers": Side(side(32)),
        "sentence-transformers, batches of 8": Side(side(8)),
        "share_prefix": Side(side(32), shared=True),
        "share_prefix, batches of 8": Side(side(8), shared=True),
    }
    needed = sum(map(len, model.tokenizer([prompt + text for text in texts])["input_ids"]))
    needed -= (len(texts) - 1) * prompt_tokens
    return table(model, sides, f"{prompt_tokens}", needed, 2, args, rate)


def train(model: SentenceTransformer, prompt_tokens: int, args: Namespace, rate: float | None) -> list[list[str]]:
    """Rows of the table: a step over `batch_size` queries behind a prompt, their positives and negatives."""
    import torch
    from peft import LoraConfig
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import batch_to_device

    from modeling.adapters import add_adapter
    from modeling.losses import SoftInfoNCELoss

    if not hasattr(model[0].model, "peft_config"):
        add_adapter(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    queries = model.preprocess(
        zipf_texts(args.batch_size, words(QUERY_TOKENS), seed=2), prompt=prompt_of(prompt_tokens)
    )
    documents = [
        model.preprocess(zipf_texts(args.batch_size, words(DOCUMENT_TOKENS), seed=[3, column]))
        for column in range(1 + NEGATIVES)
    ]
    columns = [batch_to_device(column, model.device) for column in (queries, *documents)]

    def side(loss: torch.nn.Module) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            model.zero_grad()
            loss([dict(column) for column in columns], None).backward()
            return torch.cat([parameter.grad.flatten() for parameter in trained])

        return step

    plain = side(CachedMultipleNegativesRankingLoss(model, scale=50, mini_batch_size=args.mini_batch_size))
    soft = side(SoftInfoNCELoss(model, temperature=0.02, mini_batch_size=args.mini_batch_size, alpha=0.0))
    sides = {
        "CachedMultipleNegativesRankingLoss": Side(plain),
        "CachedMultipleNegativesRankingLoss, share_prefix": Side(plain, shared=True),
        "SoftInfoNCELoss, share_prefix": Side(soft, shared=True),
    }
    needed = sum(int(column["attention_mask"].sum()) for column in columns) - (args.batch_size - 1) * prompt_tokens
    # forward and backward of LoRA, the frozen weights' gradients left out; what GradCache repeats is not useful work
    return table(model, sides, f"{prompt_tokens}", needed, 4, args, rate, passes=2)


PARTS_BY_NAME: dict[str, Callable[..., list[list[str]]]] = {"encode": encode, "train": train}


def prompt_of(tokens: int) -> str:
    """A prompt that is `tokens` tokens with BOS before it; "" for 0."""
    return "".join(f"{word} " for word in zipf_texts(1, (2000, 2000), seed=4)[0].split()[: max(tokens - 1, 0)])


def words(tokens: tuple[int, int]) -> tuple[int, int]:
    """As many words as make a text of that many tokens, its EOS included."""
    return tokens[0] - 1, tokens[1] - 1


# --- measuring ------------------------------------------------------------------------------------------------------


def table(
    model: SentenceTransformer,
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
        rate: FLOP/s that count as 100 %; None leaves the last columns out.
        passes: forward passes of the layers that a token takes, which the counts of tokens are divided by.
    """
    import torch

    from modeling.shared_prefix import share_prefix

    results, memory, computed = {}, {}, {}
    for name, side in sides.items():  # also warms up
        with share_prefix(model) if side.shared else nullcontext(), counted_tokens(model) as counts:
            results[name], memory[name] = live_memory(side.work, args.device)
        computed[name] = sum(counts) / passes
    plain, *_ = sides
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            with share_prefix(model) if side.shared else nullcontext():
                seconds[name].append(timed(side.work, args.device))
    layers = sum(layer.numel() for layer in model[0].model.layers.parameters())
    rows = []
    for name in sides:
        ratios = [first / own for first, own in zip(seconds[plain], seconds[name], strict=True)]
        middle = statistics.median(seconds[name])
        difference = (results[name].float() - results[plain].float()).norm() / results[plain].float().norm()
        rows.append(
            [
                title,
                name,
                f"{middle:.2f}",
                "1" if name == plain else median_and_range(ratios, 2),
                f"{computed[name] / needed:.2f}",
                f"{memory[name] / 2**20:,.0f}",
                f"1/{memory[plain] / memory[name]:.1f}",
                f"{difference:.0e}",
                f"{needed / middle:,.0f}",
                "" if rate is None else f"{flops * layers * needed / middle / rate:.0%}",
            ]
        )
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return rows


@contextmanager
def counted_tokens(model: SentenceTransformer) -> Iterator[list[int]]:
    """Tokens that go through the layers, padding included, by forward pass."""
    counts: list[int] = []
    hook = (
        model[0]
        .model.get_input_embeddings()
        .register_forward_pre_hook(lambda module, args: counts.append(args[0].numel()))
    )
    try:
        yield counts
    finally:
        hook.remove()


def timed(work: Callable[[], Any], device: str) -> float:
    """Processor seconds of `work`; seconds of the clock where a GPU does it."""
    import torch

    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def live_memory(work: Callable[[], Any], device: str) -> tuple[Any, int]:
    """What `work` returns, and the most bytes of tensors that were alive in it, on top of those from before it."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), torch.cuda.max_memory_allocated() - before
    with live_tensors() as live:
        result = work()
    return result, live.peak


@dataclass
class Live:
    """Bytes of tensors made so far and still alive, and the most that it has been."""

    now: int = 0
    peak: int = 0

    def change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def live_tensors() -> Iterator[Live]:
    """
    >>> import torch
    >>> with live_tensors() as live:
    ...     kept = torch.zeros(10).add(1).view(2, 5)
    >>> live
    Live(now=40, peak=80)
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
    from torch.utils.weak import WeakIdKeyDictionary

    live, known = Live(), WeakIdKeyDictionary()

    def count(tensor: torch.Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        if storage not in known:
            size = storage.nbytes() if size is None else size
            known[storage] = size
            live.change(size)
            weakref.finalize(storage, live.change, -size)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tree_map_only(torch.Tensor, lambda tensor: count(tensor, 0), (args, kwargs))  # from before
            result = func(*args, **(kwargs or {}))
            tree_map_only(torch.Tensor, count, result)
            return result

    with Mode():
        yield live


def matmul_rate(args: Namespace) -> float:
    """FLOP/s of large matrix products in bfloat16: what this GPU gives a model at best."""
    import torch

    size, count = 8192, 20
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=args.device) for _ in range(2))
    for _ in range(3):
        left @ right
    seconds = timed(lambda: [left @ right for _ in range(count)], args.device)
    return count * 2 * size**3 / seconds


if __name__ == "__main__":
    run(main)
