"""Ablations: runs that resume, failures that stop no other run, bad recipes refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats
from sentence_transformers import SentenceTransformer
from tiny_data import write_encoder, write_recipe, write_set

from common.cli import InputError
from common.steps import folder_step, write_arrow, write_parquet
from dataset_builders import build
from eval import ablation_recipe, ablation_runs
from eval.ablate import main
from eval.ablation_recipe import Ablation, override, read_ablation, read_variants, write_mined_rows
from eval.ablation_runs import runs_folder
from eval.ablation_table import save
from eval.figures import plot_differences
from eval.intervals import bootstrap_interval
from modeling.start import settle

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))


# --- what is run ----------------------------------------------------------------------------------------------------


def test_overrides_are_those_of_flags_and_of_single_stages():
    base = {"loss": "kl", "dataset_name": "x", "instruction": "y", "student": {"teacher": "t", "corpus": "c"}}
    base["stages"] = [{"name": "a", "loss": "cosent"}, {"name": "b", "alpha": 1.0}]
    base["stages"][1]["datasets"] = [{"name": "x", "loss": "ranknet"}]
    overrides = {"b.loss": "bixse", "loss": "info_nce", "stages": "b,a", "student.sif": 2.0}
    changed = override(base, overrides, "out").values
    assert changed["stages"] == [
        {"name": "b", "alpha": 1.0, "datasets": [{"name": "x"}], "loss": "bixse"},
        {"name": "a"},
    ]
    assert (changed["loss"], changed["student"]["sif"]) == ("info_nce", 2.0)
    assert base["stages"][0] == {"name": "a", "loss": "cosent"}  # the next variant starts from it
    assert "student" not in override(base, {"model_name_or_path": "org/name"}, "out").values
    # keys of a stage that is left out
    alone = override(base, {"stages": ["b"], "a.loss": "kl", "mining.seed": 1}, "out")
    assert alone.values["stages"] == [base["stages"][1]]


# --- tiny ablation --------------------------------------------------------------------------------------------------


def write_data(folder: Path, hub: Path) -> Path:
    """What eval.retrieval reads of a build: the documents and queries of `hub`, half of the held-out ones for test."""
    documents, queries, qrels = (pq.read_table(hub / f"{name}.parquet") for name in ("documents", "queries", "qrels"))
    half = ["test" if n % 2 and s == "validation" else s for n, s in enumerate(queries["split"].to_pylist())]
    with folder_step(folder / "corpus", {}) as step:
        write_arrow(step.path / "documents.arrow", documents.to_batches(), documents.schema)
        for name, table in (("queries", queries), ("qrels", qrels)):
            place = table.column_names.index("split")
            write_parquet(step.path / f"{name}.parquet", table.set_column(place, "split", pa.array(half)))
        step.finish()
    return folder


WORDS = ("sort", "read", "open", "find")
PAIRS = [("find a file", f"{word} a file", float(score)) for score, word in enumerate(WORDS)]


def write_pairs(folder: Path) -> Path:
    (folder / "stsb").mkdir(parents=True)
    columns = zip(*PAIRS, strict=True)
    table = pa.table(dict(zip(("sentence1", "sentence2", "score"), map(list, columns), strict=True)))
    pq.write_table(table, folder / "stsb" / "test.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(recipe, hub, tmp_path_factory) -> Path:
    """An ablation of three variants, one of which fails: its prompt leaves no room."""
    folder = tmp_path_factory.mktemp("ablation")
    base = recipe | {"eval_strategy": "no", "num_train_epochs": 1, "learning_rate": "1e-2"}
    (folder / "train.yaml").write_text(yaml.safe_dump(base))
    ablation = {
        "base": str(folder / "train.yaml"),
        "data": str(write_data(folder / "data", hub)),
        "seeds": [0, 1],
        "tasks": ["STSBenchmark"],
        "data_root": str(write_pairs(folder / "sets")),
        "shared": {"total_steps": 6, "retrieval.temperature": 0.5},
        "variants": {
            "soft labels": {},
            "broken": {"retrieval.instruction": "read " * 70},
            "one-hot": {"retrieval.alpha": 0},
        },
    }
    (folder / "ablation.yaml").write_text(yaml.safe_dump(ablation, sort_keys=False))
    return folder


def run_here(folder, ablation, keys):
    """`run_in_new_process` without the seconds that a new process takes."""
    try:
        ablation_runs.train_and_score_one(folder, ablation, keys)
    except InputError as error:
        (folder / "run.log").write_text(f"...\nerror: {error}\n")
        return 2
    return 0


def arguments(folder, *flags):
    return ["--config", str(folder / "ablation.yaml"), "--output_dir", str(folder / "out"), *flags]


@pytest.fixture(scope="module")
def finished(folder):
    """Interrupted after its first run, and run again to its end, now to report on the test split."""
    first = folder / "out" / "runs" / "soft_labels" / "seed-0"

    def interrupted(run_folder, ablation, keys):
        if run_folder != first:
            raise KeyboardInterrupt
        return run_here(run_folder, ablation, keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_runs, "run_in_new_process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(folder))
        trained = (first / "model" / "manifest.json").stat().st_mtime_ns
        assert not (folder / "out" / "ablation.json").exists()
        patch.setattr(ablation_runs, "run_in_new_process", run_here)
        with pytest.raises(InputError) as error:
            main(arguments(folder, "--report_split", "test"))
    assert (first / "model" / "manifest.json").stat().st_mtime_ns == trained
    return str(error.value)


@pytest.fixture(scope="module")
def result(folder, finished) -> dict:
    return json.loads((folder / "out" / "ablation.json").read_text())


@pytest.fixture(scope="module")
def scores(folder, finished) -> dict[tuple[str, str], np.ndarray]:
    """Variant, split -> (seeds, queries)."""
    runs = folder / "out" / "runs"

    def read(name, seed, split):
        return json.loads((runs / name / f"seed-{seed}" / f"scores-{split}.json").read_text())["per_query"]

    names, splits = ("soft_labels", "one-hot"), ("validation", "test")
    return {
        (name, split): np.array([read(name, seed, split) for seed in (0, 1)]) for name in names for split in splits
    }


def test_a_variant_that_fails_stops_no_other(finished, result):
    assert "2 of 6 runs failed, first broken, seed 0" in finished and "leaves 0 of 64 tokens" in finished
    assert [(failure["name"], failure["seed"]) for failure in result["failed"]] == [("broken", 0), ("broken", 1)]
    assert [row["seeds"] for row in result["rows"]] == [[0, 1], [], [0, 1]]
    assert result["rows"][1]["mean"] is None and result["rows"][1]["difference"] is None


def test_negatives_that_rows_do_not_have_are_refused_before_anything_is_trained(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.ablate.train_and_score", lambda *args: pytest.fail("trained"))
    variants = "{whole: {}, more: {retrieval.num_negatives: 9}}"
    said = r"variant 'more': stage 'retrieval': .*rows have 3 negatives; num_negatives is 9"
    with pytest.raises(InputError, match=said):
        main([*arguments(folder)[:2], "--output_dir", str(tmp_path / "out"), "--variants", variants])
    assert not (tmp_path / "out").exists()


def test_rows_are_what_the_runs_scored(scores, result, folder):
    soft, hot = scores["soft_labels", "test"], scores["one-hot", "test"]
    assert soft.shape == (2, 12) and (soft != hot).any() and len({*map(tuple, soft), *map(tuple, hot)}) > 2
    first, _, last = result["rows"]
    assert first["mean"] == pytest.approx(soft.mean(), abs=1e-5) and first["difference"] is None
    assert last["difference"]["mean"] == pytest.approx((hot - soft).mean(), abs=1e-5)
    assert last["difference"]["per_seed"] == pytest.approx((hot - soft).mean(axis=1).tolist(), abs=1e-5)
    assert [last["difference"]["low"], last["difference"]["high"]] == list(bootstrap_interval(hot - soft))
    assert last["standard_deviation"] == pytest.approx(np.std(hot.mean(axis=1), ddof=1), abs=1e-5)
    assert (last["steps"], last["examples"]) == (6, 48) and last["tokens"] > 100 and last["training_seconds"] > 0
    assert not list((folder / "out" / "runs").glob("*/*/embeddings"))


def test_tasks_of_mteb_are_scored_for_every_seed(folder, result):
    first, broken, last = result["rows"]
    assert "tasks" not in broken and set(last["tasks"]) == {"STS", "mean over tasks", "mean over types"}
    model = SentenceTransformer(str(folder / "out" / "runs" / "one-hot" / "seed-1" / "model"))
    ones, others, gold = zip(*PAIRS, strict=True)
    left, right = (model.encode(list(texts), prompt_name="STSBenchmark") for texts in (ones, others))
    expected = stats.spearmanr((left * right).sum(axis=1), gold).statistic
    assert last["tasks"]["STS"][1] == pytest.approx(expected, abs=1e-5)
    page = (folder / "out" / "ablation.md").read_text()
    assert f"| one-hot | {100 * np.mean(last['tasks']['STS']):.2f} |" in page
    differences = np.subtract(last["tasks"]["STS"], first["tasks"]["STS"]) * 100
    assert f"| {differences[0]:+.2f}, {differences[1]:+.2f} |" in page


def test_what_is_reported_on_test_was_chosen_on_validation(scores, result):
    validation = {name: scores[name, "validation"].mean() for name in ("soft_labels", "one-hot")}
    assert (result["split"], result["chosen_on"]) == ("test", "validation")
    assert result["chosen"].replace(" ", "_") == max(validation, key=validation.get)
    soft, broken, hot = (row["chosen_on_mean"] for row in result["rows"])
    assert (soft, hot) == pytest.approx(tuple(validation.values()), abs=1e-5) and broken is None
    assert (scores["one-hot", "validation"] != scores["one-hot", "test"]).any()


def test_the_page_says_all_of_it(folder, result):
    page = (folder / "out" / "ablation.md").read_text()
    for words in ("| **", "broken | failed", "pigeonhole", "alpha: 0", "total_steps: 6", "Not run: broken, seed 0"):
        assert words in page
    assert f"{result['rows'][0]['mean']:.4f} [" in page and "nDCG@10 on validation" in page
    assert (folder / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    axis = plot_differences(result).axes[0]
    [label] = axis.get_yticklabels()
    assert label.get_text() == "one-hot"
    dots = next(line for line in axis.lines if line.get_marker() == "o")
    assert dots.get_xdata().tolist() == result["rows"][2]["difference"]["per_seed"]


def test_a_page_shows_the_queries_that_a_variant_wins_and_loses(folder, scores, result):
    page = (folder / "out" / "index.html").read_text()
    rows = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["rows"]
    change = (scores["one-hot", "test"] - scores["soft_labels", "test"]).mean(axis=0)
    shown = [float(row["facts"].split()[1]) for row in rows]
    lost, won = sorted(value for value in change if value < 0), sorted(value for value in change if value > 0)
    assert len(shown) > 1 and shown == pytest.approx([*lost, *won[::-1]], abs=1e-3)
    assert [row["tags"] for row in rows] == [["one-hot", "won" if value > 0 else "lost"] for value in shown]
    queries = pq.read_table(folder / "data" / "corpus" / "queries.parquet").to_pylist()
    assert {row["title"] for row in rows} <= {row["text"] for row in queries if row["split"] == "test"}
    assert all(row["documents"][0]["text"] for row in rows)
    difference = result["rows"][2]["difference"]
    assert f"one-hot {difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]" in page


def test_what_is_finished_is_only_tabled(folder, result, tmp_path, capsys):
    recipe = yaml.safe_load((folder / "ablation.yaml").read_text())
    del recipe["variants"]["broken"]
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    main(["--config", str(tmp_path / "ablation.yaml"), "--output_dir", str(folder / "out"), "--report_split", "test"])
    assert capsys.readouterr().out.startswith("4 of 4 runs are done before")
    again = json.loads((folder / "out" / "ablation.json").read_text())
    assert again["rows"] == [row for row in result["rows"] if row["seeds"]]
    assert again["failed"] == []


def test_another_dtype_scores_again_and_trains_nothing(folder, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_runs, "run_in_new_process", run_here)
    output = shutil.copytree(folder / "out", tmp_path / "out")
    model = output / "runs" / "one-hot" / "seed-0" / "model" / "manifest.json"
    trained = model.stat().st_mtime_ns
    flags = ["--seeds", "0", "--variants", "{one-hot: {retrieval.alpha: 0}}", "--scoring_dtype", "bfloat16"]
    main([*arguments(folder, "--report_split", "test", *flags), "--output_dir", str(output)])
    again = json.loads((output / "ablation.json").read_text())
    assert model.stat().st_mtime_ns == trained and again["scoring_dtype"] == "bfloat16"
    row = json.loads((model.parents[1] / "scores-test.json").read_text())
    before = json.loads((folder / "out" / "runs" / "one-hot" / "seed-0" / "scores-test.json").read_text())
    assert row["cosines"] != before["cosines"] and row["key"] != before["key"]


def test_ablations_share_runs_of_equal_settings(folder, result, tmp_path):
    """Two questions with one row in common, whatever either calls it; each has tables in a folder of its own."""
    recipe = yaml.safe_load((folder / "ablation.yaml").read_text())
    places = []
    for variants in ({"x": {}, "hot": {"retrieval.alpha": 0}}, {"y": {}, "half": {"alpha": 0.5}}):
        keys = recipe | {"runs_dir": str(tmp_path / "runs"), "output_dir": "out", "variants": variants}
        ablation = Ablation(**keys)
        places += [runs_folder(ablation, variant) for variant in read_variants(ablation)]
    assert places[0] == places[2] and len(set(places)) == 3
    save(result, tmp_path / "of its own")
    assert (tmp_path / "of its own" / "ablation.md").is_file()


def test_a_run_has_a_process_of_its_own(folder, tmp_path):
    """Its output is in run.log; what is wrong is its last line, or the signal that ended it."""
    recipe = yaml.safe_load((folder / "ablation.yaml").read_text()) | {"seeds": [0], "variants": {"soft labels": {}}}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    main(arguments(tmp_path))
    run = tmp_path / "out" / "runs" / "soft_labels" / "seed-0"
    assert "stage retrieval" in (run / "run.log").read_text() and (run / "scores-validation.json").is_file()
    (run / "run.log").write_text("going on\nerror: no such data\n")
    assert ablation_runs.reason(run, 2) == "no such data"
    assert ablation_runs.reason(run, -9) == "ended by signal SIGKILL, out of memory?"


ORPHAN = """
import multiprocessing, threading, time
from eval.ablation_runs import _end_with_parent

