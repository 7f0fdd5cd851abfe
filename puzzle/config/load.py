"""From a YAML file and `--section.key value` to a `TrainConfig`; a mistake becomes one line naming its place.

The command line wins over the file, the file over the defaults.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from puzzle.config.base import ROLES, SOURCES, RunConfig
from puzzle.config.document import Document, Key, read_yaml, shown
from puzzle.config.renamed import RENAMED, modernised, present
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SUPERVISED
from puzzle.errors import UserError
from puzzle.files.jsonio import parse

Config = TypeVar("Config", bound=RunConfig)
Schema = type[BaseModel]
_ABSENT = object()
_MARKS = frozenset('[]{}"')
"""Without them a list's value is names between commas."""
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


def _section(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is tuple:
        return None  # a list of sections is a value
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def keys(model: Schema = TrainConfig, prefix: Key = ()) -> Iterator[tuple[Key, bool]]:
    """Every key of the configuration and whether it is a section."""
    for name, info in model.model_fields.items():
        inner = _section(info.annotation)
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


def parse_overrides(
    arguments: Sequence[str], schema: Schema = TrainConfig, program: str = "puzzle train"
) -> dict[str, Any]:
    """`--section.key value` (lists as JSON or comma-separated; null) to nested values, not yet validated."""
    arguments = _under_present_names(arguments)
    known = {".".join(key) for key, _ in keys(schema)}
    for argument in arguments:
        name = argument[2:].split("=", 1)[0]
        if argument.startswith("--") and name not in known and name != "help":
            raise UserError(f"--{name}: unknown option{suggestion(tuple(name.split('.')), schema)}")
    _refuse_words_for_sections(arguments, schema)
    try:
        return _read(arguments, schema, program)
    except SettingsError as error:
        if _of_a_list(error):
            raise UserError(
                f"{_unreadable(arguments, schema)}: neither JSON nor names between commas"
            ) from None
        text = str(error.__cause__ or error).removeprefix("error parsing CLI: ")
        raise UserError(" ".join(text.split())) from None


def _read(arguments: Sequence[str], schema: Schema, program: str) -> dict[str, Any]:
    """Nested values; SettingsError for what is no command line."""
    fields: dict[str, Any] = {name: (f.annotation, f) for name, f in schema.model_fields.items()}
    source = CliSettingsSource[Any](
        create_model("Arguments", __base__=BaseSettings, **fields),
        cli_prog_name=program,
        cli_parse_args=list(arguments),
        cli_exit_on_error=False,
        cli_parse_none_str="null",
        cli_hide_none_type=True,
    )
    return source()


def _of_a_list(error: SettingsError) -> bool:
    """Whether a list cannot be read; what is wrong with options or their number has other causes."""
    return isinstance(error.__cause__, (JSONDecodeError, SettingsError))


def _refuse_words_for_sections(arguments: Sequence[str], schema: Schema) -> None:
    """UserError for a section whose value is neither a JSON object nor null, or lacks."""
    sections = {".".join(key): key for key, is_section in keys(schema) if is_section}
    for option, value in _options(arguments):
        key = sections.get(option.removeprefix("--"))
        if key is None or value == "null":
            continue
        with suppress(UserError):
            if isinstance(parse(value, option), dict):
                continue
        inner = next(k[-1] for k, _ in keys(schema) if k[:-1] == key)
        raise UserError(
            f"{option} {shown(value)}: a section of keys; give one as {option}.{inner} VALUE, or JSON such as"
            f' {{"{inner}": VALUE}}'
        )


def _unreadable(arguments: Sequence[str], schema: Schema) -> str:
    """The options whose values, lists, cannot be read: alone they cannot, either."""
    found = list[str]()
    for option, value in _options(arguments):
        try:
            if not _MARKS.isdisjoint(value):
                _read([f"{option}={value}"], schema, "puzzle")
        except SettingsError as error:
            found += [f"{option} {shown(value)}"] if _of_a_list(error) else []
    return ", ".join(found) or "the command line"


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options of a command line with their values, which may be words of their own, or lack."""
    option, lacks = "", False
    for word in [*arguments, "--"]:
        if not word.startswith("--"):
            yield option, word
            lacks = False
            continue
        if lacks:
            yield option, ""
        option, equals, value = word.partition("=")
        if equals:
            yield option, value
        lacks = not equals


def _under_present_names(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with options and their values renamed; a note for each."""
    words, said = list(arguments), set()
    for place, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        key = tuple(name.split("."))
        renamed = next((r for r in RENAMED if key[: len(r.old)] == r.old), None)
        if not word.startswith("--") or renamed is None:
            continue
        words[place] = f"--{'.'.join(present(key))}{equals}{renamed.values.get(value, value)}"
        if not equals and place + 1 < len(words):
            value = words[place + 1]
            words[place + 1] = renamed.values.get(value, value)
        if value not in renamed.usual:
            said.add(str(renamed))
    for text in sorted(said):
        print(f"note: the command line: {text}", file=sys.stderr)
    return words


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
        model = _section(model.model_fields[part].annotation) or model
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
    try:
        return schema.model_validate(_without_empty_sections(data, sections))
    except ValidationError as error:
        problems = error.errors()
        problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
        raise UserError(_explain(problem, problems, place, schema)) from None


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
) -> str:
    """The line of one of `problems`."""
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
        plain = isinstance(problem["input"], (str, int, float, bool, list, tuple))
        return f"{head}{reason}{', got ' + shown(problem['input']) if plain else ''}"
    if problem["type"] == "missing":
        return f"{head}a value is missing"
    # Each type that a key may have, such as true, false or auto, has a problem of its own with a value.
    same = [p for p in problems if p["input"] is problem["input"] and place_of(p) == key]
    wanted = [_EXPECTED[p["type"]].format(**p.get("ctx", {})) for p in same if p["type"] in _EXPECTED]
    expected = " or ".join(dict.fromkeys(wanted)) or problem["msg"]
    return f"{head}expected {expected}, got {shown(problem['input'])}"


