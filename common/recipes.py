"""Recipes: YAML files whose keys are fields of pydantic models. An unknown key is an error.

They are plain data of a size that people write: no tags that make objects, no key twice, no alias that writes out to
more than MAX_VALUES values.

Every key can be overridden on the command line by a flag of the same name: `--mining.margin 0.9`, or `--margin 0.9`
when only one section has a key of that name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from common.cli import InputError

_NUMBERS = {int, float}


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about the names and the types of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """pydantic would read `yes` as 1; as a word it is refused."""
        if not isinstance(values, dict):
            return values
        numbers = [
            name
            for name, field in cls.model_fields.items()
            if _NUMBERS & {field.annotation, *get_args(field.annotation)}
        ]
        return {
            name: str(value).lower() if isinstance(value, bool) and name in numbers else value
            for name, value in values.items()
        }


Recipe = TypeVar("Recipe", bound=Section)
MAX_BYTES = 1 << 18  # of a recipe's file
MAX_VALUES = 100_000  # of a recipe, each alias counted as what it stands for


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError when there is none."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES:,} bytes; name a recipe")
        content = load_yaml(text.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe; recipes that ship are under recipes/") from None
    except (OSError, ValueError) as error:  # a folder, a loop of links, other bytes than UTF-8, a name with a NUL
        raise InputError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: a recipe is a mapping of names to values, this file is not")
    return content


def load_yaml(text: str) -> Any:
    """What a YAML text says, as plain data. Raises ValueError for what is no YAML, or more than plain data."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, loader, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _count_values(node: yaml.Node, loader: yaml.SafeLoader, counted: dict[yaml.Node, int | None]) -> int:
    """How many values there are in `node`, aliases written out; `counted` holds None for those around it.

    Raises YAMLError for what safe_load would take, make endless, or fail on in ways of its own: a key that is there
    twice, a value inside itself, a tag that does not fit its text, text that no UTF-8 file can hold.
    """
    if node in counted:
        if counted[node] is None:
            raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
        return counted[node]
    counted[node] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark)
            names.add(key.value)
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    else:
        _check_scalar(node, loader)
    counted[node] = 1 + sum(_count_values(part, loader, counted) for part in inner)
    if counted[node] > MAX_VALUES:
        raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES:,} values", problem_mark=node.start_mark)
    return counted[node]


def _check_scalar(node: yaml.ScalarNode, loader: yaml.SafeLoader) -> None:
    problem = None
    is_typed = node.tag in loader.yaml_constructors and node.tag != loader.DEFAULT_SCALAR_TAG
    if is_typed and loader.resolve(yaml.ScalarNode, node.value, (True, False)) != node.tag:
        problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
    try:
        node.value.encode()
    except UnicodeEncodeError:
        problem = f"{node.value!r} is no text: half of a surrogate pair"
    if problem:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def parse_recipe(kind: type[Recipe], values: dict[str, Any], where: str, flags: Sequence[str] = ()) -> Recipe:
    """`values` (as read from `where`), overridden by command-line `flags`, as an instance of `kind`.

    Raises InputError on the first unknown, missing or ill-typed key.
    """
    values = {**values}
    for path, value in _read_flags(kind, flags):
        target = values
        for key in path[:-1]:
            section = target.get(key)
            target[key] = {**section} if isinstance(section, dict) else {}
            target = target[key]
        target[path[-1]] = value
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(kind, error)}") from None


def _read_flags(kind: type[Section], flags: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    texts = dict(_keys(kind))  # variants of a union (source: local | hub | ...) may hold the same key
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    position = 0
    while position < len(flags):
        flag = flags[position]
        if not flag.startswith("--"):
            raise InputError(f"unexpected argument {flag!r}; overrides are written --key value")
        if position + 1 == len(flags):
            raise InputError(f"{flag} needs a value")
        name = flag.removeprefix("--")
        matches = [path for path in texts if name in (".".join(path), path[-1])]
        if not matches:
            raise InputError(f"unknown option {flag}{_suggestion(name, ['.'.join(path) for path in texts])}")
        if len(matches) > 1:
            raise InputError(
                f"{flag} could be any of {', '.join('--' + '.'.join(path) for path in matches)}: name one"
            )
        yield matches[0], _flag_value(flags[position + 1], texts[matches[0]])
        position += 2


def _flag_value(value: str, is_text: bool) -> Any:
    """What a flag says, as YAML; a text as it stands (`query: ` is no mapping there), unless it is null or quoted, or
    a mapping with values, which was meant for another key.
    """
    try:
        read = load_yaml(value)
    except ValueError:
        return value
    is_other = isinstance(read, dict) and any(read.values())
    if is_text and value.lower() not in ("", "~", "null") and not value.startswith(("'", '"')) and not is_other:
        return value
    return read


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The Section classes inside a field's annotation (itself, a union's members, ...), but not those in a list."""
    if get_origin(annotation) in (tuple, list, dict):
        return  # a flag could not say which entry it means
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections(inner)


def _keys(kind: type[Section]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The path of every key, and whether it holds a text."""
    for name, field in kind.model_fields.items():
        yield (name,), {field.annotation, *get_args(field.annotation)} <= {str, str | None, NoneType}
        for section in _sections(field.annotation):
            for path, is_text in _keys(section):
                yield (name, *path), is_text


def _first_problem(kind: type[Section], error: ValidationError) -> str:
    # an unknown key explains a missing one, so it is told first
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    paths = [".".join(path) for path, _ in _keys(kind)]
    of_section = problem["type"] == "value_error" and isinstance(problem["input"], dict)
    location: list[str] = []
    for part in problem["loc"]:
        # pydantic puts the tag of a union's member into the path (source.local.path); no recipe has that key
        named = ".".join([*location, str(part)]) in paths or (part == problem["loc"][-1] and not of_section)
        if not location or named:
            location.append(str(part))
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        if key in paths:  # a key of another member of the union
            return f"key {key!r} does not go with this {location[0]}'s other keys; leave it out"
        return f"unknown key {key!r}{_suggestion(location[-1], paths)}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    # pydantic speaks of Python's types, where a recipe has YAML's
    told = {"tuple_type": "write a list, such as [a, b]", "model_type": "write a mapping, such as {a: 1}"}
    reason = told.get(problem["type"], problem["msg"].removeprefix("Value error, ").replace("Tuple", "the list"))
    return f"key {key!r} is {problem['input']!r}: {reason}" if key else reason


def _suggestion(name: str, paths: list[str]) -> str:
    leaves = {path.rsplit(".", 1)[-1]: path for path in paths}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1)
    return f"; did you mean {leaves[close[0]]!r}?" if close else f"; known keys: {', '.join(paths)}"
