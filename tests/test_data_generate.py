"""Documents alone: a model writes queries, and those that find their document again are trained on."""

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from chat_server import ChatServer
from tiny_data import WORDS, write_encoder, write_recipe, write_table

from common.cli import InputError, Unfinished
from common.steps import read_manifest
from dataset_builders import language_models
from dataset_builders.build import main, make_step, plan_graded
from dataset_builders.build_record import Build
from dataset_builders.card import card_for
from dataset_builders.data_recipe import load_recipes
from dataset_builders.generate import Generate, chat, read_queries
from dataset_builders.language_models import LocalModel

DOCUMENTS = 100
INVENTED = 10  # documents whose query the stand-in makes of another document's words


def section(**keys) -> Generate:
    return Generate(**{"kind": "generate", "model": "x", **keys})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Documents of 12 words each, without queries, and an encoder that knows the words."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 12, replace=False)) for _ in range(DOCUMENTS)]
    write_table(folder / "documents.parquet", doc_id=[f"d{row:03d}" for row in range(DOCUMENTS)], text=texts)
    return folder / "documents.parquet", write_encoder(folder / "encoder"), texts


@pytest.fixture
def server(inputs):
    """Every other word of the document; of the first INVENTED documents, of another one."""
    texts = inputs[2]

    def answer(document: str) -> str:
        row = texts.index(document) if document in texts else 0
        words = texts[(row + 50) % DOCUMENTS if row < INVENTED else row].split()
        one, other = " ".join(words[1::2]), " ".join(words[10::-3])
        return f'Here are two queries:\n1. {one}\n2. {one.upper()}\n3) "{other}"\n- {document}'

    with ChatServer(answer) as server:
        yield server


def write(folder: Path, inputs, server, queries=None, **keys) -> list[str]:
    source = {"kind": "local", "path": str(inputs[0]), "holdout": 0.2, "language": "de"}
    source["queries"] = {"kind": "generate", "model": server.address, **(queries or {})}
    recipe = write_recipe(folder / "recipe.yaml", folder, inputs[1], source=source, teacher={"kind": "hybrid"}, **keys)
    return ["--config", str(recipe), "--output_dir", str(folder / "data")]


