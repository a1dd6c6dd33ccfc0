"""Ablations: intervals that are right, equal stages trained once, kills that cost one run, bad recipes refused."""

import doctest
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats
from tiny_training import two_stages, write_hub

from dataset_builders.cli import InputError
from dataset_builders.folders import folder_step, write_arrow, write_parquet
from eval import ablate
from eval.ablate import bootstrap_interval, combinations, main, override

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))


# --- intervals ------------------------------------------------------------------------------------------------------


def test_doctests():
    assert doctest.testmod(ablate).attempted >= 3
    assert doctest.testmod(ablate).failed == 0


def test_two_seeds_and_two_queries_by_hand():
    # one seed and one query are drawn each time, so that every cell comes up in a quarter of all resamples
    assert bootstrap_interval(np.array([[0.1, 0.2], [0.3, 0.7]])) == (0.1, 0.7)
    # seeds that agree leave the queries alone: one is drawn, and 2.5 % of the resamples lie below either
    assert bootstrap_interval(np.array([[0.1, 0.7], [0.1, 0.7]])) == (0.1, 0.7)


@pytest.mark.parametrize("shape", [(1, 300), (300, 1)], ids=["queries", "seeds"])
def test_along_one_axis_it_is_scipys(shape):
    values = np.random.default_rng(3).gamma(2.0, size=300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    ours = bootstrap_interval(values.reshape(shape))
    assert ours[0] < values.mean() < ours[1]
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03 * (theirs.high - theirs.low))


@pytest.mark.parametrize("seeds", [3, 10])
def test_variances_of_seeds_and_queries_add_up(seeds):
    """Where scores are a seed's effect plus a query's, the variance of the mean is s_seed^2 / S + s_query^2 / Q."""
    generator = np.random.default_rng(0)
    of_seeds, of_queries = generator.normal(size=seeds), generator.normal(size=400) * 5
    variance = of_seeds.var(ddof=1) / seeds + of_queries.var(ddof=1) / 400
    weights = (ablate._weights(generator, length, 40_000) for length in (seeds, 400))
    by_seed, by_query = next(weights), next(weights)
    resampled = by_seed @ of_seeds + by_query @ of_queries
    assert resampled.var() == pytest.approx(variance, rel=0.03)
    low, high = bootstrap_interval(of_seeds[:, None] + of_queries)
    assert (low, high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.04 * (high - low))


def test_pairs_cancel_what_is_common():
    generator = np.random.default_rng(5)
    one = generator.normal(size=(3, 200)) * 10
    other = one + 0.1
    assert bootstrap_interval(other - one) == (0.1, 0.1)
    wide = bootstrap_interval(one)
    assert wide[1] - wide[0] > 1


def test_a_single_score_has_no_interval():
    assert bootstrap_interval(np.array([[0.5]])) is None


# --- what is run ----------------------------------------------------------------------------------------------------


def test_combinations_are_variants_times_grid():
    rows = combinations({"a": {"loss": "kl", "alpha": 0}, "b": {}}, {"alpha": [0.5, 1], "sts.seed": [3]})
    assert rows["a, alpha=0.5, sts.seed=3"] == {"loss": "kl", "alpha": 0.5, "sts.seed": 3}
    assert len(rows) == 4
    assert combinations({}, {"shots": [0, 2]}) == {"shots=0": {"shots": 0}, "shots=2": {"shots": 2}}


def test_overrides_are_those_of_flags_and_of_single_stages():
    base = {
        "loss": "kl",
        "student": {"sif": 1},
        "stages": [{"name": "a", "loss": "cosent"}, {"name": "b", "alpha": 1}],
    }
    base["stages"][1]["datasets"] = [{"name": "x", "loss": "ranknet"}]
    changed = override(base, {"b.loss": "bixse", "loss": "info_nce", "stages": "b,a", "student.sif": 2}, "here")
    assert changed["stages"] == [
        {"name": "b", "alpha": 1, "datasets": [{"name": "x"}], "loss": "bixse"},
        {"name": "a"},
    ]
    assert (changed["loss"], changed["student"]) == ("info_nce", {"sif": 2})
    assert base["stages"][0] == {"name": "a", "loss": "cosent"}  # the next variant starts from it
    assert "student" not in override(base, {"model_name_or_path": "org/name"}, "here")


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


