"""What several rooms' tests share: tiny real models, made on the spot."""

from pathlib import Path

import pytest

WORDS = "instruct query given a question retrieve its answer how do i parse date read write file open close sort list"


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory) -> Path:
    """A plain transformers checkpoint: random 2-layer Mistral, word-level tokenizer that adds `<s> ... </s>`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-decoder"
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", ":", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    MistralModel(
        MistralConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=2,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tiny_decoder) -> Path:
    """`tiny_decoder` as a SentenceTransformer folder: last-token pooling, unit vectors, prompts baked."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    from modeling.prompts import baked_prompts

    folder = tiny_decoder.with_name("tiny-encoder")
    transformer = Transformer(str(tiny_decoder), max_seq_length=64)
    SentenceTransformer(
        modules=[transformer, Pooling(32, pooling_mode="lasttoken"), Normalize()],
        prompts=baked_prompts("Given a question, retrieve its answer"),
    ).save(str(folder))
    return folder
