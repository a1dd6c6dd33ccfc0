"""Prompts: the formulas by hand, and mteb's own resolver asked for every task of MTEB(eng, v2)."""

import pytest

from modeling.prompts import baked_prompts, few_shot_prompt, instruction_prompt, task_instructions, with_demonstrations


@pytest.fixture(scope="module")
def benchmark_tasks():
    import mteb

    tasks = [*mteb.get_benchmark("MTEB(eng, v2)").tasks, *mteb.get_benchmark("RTEB(eng, beta)").tasks]
    tasks = [task.metadata for task in tasks if task.metadata.is_public is not False]
    assert len(tasks) == 41 + 15
    return tasks


@pytest.fixture(scope="module")
def wrapper(tiny_encoder):
    """mteb's view of a saved model: it validates the names and drops those it does not know."""
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_encoder))
    assert model.prompts == baked_prompts("Given a question, retrieve its answer")
    wrapper = SentenceTransformerEncoderWrapper(model)
    assert wrapper.model_prompts == model.prompts, "mteb dropped a prompt whose name it does not know"
    return wrapper


def test_every_instruction_stands_under_the_type_mteb_gives_the_task(benchmark_tasks):
    ours = {task: kind for kind, tasks in task_instructions().items() for task in tasks}
    assert ours == {task.name: task.type for task in benchmark_tasks}


def test_instructions_mteb_has_are_kept_word_for_word(benchmark_tasks):
    """A paraphrase would make scores incomparable with models that were run with mteb's own instruction."""
    ours = {task: text for tasks in task_instructions().values() for task, text in tasks.items()}
    theirs = {
        task.name: task.prompt["query"] if isinstance(task.prompt, dict) else task.prompt
        for task in benchmark_tasks
        if task.prompt
    }
    assert len(theirs) == 29
    assert {name: ours[name] for name in theirs} == theirs
    assert all(text.strip() == text and len(text) > 20 for text in ours.values())


def test_mteb_resolves_an_own_prompt_for_every_task(benchmark_tasks, wrapper):
    """A missing name is no error in mteb: the task silently runs with the `query` prompt, or with none."""
    from mteb.types import PromptType

    resolved = 0
    for task in benchmark_tasks:
        asymmetric = task.type in ("Retrieval", "Reranking")
        side = PromptType.query if asymmetric else None
        name = wrapper.get_prompt_name(task, side)
        assert name == (f"{task.name}-query" if asymmetric else task.name)
        assert wrapper.model_prompts[name].startswith("Instruct: ")
        assert wrapper.model_prompts[name].endswith("\nQuery: ")
        if asymmetric:
            name = wrapper.get_prompt_name(task, PromptType.document)
            assert name == f"{task.name}-document"
            assert wrapper.model_prompts[name] == ""
        resolved += 1
    assert resolved == 56


def test_tasks_of_other_benchmarks_get_their_types_prompt(wrapper):
    """A bitext task, say, would run with no prompt at all; a retrieval task has the one it was trained with."""
    import mteb
    from mteb.types import PromptType

    kinds = set()
    for task in mteb.get_benchmark("MTEB(Multilingual, v2)").tasks:
        metadata = task.metadata
        asymmetric = "Retrieval" in metadata.type or "Reranking" in metadata.type
        name = wrapper.get_prompt_name(metadata, PromptType.query if asymmetric else None)
        assert wrapper.model_prompts[name].startswith("Instruct: "), metadata.name
        if name not in (metadata.name, f"{metadata.name}-query"):
            assert name == ("query" if asymmetric else metadata.type)
            kinds.add(metadata.type)
    assert len(kinds) >= 7


def test_mteb_encodes_with_the_resolved_prompt(benchmark_tasks, wrapper):
    """The whole path: mteb's vectors are those of sentence-transformers with the prompt spelled out."""
    import numpy as np
    from datasets import Dataset
    from mteb.types import PromptType
    from torch.utils.data import DataLoader

    task = next(task for task in benchmark_tasks if task.name == "ArguAna")
    text = "how do i parse a date"
    prompt = baked_prompts(None)["ArguAna-query"]
    vectors = wrapper.encode(
        DataLoader(Dataset.from_dict({"text": [text]})),
        task_metadata=task,
        hf_split="test",
        hf_subset="default",
        prompt_type=PromptType.query,
        show_progress_bar=False,
    )
    np.testing.assert_allclose(vectors, wrapper.model.encode([text], prompt=prompt), atol=1e-6)
    assert np.abs(vectors - wrapper.model.encode([text], prompt="")).max() > 1e-3


def test_a_model_without_an_instruction_encodes_bare_queries():
    assert baked_prompts(None)["query"] == baked_prompts(None)["document"] == ""
    assert baked_prompts("Find it")["query"] == "Instruct: Find it\nQuery: "


SHOTS = [("how do i parse a date", "read"), ("sort a list", "list sort")]


def test_demonstrations_add_one_prompt_and_change_none():
    prompts = baked_prompts("Find it", SHOTS)
    assert prompts.pop("query-2-shot") == few_shot_prompt("Find it", SHOTS)
    assert prompts == baked_prompts("Find it")


def test_mteb_leaves_the_few_shot_prompt_alone_until_it_is_asked_for(benchmark_tasks, tiny_encoder, caplog):
    """It drops names it does not know: a k-shot evaluation that only names the prompt would silently be zero-shot."""
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.types import PromptType
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_encoder))
    prompts = baked_prompts("Find it", SHOTS)
    model.prompts = prompts
    assert SentenceTransformerEncoderWrapper(model).model_prompts == baked_prompts("Find it")
    model.prompts = with_demonstrations(prompts, 2)
    wrapper = SentenceTransformerEncoderWrapper(model)
    assert wrapper.model_prompts == model.prompts
    shown = few_shot_prompt("Find it", SHOTS).removesuffix(instruction_prompt("Find it"))
    for task in benchmark_tasks:
        asymmetric = task.type in ("Retrieval", "Reranking")
        name = wrapper.get_prompt_name(task, PromptType.query if asymmetric else None)
        assert wrapper.model_prompts[name] == shown + prompts[name] != prompts[name]
        assert not asymmetric or wrapper.model_prompts[wrapper.get_prompt_name(task, PromptType.document)] == ""
