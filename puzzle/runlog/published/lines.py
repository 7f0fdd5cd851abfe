"""The line formats of the published logs, which `run.log` writes and the reader of published logs finds.

Every pattern names its groups after the measurement it holds. Times of PUZZLE lines are milliseconds, all
others seconds.
"""

import re
from collections.abc import Mapping

# Digits are limited: what is longer is no number of a log.
NUMBER = r"-?(?:\d{1,30}(?:\.\d{1,30})?(?:e[+-]?\d{1,3})?|nan|inf)"
_TIME = r"\d{1,9}\.\d{1,30}(?:e-\d{1,3})?"
_MS = r"\d{1,12}\.\d{3}"
_S2 = r"-?\d{1,12}\.\d\d"
_COUNT = r"\d{1,9}"
_END = r"(?=\s|$)"
# Behind a number that ends a pattern: another process's text is no harm, more of a number is.
GLUED = re.compile(r"[^\s\d.,:;+\-_/%]")

ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")

PUZZLE = re.compile(
    rf"epoch: (?P<epoch>{_COUNT}) \| step: (?P<step>{_COUNT})/(?P<steps>{_COUNT}) \| ppo_ep: \d+"
    rf" \| global_batch_size: (?P<global_batch_size>{_COUNT})"
    rf" \| average_reward: (?P<average_reward>{NUMBER}) \| act_loss: (?P<actor_loss>{NUMBER})"
    rf" \| cri_loss: (?P<critic_loss>{NUMBER}) \| stage 1\(gen\.\) \(ms\): (?P<stage1_gen>{_MS})"
    rf" \| stage 2\(infer\.\) \(ms\): (?P<stage2_infer>{_MS})"
    rf" \| stage 3\(train\.\) \(ms\): (?P<stage3_train>{_MS}) \| e2e_time \(ms\): (?P<e2e_time>{_MS}){_END}"
)
# The same line with another process's text somewhere in it: the parts that must be whole.
PUZZLE_STEP = re.compile(rf"epoch: (?P<epoch>{_COUNT}) \| step: (?P<step>{_COUNT})/(?P<steps>{_COUNT}) \|")
PUZZLE_MS = re.compile(rf"\(ms\): ({_MS})")
PUZZLE_METRICS = (
    re.compile(rf" global_batch_size: (?P<global_batch_size>{_COUNT}) \|"),
    re.compile(rf" average_reward: (?P<average_reward>{NUMBER}) \|"),
    re.compile(rf" act_loss: (?P<actor_loss>{NUMBER}) \|"),
    re.compile(rf" cri_loss: (?P<critic_loss>{NUMBER}) \|"),
)
PUZZLE_STAGES = ("stage1_gen", "stage2_infer", "stage3_train", "e2e_time")
RESHARD = re.compile(rf"apply shadow model time: (?P<apply_shadow_model_time>{_TIME})")

GENERATION = re.compile(
    rf"Generation time: (?P<generation_time>{_TIME}), exp gen time: (?P<exp_gen_time>{_TIME})"
)
TRAINING = re.compile(rf"Training time: (?P<training_time>{_TIME})")
CHAT_STEP = re.compile(
    rf"Epoch: (?P<epoch>{_COUNT}) \| Step: (?P<step>{_COUNT}) \| PPO Epoch: \d+"
    rf" \| Actor Loss: (?P<actor_loss>{NUMBER})"
    rf" \| Critic Loss: (?P<critic_loss>{NUMBER}) \| Unsupervised Loss: (?P<unsupervised_loss>{NUMBER})"
)
# Lines of which an iteration has one each, after its CHAT_STEP.
CHAT_PERF = (
    re.compile(
        rf"End-to-End => Latency: (?P<perf_e2e_latency>{_S2})s, TFLOPs: (?P<perf_e2e_tflops>{_S2}),"
        rf" Samples/sec: (?P<perf_samples_per_sec>{_S2}), Time/seq (?P<perf_time_per_seq>{_S2})s,"
        rf" Batch Size: (?P<perf_batch_size>{_COUNT}), Total Seq\. Length: (?P<perf_total_seq_len>{_COUNT})"
    ),
    re.compile(
        rf"Generation => Latency: (?P<perf_generation_latency>{_S2})s,"
        rf" Per-token Latency (?P<perf_per_token_latency>{_S2}) ms,"
        rf" TFLOPs: (?P<perf_generation_tflops>{_S2}), BW: (?P<perf_generation_bw>{_S2}) GB/sec,"
        rf" Answer Seq\. Length: (?P<perf_answer_seq_len>{_COUNT})"
    ),
    re.compile(
        rf"Training   => Latency: (?P<perf_training_latency>{_S2})s, TFLOPs: (?P<perf_training_tflops>{_S2})"
    ),
    re.compile(rf"Average reward score: (?P<average_reward>{NUMBER})"),
)
ENGINE = re.compile(
    rf"\|E2E latency=(?P<e2e_latency>{_S2})s \|Gather latency=(?P<gather_latency>{_S2})s"
    rf" \((?P<gather_pct>{_S2})%\) \|Generate time=(?P<engine_generate_time>{_S2})s"
    rf" \((?P<engine_generate_pct>{_S2})%\) \|Training time=(?P<engine_training_time>{_S2})s"
    rf" \((?P<engine_training_pct>{_S2})%\) \|Others=(?P<engine_others>{_S2})s?"
    rf" \((?P<engine_others_pct>{_S2})%\)\|CurSamplesPerSec=(?P<cur_samples_per_sec>{_S2})"
    rf" \|AvgSamplesPerSec=(?P<avg_samples_per_sec>{_S2})"
)
# Text that only a measurement's line holds: where it stands and no pattern fits, a number was lost.
MARKS = re.compile(
    r"e2e_time|stage 3\(train|epoch: \d|apply shadow model time|Generation time:|exp gen time:|Training time:"
    r"|Epoch: \d|End-to-End =>|Generation =>|Training   =>|Average reward score|E2E latency|Gather latency"
)

