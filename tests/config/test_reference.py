"""docs/configuration.md is what the schema says."""

import pytest
from config_reference import PAGE, page, section_of
from pydantic import BaseModel

from puzzle.config.evaluation import EvaluationConfig
from puzzle.config.load import keys
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SUPERVISED


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python scripts/config_reference.py"


@pytest.mark.parametrize("schema", [TrainConfig, *SUPERVISED.values(), EvaluationConfig])
def test_every_key_says_what_it_is(schema: type[BaseModel]) -> None:
    silent = []
    for key, is_section in keys(schema):
        model = schema
        for part in key[:-1]:
            model = section_of(model.model_fields[part].annotation)
            assert model is not None
        if not is_section and not model.model_fields[key[-1]].description:
            silent.append(".".join(key))
    assert silent == []
