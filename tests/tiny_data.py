"""A retrieval set, a teacher and a recipe small enough to build in a second, with planted duplicates."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
TOPICS = 60
WORDS = [f"{first}{second}" for first in ("bal", "cor", "dun", "fen", "gil", "hom") for second in "aeiouy"]


def write_set(folder: Path, *, seed: int = 0) -> Path:
    """60 queries (40 train, 20 test), each with one positive of 12 words of which the query repeats 5.

    The first document has an exact duplicate (`z-copy`) and a near one (`z-near`, one word added at the end).
    """
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(TOPICS)]
    documents = {f"d{topic:02d}": text for topic, text in enumerate(texts)}
    documents |= {"z-copy": texts[0].upper(), "z-near": texts[0] + " end"}
    queries = {f"q{topic:02d}": " ".join(text.split()[:5]) for topic, text in enumerate(texts)}
    splits = ["train" if topic < 40 else "test" for topic in range(TOPICS)]
    folder.mkdir(parents=True)
    write_table(folder / "corpus.parquet", _id=list(documents), title=[""] * len(documents), text=documents.values())
    write_table(folder / "queries.parquet", _id=list(queries), text=queries.values())
    corpus_ids = [f"d{topic:02d}" for topic in range(TOPICS)]
    write_table(
        folder / "qrels.parquet", query_id=list(queries), corpus_id=corpus_ids, score=[1] * TOPICS, split=splits
    )
    return folder


def write_table(path: Path, **columns) -> None:
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)


def write_encoder(folder: Path, *, seed: int = 0, sign: float = 1.0) -> Path:
    """A real SentenceTransformer whose vector is the mean of its words' random vectors: cosine grows with overlap."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({word: row for row, word in enumerate(["<unk>", "end", *WORDS])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn((len(WORDS) + 2, 32), generator=torch.Generator().manual_seed(seed)) * sign
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)]).save(str(folder))
    return folder


def write_recipe(path: Path, folder: Path, model: Path, **keys) -> Path:
    recipe = {
        "source": {"kind": "local", "path": str(folder), "split": "train", "eval_splits": ["test"]},
        "task_type": "retrieval",
        "instruction": "Find the text",
        "bm25": {"top_k": 20},
        "dense": {"model": str(model), "top_k": 20},
        "fusion": {"top_k": 25},
        "teacher": {"kind": "bi_encoder", "model": str(model)},
        "mining": {"num_negatives": 3},
    }
    path.write_text(yaml.safe_dump({**recipe, **keys}))
    return path


def tiny_build(folder: Path, *, splits=("train",), engine=None, **sections):
    """The record of a build in `folder` whose recipe has these `sections`; nothing is made."""
    from dataset_builders.build_record import Build
    from dataset_builders.data_recipe import GradedRecipe
    from dataset_builders.engines import LOCAL

    keys = {
        "source": {"kind": "pydocs", "split": splits[0], "eval_splits": splits[1:]},
        "task_type": "retrieval",
        "instruction": "Find the text",
        "dense": {"model": "unused"},
        "teacher": {"kind": "bi_encoder", "model": "unused"},
    }
    return Build(folder, GradedRecipe(**{**keys, **sections}), engine or LOCAL)