@pytest.fixture(scope="module")
def folder(tiny_decoder, tmp_path_factory) -> Path:
    """An ablation of three variants, one of which fails when its data are read."""
    folder = tmp_path_factory.mktemp("ablation")
    hub = write_hub(folder / "hub")
    base = two_stages(tiny_decoder, hub) | {"eval_strategy": "no", "num_train_epochs": 1, "learning_rate": "1e-2"}
    (folder / "train.yaml").write_text(yaml.safe_dump(base))
    ablation = {
        "base": str(folder / "train.yaml"),
        "data": str(write_data(folder / "data", hub)),
        "seeds": [0, 1],
        "shared": {"total_steps": 6},
        "variants": {
            "soft labels": {},
            "broken": {"retrieval.num_negatives": 9},
            "one-hot": {"retrieval.alpha": 0, "retrieval.temperature": 0.5},
        },
    }
    (folder / "ablation.yaml").write_text(yaml.safe_dump(ablation, sort_keys=False))
    return folder


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """In a process of its own: it forks."""
    command = [sys.executable, "-m", "eval.ablate", "--config", str(folder / "ablation.yaml")]
    command += ["--output_dir", str(folder / "out"), *flags]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def runs_of(folder: Path) -> list[int]:
    """Processes that have a log of this ablation open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            targets = {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue
        if any(target.startswith(str(folder)) and target.endswith("run.log") for target in targets):
            found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def killed(folder) -> dict:
    """Started, killed in its second run or soon after, and run again to its end."""
    process = start(folder)
    first = folder / "out" / "runs" / "soft_labels" / "seed-0" / "scores-validation.json"
    deadline = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.is_file() and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    before = first.stat().st_mtime_ns
    while runs_of(folder / "out") and time.monotonic() < deadline:
        time.sleep(0.05)
    orphans = runs_of(folder / "out")
    whole = (folder / "out" / "ablation.json").exists()
    again = start(folder)
    output, errors = again.communicate(timeout=240)
    return {
        "orphans": orphans,
        "whole": whole,
        "kept": first.stat().st_mtime_ns == before,
        "code": again.returncode,
        "output": output,
        "errors": errors,
    }


@pytest.fixture(scope="module")
def result(folder, killed) -> dict:
    return json.loads((folder / "out" / "ablation.json").read_text())


def test_a_killed_ablation_goes_on(killed):
    assert not killed["orphans"] and not killed["whole"]
    assert killed["kept"] and "of 6 runs are done before" in killed["output"]


def test_a_variant_that_fails_stops_no_other(killed, result):
    assert killed["code"] == 2
    [line] = [line for line in killed["errors"].splitlines() if line.startswith("error:")]
    assert "2 of 6 runs failed, first broken, seed 0" in line and "rows have 3 negatives" in line
    assert [(failure["name"], failure["seed"]) for failure in result["failed"]] == [("broken", 0), ("broken", 1)]
    assert [row["seeds"] for row in result["rows"]] == [[0, 1], [], [0, 1]]
    assert result["rows"][1]["mean"] is None and result["rows"][1]["difference"] is None


def test_rows_are_what_the_runs_scored(folder, result):
    scores = {
        (name, seed): json.loads(
            (folder / "out" / "runs" / name / f"seed-{seed}" / "scores-validation.json").read_text()
        )["per_query"]
        for name in ("soft_labels", "one-hot")
        for seed in (0, 1)
    }
    soft, hot = (np.array([scores[name, seed] for seed in (0, 1)]) for name in ("soft_labels", "one-hot"))
    assert soft.shape == (2, 12) and (soft != hot).any() and (soft[0] != soft[1]).any()
    first, _, last = result["rows"]
    assert first["mean"] == pytest.approx(soft.mean(), abs=1e-5) and first["difference"] is None
    assert last["difference"]["mean"] == pytest.approx((hot - soft).mean(), abs=1e-5)
    assert last["difference"]["per_seed"] == pytest.approx((hot - soft).mean(axis=1).tolist(), abs=1e-5)
    assert [last["difference"]["low"], last["difference"]["high"]] == list(bootstrap_interval(hot - soft))
    assert last["standard_deviation"] == pytest.approx(np.std(hot.mean(axis=1), ddof=1), abs=1e-5)
    assert result["chosen"] == max((first, last), key=lambda row: row["mean"])["name"]
    assert (last["steps"], last["examples"]) == (6, 48) and last["tokens"] > 100 and last["training_seconds"] > 0


def test_equal_first_stages_are_trained_once(folder, result):
    runs = folder / "out" / "runs"
    for seed in (0, 1):
        one, other = (runs / name / f"seed-{seed}" for name in ("soft_labels", "one-hot"))
        manifests = [(run / "sts" / "manifest.json").stat().st_ino for run in (one, other)]
        assert manifests[0] == manifests[1]  # one file
        assert "stage sts: done before" in (other / "run.log").read_text()
        assert (one / "retrieval" / "manifest.json").stat().st_ino != (
            other / "retrieval" / "manifest.json"
        ).stat().st_ino
        assert not (one / "embeddings").exists()
    keys = [json.loads((runs / "one-hot" / f"seed-{seed}" / "sts" / "manifest.json").read_text()) for seed in (0, 1)]
    assert keys[0]["key"] != keys[1]["key"]  # never from another seed


def test_the_page_says_all_of_it(folder, killed, result):
    page = (folder / "out" / "ablation.md").read_text()
    for words in ("| **", "broken | failed", "pigeonhole", "alpha: 0", "total_steps: 6", "Not run: broken, seed 0"):
        assert words in page
    assert str(result["rows"][0]["mean"])[:5] in page
    assert (folder / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    axis = ablate.plot_differences(result).axes[0]
    [label] = axis.get_yticklabels()
    assert label.get_text() == "one-hot"
    dots = next(line for line in axis.lines if line.get_marker() == "o")
    assert dots.get_xdata().tolist() == result["rows"][2]["difference"]["per_seed"]


def test_another_split_is_scored_without_training(folder, killed, result):
    model = folder / "out" / "runs" / "one-hot" / "seed-1" / "model" / "manifest.json"
    before = model.stat().st_mtime_ns
    process = start(folder, "--report_split", "test")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 2, errors  # `broken` still is
    assert model.stat().st_mtime_ns == before
    tested = json.loads((folder / "out" / "ablation.json").read_text())
    assert (tested["split"], tested["chosen_on"], tested["chosen"]) == ("test", "validation", result["chosen"])
    assert [row["chosen_on_mean"] for row in tested["rows"]] == [row["mean"] for row in result["rows"]]
    assert [row["mean"] for row in tested["rows"]] != [row["mean"] for row in result["rows"]]
    assert "nDCG@10 on validation" in output


# --- bad recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"varaints": {}}, "unknown key 'varaints'; did you mean 'variants'"),
        ({"variants": {}}, "nothing to compare"),
        ({"variants": {}, "grid": {"loss": []}}, "nothing to compare"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"seeds": []}, "'seeds'"),
        ({"seeds": ["x"]}, "seeds"),
        ({"baseline": "ours"}, "no variant 'ours' for a baseline; there are kl"),
        ({"base": "no.yaml"}, "no.yaml: no such recipe"),
        ({"data": "no/data"}, "no/data/corpus/documents.arrow: no such file"),
        ({"split": "dev"}, "split 'dev' has no query"),
        ({"report_split": "dev"}, "split 'dev' has no query"),
        ({"variants": {"kl": {"los": "kl"}}}, "variant 'kl': stage 'sts': unknown key 'los'; did you mean 'loss'?"),
        ({"variants": {"kl": {"retrieval.los": "kl"}}}, "variant 'kl': stage 'retrieval': unknown key 'los'"),
        ({"variants": {"kl": {"ret.loss": "kl"}}}, "variant 'kl': ret.loss: no stage 'ret'; there are sts, retrieval"),
        ({"variants": {"kl": {"retrieval.alpha": 2}}}, "variant 'kl': stage 'retrieval': alpha is 2"),
        ({"variants": {"kl": {"seed": 3}}}, "seed is not a variant's to set"),
        ({"shared": {"retrieval.output_dir": "x"}}, "output_dir is not a variant's to set"),
        ({"variants": {"kl": {"stages": "sts,rte"}}}, "stages 'sts,rte': name some of sts, retrieval"),
        ({"variants": {"kl": {"max_steps": 3}}}, "max_steps and total_steps"),
        ({"variants": {"a b": {}, "a/b": {}}}, "variants are also folders"),
        ({"variants": {"..": {}}}, "variants are also folders"),
        ({"variants": {"kl": {"dataset_name": "./no"}}}, "no such folder"),
        ({"variants": {"kl": {"model_name_or_path": "package:no"}}}, "no installed package"),
        ({"variants": {"kl": {"student.teacher": "x", "student.corpus": "no"}}}, "student.corpus no: no such folder"),
        ({"variants": {"kl": {"student.size": 4}}}, "unknown key 'size'"),
        ({"variants": {"kl": {"mining.margin": 2}}}, "mining: key 'margin' is 2"),
        ({"variants": {"kl": {"mining.margn": 2}}}, "mining: unknown key 'margn'"),
        ({"variants": {"kl": {"mining.margin": 0.9, "stages": "sts"}}}, "no stage trains on mined rows"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_recipes_are_told_before_anything_is_trained(folder, tmp_path, keys, message):
    recipe = yaml.safe_load((folder / "ablation.yaml").read_text()) | {"variants": {"kl": {"retrieval.loss": "kl"}}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**recipe, **keys}))
    with pytest.raises(InputError) as error:
        main(["--config", str(tmp_path / "bad.yaml"), "--output_dir", str(tmp_path / "out")])
    assert message in str(error.value) and "/tmp/tmp" not in str(error.value)
    assert not (tmp_path / "out").exists()
