"""The model card: all of it comes out of a run's files, its code runs, and its metadata are what the Hub reads."""

import doctest
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from jinja2 import UndefinedError
from tiny_data import write_encoder, write_recipe, write_set

from common.cli import InputError
from common.steps import files_of, fingerprint, write_json
from dataset_builders import build
from eval import model_card, report, retrieval
from eval.evidence import provenance, read_evidence
from eval.model_card import (
    FORMULAS,
    POOLED,
    card_files,
    card_metadata,
    render_adapter_card,
    render_card,
    settings_table,
)
from modeling.encoder import POOLING, build_encoder
from modeling.objectives import OBJECTIVES
from modeling.prompts import baked_prompts

ROOT = Path(__file__).parents[1]
PROMPTS = baked_prompts("Given a question, retrieve its answer")
TEXTS = ["how do I parse a date", "", "sort a list in place", "read " * 100]
# SciFact is none of the benchmark's tasks
TASKS = {
    "ArguAna": ("test", "ndcg_at_10", 0.5),
    "STSBenchmark": ("test", "cosine_spearman", 0.75),
    "SciFact": ("test", "ndcg_at_10", 0.9),
}


@pytest.fixture(scope="module")
def facts():
    """As modeling.verify tells them of the tiny model."""
    facts = {"dimensions": 32, "max_seq_length": 64, "parameters": 18_560, "dtype": "float32", "backbone": "mistral"}
    return facts | {"prompts": PROMPTS, "eos": "</s>", "reference_dtype": "float32", "reference_distance": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of dataset_builders, compared with a held-out set."""
    folder = tmp_path_factory.mktemp("made")
    write_encoder(folder / "teacher")
    write_recipe(
        folder / "data.yaml",
        write_set(folder / "questions"),
        folder / "teacher",
        sts={"num_rows": 20},
        decontamination={"local": {"SciFact": str(write_set(folder / "heldout", seed=1))}},
    )
    build.main(["--config", str(folder / "data.yaml"), "--output_dir", str(folder / "data")])
    return folder / "data"


@pytest.fixture(scope="module")
def run(tiny_run, data, tmp_path_factory):
    """The tiny run as train_st.py leaves it, evaluated and reported, trained on `data` by a full recipe."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("card") / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {"dataset_name": str(data / "hub"), "learning_rate": "1e-4", "hub_token": "hf_secret"}
    recipe |= {"output_dir": str(run), "lora_r": 8, "shots": 2}
    recipe["stages"] = [
        {"name": "sts", "loss": "cosent", "dataset_config": "sts"},
        {"name": "retrieval", "use_peft": True, "num_negatives": 3, "lora_target_modules": ["q_proj", "v_proj"]},
    ]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    retrieval.main(["--run", str(run), "--data", str(run / "data"), "--output_dir", str(run / "results")])
    report.main([str(run / "results"), "--output_dir", str(run / "report")])
    write_mteb(run / "results", run / "model", TASKS)
    return run


@pytest.fixture(scope="module")
def evidence(run):
    return read_evidence(run)


@pytest.fixture(scope="module")
def card(facts, evidence):
    return render_card("org/name", facts, evidence, license="apache-2.0")


def write_mteb(results, model, tasks):
    """What eval.run_mteb leaves, for real tasks that were not run."""
    folder = results / "results" / "runs__model" / fingerprint(files_of(model))
    folder.mkdir(parents=True)
    (folder / "model_meta.json").write_text("{}")
    for name, (split, metric, score) in tasks.items():
        write_result(folder, name, split, metric, {"default": score})


def write_result(folder, name, split, metric, scores):
    """One task's file; `scores` by subset."""
    folder.mkdir(parents=True, exist_ok=True)
    subsets = [
        {"hf_subset": subset, "languages": ["eng-Latn"], "main_score": score, metric: score}
        for subset, score in scores.items()
    ]
    write_json(
        folder / f"{name}.json",
        {
            "dataset_revision": f"revision-of-{name}",
            "task_name": name,
            "mteb_version": "2.26.24",
            "scores": {split: subsets},
            "evaluation_time": 1.0,
            "kg_co2_emissions": None,
        },
    )


def code_blocks(card):
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def plain(recipe, **changed):
    """Evidence of a run that has only its recipe."""
    empty = {"ledger": {"data": [], "stages": []}, "versions": {}, "commit": None, "metrics": None, "mteb": []}
    empty |= {"ablation": None, "data": {}, "evaluated": None, "pictures": {}}
    return {"recipe": recipe, **empty, **changed}


def test_metadata_is_what_the_hub_reads(card, run):
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.language) == (
        "sentence-transformers",
        "sentence-similarity",
        "en",
    )
    assert data.license == "apache-2.0" and "mteb" in data.tags and "graded-embedder" in data.tags
    assert data.base_model is None and data.datasets is None  # a local student, local data
    index = yaml.safe_load(card.split("---")[1])["model-index"]
    assert [entry["name"] for entry in index] == ["name"]
    results = {(r.dataset_name, r.metric_type): r for r in data.eval_results}
    assert len(results) == len(data.eval_results) == 6
    assert all(isinstance(result, EvalResult) for result in results.values())
    final = json.loads((run / "results" / "metrics.json").read_text())["systems"][-2]
    own = results["held-out queries of the training data", "ndcg_at_10"]
    assert (own.metric_value, own.dataset_split, own.metric_name) == (final["nDCG@10"], "test", "nDCG@10")
    arguana = results["MTEB ArguAna", "ndcg_at_10"]
    assert (arguana.dataset_type, arguana.dataset_revision) == ("mteb/arguana", "revision-of-ArguAna")
    assert (arguana.dataset_split, arguana.metric_value) == ("test", 0.5)
    assert results["MTEB STSBenchmark", "cosine_spearman"].task_type == "STS"