# Arguments printed at the start: Megatron's and DeepSpeed's dotted lists, and DeepSpeed's JSON.
ARGUMENT = re.compile(
    r"(?:^| )(?P<name>[a-z]\w*) \.{3,} (?P<value>\S+)\s*$|^\s*\"(?P<key>\w+)\": (?P<number>\d+),?$"
)


def puzzle_line(
    iteration: int,
    total: int,
    batch: int,
    stage_seconds: Mapping[str, float],
    e2e_seconds: float,
    metrics: Mapping[str, float],
) -> str:
    """PUZZLE's line of one iteration; the re-shard counts as generation, as in the published logs."""
    nan = float("nan")
    stages = (
        stage_seconds["generation"] + stage_seconds["switch"],
        stage_seconds["inference"],
        stage_seconds["training"],
    )
    labels = ("stage 1(gen.)", "stage 2(infer.)", "stage 3(train.)")
    times = " | ".join(f"{label} (ms): {1e3 * time:.3f}" for label, time in zip(labels, stages, strict=True))
    # A run without a critic says nothing of one.
    critic = f" | cri_loss: {metrics['critic_loss']:.3f}" if "critic_loss" in metrics else ""
    return (
        f"epoch: {iteration // total} | step: {iteration % total}/{total} | ppo_ep: 1"
        f" | global_batch_size: {batch} | average_reward: {metrics.get('reward', nan):.3f}"
        f" | act_loss: {metrics.get('actor_loss', nan):.3f}{critic}"
        f" | {times} | e2e_time (ms): {1e3 * e2e_seconds:.3f}"
    )


def reshard_line(seconds: float) -> str:
    """PUZZLE's line of one re-shard."""
    return f"apply shadow model time: {seconds}"


def chat_lines(
    iteration: int,
    total: int,
    batch: int,
    stage_seconds: Mapping[str, float],
    e2e_seconds: float,
    metrics: Mapping[str, float],
    mean_seconds: float,
) -> str:
    """DeepSpeed-Chat's lines of one iteration, of which `mean_seconds` is the mean so far.

    As DeepSpeed's hybrid engine counts: generation without the gather, and the gather among the others.
    """
    nan = float("nan")
    gather, generation = stage_seconds["switch"], stage_seconds["generation"]
    training = stage_seconds["training"]
    others = e2e_seconds - generation - training
    whole = max(e2e_seconds, 1e-9)
    return "\n".join(
        (
            f"Generation time: {generation + gather}, "
            f"exp gen time: {generation + gather + stage_seconds['inference']}",
            f"Training time: {training}",
            f"Epoch: {iteration // total} | Step: {iteration % total} | PPO Epoch: 1"
            f" | Actor Loss: {metrics.get('actor_loss', nan)}"
            f" | Critic Loss: {metrics.get('critic_loss', nan)}"
            f" | Unsupervised Loss: {metrics.get('unsupervised_loss', 0.0)}",
            f"Average reward score: {metrics.get('reward', nan)}",
            f"|E2E latency={e2e_seconds:.2f}s |Gather latency={gather:.2f}s ({100 * gather / whole:.2f}%)"
            f" |Generate time={generation:.2f}s ({100 * generation / whole:.2f}%)"
            f" |Training time={training:.2f}s ({100 * training / whole:.2f}%)"
            f" |Others={others:.2f} ({100 * others / whole:.2f}%)|CurSamplesPerSec={batch / whole:.2f}"
            f" |AvgSamplesPerSec={batch / max(mean_seconds, 1e-9):.2f}",
        )
    )
