"""MTEB runs, offline on mteb's own mock tasks: they pass, resume, and never mix two models' results."""

import json
import shutil

import numpy as np
import pytest

from common.cli import InputError, run
from eval import run_mteb
from eval.cost import task_cost
from eval.run_mteb import evaluate, load_for_mteb, load_tasks, main, show_demonstrations, use_dtype
from modeling.prompts import baked_prompts, few_shot_prompt

NAMES = ("MockClassificationTask", "MockSTSTask", "MockRetrievalTask")


@pytest.fixture(scope="module")
def mock_tasks():
    from mteb.mocks import MOCK_TASK_REGISTRY

    return [MOCK_TASK_REGISTRY[name]() for name in NAMES]


@pytest.fixture(scope="module")
def model(tiny_encoder):
    return load_for_mteb(str(tiny_encoder))


def results_of(output, model):
    meta = model.mteb_model_meta
    return output / "results" / meta.model_name_as_path() / meta.revision


def test_a_local_model_is_known_by_its_files(tiny_encoder, model, tmp_path):
    """mteb's `no_revision_available` would take up the results of the weights that were there before."""
    assert model.mteb_model_meta.name == "/".join(tiny_encoder.parts[-2:])
    copy = tmp_path / "models0" / "tiny-encoder"
    shutil.copytree(tiny_encoder, copy)
    assert load_for_mteb(str(copy)).mteb_model_meta.revision == model.mteb_model_meta.revision
    config = copy / "config_sentence_transformers.json"
    config.write_text(config.read_text().replace("its answer", "an answer"))
    assert load_for_mteb(str(copy)).mteb_model_meta.revision != model.mteb_model_meta.revision


def test_an_interrupted_run_computes_only_what_is_missing(model, mock_tasks, tmp_path, monkeypatch, capsys):
    import mteb

    whole, failures = evaluate(model, mock_tasks, tmp_path / "whole", batch_size=8)
    [found] = mteb.ResultCache(tmp_path / "whole").load_results(tasks=mock_tasks)  # where mteb looks for them
    assert failures == {} and found.model_name == model.mteb_model_meta.name and len(found.task_results) == 3
    evaluate(model, mock_tasks[:2], tmp_path / "cut", batch_size=8)
    broken = results_of(tmp_path / "cut", model) / "MockSTSTask.json"
    broken.write_text(broken.read_text()[:100])  # killed while mteb wrote it

    encoded = []
    encode = type(model).encode
    monkeypatch.setattr(
        type(model),
        "encode",
        lambda self, inputs, **kwargs: encoded.append(kwargs["task_metadata"].name) or encode(self, inputs, **kwargs),
    )
    resumed, failures = evaluate(model, mock_tasks, tmp_path / "cut", batch_size=8)
    assert "MockSTSTask.json: cut off while it was written; MockSTSTask is run again" in capsys.readouterr().err
    assert failures == {}
    assert set(encoded) == {"MockSTSTask", "MockRetrievalTask"}
    assert {r.task_name: r.get_score() for r in resumed} == {r.task_name: r.get_score() for r in whole}


def test_shots_stand_before_every_instruction_and_have_results_of_their_own(tiny_encoder, mock_tasks, tmp_path):
    shots = [("open", "open a file"), ("close", "close it")]
    folder = shutil.copytree(tiny_encoder, tmp_path / "models" / "few")
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": baked_prompts("Find it", shots)}))
    zero, few = load_for_mteb(str(folder)), load_for_mteb(str(folder))
    show_demonstrations(few, 2)
    assert few.mteb_model_meta.revision == f"{zero.mteb_model_meta.revision}-2-shot"
    assert few.model_prompts["query"] == few_shot_prompt("Find it", shots)
    before, asked = few.model.encode_query, []
    few.model.encode_query = lambda texts, prompt=None, **kwargs: (
        asked.append(prompt) or before(texts, prompt=prompt, **kwargs)
    )
    for model in (zero, few):
        results, failures = evaluate(model, mock_tasks[2:], tmp_path, batch_size=8)
        assert failures == {} and len(results) == 1
        assert results_of(tmp_path, model).is_dir()
    assert set(asked) == {few_shot_prompt("Find it", shots)}
    told = [json.loads((results_of(tmp_path, model) / "model_meta.json").read_text()) for model in (zero, few)]
    assert [meta["loader_kwargs"] for meta in told] == [{}, {"model_prompts": few.model_prompts}]
    with pytest.raises(InputError, match="--shots 3: the model has no prompt of so many demonstrations; it has 2"):
        show_demonstrations(zero, 3)
    with pytest.raises(InputError, match="train it with prompt_shots"):
        show_demonstrations(load_for_mteb(str(tiny_encoder)), 2)


