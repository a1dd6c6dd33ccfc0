"""A small Mistral that starts as a bag of its teacher's words, for runs without a pretrained decoder.

A decoder with random weights needs far more text than a demo has before it embeds anything. This one starts from
what needs no training: its teacher's tokenizer and word embeddings, and the frequencies of the corpus. Its weights
are set so that the last token's state is the weighted mean of the words before it, w(n) * sif(word), with the SIF
weight a / (a + p(word)) (Arora et al. 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings") and
w(n) close to sqrt(n) for a word that occurs n times. All of it is an ordinary causal decoder:

- a token's input vector holds its word embedding, a random sign code (two tokens share none, so that a rare word
  can be matched exactly), the logarithm of its weight, marks for the first and the last token, and one coordinate
  that brings every vector to the same length, so that RMSNorm keeps all of this as it is;
- in the first layer each head attends from a token to its earlier copies (equal codes) and to the first token; the
  share that is left for the first token tells how often the word has been seen and lowers its weight;
- in the last layer each head of the last token asks for the logarithm of the weight, so that softmax returns the
  weights themselves, and the values are word embeddings and codes;
- every other matrix that writes to the residual stream is zero at first: training decides what it is for.

Scores that must not depend on the distance between tokens use the half of a head's dimensions that rotary embeddings
turn slowest (by at most 1e-3 a token). The result is a plain Mistral checkpoint: nothing of this file is needed to
load or to train it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, MistralConfig, MistralModel, PreTrainedTokenizerFast

from common.models import resolve_model, without_bars
from common.steps import read_arrow, read_parquet
from modeling.keys import StudentConfig

HEAD_SIZE = 128
ROPE_THETA = 1e6
_SLOW_PAIR = HEAD_SIZE // 2 - 1  # transformers turns dimension i of a head together with i + HEAD_SIZE / 2
_CODE_SIZE = HEAD_SIZE // 2 - 2  # the slow half of a head, less that slowest pair
# An input vector: word embedding, one code a head, then these coordinates.
_ONE, _LOG_WEIGHT, _IS_BOS, _IS_EOS, _FILLER = range(-5, 0)
_MARKS = 5
_PART = 1 / 3  # of an input vector's squared length is the word's, as much the code's
_LEAST_LOG_WEIGHT = -8.0  # e^-8 of a rare word's
_COPY_SCORE = 16.0  # score of a token's copy and of the first token; unequal codes score about 16 * (0 +- 1/8)
# A word seen k times leaves 1 / (1 + k) of the attention for the first token. With this factor the weight of its
# k-th copy falls from 1 (k = 1) to sqrt(2) - 1 (k = 2), so that two copies weigh sqrt(2), and so on.
_REPEAT_FACTOR = float(np.log(2**0.5 - 1) / (1 / 3 - 1 / 2))


def build_student(config: StudentConfig, folder: Path) -> None:
    """Write the student's weights, configuration and tokenizer into `folder`, as transformers reads them."""
    teacher = resolve_model(config.teacher)
    tokenizer = student_tokenizer(AutoTokenizer.from_pretrained(teacher.name_or_path, revision=teacher.revision))
    teacher_model = AutoModel.from_pretrained(teacher.name_or_path, revision=teacher.revision, dtype=torch.float32)
    words = teacher_model.get_input_embeddings().weight.detach().numpy()
    counts = token_counts(tokenizer.backend_tokenizer, corpus_texts(config))
    inputs = input_vectors(words, sif_log_weights(counts, config.sif), tokenizer, config)

    torch.manual_seed(config.seed)
    model = MistralModel(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.hidden_size // HEAD_SIZE,
            num_key_value_heads=config.hidden_size // HEAD_SIZE,
            head_dim=HEAD_SIZE,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            sliding_window=None,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    write_weighted_mean(model, torch.from_numpy(inputs))
    with without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def student_tokenizer(teacher_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The teacher's vocabulary with `<s>` and `</s>` for a decoder; ids of the teacher's tokens do not change.

    Texts stand between these two, not after the teacher's [CLS]: the student's heads count from `<s>`.
    """
    backend = Tokenizer.from_str(teacher_tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=teacher_tokenizer.unk_token,
        pad_token=teacher_tokenizer.pad_token,
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def corpus_texts(config: StudentConfig) -> Iterable[str]:
    """The documents and the (prompted) training queries of a data folder's corpus."""
    documents = read_arrow(Path(config.corpus) / "documents.arrow", ["text"])
    queries = read_parquet(Path(config.corpus) / "queries.parquet", ["text", "split"]).to_pylist()
    yield from documents["text"].to_pylist()
    yield from (config.prompt + query["text"] for query in queries if query["split"] == "train")


def token_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """How often each token id occurs in `texts`: shape (vocabulary,), int64."""
    counts = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        np.add.at(counts, encoding.ids, 1)
    return counts


def sif_log_weights(counts: np.ndarray, a: float) -> np.ndarray:
    """log(a / (a + p)) with p = counts / sum: 0 for unseen tokens, very negative for common ones.

    >>> sif_log_weights(np.array([0, 1, 999]), a=1e-3).round(3).tolist()
    [0.0, -0.693, -6.908]
    """
    probabilities = counts / max(counts.sum(), 1)
    return np.log(a) - np.log(a + probabilities)


def whitened(vectors: np.ndarray, size: int) -> np.ndarray:
    """Centred `vectors` (n, d) in their `size` strongest directions, each scaled to variance 1, in rows of norm 1.

    Zero-padded where there are fewer directions. Word embeddings lie in a narrow cone; scaled like this, distinct
    words come close to orthogonal, so that a bag of them tells texts apart by their words.
    """
    left, strengths, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    left = left[:, :size][:, strengths[:size] > 1e-6 * strengths[0]]  # the others hold rounding errors alone
    left /= np.maximum(np.linalg.norm(left, axis=1, keepdims=True), 1e-12)
    return np.pad(left, ((0, 0), (0, size - left.shape[1])))


def input_vectors(
    words: np.ndarray, log_weights: np.ndarray, tokenizer: PreTrainedTokenizerFast, config: StudentConfig
) -> np.ndarray:
    """The embedding matrix (vocabulary, hidden_size), float32; every row has norm sqrt(hidden_size)."""
    heads = config.hidden_size // HEAD_SIZE
    part_norm = (_PART * config.hidden_size) ** 0.5
    code = np.random.default_rng(config.seed).choice([-1.0, 1.0], size=(len(tokenizer), heads * _CODE_SIZE))
    word = whitened(words, config.hidden_size - heads * _CODE_SIZE - _MARKS)
    word = np.pad(word, ((0, len(tokenizer) - len(word)), (0, 0)))
    content = np.concatenate([word, code / (heads * _CODE_SIZE) ** 0.5], axis=1) * part_norm
    content[tokenizer.all_special_ids] = 0.0

    vectors = np.pad(content, ((0, 0), (0, _MARKS)))
    vectors[:, _ONE] = 1.0
    vectors[:, _LOG_WEIGHT] = np.maximum(log_weights, _LEAST_LOG_WEIGHT)
    vectors[tokenizer.all_special_ids, _LOG_WEIGHT] = _LEAST_LOG_WEIGHT
    vectors[tokenizer.bos_token_id, _IS_BOS] = 1.0
    vectors[tokenizer.eos_token_id, _IS_EOS] = 1.0
    vectors[:, _FILLER] = np.sqrt(config.hidden_size - (vectors**2).sum(axis=1))
    return vectors.astype(np.float32)


@torch.no_grad()
def write_weighted_mean(model: MistralModel, inputs: torch.Tensor) -> None:
    """Set the weights so that the last token's state is the weighted mean that the module's docstring describes."""
    size = model.config.hidden_size
    heads = size // HEAD_SIZE
    model.embed_tokens.weight.copy_(inputs)
    for layer in model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    content = size - _MARKS
    first_code = content - heads * _CODE_SIZE
    first_of_head = torch.arange(heads) * HEAD_SIZE
    slowest = first_of_head + _SLOW_PAIR
    scale = HEAD_SIZE**0.5  # cancels the division of the scores by it

    counting = model.layers[0].self_attn
    for projection in (counting.q_proj, counting.k_proj, counting.v_proj):
        projection.weight.zero_()
    # the dimensions of a head that hold its code: the slow half of both sides of the rotation
    half = HEAD_SIZE // 2
    places = torch.tensor([*range(half // 2, half - 1), *range(half + half // 2, HEAD_SIZE - 1)])
    copy_score = _COPY_SCORE / (_PART * size / heads)  # a code's squared length
    for head in range(heads):
        codes = torch.arange(_CODE_SIZE) + first_code + head * _CODE_SIZE
        counting.q_proj.weight[head * HEAD_SIZE + places, codes] = copy_score * scale
        counting.k_proj.weight[head * HEAD_SIZE + places, codes] = 1.0
    counting.q_proj.weight[slowest, _ONE] = _COPY_SCORE * scale
    counting.k_proj.weight[slowest, _IS_BOS] = 1.0
    counting.v_proj.weight[first_of_head, _IS_BOS] = 1.0
    counting.o_proj.weight[_LOG_WEIGHT, first_of_head] = _REPEAT_FACTOR / heads

    averaging = model.layers[-1].self_attn
    keep = torch.zeros(size)
    keep[:content] = 1.0
    for projection in (averaging.q_proj, averaging.k_proj):
        projection.weight.zero_()
    averaging.q_proj.weight[slowest, _IS_EOS] = scale
    averaging.k_proj.weight[slowest, _LOG_WEIGHT] = 1.0
    averaging.v_proj.weight.copy_(torch.diag(keep))
    averaging.o_proj.weight.copy_(torch.eye(size))
    model.norm.weight.copy_(keep)
