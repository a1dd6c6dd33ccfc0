"""Recipes: YAML files whose keys are fields of pydantic models. An unknown key is an error.

A flag of the same name overrides any key: `--mining.margin 0.9`, or `--margin 0.9` where only one section has it.
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

# pydantic speaks of Python's types, where a recipe has YAML's
_ADVICE = {"tuple_type": "write a list, such as [a, b]", "model_type": "write a mapping, such as {a: 1}"}


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about the names and the types of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, values: Any) -> Any:
        """pydantic reads `yes` as 1; as a word it is refused."""
        for name, value in values.items() if isinstance(values, dict) else ():
            annotation = cls.model_fields[name].annotation if name in cls.model_fields else None
            if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
                values = {**values, name: str(value).lower()}
        return values


Recipe = TypeVar("Recipe", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML's loader keeps the last of two equal keys; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {name!r} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError when there is none."""
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe; recipes that ship are under recipes/") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: a recipe is a mapping of names to values, this file is not")
    return content


def load_yaml(text: str) -> Any:
    """What a YAML text says. Raises ValueError for what is no YAML, or holds a key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


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
    """The path of a key and its value, for each flag."""
    is_text = dict(_keys(kind))  # members of a union (source: local | hub | ...) may hold the same key
    parts = iter(part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag]))
    for flag in parts:
        if not flag.startswith("--"):
            raise InputError(f"unexpected argument {flag!r}; overrides are written --key value")
        name = flag.removeprefix("--")
        matches = [path for path in is_text if name in (".".join(path), path[-1])]
        if not matches:
            raise InputError(f"unknown option {flag}{_suggestion(name, ['.'.join(path) for path in is_text])}")
        if len(matches) > 1:
            raise InputError(
                f"{flag} could be any of {', '.join('--' + '.'.join(path) for path in matches)}: name one"
            )
        value = next(parts, None)
        if value is None:
            raise InputError(f"{flag} needs a value")
        yield matches[0], _flag_value(value, is_text[matches[0]])


def _flag_value(value: str, is_text: bool) -> Any:
    """What a flag says: YAML; for a key that holds text the text as it is (as YAML, `query: ` would be a mapping)."""
    if is_text:
        return None if value in ("", "null") else value
    try:
        return load_yaml(value)
    except ValueError:
        return value


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The Section classes inside a field's annotation (itself, a union's members, ...), but not those in a list."""
    if get_origin(annotation) in (tuple, list, dict):
        return  # a flag could not say which entry it means
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections(inner)


def _keys(kind: type[Section]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The path of every key, and whether it holds text."""
    for name, field in kind.model_fields.items():
        yield (name,), {field.annotation, *get_args(field.annotation)} <= {str, str | None, NoneType}
        for section in _sections(field.annotation):
            for path, is_text in _keys(section):
                yield (name, *path), is_text


def _first_problem(kind: type[Section], error: ValidationError) -> str:
    # an unknown key explains a missing one, so it comes first
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    paths = [".".join(path) for path, _ in _keys(kind)]
    of_section = problem["type"] == "value_error" and isinstance(problem["input"], dict)
    location: list[str] = []
    for part in problem["loc"]:
        # pydantic puts the tag of a union's member into the path (source.local.path); no recipe has that key
        is_key = ".".join([*location, str(part)]) in paths or (part == problem["loc"][-1] and not of_section)
        if not location or is_key:
            location.append(str(part))
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        if key in paths:  # a key of another member of the union
            return f"key {key!r} does not go with this {location[0]}'s other keys; leave it out"
        return f"unknown key {key!r}{_suggestion(location[-1], paths)}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    reason = problem["msg"].removeprefix("Value error, ").replace("Tuple", "the list")
    reason = _ADVICE.get(problem["type"], reason)
    return f"key {key!r} is {problem['input']!r}: {reason}" if key else reason


def _suggestion(name: str, paths: list[str]) -> str:
    leaves = {path.rsplit(".", 1)[-1]: path for path in paths}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1)
    return f"; did you mean {leaves[close[0]]!r}?" if close else f"; known keys: {', '.join(paths)}"
