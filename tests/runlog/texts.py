"""Texts in the published formats, made of numbers that fit together, and a writer's header."""

from typing import Any

from puzzle.runlog import RunHeader

RAY = "\x1b[36m(Role pid=6597, ip=10.0.0.2)\x1b[0m "


def puzzle_line(step, generation, inference, training, second="stage 2(infer.)"):
    e2e = generation + inference + training
    return (
        f"epoch: 0 | step: {step}/239 | ppo_ep: 1 | global_batch_size: 128 | average_reward: {step - 1}.250"
        f" | act_loss: 5.{step}00 | cri_loss: 7.{step}50 | stage 1(gen.) (ms): {generation:.3f}"
        f" | {second} (ms): {inference:.3f} | stage 3(train.) (ms): {training:.3f} | e2e_time (ms): {e2e:.3f}"
    )


def reshard_line(seconds):
    return f"{RAY}apply shadow model time: {seconds}"


def argument(name, value):
    return f"{RAY}  {name} {'.' * (48 - len(name))} {value}"


ARGUMENTS = {
    "ar_stage_mbs": 64,
    "bulk_switch_on": True,
    "data_parallel_size": 1,
    "global_batch_size": 128,
    "hidden_size": 4096,
    "max_answer_seq_len": 256,
    "max_prompt_seq_len": 256,
    "micro_batch_size": 4,
    "num_layers": 32,
    "pf_stage_mbs": 4,
    "pipeline_model_parallel_size": 8,
    "shadow_pipeline_model_parallel_size": 4,
    "shadow_tensor_model_parallel_size": 2,
    "tensor_model_parallel_size": 1,
    "use_shadow": True,
    "world_size": 8,
}

PUZZLE_TIMES = (
    (13959.789, 2349.62, 8337.611),
    (7367.424, 1350.157, 4242.159),
    (7367.216, 1354.45, 4233.367),
    (7378.206, 1370.623, 4229.576),
)
RESHARDS = (0.08903622627258301, 0.08359861373901367, 0.08319902420043945, 0.0831446647644043)


def puzzle_lines():
    """A short `opt` log: arguments, Ray prefixes and colours, another rank's text between the lines."""
    texts = ["2024-04-29 20:35:58,552 INFO worker.py:1724 -- Connected to Ray cluster."]
    texts += [argument(name, value) for name, value in ARGUMENTS.items()]
    texts += ["Beginning of Epoch 1/1, Total Generation Batches 239"]
    for step, times in enumerate(PUZZLE_TIMES):
        texts += [
            reshard_line(RESHARDS[step]),
            f"{RAY} > number of parameters on rank (0, 7): 42\x1b[32m [repeated 39x across cluster]\x1b[0m",
            puzzle_line(step, *times),
        ]
    return [*texts, "exit with early finished, for debug"]


# Generation, generation and inference, training per rank, end to end, gather.
CHAT_TIMES = (
    (
        19.54685950279236,
        22.588785886764526,
        (5.45788431167603, 5.45761728286743, 5.45796966552734),
        27.89,
        1.09,
    ),
    (17.350685119628906, 21.090353965759277, (4.7595798969269, 4.767753124237, 4.7681024074554), 25.86, 1.15),
    (16.794774532318115, 20.342509269714355, (3.93184518814087, 3.93167066574097, 3.9297440052), 24.28, 1.11),
)


def engine_line(e2e, gather, generate, training):
    others = e2e - generate - training
    shares = [f"{100 * part / e2e:.2f}%" for part in (gather, generate, training, others)]
    return (
        f"|E2E latency={e2e:.2f}s |Gather latency={gather:.2f}s ({shares[0]}) |Generate time={generate:.2f}s"
        f" ({shares[1]}) |Training time={training:.2f}s ({shares[2]}) |Others={others:.2f} ({shares[3]})"
        f"|CurSamplesPerSec={128 / e2e:.2f} |AvgSamplesPerSec=4.59"
    )


def step_line(step):
    return (
        f"Epoch: 0 | Step: {step} | PPO Epoch: 1 | Actor Loss: -0.{step}9383349418640137"
        f" | Critic Loss: 1.{step}379273891448975 | Unsupervised Loss: 0.0"
    )


def perf_lines(step):
    _, experience, ranks, _, _ = CHAT_TIMES[step]
    return [
        f"End-to-End => Latency: {experience + ranks[0]:.2f}s, TFLOPs: 19.66, Samples/sec: 4.56,"
        " Time/seq 0.22s, Batch Size: 128, Total Seq. Length: 512",
        f"Generation => Latency: {experience:.2f}s, Per-token Latency 88.24 ms, TFLOPs: 4.84,"
        " BW: -152.74 GB/sec, Answer Seq. Length: 256",
        f"Training   => Latency: {ranks[0]:.2f}s, TFLOPs: 81.00",
        "Actor Model Parameters => 6.738 B, Critic Model Parameters => 0.304 B",
        f"Average reward score: -0.{step}961914062500{step}",
    ]


def chat_lines():
    """A short DeepSpeed-Chat log: three ranks, two on one line in iteration 1; no last engine line."""
    texts = [
        "[2024-01-12 00:05:49,464] [INFO] [config.py:971:print]   world_size ................... 8",
        "[2024-01-12 00:05:49,464] [INFO] [config.py:971:print]   train_batch_size ............. 128",
        '    "train_micro_batch_size_per_gpu": 16,',
        "Beginning of Epoch 1/1, Total Generation Batches 239",
    ]
    for step, (generation, experience, ranks, e2e, gather) in enumerate(CHAT_TIMES):
        prints = [f"Training time: {seconds}" for seconds in ranks]
        texts += [f"Generation time: {generation}, exp gen time: {experience}"]
        texts += [
            "[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 65536, reducing to 32768"
        ]
        texts += [prints[0] + prints[1], "", ""] if step == 1 else [prints[0], prints[1]]
        texts += [step_line(step), prints[2], *perf_lines(step), "-" * 80]
        texts += [engine_line(e2e, gather, generation - gather, ranks[0] + 2.0)]
    return texts[:-1]


def as_bytes(texts):
    return ("\n".join(texts) + "\n").encode()


def header(**changes):
    fields: dict[str, Any] = {
        "run_id": "abc",
        "figures": ("figure8",),
        "cluster": "local",
        "variant": "opt",
        "actor": "7B",
        "critic": "350M",
        "config": {"iterations": 8, "global_batch_size": 16},
        "layouts": {"training": {"tp": 1, "pp": 2, "dp": 1}, "generation": {"tp": 2, "pp": 1, "dp": 1}},
        "provenance": "rehearsal",
        "software": {"python": "3.12"},
        "hardware": {"devices": 2},
        "git_commit": None,
        "started": "2026-11-22T12:00:00+00:00",
    }
    return RunHeader(**{**fields, **changes})


def stages(generation, inference, training, switch=0.0, other=0.0):
    """Stage seconds, and what they add up to."""
    parts = {
        "generation": generation,
        "inference": inference,
        "training": training,
        "switch": switch,
        "other": other,
    }
    return parts, sum(parts.values())