def test_documents_alone_become_graded_data(inputs, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    arguments = write(tmp_path, inputs, server, {"seed": 3})
    main(arguments)
    table = pl.read_parquet(tmp_path / "data" / "corpus" / "generated.parquet")
    assert len(table) == 5 * DOCUMENTS and len(server.requests) == 1 + DOCUMENTS
    first = table.group_by("document_id", maintain_order=True).agg("reason", "rank").sort("document_id")
    invented, own = first["reason"][:INVENTED].explode(), first["reason"][INVENTED:]
    assert {*invented[1::5]} <= {"document ranked too low", "document not found"}, "they are about another document"
    assert own.list.to_array(5).unique(maintain_order=True).to_list()[0] == [
        "introduction",
        None,
        "duplicate",
        None,
        "copied from the document",
    ]
    kept = table.filter(pl.col("reason").is_null())
    assert kept["rank"].max() <= 10 and len(kept) > 1.8 * (DOCUMENTS - INVENTED)

    corpus = tmp_path / "data" / "corpus"
    qrels = pl.read_parquet(corpus / "qrels.parquet")
    assert {*qrels["split"]} == {"train", "validation", "test"}
    assert qrels.group_by("document_id").agg(pl.col("split").n_unique())["split"].max() == 1
    pairs, manifest = kept.select("query_id", "document_id"), read_manifest(corpus)
    leaking = pairs.join(qrels, on=["query_id", "document_id"], how="anti")
    assert len(qrels) == len(pairs) - len(leaking) and len(leaking) == manifest["leaking_queries_dropped"] < 5
    assert manifest["documents"] == DOCUMENTS, "documents that lost their queries are searched still"
    assert read_manifest(tmp_path / "data" / "mined")["rows"] > 80

    request = server.requests[-1]
    assert request["model"] == "stand-in" and request["temperature"] == 0.7 and request["max_tokens"] == 64
    assert len({body["seed"] for body in server.requests}) > DOCUMENTS and {*server.keys} == {"Bearer a-key"}
    assert "Write 2 different queries" in (asked := request["messages"][-1]["content"]) and "in German" in asked
    assert "Task of the search: Find the text." in asked
    card = card_for(tmp_path / "data" / "hub", "you/data")
    assert server.address not in card and "a-key" not in card and "machine-generated" in card
    assert "No person asked these queries" in card and "(`stand-in`)" in card and asked.partition("\n\n")[2] in card
    lines_dropped = manifest["lines_dropped"]
    assert sum(lines_dropped.values()) == 5 * DOCUMENTS - len(kept) and lines_dropped["duplicate"] == DOCUMENTS
    assert all(f"{reason} {count}" in card for reason, count in lines_dropped.items())
    page = (corpus / "generated.html").read_text()
    assert "500 lines that a model wrote for 100 documents" in page and "copied from the document" in page

    main([*arguments, "--keep_within", "1"])
    assert len(server.requests) == 1 + DOCUMENTS, "another filter asks the model nothing"
    assert "generated: done before" in capsys.readouterr().out
    assert pl.read_parquet(corpus / "generated.parquet").filter(pl.col("reason").is_null())["rank"].max() == 1


def test_what_a_server_left_unfinished_is_gone_on_with_to_the_same_result(inputs, server, tmp_path, monkeypatch):
    monkeypatch.setattr(language_models.Server, "size", 8)
    monkeypatch.setattr(language_models, "WAIT", 0.0)
    keys = {"documents": 30, "requests": 1}
    (tmp_path / "whole").mkdir()
    server.failures = 3  # fewer than are tried
    with pytest.raises(InputError, match=r"HTTP 503: .*; start the server, check the address"):
        main(write(tmp_path, inputs, server, keys))
    assert not (tmp_path / "data").exists() and server.failures == 2
    server.failures, failures = 0, 10
    answer, left = server.answer, iter([*range(20), None, *range(99)])

    def answer_and_fail(document: str) -> str:
        if next(left) is None:
            server.failures = failures
        return answer(document)

    server.answer = answer_and_fail
    with pytest.raises(Unfinished, match=r"HTTP 503: .* \(6 times\); run the same command again when it answers"):
        outputs(write(tmp_path, inputs, server, keys))
    server.failures, failures, left = 0, 3, iter([*range(5), None, *range(99)])
    before = len(server.requests)
    found = outputs(write(tmp_path, inputs, server, keys))
    assert len(server.requests) - before == 1 + 30 - 16, "two of four shards were there"
    server.answer, server.failures = answer, 0
    assert len(found) == 30 and found.equals(outputs(write(tmp_path / "whole", inputs, server, keys)))
    more = outputs(write(tmp_path / "whole", inputs, server, {**keys, "documents": 40}))
    assert more.head(30).equals(found), "more documents hold those of fewer"


def outputs(arguments: list[str]) -> pl.DataFrame:
    """Of the first step of a build, which alone is made."""
    folder = Path(arguments[-1])
    build = Build(folder, load_recipes(arguments[1], [], folder)[folder])
    make_step(build, plan_graded(build.recipe)[0])
    return pl.read_parquet(folder / "generated" / "outputs.parquet")


TEMPLATE = "{% for turn in messages %}{{ turn.role }} {{ turn.content }} </s>{% endfor %}assistant"


@pytest.fixture(scope="module")
def instruct_model(tiny_decoder, tmp_path_factory):
    """The tiny decoder with a head and a chat template, which answers at random."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, MistralForCausalLM

    folder = tmp_path_factory.mktemp("instruct")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_decoder, eos_token_id=2, max_position_embeddings=2048)
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_in_this_process_answers_each_document_as_it_would_alone(instruct_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keys = section(model=str(instruct_model), temperature=0, max_new_tokens=12, dtype="float32", batch_tokens=2000)
    texts = ["parse a date", "how do i read and write a file given a list", "sort"]
    chats = [chat(keys, "Given a question, retrieve its answer", None, text) for text in texts]
    found = LocalModel(keys, tuple(chats))(0)
    model, tokenizer = (kind.from_pretrained(instruct_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for turns, row in zip(chats, found, strict=True):
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
        assert row["is_cut"] == (2 not in made)
        # what was cut in its only line has none that is whole
        assert row["text"] == ("" if row["is_cut"] else tokenizer.decode(made, skip_special_tokens=True))
    drawn = [
        LocalModel(keys.model_copy(update={"temperature": 1.0, "seed": seed}), tuple(chats)) for seed in (0, 0, 1)
    ]
    answers = [[text for text, _ in model.answers(chats, 0)] for model in drawn]
    assert answers[0] == answers[1] != answers[2]
    language_models.causal_model.cache_clear()


LINES = {
    "1. How to fly?": ("How to fly?", None),
    "- “what wings do”": ("what wings do", None),
    "Query 2: wings of a bird": ("wings of a bird", None),
    "1.5 mg of aspirin": ("1.5 mg of aspirin", None),
    "二、": ("二、", "too short"),
    "Sure, two queries:": ("Sure, two queries:", "introduction"),
    "A title?": ("A title?", "copied from the document"),
    "they beat the air when they": ("they beat the air when they", "copied from the document"),
    "beat the air": ("beat the air", None),
    "when do baltic herring spawn": ("when do baltic herring spawn", "copied from the prompt"),
    "why " * 60: (("why " * 60).strip(), "too long"),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_query_or_goes_for_a_reason(line):
    document = "A title About wings. They beat the air when they fly."
    assert list(read_queries(f"<think>no\n</think>\n{line}\n\n", document, section())) == [LINES[line]]


def test_examples_of_ones_own_take_the_place_of_ours():
    examples = [{"document": "A manual.", "queries": ["why does it hum", "how loud", "where"]}]
    turns = chat(section(examples=examples, per_document=2), "Find it.", None, "x" * 3000)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"] == "why does it hum\nhow loud" and turns[2]["content"].count("x") == 2000
    assert re.search(r"Find it\.\nWrite 2 .* that this document answers, one", turns[2]["content"])


def test_bad_input_is_told_in_one_line(inputs, server, tiny_decoder, tmp_path):
    with pytest.raises(InputError, match="has no chat template; name an instruct model"):
        main([*write(tmp_path, inputs, server, {"model": str(tiny_decoder)})])
    with pytest.raises(InputError, match=r"9/v1/models: .*refused.*; start the server"):
        main([*write(tmp_path, inputs, server, {"model": "http://127.0.0.1:9/v1"})])
    with pytest.raises(InputError, match=r"num_pairs does not go with source\.queries"):
        main([*write(tmp_path, inputs, server), "--num_pairs", "3"])
    write_table(tmp_path / "faq.parquet", question=["why"], answer=["so"])
    with pytest.raises(InputError, match=r"column 'question' holds queries already; leave source\.queries out"):
        main([*write(tmp_path, inputs, server), "--path", str(tmp_path / "faq.parquet")])
    (tmp_path / "set").mkdir()
    write_table(tmp_path / "set" / "corpus.parquet", _id=["a"], text=["b"])
    write_table(tmp_path / "set" / "queries.parquet", _id=["a"], text=["b"])
    with pytest.raises(InputError, match=r"holds queries already; .* name the documents' file alone"):
        main([*write(tmp_path, inputs, server), "--path", str(tmp_path / "set")])
    with pytest.raises(InputError, match="documents alone get queries from a model"):
        main(
            [*write(tmp_path, inputs, server), "--path", str(tmp_path / "set" / "corpus.parquet"), "--queries", "null"]
        )
    assert not (tmp_path / "data").exists()
    server.answer = lambda document: "Sure:\nno\n"
    with pytest.raises(InputError, match=r"of 200 lines that http.* wrote none stays .*'too short': 100"):
        main(write(tmp_path, inputs, server))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["generated"]