def load_config(file: Path | None, arguments: Sequence[str] = ()) -> TrainConfig:
    """The run that `file` and the command line describe; raises UserError naming the file and line."""
    return load_given(TrainConfig, file, arguments)[0]


def load_given(
    schema: type[Config], file: Path | None, arguments: Sequence[str] = (), program: str = "puzzle train"
) -> tuple[Config, dict[str, Any]]:
    """The same of any schema, and what was given of it, as nested values without defaults."""
    document = read_yaml(file) if file else Document(Path("defaults"), {})
    overrides = parse_overrides(arguments, schema, program)
    data, renamed = modernised(document.data)
    for one in renamed:
        print(f"note: {document.path}: {one}", file=sys.stderr)
    lines = {**{present(key): line for key, line in document.lines.items()}, **document.lines}

    def place(key: Key) -> str:
        inner: Any = overrides
        for part in key:
            inner = inner.get(part, _ABSENT) if isinstance(inner, Mapping) else _ABSENT
        if key and inner is not _ABSENT:
            return "command line"
        line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
        return f"{document.path}:{line}" if line else str(document.path if file else "configuration")

    given = merge(_replaced_sources(data, overrides), overrides)
    return build_as(schema, given, place), given


def given_config(
    data: Mapping[str, Any], changes: Mapping[str, Any], where: str, schema: type[Config]
) -> tuple[Config, dict[str, Any]]:
    """The run that nested values from `where` describe, with `changes` laid over them; and both."""
    given = merge(_replaced_sources(modernised(data)[0], changes), changes)
    return build_as(schema, given, lambda key: where), given


def go_on(
    before: Mapping[str, Any], log: Path, arguments: Sequence[str]
) -> tuple[TrainConfig, dict[str, Any]]:
    """The run of `puzzle train` that `before`, given at its start as `log` has it, and the command line
    describe; and both."""
    return go_on_as(TrainConfig, before, log, arguments)


def go_on_as(
    schema: type[Config], before: Mapping[str, Any], log: Path, arguments: Sequence[str]
) -> tuple[Config, dict[str, Any]]:
    """The same for any schema."""
    changes = parse_overrides(arguments, schema)
    return given_config(before, changes, f"{log} and the command line", schema)


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
