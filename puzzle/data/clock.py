"""Chat templates that write the date: all processes of a run, and whoever goes on with it, write the same."""

import json
import string
from datetime import datetime


def at(template: str, now: datetime) -> str:
    """The template with `now` where it asks for the time by strftime_now, the only clock that templates have.

    transformers hands templates no functions, so this is one of the template's own.
    """
    if "strftime_now" not in template:
        return template
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters]
    steps = "".join(f"|replace({json.dumps(code)},{json.dumps(now.strftime(code))})" for code in codes)
    return f"{{% macro strftime_now(form) %}}{{{{ form{steps} }}}}{{% endmacro +%}}{template}"
