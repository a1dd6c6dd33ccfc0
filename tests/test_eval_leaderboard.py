"""mteb's results, model against model: Borda ranks and means as mteb's leaderboard has them; no two models mixed."""

import numpy as np
import pytest
from tiny_mteb import write_result

from eval import report
from eval.figures import plot_leaderboard
from eval.leaderboard import borda_ranks, format_means, format_tasks, read_leaderboard

SCORES = {
    ("org__a", "0123456789abcdef"): {"ArguAna": 0.50, "SCIDOCS": 0.20, "STS12": 0.70, "STSBenchmark": 0.80},
    ("org__a", "0123456789abcdef-2-shot"): {"ArguAna": 0.60, "SCIDOCS": 0.10, "STS12": 0.70, "STSBenchmark": 0.85},
    ("org__b", "main"): {"ArguAna": 0.55, "SCIDOCS": 0.30, "STSBenchmark": 0.10},
}
METRICS = {
    "ArguAna": "ndcg_at_10",
    "SCIDOCS": "ndcg_at_10",
    "STS12": "cosine_spearman",
    "STSBenchmark": "cosine_spearman",
}


@pytest.fixture
def output(tmp_path):
    for (name, revision), scores in SCORES.items():
        for task, score in scores.items():
            write_result(tmp_path / "results" / name / revision, task, "test", METRICS[task], {"default": score})
    return tmp_path


def test_ranks_are_those_of_mteb():
    pl = pytest.importorskip("polars")
    from mteb.benchmarks._create_table import _get_borda_rank

    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 4, size=(5, 6)) / 4  # with many ties
        scores[rng.random(scores.shape) < 0.2] = np.nan
        frame = pl.DataFrame({str(column): scores[:, column] for column in range(6)}).fill_nan(None)
        assert borda_ranks(scores) == frame.select(_get_borda_rank(frame.columns)).to_series().to_list()


def test_table_by_hand(output):
    board = read_leaderboard(output)
    assert board.models == ["org/a@01234567", "org/a@01234567-2-shot", "org/b"]
    # points of the three on ArguAna 0 2 1, SCIDOCS 1 0 2, STS12 1.5 1.5 -, STSBenchmark 1 2 0
    assert format_means(board).splitlines()[:5] == [
        "| model | Borda rank | tasks | mean over tasks | mean over types | Retrieval | STS |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| org/a@01234567-2-shot | 1 | 4/4 | 56.25 | 56.25 | 35.00 | 77.50 |",
        "| org/a@01234567 | 2 | 4/4 | 55.00 | 55.00 | 35.00 | 75.00 |",
        "| org/b | 3 | 3/4 | | | 42.50 | |",
    ]
    assert "4 of the 41 tasks of MTEB(eng, v2)" in format_means(board)
    assert "| STS12 | STS | cosine_spearman | **70.00** | **70.00** | |" in format_tasks(board)
    axis = plot_leaderboard(board).axes[0]
    shown = {line.get_label(): line.get_xdata() for line in axis.lines}
    np.testing.assert_allclose(shown["org/b"], [42.5, np.nan])


def test_the_benchmark_of_most_tasks_decides_which_languages_count(tmp_path):
    """Of AmazonCounterfactualClassification the multilingual one asks for Japanese too: this result is not whole."""
    folder = tmp_path / "results" / "org__a" / "main"
    write_result(folder, "AmazonCounterfactualClassification", "test", "accuracy", {"en": 0.8, "de": np.nan})
    board = read_leaderboard(tmp_path)
    assert board.scores == [[0.8]] and not board.is_nan.any(), "German is none of the English benchmark's"
    write_result(folder, "BornholmBitextMining", "test", "f1", {"default": 0.5})
    write_result(folder, "PolEmo2.0-OUT", "test", "accuracy", {"default": 0.5})
    board = read_leaderboard(tmp_path)
    assert [task.metadata.name for task in board.tasks][1] == "AmazonCounterfactualClassification"
    assert np.isnan(board.scores[0, 1])
    assert "3 of the 131 tasks of MTEB(Multilingual, v2)" in format_means(board)


def test_a_score_that_is_nan_stands_as_such(output):
    """A model whose vectors are broken: run, and neither a number nor "not run"."""
    folder = output / "results" / "org__c" / "main"
    for task in ("SCIDOCS", "STS12"):
        write_result(folder, task, "test", METRICS[task], {"default": np.nan})
    write_result(folder, "ArguAna", "test", "ndcg_at_10", {"default": 0.6})
    board = read_leaderboard(output)
    assert "| org/c | 4 | 3/4, 2 NaN | | | | |" in format_means(board)
    assert "NaN: the task was run" in format_means(board)
    assert "| STS12 | STS | cosine_spearman | **70.00** | **70.00** | | NaN |" in format_tasks(board)


def test_a_page_of_mteb_alone(output, tmp_path):
    report.main([str(output), "--output_dir", str(tmp_path / "page")])
    page = (tmp_path / "page" / "report.md").read_text()
    assert "| org/a@01234567-2-shot | 1 |" in page and "![MTEB by task type](mteb.png)" in page
    assert f"Made from mteb's results in `{tmp_path / 'results'}`." in page
    assert (tmp_path / "page" / "mteb.png").read_bytes().startswith(b"\x89PNG")
    assert "Not run" not in page