def test_metadata_names_only_what_the_hub_has(tmp_path):
    stages = [{"name": "a", "dataset_name": "org/pairs"}, {"name": "b", "dataset_name": str(tmp_path)}]
    recipe = {"model_name_or_path": "mistralai/Mistral-7B-v0.1@main", "stages": stages}
    data = card_metadata("org/name", plain(recipe), "mit", ["org/graded"])
    assert (data.base_model, data.base_model_relation) == ("mistralai/Mistral-7B-v0.1", "finetune")
    assert data.datasets == ["org/graded", "org/pairs"] and data.eval_results is None
    recipe = {"model_name_or_path": str(tmp_path), "dataset_name": "./x", "stages": [{"name": "a"}]}
    data = card_metadata("org/name", plain(recipe))
    assert (data.base_model, data.datasets) == (None, None) and "base_model_relation" not in data.to_dict()


def test_scores_on_a_source_of_the_hub_name_it_and_its_commit(evidence):
    """Two kinds of scores, told apart: the run's own held-out queries, and mteb's tasks."""
    source = {"dataset": "org/questions", "title": "questions", "commit": "0" * 40}
    on_hub = {**evidence, "evaluated": source, "mteb": []}
    [result, *_] = card_metadata("org/name", on_hub).eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_revision) == (
        "org/questions",
        "questions",
        "0" * 40,
    )
    local = {"dataset": None, "title": "My questions"}
    for data, datasets, named in (
        ({"x": local}, ["org/graded"], "org/graded"),
        ({"x": local, "y": None}, ["org/graded"], "my-questions"),
        ({"x": local}, [], "my-questions"),
    ):
        here = {**evidence, "evaluated": local, "data": data, "mteb": []}
        assert card_metadata("org/name", here, None, datasets).eval_results[0].dataset_type == named