def child():
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print("up", flush=True)
    time.sleep(100)
    print("outlived its parent", flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
"""


def test_a_run_ends_with_a_killed_ablation(tmp_path):
    (tmp_path / "parent.py").write_text(ORPHAN)
    command = [sys.executable, str(tmp_path / "parent.py")]
    environment = {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "up\n"
        parent.kill()
        assert parent.stdout.read() == ""  # ends when the child has closed it, too


# --- mined anew -----------------------------------------------------------------------------------------------------


def test_other_margins_are_mined_from_the_same_grades(folder, tmp_path):
    from datasets import load_dataset

    judged = write_set(tmp_path / "set") / "qrels.parquet"
    second = pa.table({"query_id": ["q00"], "corpus_id": ["d01"], "score": [1], "split": ["train"]})
    pq.write_table(pa.concat_tables([pq.read_table(judged), second]), judged)
    mining = {"num_negatives": 3, "relabel": "exclude"}
    recipe = write_recipe(tmp_path / "data.yaml", tmp_path / "set", write_encoder(tmp_path / "teacher"), mining=mining)
    build.main(["--config", str(recipe), "--output_dir", str(tmp_path / "build")])
    base = yaml.safe_load((folder / "train.yaml").read_text()) | {"dataset_name": str(tmp_path / "build" / "hub")}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(base))
    keys = {"base": str(tmp_path / "train.yaml"), "data": str(folder / "data"), "output_dir": str(tmp_path / "out")}
    grid = {"mining.margin": [0.5, 0.95], "stages": ["retrieval"], "mining.num_negatives": [2]}
    low, high = read_variants(Ablation(**keys, grid=grid))
    assert low.key != high.key
    rows = {}
    for variant in (low, high):
        [(mined, source)] = variant.mined.items()
        write_mined_rows(mined, source, variant.mining)
        [stage] = variant.recipe.stages
        rows[variant.name] = load_dataset(
            stage.own.dataset_name, "train", split="train", cache_dir=str(tmp_path / "cache" / mined.name)
        )
    few, many = rows.values()
    assert len(many) > 10 and "negative_2" in many.column_names and "negative_3" not in many.column_names
    for table, margin in ((few, 0.5), (many, 0.95)):
        assert all(max(label[1:]) < margin * label[0] for label in table["label"])
    assert any(max(label[1:]) >= 0.5 * label[0] for label in many["label"])
    shuffled = tmp_path / "shuffled"
    write_mined_rows(shuffled, source, {**variant.mining, "shuffle_labels": 1})
    dealt = pq.read_table(sorted((shuffled / "train").glob("*.parquet"))).to_pydict()
    assert {key: dealt[key] for key in dealt if key != "label"} == {key: many[key] for key in dealt if key != "label"}
    assert sorted(dealt["label"]) == sorted(many["label"]) and dealt["label"] != list(many["label"])
    # the two positives of q00 go along: neither is an in-batch negative of it, at whatever margin
    positives = load_dataset(str(mined), "positives", split="train", cache_dir=str(tmp_path / "positives"))
    assert len(positives) == 2 and len(set(positives["query"])) == 1
    # and so do documents graded above every positive, where these are no negatives either: as the build has it, too
    for keys in ({**variant.mining, "relabel": "exclude"}, {"shuffle_labels": 1}):
        write_mined_rows(tmp_path / str(len(keys)), source, keys)
        [beside] = (tmp_path / str(len(keys)) / "positives").glob("*.parquet")
        assert pq.read_metadata(beside).num_rows > 2


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["recipes/evidence/train.yaml", "recipes/evidence/gpu.yaml"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recipes_that_ship_are_whole(path, base, folder, tmp_path, monkeypatch):
    """With tiny data in place of the demo's: every variant is read and checked as a run would be, and no two of them
    are the same on a CPU's base or on a GPU's.
    """
    assert len(SHIPPED) == 14
    monkeypatch.setattr(ablation_recipe, "data_content", lambda name, revision: name)
    monkeypatch.setattr(ablation_recipe, "corpus_content", lambda name: name)
    monkeypatch.setattr(ablation_recipe, "model_content", lambda name: name)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    _, ablation = read_ablation(["--config", str(path), "--output_dir", str(tmp_path / "out"), "--base", base], "")
    monkeypatch.chdir(ROOT)
    variants = read_variants(ablation)
    counts = {"objectives": 18, "labels": 5, "grades": 9, "number": 3, "cross-encoder": 3, "negatives": 10}
    counts |= {"teachers": 6, "curriculum": 6}
    assert len(variants) == counts.get(path.stem, 4)
    assert len({variant.key for variant in variants}) == len(variants)
    assert ablation.compared_with == ablation.baseline
    for stage in (stage for variant in variants for stage in variant.recipe.stages):
        settle(stage, None)  # lengths that go together
    steps = {sum(stage.training.max_steps for stage in variant.recipe.stages) for variant in variants}
    assert len(steps) == 1 and steps.pop() > 0  # equal budgets
    assert ablation.splits == ["validation", "test"] and len(ablation.seeds) == 3 and ablation.tasks


@pytest.mark.parametrize("written", [["0", "2"], ["0,2"], ["[0, 2]"]])
def test_seeds_are_taken_as_people_write_them(written):
    flags = ["--config", str(SHIPPED[0]), "--output_dir", "out", "--seeds", *written, "--split", "test"]
    _, ablation = read_ablation(flags, "")
    assert ablation.seeds == (0, 2) and ablation.split == "test"
