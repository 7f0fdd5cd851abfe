"""What a run needs of this host, checked before any process starts: packages, files, the reward."""

from importlib.util import find_spec
from pathlib import Path

from puzzle.config.base import RunConfig
from puzzle.config.capabilities import missing
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SupervisedConfig
from puzzle.data.examples import read_examples
from puzzle.data.prompts import no_columns, read_rows
from puzzle.data.records import drop_is_a_remedy
from puzzle.errors import UserError, lacking
from puzzle.rlhf.rewards.weighted import probe
from puzzle.rlhf.trackers import MODULES


def check_packages(config: RunConfig) -> None:
    """UserError for what the run asks for and this installation lacks."""
    lacks = missing(config) if isinstance(config, TrainConfig) else []
    if lacks:
        raise UserError(f"this version does not have: {'; '.join(lacks)}")
    for tracker in config.log.trackers:
        for module in MODULES[tracker]:
            if find_spec(module) is None:
                raise UserError(f"log.trackers: {tracker}: {lacking(module)}")
    for role in config.trained:
        if getattr(config, role).optimizer.backend == "apex" and find_spec("apex") is None:
            raise UserError(f"{role}.optimizer.backend: apex cannot be imported; install it, or choose torch")


def check_files(config: RunConfig) -> None:
    """UserError for files of prompts or examples that cannot be read and for a reward function that cannot be
    had or asks for what they lack; a run finds the same before its log begins."""
    if isinstance(config, SupervisedConfig):
        for path in filter(None, (config.data.examples, config.data.eval_examples)):
            read_examples(Path(path), config.data)
        return
    assert isinstance(config, TrainConfig), "the other kind of run"
    rewards = probe(config)
    try:
        choose = no_columns if rewards is None else rewards.columns
        for key in ("prompts", "eval_prompts"):
            path = getattr(config.data, key)
            if path is not None:
                data = config.data
                with drop_is_a_remedy():
                    read_rows(Path(path), data.field, data.id_field, choose, data.empty == "drop")
    finally:
        if rewards is not None:
            rewards.close()