def test_first_screen_says_what_how_good_and_what_licence(card):
    screen = card.split("## Use")[0].split("# org/name")[1]
    assert re.search(r"\*\*How good:\*\* nDCG@10 0\.\d{3} on 3 held-out queries over 6 documents, where BM25", screen)
    assert "62.50 on average over 2 of the 41 tasks of MTEB(eng, v2)" in screen
    assert "**Licence:** apache-2.0" in screen and "32 dimensions" in screen
    assert card.index("## Use") < card.index("## Evaluation") < card.index("## Training") < card.index("## Limits")


def test_card_tells_recipe_costs_data_and_scores(card, data):
    for line in (
        "| retrieval | 20 | 4,000 | 61 | cpu | 3.00 GiB | 0.02 |",
        "| evaluation | | | ",
        "| **all** | | 8,000 | **",
        "| loss | cosent | soft_info_nce |",
        "| lora_r |  | 8 |",
        "| lora_target_modules |  | q_proj, v_proj |",
        "| num_negatives |  | 3 |",
        "| learning_rate | 1e-4 | 1e-4 |",
        "| per_device_train_batch_size | 8 | 8 |",  # nobody set it
        "| optimizer steps | 20 | 20 |",
        "| ArguAna | Retrieval | ndcg_at_10 | 50.00 |",
        "| SciFact | Retrieval | ndcg_at_10 | 90.00 |",
        "| Retrieval | 1/10 | 50.00 |",
        "one block for each, in this form",
        "Decontamination: compared with the test texts of 1 evaluation task (SciFact); dropped: queries 0",
        "Negatives: 3 a row (`top`), only those whose label is below 0.95 times the positive's",
        "Teacher: `teacher` (bi-encoder)",
        "20 rows `sts`",
        "not every source states its `training_datasets`",
        "![nDCG@10 of every system](systems.png)",
    ):
        assert line in card, line
    told = re.findall(r"^\| `(\S+)` \| `\"Instruct: ", card, flags=re.MULTILINE)
    assert sorted(told) == sorted(name for name, prompt in PROMPTS.items() if prompt) and len(told) == 42


def test_no_secret_and_no_path_of_the_publisher(card, run, data):
    assert "hf_secret" not in card and "hub_token" not in card
    for folder in (run, data, ROOT, Path.home()):
        assert f"{folder}/" not in card
    assert "/tmp" not in card
    assert "dataset_name: hub" in card  # its name is all that is told of a folder


def test_paths_inside_the_repository_stay_useful():
    public = model_card.public_recipe_text({"dataset_name": f"{ROOT}/runs/x/hub", "output_dir": "runs/y"})
    assert yaml.safe_load(public) == {"dataset_name": "runs/x/hub", "output_dir": "runs/y"}


