"""YAML files of configurations: values of safe types, and the line of each key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from puzzle.errors import UserError
from puzzle.files.reading import read_text

Key = tuple[str, ...]

MOST_BYTES = 16 << 20
MOST_DEPTH = 64
MOST_VALUES = 100_000
MOST_BITS = 1024  # of a whole number: more is none that a double holds, and slow to print
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


@dataclass(frozen=True)
class Document:
    """A parsed YAML file: its values and the line of each key."""

    path: Path
    data: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Safe types, and an error with a line for every value that is not what its tag says."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """As in the base class, which lets the errors of Python's own types through."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MOST_BITS:
                raise OverflowError
            return value
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            kind, text = node.tag.rpartition(":")[2], shown(node.value)
            raise ConstructorError(None, None, f"{text} is no {kind}", node.start_mark) from None


def read_yaml(path: Path) -> Document:
    """Read a mapping of YAML's safe types.

    Raises UserError: bad syntax, a key given twice or no text, no mapping; deeper, or with its aliases
    larger, than any configuration.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    text = read_text(path, MOST_BYTES)
    lines: dict[Key, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _size(node, {}, 0)
        _walk(path, node, (), lines, set())
        data = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        place = f"{path}:{line + 1}"
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}: not valid YAML: {reason}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested deeper than {MOST_DEPTH} levels") from None
    except (ValueError, OverflowError):  # what \UFFFFFFFF raises
        raise UserError(f"{path}: not valid YAML: an escape in it is no character") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections of keys, found {type(data).__name__}")
    return Document(path, data, lines)


def _size(node: Any, sizes: dict[int, int], depth: int) -> int:
    """Values in and below `node`, an alias counted as all that it stands for; ConstructorError for too many,
    for too deep ones, and for one that holds itself."""
    if depth > MOST_DEPTH:
        raise ConstructorError(None, None, f"nested deeper than {MOST_DEPTH} levels", node.start_mark)
    if (known := sizes.get(id(node))) is not None:
        if not known:
            raise ConstructorError(None, None, "an alias of what it stands in", node.start_mark)
        return known
    sizes[id(node)] = total = 0
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                total += _size(part, sizes, depth + 1)
    if total >= MOST_VALUES:
        raise ConstructorError(None, None, f"more than {MOST_VALUES} values", node.start_mark)
    sizes[id(node)] = total + 1
    return total + 1


def _walk(path: Path, node: Any, key: Key, lines: dict[Key, int], seen: set[int]) -> None:
    """Record the line of every key below `node`; refuses a key given twice or no text. `seen` are those of
    aliases."""
    if not isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _walk(path, child, (*key, str(index)), lines, seen)
        return
    for name, child in node.value:
        line = name.start_mark.line + 1
        if name.tag not in _KEY_TAGS:
            raise UserError(f"{path}:{line}: {shown(name.value)} is no text, and keys are: quote it")
        inner = (*key, name.value)
        if inner in lines and name.value != "<<":
            raise UserError(f"{path}:{line}: {'.'.join(inner)} is given twice, first in line {lines[inner]}")
        lines[inner] = line
        _walk(path, child, inner, lines, seen)


def shown(value: Any) -> str:
    """A value for an error line, as Python has it and cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
