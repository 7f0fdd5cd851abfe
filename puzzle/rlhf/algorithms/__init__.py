"""Algorithms of RLHF behind one seam (`base.Algorithm`)."""

from puzzle.config.algorithm import AlgorithmConfig
from puzzle.rlhf.algorithms.base import Algorithm
from puzzle.rlhf.algorithms.groups import GRPO, RLOO, DrGRPO
from puzzle.rlhf.algorithms.ppo import PPO
from puzzle.rlhf.algorithms.reinforce import ReinforcePP, ReinforcePPBaseline, ReMax

ALGORITHMS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "rloo": RLOO,
    "reinforce_pp": ReinforcePP,
    "reinforce_pp_baseline": ReinforcePPBaseline,
    "remax": ReMax,
}


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that a run is configured for."""
    return ALGORITHMS[config.name](config)
