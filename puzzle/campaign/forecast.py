"""How long a campaign will take and what it will write, from the work in its runs, before any of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from puzzle.campaign.experiments import Experiment
from puzzle.config.capabilities import BASELINE
from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.spec.flops import forward_flops

# What the published runs reached on A800 and A100 GPUs, end to end, on the mean (FLOP/s per GPU).
RATE, BASELINE_RATE = 40e12, 29e12
# Start of a run on GPUs: what two H200 took for runs of two short iterations (logs/node). On CPUs starting is
# all there is: the campaign of README's table, on two cores, per process of its runs.
GPU_START_SECONDS, CPU_PROCESS_SECONDS = 13.0, 5.0
REPEAT_MARGIN, FORECAST_MARGIN = (
    1.1,
    1.25,
)  # what runs may take beyond what is expected
RUN_BYTES, RANK_BYTES = 60_000, 4_000  # logs; a campaign's runs save no weights


def told_hours(seconds: float) -> str:
    """Such as "0.25 hours" or "120 hours", for people: two digits, or whole hours."""
    hours = seconds / 3600
    return f"{hours:.2g} hours" if hours < 99.5 else f"{hours:.0f} hours"


@dataclass(frozen=True)
class Forecast:
    """Seconds of all runs one after another, and bytes that they leave behind."""

    seconds: float
    written: int

    def __str__(self) -> str:
        megabytes = max(1, round(self.written / 1e6))
        return f"about {told_hours(self.seconds)} one after another, {megabytes} MB of logs"


def forecast(experiments: Sequence[Experiment]) -> Forecast:
    """For runs that can be run."""
    configs = [experiment.config for experiment in experiments]
    written = sum(RUN_BYTES + RANK_BYTES * config.world for config in configs)
    return Forecast(sum(map(run_seconds, configs)), written)


def run_seconds(config: TrainConfig) -> float:
    """One run, its start included."""
    if config.device == "cpu":
        return CPU_PROCESS_SECONDS * config.world
    return GPU_START_SECONDS + config.iterations * iteration_seconds(config)


def iteration_seconds(config: TrainConfig) -> float:
    """One iteration on GPUs as the published runs would take for it."""
    rate = BASELINE_RATE if config.log.variant == BASELINE else RATE
    return iteration_flops(config) / (rate * config.world)


def iteration_flops(config: TrainConfig) -> int:
    """Generation, one forward pass of every model that scores, and training; sequences at full length."""
    prompt = config.data.random_tokens or config.data.max_prompt_tokens
    length = prompt + config.generation.max_new_tokens
    lengths = [length] * (config.batch * config.generation.samples)
    models = [
        (model.trained, forward_flops(model.spec, lengths)) for model in resolve(config).models.values()
    ]
    trained = sum(flops for is_trained, flops in models if is_trained)
    return sum(flops for _, flops in models) + 3 * config.algorithm.epochs * trained


@dataclass(frozen=True)
class Expectation:
    """How long runs take here, from the seconds that `took` gives for the names of those that have ended."""

    experiments: Sequence[Experiment]
    took: Mapping[str, float]

    def __call__(self, experiment: Experiment) -> float:
        """Seconds by which the run should have ended: as long as its other repeats, else its forecast times
        how much longer than forecast the runs of the same program took."""
        repeats = [one for one in self._ended() if one.job == experiment.job]
        if repeats:
            return REPEAT_MARGIN * max(self.took[one.name] for one in repeats)
        return FORECAST_MARGIN * self._pace(experiment) * run_seconds(experiment.config)

    def _pace(self, experiment: Experiment) -> float:
        alike = [one for one in self._ended() if bool(one.options) == bool(experiment.options)]
        paces = [self.took[one.name] / run_seconds(one.config) for one in alike]
        return fmean(paces) if paces else 1.0

    def _ended(self) -> list[Experiment]:
        return [one for one in self.experiments if one.name in self.took]


def baseline_bytes(config: TrainConfig, stage: int) -> float:
    """Bytes per GPU that DeepSpeed's models need at least under that ZeRO stage: 16-bit weights of all models
    (under stage 3 a share), and of trained ones a share of gradients, masters and moments; without
    activations and cache. As ZeRO's paper counts (arXiv:1910.02054), gradients in 32 bits."""
    models = resolve(config).models.values()
    weights = sum(2 * model.spec.parameters for model in models) / (config.world if stage == 3 else 1)
    return weights + sum(16 * model.spec.parameters for model in models if model.trained) / config.world
