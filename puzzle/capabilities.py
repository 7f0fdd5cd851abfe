"""What cannot be run here; the command line and the campaign ask here before they start."""

from importlib.util import find_spec

from puzzle.config import TrainConfig

BASELINE = "dschat"
"""The variant that another program of this project runs."""
BASELINE_SCRIPT = "DeepSpeedExamples/applications/DeepSpeed-Chat/main.py"


def missing(config: TrainConfig) -> list[str]:
    """What `config` asks for that does not exist, or is not installed; empty when it can run."""
    lacks: list[str] = []
    if config.log.variant == BASELINE:
        if find_spec("deepspeed") is None:
            lacks.append(
                "the package deepspeed for the DeepSpeed-Chat baseline (PUZZLE_ENV=baseline of env.sh)"
            )
        if config.generation.stop:
            lacks.append("stop texts (generation.stop) in the baseline")
    return lacks
