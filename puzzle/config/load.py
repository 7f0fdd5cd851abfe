"""From a YAML file and `--section.key value` to a `TrainConfig`; a mistake becomes one line naming its place.

The command line wins over the file, the file over the defaults.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from puzzle.config import command_line
from puzzle.config.base import ROLES, SOURCES, RunConfig
from puzzle.config.document import Key, read_yaml, shown
from puzzle.config.renamed import modernised, present
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SUPERVISED
from puzzle.errors import UserError

Config = TypeVar("Config", bound=RunConfig)
Schema = type[BaseModel]
_ABSENT = object()
_KEYS = re.compile(r"[a-z_]\w*(?:\.\w+)*")
COMMAND_LINE = "command line"
COMMANDS: Mapping[str, Schema] = {TrainConfig.task_name(): TrainConfig, **SUPERVISED}
"""Commands that run a configuration, and what it may say."""

_EXPECTED = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "string_unicode": "text without half characters",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of at most {max_length} characters",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, the last one on top."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = result.get(name)
            both = isinstance(value, Mapping) and isinstance(below, Mapping)
            result[name] = merge(below, value) if both else value
    return result


def keys(model: Schema = TrainConfig, prefix: Key = ()) -> Iterator[tuple[Key, bool]]:
    """Every key of the configuration and whether it is a section."""
    for name, info in model.model_fields.items():
        inner = command_line.section(info.annotation)
        yield (*prefix, name), inner is not None
        if inner is not None:
            yield from keys(inner, (*prefix, name))


def suggestion(key: Key, schema: Schema = TrainConfig) -> str:
    """`; did you mean a.b?` for an unknown key, or nothing."""
    if present(key) != key:
        return f"; it is now {'.'.join(present(key))}, which is given, too"
    known = [k for k, _ in keys(schema)]
    others = [f"puzzle {name}" for name, other in COMMANDS.items() if key in {k for k, _ in keys(other)}]
    if others and key not in known:
        return f"; it is a key of {', '.join(others)}"
    siblings = {k[-1]: k for k in known if k[:-1] == key[:-1]}
    near = get_close_matches(key[-1], siblings, 1)
    if near:
        return f"; did you mean {'.'.join(siblings[near[0]])}?"
    same = [".".join(k) for k in known if k[-1] == key[-1]]
    near = same[:1] or get_close_matches(".".join(key), [".".join(k) for k in known], 1)
    return f"; did you mean {near[0]}?" if near else ""


def parse_overrides(arguments: Sequence[str], schema: Schema = TrainConfig) -> dict[str, Any]:
    """`--section.key value` to nested values, not yet validated; UserError for what cannot be read."""
    words = command_line.under_present_names(arguments)
    known = {".".join(key): _field(key, schema).annotation for key, _ in keys(schema)}
    for option, _ in command_line.options(words):
        name = option.removeprefix("--")
        if option and name not in known:
            raise UserError(f"--{name}: unknown option{suggestion(tuple(name.split('.')), schema)}")
    return command_line.read(words, known)


def option_help(schema: Schema = TrainConfig) -> str:
    """One line per key: option, default, meaning."""
    lines = []
    for key, is_section in keys(schema):
        info = _field(key, schema)
        if not is_section:
            default = "" if info.default is None else f"[{info.default}] "
            lines.append(f"  --{'.'.join(key):<36} {default}{info.description or ''}".rstrip())
    return "\n".join(lines)


def defaults(schema: Schema = TrainConfig) -> dict[str, Any]:
    """What every key is where nothing is given, by dotted key."""
    return {
        ".".join(key): _field(key, schema).get_default(call_default_factory=True)
        for key, is_section in keys(schema)
        if not is_section
    }


def _field(key: Key, model: Schema) -> FieldInfo:
    for part in key[:-1]:
        model = command_line.section(model.model_fields[part].annotation) or model
    return model.model_fields[key[-1]]


def build(data: Mapping[str, Any], place: Callable[[Key], str]) -> TrainConfig:
    """Validate nested values of `puzzle train`. `place` says where a key came from, for the one line of a
    mistake."""
    return build_as(TrainConfig, data, place)


def build_as(schema: type[Config], data: Mapping[str, Any], place: Callable[[Key], str]) -> Config:
    """The same for any run."""
    return validated(schema, data, place)


def validated(schema: type[Any], data: Mapping[str, Any], place: Callable[[Key], str]) -> Any:
    """The same for any schema."""
    sections = {key for key, is_section in keys(schema) if is_section and key[-1] != "init"}
    if (broken := _broken(data)) is not None:
        expected = f"expected {_EXPECTED['string_unicode']}, got {shown(_inside(data, broken))}"
        raise UserError(f"{place(broken)}: {'.'.join(broken)}: {expected}")
    try:
        return schema.model_validate(_without_empty_sections(data, sections))
    except ValidationError as error:
        problems = error.errors()
        problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
        raise UserError(_explain(problem, problems, place, schema, data)) from None


def _broken(values: Mapping[str, Any]) -> Key | None:
    """The first key of a text, or of a list with one, that UTF-8 cannot hold."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            if (inner := _broken(value)) is not None:
                return (str(name), *inner)
        elif any(re.search("[\ud800-\udfff]", text) for text in _texts(value)):
            return (str(name),)
    return None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _without_empty_sections(data: Mapping[str, Any], sections: set[Key], prefix: Key = ()) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in data.items():
        key = (*prefix, str(name))
        if value is None and key in sections:
            continue
        kept[name] = _without_empty_sections(value, sections, key) if isinstance(value, Mapping) else value
    return kept


