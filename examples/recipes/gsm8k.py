"""A reward for openai/gsm8k: 1 where the last number of a response is that of the answer, behind its ####."""

import re
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def correct(responses: list[str], answer: list[str]) -> list[float]:
    """One score per response; `answer` is the dataset's column."""
    return [float(same(response, known)) for response, known in zip(responses, answer, strict=True)]


def same(response: str, answer: str) -> bool:
    """Whether both end with the same number, however it is written."""
    return last_number(response) == last_number(answer.rpartition("####")[2]) is not None


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None without one."""
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None
