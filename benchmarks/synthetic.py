"""Texts, sets and models made on the spot: nothing to download, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.steps import parquet_writer

WORDS = [f"w{number:x}q" for number in range(30_000)]
BLOCK = 65_536  # documents in memory at a time
CORPUS = pa.schema([("_id", pa.string()), ("title", pa.string()), ("text", pa.string())])
QUERIES = pa.schema([("_id", pa.string()), ("text", pa.string())])
QRELS = pa.schema(
    [("query_id", pa.string()), ("corpus_id", pa.string()), ("score", pa.int32()), ("split", pa.string())]
)


def zipf_texts(count: int, words: tuple[int, int], seed: int | Sequence[int]) -> list[str]:
    """Texts of `words` (from, to) words whose frequencies fall as 1 / rank, as those of a natural language do."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, len(WORDS) + 1)
    lengths = rng.integers(words[0], words[1], size=count, endpoint=True)
    drawn = rng.choice(len(WORDS), size=lengths.sum(), p=shares / shares.sum()).tolist()
    ends = lengths.cumsum()
    return [
        " ".join(map(WORDS.__getitem__, drawn[end - length : end]))
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]


def write_set(folder: Path, documents: int, queries: int) -> None:
    """A retrieval set in the layout of `kind: local`: documents of 60 to 100 words, queries of ten words out of one.

    Of a thousand documents one repeats another and one nearly does. Every second query is of split train, the others
    of test.
    """
    folder.mkdir(parents=True)
    asked = np.linspace(0, documents, queries, endpoint=False).astype(np.int64)
    with (
        parquet_writer(folder / "corpus.parquet", CORPUS) as corpus,
        parquet_writer(folder / "queries.parquet", QUERIES) as questions,
        parquet_writer(folder / "qrels.parquet", QRELS) as qrels,
    ):
        for start in range(0, documents, BLOCK):
            rows = range(start, min(start + BLOCK, documents))
            texts = zipf_texts(len(rows), (60, 100), seed=[0, start])
            texts[999::1000] = texts[499::1000][: len(texts[999::1000])]
            texts[799::1000] = [f"{text} {WORDS[0]}" for text in texts[299::1000][: len(texts[799::1000])]]
            corpus.write(pa.table([[f"d{row:08d}" for row in rows], [""] * len(rows), texts], schema=CORPUS))
            numbers = np.flatnonzero((asked >= rows.start) & (asked < rows.stop))
            rng = np.random.default_rng([1, start])
            written = [" ".join(rng.permutation(texts[row - start].split())[:10]) for row in asked[numbers]]
            ids = [f"q{number:07d}" for number in numbers]
            documents_of = [f"d{row:08d}" for row in asked[numbers]]
            splits = [("train", "test")[number % 2] for number in numbers]
            questions.write(pa.table([ids, written], schema=QUERIES))
            qrels.write(pa.table([ids, documents_of, pa.array([1] * len(ids), pa.int32()), splits], schema=QRELS))


def word_tokenizer(texts: Sequence[str]):
    """A tokenizer of whole words in lower case, of those that `texts` hold."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<cls>", "<sep>"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return tokenizer


def write_encoder(folder: Path, texts: Sequence[str], dimensions: int = 384) -> Path:
    """A SentenceTransformer: the mean of a text's random word vectors, each as long as its word is rare in `texts`."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = word_tokenizer(texts)
    found = [np.unique(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
    frequencies = np.bincount(np.concatenate(found), minlength=tokenizer.get_vocab_size())
    rarity = torch.from_numpy(np.log((1 + len(texts)) / (1 + frequencies))).float()
    weights = torch.randn((len(rarity), dimensions), generator=torch.Generator().manual_seed(0)) * rarity[:, None]
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)]).save(str(folder))
    return folder


def write_cross_encoder(folder: Path, texts: Sequence[str]) -> Path:
    """A BERT cross-encoder of two layers of 128 with random weights: its scores mean nothing, its cost does."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = word_tokenizer(texts)
    names = ("<cls>", "<sep>")
    tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        num_labels=1,
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<cls>",
        sep_token="<sep>",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder
