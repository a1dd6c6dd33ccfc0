"""Run a model on MTEB tasks, into mteb's own result layout.

    python -m eval.run_mteb --model runs/demo/model --benchmark "MTEB(eng, v2)" --output_dir results
    python -m eval.run_mteb --model org/name@revision --tasks STSBenchmark SciFact --output_dir results
    python -m eval.run_mteb --model runs/demo/model --tasks local --data_root DATA --output_dir results

Scores go to OUTPUT_DIR/results/MODEL/REVISION/TASK.json as soon as a task is done; running the same command again
computes only what is missing. For results that go to mteb's leaderboard see docs/leaderboard.md. With --data_root,
tasks of eval.local_tasks read the Parquet files below that folder instead of the Hub; `local` means all of them.

`--shots 2` evaluates with demonstrations, those of the model's prompt `query-2-shot`. They are rows of the training
task, with its instruction, and stand before every task's own instruction, whatever that task is about. REVISION ends
in -2-shot, and its model_meta.json has the prompts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import ArgumentParser, InputError, at_least_1, run
from common.models import fetch_settings, resolve_model
from common.plain_text import use_plain_text
from dataset_builders.embeddings import load_model
from eval.cost import format_cost
from eval.leaderboard import format_means, make_leaderboard
from eval.local_tasks import LOCAL_TASKS, local_tasks, register_local_tasks
from eval.systems import DTYPES, encoder_section
from modeling.prompts import few_shot_prompts, with_demonstrations

if TYPE_CHECKING:
    from mteb import AbsTask
    from mteb.models import MTEBModels
    from mteb.results import TaskResult


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    tasks = load_tasks(args.benchmark, args.tasks, args.data_root)
    if args.data_root:
        local = [task.metadata.name for task in tasks if task.metadata.dataset["path"].startswith("local/")]
        print(f"from {args.data_root}, so not for mteb's leaderboard: {', '.join(local) or 'none'}", file=sys.stderr)
    model = load_for_mteb(args.model)
    is_encoder = hasattr(model, "model")  # else it runs by an API, or by code of its own in mteb
    if not is_encoder and (args.estimate or args.share_prefix or args.dtype):
        raise InputError(
            f"{args.model}: mteb does not run it by sentence-transformers; "
            "leave out --estimate, --share_prefix and --dtype"
        )
    if args.dtype:
        use_dtype(model, args.dtype)
    if args.shots:
        show_demonstrations(model, args.shots)
    if is_encoder:
        print(format_cost(model.model, tasks), file=sys.stderr)
    if args.estimate:
        return
    results, failures = evaluate(model, tasks, Path(args.output_dir), args.batch_size, args.share_prefix)
    print(format_means(make_leaderboard({args.model: results}, tasks)))
    if failures:
        name, reason = next(iter(failures.items()))
        raise InputError(
            f"{len(failures)} of {len(tasks)} tasks failed, the first of them {name}: {reason}; "
            "run the same command again to compute only these"
        )


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python -m eval.run_mteb", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a model, Hub id (with @revision) or package:NAME")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--benchmark", help='name of an mteb benchmark, such as "MTEB(eng, v2)"')
    chosen.add_argument("--tasks", nargs="+", metavar="TASK", help="names of mteb tasks, or local")
    parser.add_argument("--data_root", type=Path, help="folder of local copies of tasks' data, see eval.local_tasks")
    parser.add_argument("--output_dir", required=True, help="where results/ goes")
    parser.add_argument("--batch_size", type=at_least_1, default=32, help="texts per forward pass (default: 32)")
    shots = "show the training task's K demonstrations before every task's own instruction (default: none)"
    parser.add_argument("--shots", type=at_least_1, default=0, metavar="K", help=shots)
    share = "compute a prompt once a call: the same vectors up to rounding, sooner where prompts are long"
    parser.add_argument("--share_prefix", action="store_true", help=share)
    dtype = "of weights and products (default: as saved); the results' revision then ends in it"
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    parser.add_argument("--estimate", action="store_true", help="print texts, tokens and GPU hours, and stop")
    return parser.parse_args(argv)


def load_tasks(benchmark: str | None, names: Sequence[str] | None, data_root: Path | None = None) -> list[AbsTask]:
    """The tasks of a benchmark, those of the given names, or all local ones; below `data_root` where it has them.

    Raises InputError for an unknown name, and for local tasks whose files are not there.
    """
    import mteb

    if names == ["local"]:
        if data_root is None:
            raise InputError("--tasks local: name the folder of the data sets with --data_root")
        return local_tasks(data_root)
    register_local_tasks()
    try:
        tasks = list(mteb.get_benchmark(benchmark).tasks) if benchmark else [mteb.get_task(name) for name in names]
        if closed := [task.metadata.name for task in tasks if benchmark and task.metadata.is_public is False]:
            print(f"left out, their data are not public: {', '.join(closed)}", file=sys.stderr)
            tasks = [task for task in tasks if task.metadata.name not in closed]
    except KeyError as error:
        raise InputError(f"mteb: {error.args[0]}") from None
    there = [task.metadata.name for task in tasks if task.metadata.name in LOCAL_TASKS]
    if data_root is None:
        if missing := [name for name in there if LOCAL_TASKS[name].description]:
            raise InputError(f"task {missing[0]} is read from local files; name their folder with --data_root")
        return tasks
    if benchmark:
        there = [name for name in there if (data_root / LOCAL_TASKS[name].folder).is_dir()]
    local = {task.metadata.name: task for task in local_tasks(data_root, there)}
    return [local.get(task.metadata.name, task) for task in tasks]


def load_for_mteb(reference: str) -> MTEBModels:
    """The model in mteb's wrapper, with a name and a revision that tell its results from those of other weights.

    mteb gives local folders the revision `no_revision_available`, and would take up the results of the model that
    was there before; here the revision is a hash of the files, and the name the folder's last two parts.
    """
    import mteb
    from huggingface_hub.errors import HTTPError
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.models.model_implementations import MODEL_REGISTRY
    from sentence_transformers import SentenceTransformer

    model = resolve_model(reference)
    if not model.is_local:
        commit = fetch_settings(model)
        if model.name_or_path not in MODEL_REGISTRY:  # then model_meta.json holds mteb's guesses
            print(
                f"{model.name_or_path}: mteb has no file about it; results for the leaderboard need one first, "
                "see docs/leaderboard.md",
                file=sys.stderr,
            )
        try:
            wrapper = mteb.get_model(model.name_or_path, commit)
        except (HTTPError, OSError, ValueError, KeyError) as error:
            raise InputError(f"model {reference!r}: mteb cannot load it: {str(error).splitlines()[0]}") from None
        if type(wrapper) is SentenceTransformerEncoderWrapper:  # others format texts as their authors meant
            use_plain_text(wrapper.model, model.name_or_path, commit)
        return wrapper
    wrapper = SentenceTransformerEncoderWrapper(load_model(SentenceTransformer, encoder_section(reference)))
    update_meta(wrapper, name="/".join(Path(model.name_or_path).resolve().parts[-2:]), revision=model.fingerprint())
    return wrapper


def update_meta(model: MTEBModels, **fields: Any) -> None:
    """Change what mteb knows of a loaded model."""
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update=fields)


def use_dtype(model: MTEBModels, dtype: str) -> None:
    """Run the model in `dtype`, under a revision of its own where its weights were saved in another."""
    import torch

    if model.model.dtype != (wanted := getattr(torch, dtype)):
        model.model.to(wanted)
        update_meta(model, revision=f"{model.mteb_model_meta.revision}-{dtype}")


def show_demonstrations(model: MTEBModels, shots: int) -> None:
    """Put the model's saved demonstrations before every prompt, under a revision of its own.

    Raises InputError when it was saved without so many.
    """
    # model_prompts are those of them that mteb knows by name
    prompts = model.model.prompts if getattr(model, "model_prompts", None) else {}
    known = few_shot_prompts(prompts)
    if shots not in known:
        there = f"it has {', '.join(map(str, known))}" if known else "train it with prompt_shots"
        raise InputError(f"--shots {shots}: the model has no prompt of so many demonstrations; {there}")
    model.model_prompts = with_demonstrations(prompts, shots)
    meta = model.mteb_model_meta
    shown = {**meta.loader_kwargs, "model_prompts": model.model_prompts}
    update_meta(model, revision=f"{meta.revision}-{shots}-shot", loader_kwargs=shown)


def evaluate(
    model: MTEBModels, tasks: Sequence[AbsTask], output: Path, batch_size: int, share: bool = False
) -> tuple[list[TaskResult], dict[str, str]]:
    """Results of the tasks that have been run, now or earlier, and task name -> reason of those that failed.

    One task's failure (a data set that the Hub does not serve) does not end a run of days. `share`: prompts are
    computed once a call (modeling.shared_prefix), for models of sentence-transformers.
    """
    import mteb

    from modeling.shared_prefix import share_prefix

    cache = mteb.ResultCache(output)
    for task in tasks:  # mteb writes results in place: a kill while writing leaves a file that it cannot read
        path = cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            print(f"{path}: cut off while it was written; {task.metadata.name} is run again", file=sys.stderr)
            path.unlink()
    with share_prefix(model.model) if share else nullcontext():
        found = mteb.evaluate(
            model, tasks, cache=cache, encode_kwargs={"batch_size": batch_size}, raise_error=False, co2_tracker=False
        )
    failures = {failure.task_name: failure.exception for failure in found.exceptions or []}
    return list(found.task_results), failures


if __name__ == "__main__":
    run(main)