def links(text):
    """Targets of Markdown links and pictures, outside of code."""
    text = re.sub(r"^(`{3,}).*?^\1`*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_dead_link_in_the_card(card, facts, evidence):
    """Relative ones are files that are published beside it, or headings of its own."""
    files = card_files(evidence)
    assert "systems.png" in files and all(path.is_file() for path in files.values())
    adapted = render_card("org/name", facts, evidence, adapter_repo_id="org/name-adapter", datasets=["org/data"])
    for text in (card, adapted):
        found = links(text)
        assert len(found) >= 4
        relative = [link for link in found if not link.startswith("https://huggingface.co/")]
        assert {link for link in relative if not link.startswith("#")} <= set(files)
        assert {link[1:] for link in relative if link.startswith("#")} <= anchors(text)
    assert "https://huggingface.co/org/name-adapter" in links(adapted)
    assert "https://huggingface.co/datasets/org/data" in links(adapted)


def test_no_dead_link_in_readme_and_docs():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert len(pages) >= 3
    for page in pages:
        text = page.read_text()
        for link in links(text):
            if not link.startswith(("http://", "https://")):
                name, _, anchor = link.partition("#")
                assert not name or (page.parent / name).exists(), f"{page.name}: {link}"
                assert not anchor or name or anchor in anchors(text), f"{page.name}: {link}"


def test_only_html_that_the_hub_shows(card):
    tags = set(re.findall(r"</?(\w+)", re.sub(r"`[^`\n]*`|```.*?```", "", card, flags=re.DOTALL)))
    assert tags == {"details", "summary"}
    assert card.count("<details>") == card.count("</details>") >= 3


def test_the_card_says_what_a_high_score_is(card, facts, evidence):
    row = evidence["metrics"]["systems"][-2]
    quantiles = " | ".join(f"{value:.2f}" for value in row["cosines"]["relevant"])
    assert f"| its relevant documents | {quantiles} |" in card and len(row["cosines"]["relevant"]) == 5
    assert "| cosine of a query and | 5 % are below | 25 % are below | 50 %" in card
    assert "(#what-is-a-high-score)" in card and "### What is a high score?\n" in card
    # results from before there were any
    rows = [{key: value for key, value in row.items() if key != "cosines"} for row in evidence["metrics"]["systems"]]
    old = render_card("org/name", facts, {**evidence, "metrics": {**evidence["metrics"], "systems": rows}})
    assert "high score" not in old and "For a threshold, look at scores of your own pairs." in old


def test_the_card_tells_how_to_use_a_few_shot_prompt(card, facts, evidence):
    prompts = baked_prompts("Find it", [("q1", "p1"), ("q2", "p2")])
    few_shot = render_card("org/name", {**facts, "prompts": prompts}, evidence)
    assert 'model.encode(queries, prompt_name="query-2-shot")' in few_shot and "--shots 2" in few_shot
    assert "| `query-2-shot` | `" in few_shot and "prompt_name=" not in card
    # its scores are no headline
    systems = evidence["metrics"]["systems"]
    more = [*systems, {**systems[-1], "name": "final, 2-shot", "shots": 2, "nDCG@10": 0.999}]
    told = render_card("org/name", facts, {**evidence, "metrics": {**evidence["metrics"], "systems": more}})
    assert "| final, 2-shot | 0.999 |" in told and "nDCG@10 0.999" not in told


def test_the_ledger_tells_what_share_prefix_saved(card, facts, evidence):
    before = report.format_ledger(evidence["ledger"], evidence["metrics"])
    assert "share_prefix" not in before  # nobody asked for it
    counts = {"tokens_computed": 600, "tokens_padded": 1000}
    rows = evidence["ledger"]["stages"]
    ledger = {**evidence["ledger"], "stages": [rows[0], {**rows[1], "share_prefix": counts}]}
    after = report.format_ledger(ledger, evidence["metrics"])
    shown = render_card("org/name", facts, {**evidence, "ledger": ledger})
    assert after in shown and "\nSaved: of all tokens" in shown and "\nSaved: of" not in card
    assert "| step | steps | tokens | saved by share_prefix | seconds |" in after
    assert "| sts | 20 | 4,000 | | 61 |" in after and "| retrieval | 20 | 4,000 | 400 of 1,000 (40%) | 61 |" in after
    assert {line.count("|") for line in after.splitlines()} == {9}


def test_an_undefined_name_in_the_template_is_an_error(facts, evidence):
    """huggingface_hub's own renderer would leave a hole in the card without a word."""
    for name in ("eos", "backbone", "dimensions"):
        with pytest.raises(UndefinedError, match=name):
            render_card("org/name", {key: fact for key, fact in facts.items() if key != name}, evidence)


@pytest.mark.parametrize("pooling", POOLED)
def test_every_way_to_use_it_gives_the_same_vectors(pooling, tiny_decoder, facts, tmp_path, capsys):
    """The card's own lines, by plain transformers, against sentence-transformers; for each pooling."""
    folder = tmp_path / "model"
    encoder = build_encoder(tiny_decoder, max_seq_length=64, prompts=PROMPTS, pooling=pooling)
    encoder.save(str(folder), create_model_card=False)
    recipe = {"student": {"teacher": "x"}, "pooling": pooling, "stages": [{"name": "only"}]}
    card = render_card("org/name", facts, plain(recipe))
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
    served = "--pooler-config" in card
    assert served == (pooling in ("eos", "mean"))


def test_lines_for_transformers_cover_every_pooling_and_loss():
    assert POOLED.keys() == POOLING.keys()
    assert FORMULAS.keys() == {*OBJECTIVES, "cosent"}


def test_a_base_of_the_hub_is_linked_at_its_revision(facts):
    recipe = {
        "model_name_or_path": "org/base",
        "model_revision": "abc",
        "stages": [{"name": "a", "dataset_name": "o/d"}],
    }
    card = render_card("org/name", facts, plain(recipe, data={"o/d": None}))
    assert "It is [org/base](https://huggingface.co/org/base) at `abc`" in card
    assert "see [o/d](https://huggingface.co/datasets/o/d)" in card
    assert "not evaluated yet" in card and "Not evaluated: nothing is known" in card
    assert "none is stated for the weights" in card and "at a commit that was not noted" in card
    known = plain(recipe, commit="c0ffee", versions={"torch": "2.13.0"})
    assert "at commit `c0ffee`, with torch 2.13.0." in render_card("org/name", facts, known)
    changed = render_card("org/name", facts, {**known, "commit": "c0ffee-dirty"})
    assert "at commit `c0ffee`, plus changes that are in no commit, with torch" in changed


def test_adapter_card_belongs_to_base_and_model(facts, evidence):
    adapter = {"base": "org/base", "revision": "abc", "distance": 0.00012, "dtype": "float32"}
    card = render_adapter_card("org/name-adapter", "org/name", {**facts, "adapter": adapter}, evidence, license="mit")
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "org/base", "adapter")
    assert data.license == "mit"
    assert {"https://huggingface.co/org/name", "https://huggingface.co/org/base"} <= set(links(card))
    assert "at most 0.0001 apart, in float32" in card
    assert "r 8, alpha 32, dropout 0.05, on q_proj, v_proj" in card


