#!/usr/bin/env python
"""GRPO on a CPU by TRL and by this project: the same model, prompts, lengths, steps and cores, in turns.

    python scripts/peers/trl_cpu.py MODEL LOG.jsonl --trl /path/to/an/environment/with/trl/bin/python

MODEL is a Hugging Face folder (`puzzle convert` makes one of SmolLM2-135M). Every program runs as a child
that prints a line a step; what happens between two of these lines counts as one step, in seconds of the clock
and in seconds that the child's processes computed, which other programs on the host disturb less. The first
step warms up. A line of LOG is `settings` (once), or `step`.

Sequences have one length: no program can gain by stopping early. Both draw samples from the policy's full
distribution in fp32, score them by a function and under a frozen reference, and take one step of AdamW over
all of them; neither computes old log-probs by a pass of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # no environment of a peer has this project

from puzzle.cli import Parser, new_file, real, whole  # noqa: E402
from puzzle.errors import UserError, exit_code, one_line  # noqa: E402

SIDES, UNITS = ("puzzle", "trl"), ("seconds", "cpu_seconds")
STEP = "step done"
WORDS = (
    "river",
    "market",
    "window",
    "letter",
    "garden",
    "number",
    "story",
    "doctor",
    "winter",
    "paper",
    "music",
)


@dataclass(frozen=True)
class Work:
    """What both do: `groups` prompts of `prompt` tokens in a step, each with `samples` responses of `new`."""

    groups: int = 4
    samples: int = 4
    microbatch: int = 8
    prompt: int = 32
    new: int = 48
    steps: int = 5
    threads: int = 2
    kl: float = 0.04
    clip: float = 0.2
    learning_rate: float = 1e-6


def prompts(model: Path, work: Work) -> list[str]:
    """Texts of different words that the model's tokenizer cuts into exactly `work.prompt` tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    draw, found = random.Random(0), []
    while len(found) < work.groups * work.steps:
        text = draw.choice(WORDS)
        while len(tokenizer(text)["input_ids"]) < work.prompt:
            text += " " + draw.choice(WORDS)
        if len(tokenizer(text)["input_ids"]) == work.prompt:
            found.append(text)
    return found


def brevity(responses: Sequence[str]) -> list[float]:
    """The reward of both: fewer characters are better."""
    return [1.0 - len(response) / 1000 for response in responses]


def run_puzzle(model: Path, work: Work, texts: Sequence[str]) -> None:
    """The project's side: one process."""
    import puzzle

    with TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        config = {
            "iterations": work.steps,
            "batch": work.groups,
            "dtype": "fp32",
            "device": "cpu",
            "actor": {"model": str(model), "optimizer": {"lr": work.learning_rate}},
            "data": {"prompts": str(file), "max_prompt_tokens": work.prompt},
            "generation": {
                "samples": work.samples,
                "min_new_tokens": work.new,
                "max_new_tokens": work.new,
            },
            "algorithm": {
                "name": "grpo",
                "microbatch": work.microbatch,
                "clip": work.clip,
                "kl": {"coef": work.kl},
            },
            "checkpoint": {"save": False},
            "log": {"samples": 0, "plots": False},
        }

        def reward(responses: list[str]) -> list[float]:
            return brevity(responses)

        puzzle.run(config, Path(folder, "run"), reward=reward, on_iteration=lambda _: print(STEP, flush=True))


def run_trl(model: Path, work: Work, texts: Sequence[str]) -> None:
    """TRL's side, by its GRPOTrainer."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # ty: ignore[import-not-found]

    torch.set_num_threads(work.threads)

    class Steps(TrainerCallback):
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            print(STEP, flush=True)

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return brevity(completions)

    with TemporaryDirectory() as folder:
        GRPOTrainer(
            model=str(model),
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            callbacks=[Steps()],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                model_init_kwargs={"dtype": "float32"},
                gradient_checkpointing=False,  # its default recomputes what two cores have room for
                max_steps=work.steps,
                num_generations=work.samples,
                per_device_train_batch_size=work.microbatch,
                gradient_accumulation_steps=work.groups * work.samples // work.microbatch,
                max_completion_length=work.new,
                generation_kwargs={"min_new_tokens": work.new},
                loss_type="grpo",
                beta=work.kl,
                epsilon=work.clip,
                learning_rate=work.learning_rate,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        ).train()


def processes(root: int) -> Iterator[int]:
    """A process and all that descend from it, by the parents that /proc names."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields_of := _stat(int(folder.name))):
            children.setdefault(int(fields_of[1]), []).append(int(folder.name))
    waiting = [root]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += children.get(one, [])


