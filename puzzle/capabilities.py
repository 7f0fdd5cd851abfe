"""What this version cannot run yet; the command line and the campaign ask here before they start."""

from puzzle.config import TrainConfig


def missing(config: TrainConfig) -> list[str]:
    """What `config` asks for that does not exist yet; empty when it can run."""
    lacks: list[str] = []
    if config.log.variant == "dschat":
        lacks.append("the DeepSpeed-Chat baseline (log.variant dschat)")
    if config.generation.stop:
        lacks.append("stop texts (generation.stop)")
    return lacks