def test_the_adapter_cards_lines_run(tiny_decoder, facts, evidence, tmp_path):
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
    adapter = {"base": "org/base", "revision": "main", "distance": None, "dtype": "float32"}
    card = render_adapter_card("org/name-adapter", "org/name", {**facts, "adapter": adapter}, evidence)
    assert "measured" not in card
    [lines] = code_blocks(card)
    names = {}
    exec(lines.replace("org/name-adapter", str(tmp_path / "adapter")).replace("org/base", str(tiny_decoder)), names)
    expected = encoder.encode(TEXTS, prompt_name="query")
    assert np.allclose(names["encode"](TEXTS, PROMPTS["query"]), expected, atol=1e-6)
    assert np.abs(encoder.encode(TEXTS) - before).max() > 0.1  # the adapter does something


def test_ablations_stand_with_their_intervals_and_notes(facts, evidence, run, tmp_path):
    """The table is eval.ablate's own; its picture goes along."""
    costs = {"steps": 60, "tokens": 9000, "training_seconds": 12.0, "peak_memory_bytes": 2**30}
    scores = {"mean": 0.5, "low": 0.4, "high": 0.6, "seeds": [0, 1], "standard_deviation": 0.01, **costs}
    rows = [{"name": "kl", **scores, "difference": {"mean": 0.02, "low": -0.01, "high": 0.05}}]
    rows = [{"name": "soft_info_nce", **scores, "difference": None}, *rows]
    result = {"metric": "nDCG@10", "split": "test", "chosen_on": "test", "chosen": "kl", "baseline": "soft_info_nce"}
    result |= {"rows": rows, "counts": {"queries": 545, "documents": 6000}, "notes": ["Budgets are equal."]}
    write_json(tmp_path / "ablation.json", {**result, "interval": {"level": 0.95, "method": "Bootstrap."}})
    (tmp_path / "ablation.png").write_bytes(b"")
    found = read_evidence(run, ablations=tmp_path)
    card = render_card("org/name", facts, found)
    assert "| **kl** | 0.5000 [0.4000, 0.6000] | +0.0200 [-0.0100, +0.0500] | 0.0100 | 2 |" in card
    assert "Bootstrap. nDCG@10 on 545 queries of split test." in card and "- Budgets are equal." in card
    assert card_files(found)["ablation.png"] == tmp_path / "ablation.png" and "](ablation.png)" in card
    with pytest.raises(InputError, match=r"ablation\.json: no such file"):
        read_evidence(run, ablations=tmp_path / "nowhere")
    write_json(tmp_path / "ablation.json", {"rows": []})
    with pytest.raises(InputError, match=r"ablation\.json: not written by eval\.ablate"):
        read_evidence(run, ablations=tmp_path)