def cpu_seconds(root: int) -> float:
    """User and system time of a process, its descendants, and those of them that were waited for."""
    ticks = sum(sum(map(int, found[11:15])) for one in processes(root) if (found := _stat(one)))
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name (state, parent, ...); empty where the process has gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def measured(command: Sequence[str], work: Work, output: Path) -> list[tuple[float, float]]:
    """Seconds of the clock and of computing of every step but a child's first; its output goes to a file.

    Raises UserError where it fails or prints another number of steps.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that wait for others shall not count as computing
    marks = []
    with output.open("w") as told:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True, env=environment)
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == STEP:
                marks.append((time.monotonic(), cpu_seconds(child.pid)))
            told.write(line)
        code = child.wait()
    if code or len(marks) != work.steps:
        raise UserError(f"{command[0]} ended with {code} after {len(marks)} steps; see {output}")
    return [(now - before, cpu - cpu_before) for (before, cpu_before), (now, cpu) in pairwise(marks)]


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """What an interpreter has of the packages."""
    code = "import sys, json; from importlib.metadata import version\n"
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    answer = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=False)
    if answer.returncode:
        why = one_line((answer.stderr.splitlines() or ["it says nothing"])[-1])
        raise UserError(f"{python} lacks one of {', '.join(packages)} ({why}); give --trl another Python")
    return json.loads(answer.stdout)


def compare(model: Path, log: Path, trl: str, work: Work, rounds: int) -> None:
    """Run both in turns, write the log, print means and ratios."""
    pythons = {"puzzle": sys.executable, "trl": trl}
    packages = {"puzzle": ["torch", "transformers"], "trl": ["torch", "transformers", "trl"]}
    settings = {
        "record": "settings",
        "model": model.name,
        "work": asdict(work),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {side: versions(pythons[side], packages[side]) for side in SIDES},
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(work).items()]
    with log.open("w") as out:
        print(json.dumps(settings), file=out, flush=True)
        for turn in range(rounds):
            for side in SIDES:
                command = [pythons[side], __file__, str(model), str(log), "--side", side, *options]
                for number, (seconds, cpu) in enumerate(
                    measured(command, work, log.with_suffix(f".{side}.txt")), 1
                ):
                    row = {"record": "step", "side": side, "round": turn, "step": number}
                    took = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)}
                    print(json.dumps({**row, **took}), file=out, flush=True)
    print(summary(log))


def seconds_of(log: Path, side: str, unit: str) -> list[float]:
    """Of a side's steps in a log, `seconds` or `cpu_seconds`."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if row["record"] == "step"]
    return [row[unit] for row in rows if row["side"] == side]


def summary(log: Path) -> str:
    """Means of a log over all steps, with the standard deviation, and what TRL takes of ours."""
    lines, means = [], {}
    for side in SIDES:
        for unit in UNITS:
            values = seconds_of(log, side, unit)
            means[side, unit] = fmean(values)
            spread = stdev(values) if len(values) > 1 else 0.0
            lines.append(f"{side:<7} {unit:<12} {means[side, unit]:7.2f} +- {spread:.2f} (n={len(values)})")
    for unit in UNITS:
        lines.append(f"trl over puzzle, {unit}: {means['trl', unit] / means['puzzle', unit]:.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 after a mistake, which gets one line."""
    return exit_code(lambda: do(sys.argv[1:] if arguments is None else arguments))


def do(arguments: Sequence[str]) -> None:
    """What the command line says."""
    assert __doc__ is not None
    parser = Parser(prog=Path(__file__).name, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("log", type=new_file)
    parser.add_argument("--trl", default=sys.executable, help="the Python that has trl")
    parser.add_argument("--rounds", type=whole(1), default=2, help="times that each runs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    for field in fields(Work):
        default = field.default
        assert isinstance(default, int | float)
        kind = real(0.0) if isinstance(default, float) else whole(2 if field.name == "steps" else 1)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default)
    given = parser.parse_args(arguments)
    if not (given.model / "config.json").is_file():
        parser.error(f"{given.model}: is no Hugging Face model folder")
    work = Work(**{field.name: getattr(given, field.name) for field in fields(Work)})
    if given.side is None:
        compare(given.model.resolve(), given.log, given.trl, work, given.rounds)
    else:
        texts = prompts(given.model, work)
        {"puzzle": run_puzzle, "trl": run_trl}[given.side](given.model, work, texts)


if __name__ == "__main__":
    sys.exit(main())
