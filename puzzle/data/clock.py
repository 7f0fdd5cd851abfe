"""Chat templates that write the date: all processes of a run, and whoever goes on with it, write the same."""

import json
import string
from datetime import datetime

_FLAGS = ("-", "_", "0", "^", "#", "")
"""Of glibc, before the letter of a code."""
_PERCENT = "\N{INVISIBLE SEPARATOR}%\N{INVISIBLE SEPARATOR}"
"""Stands for %% while codes are replaced: what is left of it is no code."""


def at(template: str, now: datetime) -> str:
    """The template with `now` where it asks for the time by strftime_now, the only clock that templates have.

    transformers hands templates no functions, so this is one of the template's own, with the parameter of
    transformers' own. It goes through a list: a filter behind another for each code would take jinja seconds.
    """
    if "strftime_now" not in template:
        return template
    codes = [f"%{flag}{letter}" for flag in _FLAGS for letter in string.ascii_letters]
    pairs = [["%%", _PERCENT], *([code, now.strftime(code)] for code in codes), [_PERCENT, "%"]]
    steps = (
        f"{{% for old, new in {json.dumps(pairs)} %}}"
        "{% set now.text = now.text|replace(old, new) %}{% endfor %}{{ now.text }}"
    )
    macro = f"{{% macro strftime_now(format) %}}{{% set now = namespace(text=format) %}}{steps}"
    # transformers trims the line end behind a block: the template begins a line, as it does without this.
    return f"{macro}{{% endmacro %}}\n{template}"