def _explain(
    problem: Mapping[str, Any],
    problems: Sequence[Mapping[str, Any]],
    place: Callable[[Key], str],
    schema: Schema,
    data: Mapping[str, Any],
) -> str:
    """The line of one of `problems` with `data`."""
    known = {key for key, _ in keys(schema)}

    def place_of(one: Mapping[str, Any]) -> Key:
        key = tuple(str(part) for part in one["loc"])
        while one["type"] != "extra_forbidden" and key and key not in known:
            key = key[:-1]  # list positions and names of union branches
        return key

    key = place_of(problem)
    name = ".".join(key)
    head = f"{place(key)}: {name}: " if key else f"{place(())}: "
    if problem["type"] == "extra_forbidden":
        return f"{place(key)}: {name}: unknown key{suggestion(key, schema)}"
    if problem["type"] == "value_error":
        reason = problem["msg"].removeprefix("Value error, ")
        named = [one for one in _named(reason, key, known) if _inside(data, one) is not _ABSENT]
        if places := list(dict.fromkeys(map(place, named))):
            head = f"{' and '.join(places)}: {f'{name}: ' if key else ''}"
        plain = isinstance(problem["input"], (str, int, float, bool, list, tuple))
        return f"{head}{reason}{', got ' + shown(problem['input']) if plain else ''}"
    if problem["type"] == "missing":
        return f"{head}a value is missing"
    # Each type that a key may have, such as true, false or auto, has a problem of its own with a value.
    same = [p for p in problems if p["input"] is problem["input"] and place_of(p) == key]
    wanted = [_EXPECTED[p["type"]].format(**p.get("ctx", {})) for p in same if p["type"] in _EXPECTED]
    expected = " or ".join(dict.fromkeys(wanted)) or problem["msg"]
    return f"{head}expected {expected}, got {shown(problem['input'])}"


def _named(reason: str, key: Key, known: set[Key]) -> list[Key]:
    """The keys, but no sections, that a reason for refusing what stands at `key` names: whole, from there, or
    from the section that it begins with."""
    lead, colon, _ = reason.partition(": ")
    within = (*key, *lead.split("."))
    above = [within] if colon and within in known else []
    found = []
    for word in _KEYS.findall(reason):
        parts = tuple(word.split("."))
        whole = next((k for start in (*above, key, ()) if (k := (*start, *parts)) in known), None)
        if whole is not None and not any(k[: len(whole)] == whole and k != whole for k in known):
            found.append(whole)
    return found


def _inside(values: Any, key: Key) -> Any:
    """The value at a key, `_ABSENT` where there is none."""
    for part in key:
        values = values.get(part, _ABSENT) if isinstance(values, Mapping) else _ABSENT
    return values


