"""The registry agrees with mteb and the paper, and says which evaluations its sets hold."""

from dataset_builders.sources import registry

# mteb's newer copies, or what mteb drew its sets from, and sets that mteb does not have
NOT_OF_MTEB = {"ELI5", "NQ", "SQuAD", "TriviaQA", "SciDocsReranking", "StackOverflowDupQuestions", "Quora", "SNLI"}
NOT_OF_MTEB |= {f"{site}Clustering{side}" for site in ("Arxiv", "Biorxiv", "Medrxiv") for side in ("S2S", "P2P")}
NOT_OF_MTEB |= {"RedditClustering", "RedditClusteringP2P", "TwentyNewsgroupsClustering"}
TASK_TYPES = {"Retrieval": {"retrieval", "duplicates"}, "Reranking": {"retrieval"}, "STS": {"sts"}}
TASK_TYPES |= {"Classification": {"classification"}, "Clustering": {"clustering"}}


def test_the_registry_agrees_with_mteb():
    import mteb

    tasks = {name: mteb.get_task(entry.mteb_task).metadata for name, entry in registry().items() if entry.mteb_task}
    checked = 0
    for name, task in tasks.items():
        entry = registry()[name]
        assert entry.task_type in TASK_TYPES[task.type] and entry.instruction, name
        if name in NOT_OF_MTEB:
            assert entry.dataset != task.dataset["path"], name
            continue
        assert (entry.dataset, entry.revision) == (task.dataset["path"], task.dataset["revision"]), name
        assert entry.split not in task.eval_splits and entry.licence == task.license, name
        languages = task.eval_langs
        assert entry.config is None if isinstance(languages, list) else languages[entry.config] == ["eng-Latn"], name
        checked += 1
    assert len(registry()) == 35 and len(tasks) == 31 and checked == 18
    assert {name for name, entry in registry().items() if entry.mteb_task is None} | set(tasks) == set(registry())
    assert set(registry()) >= NOT_OF_MTEB


def test_the_registry_is_what_the_paper_trained_on():
    from mteb.models.model_implementations.lgai_embedding_models import LGAI_EMBEDDING_TRAINING_DATA as paper

    spelt = {"QuoraDuplicateQuestions": "Quora"}
    assert {spelt.get(name, name) for name in paper} | {"TriviaQA"} == set(registry()) and len(paper) == 34


def test_every_evaluation_of_a_set_is_disclosed():
    import mteb

    known = {task.metadata.name for task in mteb.get_benchmark("MTEB(eng, v2)").tasks}
    related = 0
    for entry in registry().values():
        assert entry.training_datasets
        for task in mteb.get_benchmark("MTEB(eng, v2)").tasks:
            same = task.metadata.dataset["path"] == entry.dataset
            if same or entry.mteb_task in {task.metadata.name, *(task.metadata.adapted_from or [])}:
                assert task.metadata.name in entry.training_datasets, entry
                related += 1
        names = set(entry.training_datasets) - known - {entry.mteb_task}
        assert not names or entry.mteb_task is None, names
    assert related >= 15