def test_a_model_without_instruction_says_so(facts):
    bare = {**facts, "prompts": {**PROMPTS, "query": ""}}
    card = render_card("org/name", bare, plain({"stages": [{"name": "a"}]}))
    assert "Queries and documents are both encoded as they are." in card and "encode_query` puts" not in card


def test_several_data_sets_of_a_stage_stand_in_one_cell():
    datasets = [{"name": "x", "loss": "kl"}, {"name": "y", "shots": 2, "instruction": "a | b"}]
    table = settings_table({"stages": [{"name": "one", "datasets": datasets}]}, {"stages": []})
    assert "| loss | kl; soft_info_nce |" in table and "| shots | 0; 2 |" in table
    assert "| instruction | a \\| b |" in table and "| optimizer steps |  |" in table


def test_provenance_is_that_of_the_manifests(data, tmp_path):
    found = provenance(data / "hub")
    assert (found["title"], found["split"], found["commit"]) == ("questions", "train", None)
    assert found["rows"]["train"] == 40 and found["compared"] == ["SciFact"] and found["mined"]
    assert found["models"] == {"dense": "teacher", "teacher": "teacher"}
    assert provenance(tmp_path) is None


def test_zero_shot_share_needs_every_source_to_state_its_own():
    entry = {"benchmark": "MTEB(eng, v2)"}
    known = {"a": {**entry, "training_datasets": ["ArguAna"]}, "b": {**entry, "training_datasets": ["MSMARCO"]}}
    told = model_card.disclosure(known)
    assert told["training_datasets"] == ["ArguAna", "MSMARCO"] and told["trained_on"] == ["ArguAna"]
    assert 90 < told["zero_shot_percentage"] < 100
    on_e5 = model_card.disclosure(known, "intfloat/e5-mistral-7b-instruct")  # which mteb knows to have seen FEVER
    assert on_e5["training_datasets"] == told["training_datasets"] and "FEVERHardNegatives" in on_e5["trained_on"]
    assert on_e5["zero_shot_percentage"] < told["zero_shot_percentage"]
    assert model_card.disclosure({**known, "c": None}) is None
    assert model_card.disclosure({**known, "c": {**entry, "training_datasets": None}}) is None
    assert model_card.disclosure({}) is None


def test_results_of_a_commit_with_the_same_files_are_ours(run, tmp_path):
    commits = ["a" * 40, "b" * 40]
    write_mteb(tmp_path, run / "model", {"ArguAna": ("test", "ndcg_at_10", 0.25)})
    [written] = tmp_path.glob("results/*/*")
    written.rename(written.with_name(commits[0]))
    [found] = read_evidence(run, tmp_path, commits=commits)["mteb"][:1]
    assert (found.task_name, found.get_score()) == ("ArguAna", 0.25)
    with pytest.raises(InputError, match=r"neither metrics\.json nor mteb's results"):
        read_evidence(run, tmp_path, commits=commits[1:])