@dataclass(frozen=True)
class Layer:
    """Nested values that were given in one place, and the lines of their keys where that is a file."""

    where: str
    values: Mapping[str, Any]
    lines: Mapping[Key, int] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Where the key was given."""
        line = next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), None)
        return f"{self.where}:{line}" if line else self.where


@dataclass(frozen=True)
class Given:
    """What was given of a configuration, the layers that lie over the others last."""

    layers: tuple[Layer, ...]

    @cached_property
    def values(self) -> dict[str, Any]:
        """All of it."""
        found: dict[str, Any] = {}
        for layer in self.layers:
            found = merge(_replaced_sources(found, layer.values), layer.values)
        return found

    def over(self, where: str, options: Mapping[str, Any]) -> Given:
        """With values by dotted keys above all others."""
        values: dict[str, Any] = {}
        for name, value in options.items():
            nested = value
            for part in reversed(name.split(".")):
                nested = {part: nested}
            values = merge(values, nested)
        return Given((*self.layers, Layer(where, values)))

    def place(self, key: Key) -> str:
        """The layer that says most of a key, the uppermost of those; all of them for none."""
        for length in range(len(key), 0, -1):
            for layer in reversed(self.layers):
                if _inside(layer.values, key[:length]) is not _ABSENT:
                    return layer.place(key)
        places = [layer.where for layer in self.layers if layer.values]
        return " and ".join(places) or next((layer.where for layer in self.layers), "configuration")

    def build(self, schema: type[Config]) -> Config:
        """The run that it describes; raises UserError naming where a mistake was given."""
        return build_as(schema, self.values, self.place)


def read_given(schema: Schema, file: Path | None, arguments: Sequence[str] = ()) -> Given:
    """A file, if there is one, and the command line above it. What has another name now is said."""
    layers: list[Layer] = []
    overrides = parse_overrides(arguments, schema)
    if file is not None:
        document = read_yaml(file)
        data, renamed = modernised(document.data)
        for one in renamed:
            print(f"note: {document.path}: {one}", file=sys.stderr)
        lines = {**{present(key): line for key, line in document.lines.items()}, **document.lines}
        layers.append(Layer(str(document.path), data, lines))
    if overrides or file is None:
        layers.append(Layer(COMMAND_LINE if overrides else "configuration", overrides))
    return Given(tuple(layers))


def load_config(file: Path | None, arguments: Sequence[str] = ()) -> TrainConfig:
    """The run that `file` and the command line describe; raises UserError naming the file and line."""
    return load_given(TrainConfig, file, arguments)[0]


def load_given(
    schema: type[Config], file: Path | None, arguments: Sequence[str] = ()
) -> tuple[Config, dict[str, Any]]:
    """The same of any schema, and what was given of it, as nested values without defaults."""
    given = read_given(schema, file, arguments)
    return given.build(schema), given.values


def go_on(schema: Schema, before: Mapping[str, Any], log: Path, arguments: Sequence[str] = ()) -> Given:
    """What describes a run that goes on: `before`, given at its start as `log` has it, and the command line
    above it."""
    changes = parse_overrides(arguments, schema)
    return Given((Layer(str(log), modernised(before)[0]), Layer(COMMAND_LINE, changes)))


def without_inherited(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration without what its roles took over from the actor and the run: what may have
    been given, for logs that do not say what was."""
    kept = {name: dict(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    actor = config.get("actor")
    for role in (*ROLES, "generation"):
        section = kept.get(role)
        if not isinstance(actor, Mapping) or not isinstance(section, dict):
            continue  # `build` says that it must be a section
        if section.get("layout") == (actor if role == "generation" else config).get("layout"):
            section.pop("layout", None)
        names = ("model", "init", "layers") if role == "reference" else ("model", "init")
        if role in ("critic", "reference") and all(section.get(name) == actor.get(name) for name in names):
            for name in names:
                section.pop(name, None)
    return kept


def _replaced_sources(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without the sources that the command line replaces: `--actor.model` puts `actor.init` away, and
    reward functions those of the file."""
    kept = dict(data)
    for role in ROLES:
        section = overrides.get(role)
        given = [key for key in _REPLACED if isinstance(section, Mapping) and section.get(key) is not None]
        if given and isinstance(kept.get(role), Mapping):
            gone = {other for key in given for other in _REPLACED[key]} - set(given)
            kept[role] = {k: v for k, v in kept[role].items() if k not in gone}
    return kept


_REPLACED = {
    **dict.fromkeys(("model", "init"), SOURCES),
    **dict.fromkeys(("function", "url"), (*SOURCES, "functions")),
    "functions": ("function", "url"),
}
"""What a source of a role puts away."""
