"""The text before a text: instructions, demonstrations, and a prompt for every task of MTEB(eng, v2).

Queries (and both sides of symmetric tasks) carry `Instruct: {task}` and `Query: ` on two lines, as E5-mistral
introduced it (arXiv 2401.00368); documents stay bare. A published embedder keeps the wording it was trained with: its
template, such as Qwen3-Embedding's without the space after `Query:`, is read from its prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

# Task types whose two sides are encoded differently: mteb asks for `{Task}-query` and `{Task}-document`.
# Every other type has one side, or two equal ones, and mteb asks for `{Task}`.
ASYMMETRIC = ("Retrieval", "Reranking")


QUERY_TEMPLATE = "Instruct: {task}\nQuery: "
# `Instruct: ...` and `Query:` on two lines, in the spacing and spelling of whoever published the model
_INSTRUCTED = re.compile(r"(?P<before>\s*Instruct:\s*)(?P<task>\S.*?)(?P<after>\s*\nQuery:\s*)", re.DOTALL)


def instruction_prompt(task: str, template: str = QUERY_TEMPLATE) -> str:
    r"""The prompt of a query, given the task in one sentence.

    >>> instruction_prompt("Given a question, retrieve its answer")
    'Instruct: Given a question, retrieve its answer\nQuery: '
    """
    return template.replace("{task}", task)


def few_shot_prompt(task: str, demonstrations: Sequence[tuple[str, str]], template: str = QUERY_TEMPLATE) -> str:
    r"""The prompt of a query after `demonstrations`, (query, response) pairs in the order in which they are shown.

    Demonstrations first and the instruction last is the order of arXiv 2506.07438; the wording of a block is ours.
    With no demonstrations this is `instruction_prompt(task, template)`.

    >>> few_shot_prompt("Find the capital", [("France", "Paris")])
    'Instruct: Find the capital\nQuery: France\nResponse: Paris\n\nInstruct: Find the capital\nQuery: '
    """
    prompt = instruction_prompt(task, template)
    return "".join(f"{prompt}{query}\nResponse: {response}\n\n" for query, response in demonstrations) + prompt


def template_of(prompt: str) -> str | None:
    r"""The template behind an instruction prompt; None when it is of another form.

    >>> template_of("Instruct: Given a web search query, retrieve relevant passages\nQuery:")
    'Instruct: {task}\nQuery:'
    >>> template_of("query: ") is None
    True
    """
    match = _INSTRUCTED.fullmatch(prompt)
    return match and f"{match['before']}{{task}}{match['after']}"


def task_instructions() -> dict[str, dict[str, str]]:
    """Task type -> task name -> instruction, for the tasks of MTEB(eng, v2) and RTEB(eng, beta); names are mteb's."""
    return {kind: of_kind for kind, of_kind in _instructions().items() if kind != "types"}


def type_instructions() -> dict[str, str]:
    """Task type -> instruction of tasks that `task_instructions` does not have."""
    return _instructions()["types"]


def _instructions() -> dict[str, dict[str, str]]:
    return yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))


def few_shot_prompts(prompts: Mapping[str, str]) -> dict[int, str]:
    """Number of demonstrations -> prompt, of the few-shot prompts among those of a saved model.

    >>> few_shot_prompts({"query": "Q: ", "query-2-shot": "Q: a ..."})
    {2: 'Q: a ...'}
    """
    named = {name: re.fullmatch(r"query-(\d+)-shot", name) for name in prompts}
    return {int(match[1]): prompts[name] for name, match in named.items() if match}


def baked_prompts(
    instruction: str | None,
    demonstrations: Sequence[tuple[str, str]] = (),
    template: str = QUERY_TEMPLATE,
    document_prompt: str = "",
) -> dict[str, str]:
    """What a saved model carries as `prompts`: its own `query` and `document`, and one for each evaluation task.

    `instruction` is what the model was trained with; None leaves queries as bare as documents. The names are those
    that mteb looks up in `model.prompts`: a task of another name runs with its type's prompt, a retrieval task with
    the `query` prompt, without an error.

    With `demonstrations`, there is one more, `query-K-shot`: `model.encode(texts, prompt_name="query-2-shot")`. mteb
    does not know that name and leaves it alone; `with_demonstrations` makes of it what mteb looks up.
    """
    query_prompt = "" if instruction is None else instruction_prompt(instruction, template)
    prompts = {"query": query_prompt, "document": document_prompt}
    if demonstrations:
        prompts[f"query-{len(demonstrations)}-shot"] = few_shot_prompt(instruction, demonstrations, template)
    for task_type, instructions in task_instructions().items():
        for task, text in instructions.items():
            if task_type in ASYMMETRIC:
                prompts |= {f"{task}-query": instruction_prompt(text, template), f"{task}-document": document_prompt}
            else:
                prompts[task] = instruction_prompt(text, template)
    return prompts | {kind: instruction_prompt(text, template) for kind, text in type_instructions().items()}


def with_demonstrations(prompts: Mapping[str, str], shots: int) -> dict[str, str]:
    r"""The `prompts` of a saved model for a k-shot evaluation: its frozen demonstrations before every instruction.

    They stay those of the training rows, with the instruction of these; a task's own instruction comes last.
    Documents stay bare. For mteb: `model.prompts = with_demonstrations(model.prompts, 2)` before it wraps the model.

    Raises:
        KeyError: the model has no prompt of so many shots.

    >>> with_demonstrations({"query": "Q: ", "SICK-R": "S: ", "document": "", "query-1-shot": "Q: a\nR: b\n\nQ: "}, 1)
    {'query': 'Q: a\nR: b\n\nQ: ', 'SICK-R': 'Q: a\nR: b\n\nS: ', 'document': ''}
    """
    few_shot = few_shot_prompts(prompts)
    shown = few_shot[shots].removesuffix(prompts["query"])
    return {name: prompt and shown + prompt for name, prompt in prompts.items() if prompt not in few_shot.values()}