def test_another_dtype_has_results_of_its_own(tiny_encoder, mock_tasks, tmp_path):
    whole, half = load_for_mteb(str(tiny_encoder)), load_for_mteb(str(tiny_encoder))
    use_dtype(whole, "float32")
    use_dtype(half, "bfloat16")
    revisions = [model.mteb_model_meta.revision for model in (whole, half)]
    assert revisions[1] == f"{revisions[0]}-bfloat16" and half.model.dtype.itemsize == 2
    scores = [evaluate(model, mock_tasks[1:2], tmp_path, batch_size=8)[0][0].get_score() for model in (whole, half)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05) and len(list(tmp_path.rglob("MockSTSTask.json"))) == 2


def test_a_failing_task_does_not_end_the_run(model, mock_tasks, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise ConnectionError("the Hub cannot be reached")

    monkeypatch.setattr(mock_tasks[0], "evaluate", unreachable)
    monkeypatch.setattr(run_mteb, "load_tasks", lambda *_: mock_tasks)
    monkeypatch.setattr(run_mteb, "load_for_mteb", lambda reference: model)
    with pytest.raises(SystemExit) as stopped:
        run(main, ["--model", "m", "--tasks", *NAMES, "--output_dir", str(tmp_path)])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert "error: 1 of 3 tasks failed, the first of them MockClassificationTask: the Hub" in shown.err
    files = [json.loads(path.read_text()) for path in results_of(tmp_path, model).glob("Mock*.json")]
    scores = {file["task_name"]: 100 * file["scores"]["test"][0]["main_score"] for file in files}
    assert set(scores) == {"MockSTSTask", "MockRetrievalTask"}
    by_type = f"{scores['MockRetrievalTask']:.2f} | {scores['MockSTSTask']:.2f}"
    assert f"| m | 2/3 | | | | {by_type} |" in shown.out


def test_the_estimate_is_mtebs_counts_times_the_models_length(tiny_encoder, tmp_path, capsys):
    """SciFact: 5,183 documents of 1,499 characters on average, cut at the model's length, and 300 queries of 90."""
    model = load_for_mteb(str(tiny_encoder)).model
    arguments = ["--model", str(tiny_encoder), "--tasks", "SciFact", "--output_dir", str(tmp_path), "--estimate"]
    main(arguments)
    table = capsys.readouterr().err
    length = model.max_seq_length
    prompts = [prompt for prompt in model.prompts.values() if prompt]
    prompt_tokens = round(np.mean([len(prompt) for prompt in prompts]) / 4)
    tokens = 5183 * length + 300 * min(90.34666 / 4 + prompt_tokens, length)
    assert f"| Retrieval | 1 | 5,483 | {tokens / 1e6:,.1f} M |" in table and "A100 hours" in table
    assert not (tmp_path / "results").exists()


def test_closed_tasks_of_a_benchmark_are_left_out_by_name(capsys):
    tasks = load_tasks("RTEB(eng, beta)", None)
    assert len(tasks) == 15 and "Code1Retrieval" not in {task.metadata.name for task in tasks}
    assert "left out, their data are not public: Code1Retrieval, EnglishFinance1Retrieval" in capsys.readouterr().err
    costs = [task_cost(task, 512, 20) for task in tasks]
    assert all(cost.tokens <= cost.texts * 512 and cost.texts > 50 for cost in costs)