def test_results_of_other_weights_are_not_ours(run, tmp_path):
    """mteb's results are found by the hash of the weights: after another training the old ones are not told."""
    copy = shutil.copytree(run, tmp_path / "run")
    config = copy / "model" / "config_sentence_transformers.json"
    config.write_text(config.read_text().replace("its answer", "an answer"))
    assert read_evidence(run)["mteb"] and not read_evidence(copy)["mteb"]


def test_a_named_folder_of_results_comes_first(run, tmp_path):
    write_mteb(tmp_path / "elsewhere", run / "model", {"ArguAna": ("test", "ndcg_at_10", 0.25)})
    found = read_evidence(run, tmp_path / "elsewhere")
    assert found["metrics"]
    scores = {result.task_name: result.get_score() for result in found["mteb"]}
    assert scores == {"ArguAna": 0.25, "STSBenchmark": 0.75, "SciFact": 0.9}
    with pytest.raises(InputError, match=r"neither metrics\.json nor mteb's results"):
        read_evidence(run, tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "{}", '{"task_name": "NoTask", "dataset_revision": "1", "scores": {}}'])
def test_a_broken_result_of_mteb_is_one_line(run, tmp_path, content):
    copy = shutil.copytree(run, tmp_path / "run")
    [path] = (copy / "results" / "results").rglob("ArguAna.json")
    path.write_text(content)
    with pytest.raises(InputError, match=r"ArguAna\.json: not a result that mteb can read") as caught:
        read_evidence(copy)
    assert "\n" not in str(caught.value)


def test_no_text_of_a_recipe_breaks_the_card(facts, tiny_encoder, capsys):
    """Tables, fences, metadata and code hold whatever an instruction is made of."""
    nasty = 'find | what\n---\n```python\n</details> "quoted" \\ `ticks` {{ eos }} ünï \u2028 東京'
    recipe = {"instruction": nasty, "student": {"teacher": "x"}, "stages": [{"name": "a"}]}
    prompts = {**PROMPTS, "query": f"Instruct: {nasty}\nQuery: "}
    card = render_card("org/name", {**facts, "prompts": prompts}, plain(recipe), license="mit")
    assert ModelCard(card).data.license == "mit"
    rows = re.findall(r"^\| (?:`query`|instruction) \|.*$", card, flags=re.MULTILINE)
    assert len(rows) == 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    told = re.search(r"^````yaml\n(.*?)^````$", card, flags=re.DOTALL | re.MULTILINE).group(1)
    assert yaml.safe_load(told)["instruction"] == nasty
    assert len(code_blocks(card)) == 2
    names = {}
    exec(code_blocks(card.replace("org/name", str(tiny_encoder)))[1], names)
    assert names["queries"].shape == (1, 32)


def test_pictures_of_other_results_are_refused(run, tmp_path):
    """Evaluated anew and not reported anew: table and picture would disagree."""
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((copy / "results" / "metrics.json").read_text())
    write_json(copy / "results" / "metrics.json", {**metrics, "key": "another"})
    with pytest.raises(InputError, match=r"systems.png: drawn from other results .*eval.report"):
        read_evidence(copy)
    shutil.rmtree(copy / "report")
    assert card_files(read_evidence(copy)) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", None, "no such file; the card tells the recipe"),
        ("recipe.yaml", "stages: 3\n", "no list of stages"),
        ("ledger.json", None, "no such file"),
        ("ledger.json", "{}", "not a ledger of train_st.py"),
        ("results/metrics.json", "[]", "not written by eval.retrieval"),
    ],
)
def test_a_broken_run_is_one_line(run, tmp_path, name, content, message):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).unlink() if content is None else (copy / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_evidence(copy)


def test_examples():
    found = doctest.testmod(model_card)
    assert found.attempted > 0 and found.failed == 0
