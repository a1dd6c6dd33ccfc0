"""Recipes: YAML files whose keys are fields of pydantic models. An unknown key is an error.

A flag of the same name overrides any key: `--mining.margin 0.9`, or `--margin 0.9` where only one section has it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from common.cli import InputError, at

# pydantic speaks of Python's types, where a recipe has YAML's
_ADVICE = {"tuple_type": "write a list, such as [a, b]", "model_type": "write a mapping, such as {a: 1}"}


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and what it is made of: the members of a union, what Annotated annotates, ..."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about the names and the types of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, values: Any) -> Any:
        """pydantic reads `yes` as 1; as a word it is refused."""
        for name, value in values.items() if isinstance(values, dict) else ():
            annotation = cls.model_fields[name].annotation if name in cls.model_fields else None
            if isinstance(value, bool) and any(part in (int, float) for part in _parts(annotation)):
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
    with at(where):
        return parse_section(kind, values)


def parse_section(kind: type[Recipe], values: Mapping[str, Any]) -> Recipe:
    """`values` as an instance of `kind`. Raises InputError on the first unknown, missing or ill-typed key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_first_problem(kind, error)) from None


def _read_flags(kind: type[Section], flags: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The path of a key and its value, for each flag."""
    is_text = dict(_keys(kind))  # members of a union (source: local | hub | ...) may hold the same key
    for name, texts in flag_texts(flags):
        matches = [path for path in is_text if name in (".".join(path), path[-1])]
        if not matches:
            raise InputError(f"unknown option --{name}{_suggestion(name, ['.'.join(path) for path in is_text])}")
        if len(matches) > 1:
            paths = ", ".join("--" + ".".join(path) for path in matches)
            raise InputError(f"--{name} could be any of {paths}: name one")
        yield matches[0], flag_value(texts, is_text[matches[0]])


def flag_texts(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Name and texts of each flag: --key value, --key=value, or --key value value for a list."""
    found: list[tuple[str, list[str]]] = []
    for flag in flags:
        if flag.startswith("--"):
            name, *value = flag.removeprefix("--").split("=", 1)
            found.append((name, value))
        elif not found:
            raise InputError(f"unexpected argument {flag!r}; overrides are written --key value")
        else:
            found[-1][1].append(flag)
    for name, texts in found:
        if not texts:
            raise InputError(f"--{name} needs a value")
    return found


def flag_value(texts: Sequence[str], is_text: bool) -> Any:
    """What a flag says: YAML; for a key that holds text the text as it is (as YAML, `query: ` would be a mapping)."""
    if len(texts) > 1:
        return [flag_value([text], is_text) for text in texts]
    [text] = texts
    if is_text:
        return None if text in ("", "null") else text
    try:
        return load_yaml(text)
    except ValueError:
        return text


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The Section classes inside a field's annotation (itself, a union's members, ...), but not those in a list."""
    if get_origin(annotation) in (tuple, list, dict):
        return  # a flag could not say which entry it means
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections(inner)


def text_keys(kind: type[Section]) -> set[str]:
    """Names of the keys that hold text."""
    fields = kind.model_fields.items()
    return {
        name
        for name, field in fields
        if {field.annotation, *get_args(field.annotation)} <= {str, str | None, NoneType}
    }


def _keys(kind: type[Section]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The path of every key, and whether it holds text."""
    for name, field in kind.model_fields.items():
        yield (name,), name in text_keys(kind)
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
    return f"; did you mean {leaves[close[0]]!r}?" if close else "; --list_keys prints all"


# --- what the keys mean ---------------------------------------------------------------------------------------------


def key_line(name: str, default: Any, meaning: str, choices: Sequence[str] = ()) -> str:
    """A key as --list_keys and docs/keys.md show it.

    >>> key_line("fusion", "rrf", "how rankings become one", ["rrf", "convex"])
    '- `fusion` (rrf): how rankings become one; one of rrf, convex'
    """
    if isinstance(default, Section):
        default = "see below"
    default = default if default and isinstance(default, str) else json.dumps(default)
    parts = [*([meaning] if meaning else []), *([f"one of {', '.join(choices)}"] if choices else [])]
    return f"- `{name}` ({default}): {'; '.join(parts)}"


def list_keys(kind: type[Section], title: str, prefix: str = "") -> Iterator[str]:
    """Lines of Markdown: every key of `kind` with default and meaning, then those of the sections in it."""
    yield from (f"### {title}", "", *key_lines(kind, prefix).values(), "")
    for name, field in kind.model_fields.items():
        for section in _sections(field.annotation):
            kinds = _choices(section, "kind") if "kind" in section.model_fields else []
            kind_of_union = f", kind `{kinds[0]}`" if len(kinds) == 1 else ""
            yield from list_keys(section, f"`{prefix}{name}`{kind_of_union}", f"{prefix}{name}.")


def key_lines(kind: type[Section], prefix: str = "") -> dict[str, str]:
    """Name -> line of every key of `kind`."""
    lines, described = {}, meanings(kind)
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        lines[name] = key_line(prefix + name, default, described[name], _choices(kind, name))
    return lines


def _choices(kind: type[Section], name: str) -> list[str]:
    """The words that a key can be; none where it is anything else."""
    annotation = kind.model_fields[name].annotation
    literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)]


def meanings(kind: type) -> dict[str, str]:
    """Name -> meaning of the fields of a class: the comment beside a field, or on the lines above it."""
    found = {}
    for base in reversed(kind.__mro__[: kind.__mro__.index(Section)]):
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            beside = lines[node.end_lineno - 1].rpartition("  # ")
            above = []
            while (line := lines[node.lineno - 2 - len(above)].strip()).startswith("# "):
                above.insert(0, line.removeprefix("# "))
            meaning = beside[2] if beside[1] else " ".join(above)
            found[node.target.id] = meaning or found.get(node.target.id, "")  # that of the class it is derived from
    return found
