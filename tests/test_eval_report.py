"""The report says what the run's files say, shows pictures that were drawn, and tells what was not run."""

import re
import shutil

import pytest
from PIL import Image

from common.steps import write_json
from eval import retrieval
from eval.figures import KEY, plot_systems, plot_training
from eval.metrics import read_metrics
from eval.report import format_costs, main, not_run
from eval.run_files import read_manifests
from modeling.recipe import VALIDATION_NDCG

LOGS = {
    "sts": [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.5}],
    "retrieval": [
        {"step": 10, "loss": 1.0, "seconds": 3.0},
        {"step": 63, VALIDATION_NDCG: 0.25},
        {"step": 20, "x": 1},
    ],
}


def stage(**changed):
    row = {"stage": "sts", "steps": 2, "tokens": 1234, "training_seconds": 90.0, "device": "cpu"}
    row |= {"device_seconds": 90.0, "peak_memory_bytes": 2**30, "peak_device_memory_bytes": 2**31}
    return row | changed


def report(results, output):
    main([str(results), "--output_dir", str(output)])
    return (output / "report.md").read_text()


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The tiny run, evaluated, with the trainer's logs."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("report") / "run")
    (run / "logs").mkdir()
    for name, log in LOGS.items():
        write_json(run / "logs" / f"{name}.json", log)
    retrieval.main(["--run", str(run), "--data", str(run / "data"), "--output_dir", str(run / "results")])
    return run


@pytest.fixture(scope="module")
def metrics(run):
    return read_metrics(run / "results")


def test_report_shows_every_system_step_and_picture(run, tmp_path, metrics):
    """Of a run that was moved as well; pictures carry the key of their results, by which the card knows them."""
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    page = report(moved / "results", tmp_path / "report")
    assert page.startswith("# Report on elsewhere\n")
    for row in metrics["systems"]:
        assert f"| {row['name']} | {row['nDCG@10']:.3f} |" in page
    for step in ("data: corpus", "data: candidates", "training: sts", "training: retrieval", "evaluation"):
        assert f"| {step} |" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures == ["systems.png", "training.png"]
    for picture in pictures:
        assert Image.open(tmp_path / "report" / picture).text[KEY] == metrics["key"]
    assert "max_seq_length: 64" in page  # the recipe
    assert "torch" in page.splitlines()[-1]  # the versions
    assert "- MTEB and other collections: " in page and "- Other seeds: " in page


def test_models_without_a_run_have_a_report(run, tmp_path, metrics):
    flags = ["--model", str(run / "model"), "--data", str(run / "data"), "--output_dir", str(tmp_path / "out")]
    retrieval.main(flags)
    page = report(tmp_path / "out", tmp_path / "report")
    assert f"| {run / 'model'} | {metrics['systems'][-2]['nDCG@10']:.3f} |" in page and "## Settings" not in page


def test_a_model_without_a_record_of_its_training_has_a_report_of_its_scores(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "run" / "model")
    flags = ["--run", str(tmp_path / "run"), "--data", str(run / "data")]
    retrieval.main([*flags, "--output_dir", str(tmp_path / "run" / "results")])
    page = report(tmp_path / "run" / "results", tmp_path / "report")
    assert page.startswith("# Report on run\n") and "| final model | 0." in page
    assert "## Settings" not in page and "## Results" in page


def test_bars_are_as_long_as_the_scores(metrics):
    [axis] = plot_systems(metrics).axes
    bars = zip(axis.get_yticklabels(), axis.patches, strict=True)
    shown = {label.get_text(): bar.get_width() for label, bar in bars}
    assert shown == {row["name"]: row["nDCG@10"] for row in metrics["systems"]} and len(shown) >= 7


def test_curves_are_the_logged_points():
    loss_sts, loss_retrieval, ndcg_sts, ndcg_retrieval = plot_training(LOGS).axes
    assert loss_sts.lines[0].get_xydata().tolist() == [[10, 2.0], [20, 1.5]]
    assert loss_retrieval.lines[0].get_xydata().tolist() == [[10, 1.0]]
    assert ndcg_retrieval.lines[0].get_xydata().tolist() == [[63, 0.25]]
    assert ndcg_retrieval.get_xlim()[1] > 63  # a measurement after the last logged loss
    assert not ndcg_sts.lines and [text.get_text() for text in ndcg_sts.texts] == ["not measured"]


def test_costs_add_up(metrics):
    """Eight devices for an hour are eight device hours."""
    ledger = {"data": [{"data": "x", "step": "corpus", "seconds": 10.0, "peak_memory_bytes": 2**29}]}
    ledger["stages"] = [stage()]
    manifests = {"corpus": {"seconds": 10.0, "peak_memory_bytes": 2**29, "counts": ["rows"], "rows": 1200}}
    metrics = {**metrics, "systems": [{"seconds": 5.0}, {"seconds": 0.0}], "peak_memory_bytes": 2**30}
    assert format_costs(ledger, metrics, manifests).splitlines() == [
        "| step | made | steps | tokens | seconds | device | peak memory | device hours |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        "| data: corpus | rows 1,200 | | | 10 | | 0.50 GiB | |",
        "| training: sts | | 2 | 1,234 | 90 | cpu | 2.00 GiB | 0.03 |",
        "| evaluation | documents 6, queries 3, relevant 3 | | | 5 | | 1.00 GiB | |",
        "| **all** | | | 1,234 | **105** | | | **0.03** |",
    ]
    assert format_costs(ledger).splitlines()[2:] == [
        "| data: corpus | | | 10 | | 0.50 GiB | |",
        "| training: sts | 2 | 1,234 | 90 | cpu | 2.00 GiB | 0.03 |",
        "| **all** | | 1,234 | **100** | | | **0.03** |",
    ]
    hour = stage(training_seconds=3600.0, device_seconds=8 * 3600.0, device="A100")
    row = format_costs({"data": [], "stages": [hour]}).splitlines()[2]
    assert row == "| training: sts | 2 | 1,234 | 3,600 | 8 x A100 | 2.00 GiB | 8.00 |"


def test_what_was_not_run_is_said(run, metrics):
    metrics = {**metrics, "not_evaluated": ["sts"], "systems": [{**metrics["systems"][0], "R@100": None}]}
    said = "\n".join(not_run(metrics, read_manifests(run / "data"), {"sts": []}, ["sts", "retrieval"]))
    assert "Stage sts: it is in the recipe" in said
    assert "Training curve of stage retrieval" in said
    assert "R@100 of BM25" in said
    assert "Data step mined: it was not made." in said and "Data step corpus" not in said


def test_a_run_without_logs_has_a_report_without_curves(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "logs")
    page = report(copy / "results", tmp_path / "report")
    assert "training.png" not in page and not (tmp_path / "report" / "training.png").exists()
    assert "Training curve of stage sts: there is no log of it." in page
