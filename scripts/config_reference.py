#!/usr/bin/env python
"""Writes docs/configuration.md, every key of a run's configuration, from the schema itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from puzzle.config.evaluation import EvaluationConfig
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SUPERVISED
from puzzle.files.limits import LARGEST, MOST

ROOT = Path(__file__).resolve().parents[1]
UNTOLD = (MOST, LARGEST)  # of nearly every number: the page says so once
PAGE = ROOT / "docs" / "configuration.md"
HEAD = """\
# Configuration

Every key of `puzzle train --config FILE.yaml`. Each is an option of the command line, too
(`--algorithm.kl.coef 0.05`), which wins over the file. `puzzle train --dry-run` prints the plan of the
run, `--dry-run=json` the configuration as it resolves, which is a file for `--config`, too.
Former names of keys are read, too, and say their present ones.

Whole numbers are at most 2147483647, others at most 1e30, where nothing less is said.

The critic, the reference and generation take what is not given from the actor, and every model its `layout`
from the run's. [Learning from examples](recipe.md) comes last, with sections that differ from those above.
This page is written by `python scripts/config_reference.py`; a test holds it against the
schema.
"""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, None for a plain value, which a list of sections is, too."""
    if get_origin(annotation) is tuple:
        return None
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def kind(annotation: Any) -> str:
    """A field's type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(args[0])
    if origin is Literal:
        return " or ".join(f"`{str(a).lower() if isinstance(a, bool) else a}`" for a in args)
    if origin is tuple:
        return f"list of {kind(args[0])}"
    if args and (origin is Union or NoneType in args or origin.__name__ == "UnionType"):
        return " or ".join(dict.fromkeys(kind(a) for a in args))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "sections (below)"
    names = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", NoneType: "`null`"}
    return names[annotation]


def bounds(info: FieldInfo) -> str:
    """What a number may be, in words: "> 0, <= 1"."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [(sign, getattr(m, n)) for m in info.metadata for n, sign in signs.items() if hasattr(m, n)]
    found = [f"{sign} {limit}" for sign, limit in limits if limit not in UNTOLD]
    return f", {', '.join(found)}" if found else ""


def default(info: FieldInfo) -> str:
    """A field's default as YAML would have it."""
    if info.is_required():
        return "none: needed"
    value = info.get_default(call_default_factory=True)
    return f"`{json.dumps(value)}`"


def rows(model: type[BaseModel]) -> Iterator[str]:
    """A line of the table for every plain field of a section."""
    for name, info in model.model_fields.items():
        if section_of(info.annotation) is None:
            what = (info.description or "").replace("|", "\\|")
            yield f"| `{name}` | {default(info)} | {kind(info.annotation)}{bounds(info)} | {what} |"


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its dotted name, parents first."""
    yield prefix, model
    for name, info in model.model_fields.items():
        inner, listed = section_of(info.annotation), get_args(info.annotation)[:1]
        if inner is not None:
            yield from sections(inner, f"{prefix}.{name}" if prefix else name)
        elif get_origin(info.annotation) is tuple and section_of(listed[0]) is not None:
            yield from sections(listed[0], f"{prefix}.{name}[]")


def chapter(schema: type[BaseModel], head: str, known: set[type[BaseModel]]) -> Iterator[str]:
    """The sections of a schema, those of one type together, under all their names; those that are `known` are
    left out, and known are all afterwards. `head` is what the schema itself is called."""
    named: dict[type[BaseModel], list[str]] = {}
    for name, model in sections(schema):
        named.setdefault(model, []).append(name)
    for model, names in named.items():
        if model in known:
            continue
        known.add(model)
        title = ", ".join(f"`{name}`" for name in names) if names != [""] else head
        about = " ".join((model.__doc__ or "").split())
        table = ["| key | default | value | meaning |", "|---|---|---|---|", *rows(model)]
        yield f"## {title}\n{about}\n\n" + "\n".join(table) + "\n"


def page() -> str:
    """The whole page."""
    known: set[type[BaseModel]] = set()
    parts = [HEAD, *chapter(TrainConfig, "The run", known)]
    for task, schema in {**SUPERVISED, "evaluate": EvaluationConfig}.items():
        parts += chapter(schema, f"`puzzle {task}`", known)
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
