#!/usr/bin/env python
"""PPO by verl with vLLM on one host: random weights, 16 sequences of 256 + 256 tokens per GPU.

    python scripts/peers/verl_ppo.py prepare WORK           models, tokenizer, prompts and a reward, once
    python scripts/peers/verl_ppo.py search WORK OUT --gpus 4 --critic 350m --minutes 50
    python scripts/peers/verl_ppo.py table OUT              what was measured
    python scripts/peers/verl_ppo.py command WORK OUT --gpus 4 --critic 7b [--only NAME]    commands alone

`search` runs `settings` one after another, each changing one thing of the first; the last one, combined, has
all changes together that were faster. Each lies in OUT/NAME: metrics.jsonl (verl's file logger) and verl.log.
Nothing starts that would not end within --minutes, by what the runs before took; started again, it goes on.
docs/peers.md says what the numbers are compared with.

Needs verl 0.9.1, vllm 0.26.0, ray and flash-attn; without flash-attn --attention sdpa, where verl's critic
loads with that.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # no environment of a peer has this project

from puzzle.cli import Parser, named, real, whole  # noqa: E402
from puzzle.errors import UserError, exit_code  # noqa: E402

VOCABULARY, PROMPT, RESPONSE, ROWS = 32000, 256, 256, 16
SHAPES = {"7b": (4096, 32, 32), "350m": (512, 16, 16)}  # hidden size, layers, heads; all 11008 wide
FIRST_SECONDS = 450.0  # of a run of four iterations, before any is known: 280 are the start (logs/peers)
PARTS = (
    "gen",
    "old_log_prob",
    "ref",
    "values",
    "adv",
    "update_critic",
    "update_actor",
    "update_weights",
    "step",
)


@dataclass(frozen=True)
class Setting:
    """What is tried of verl: how models are sharded and stored, and who computes what in how large pieces.

    `microbatch` and `scoring` are sequences of a pass of training, and of log-probs and values, per GPU.
    """

    strategy: str = "fsdp"
    reshard: bool = True  # parameters are sharded again after the forward pass
    weights: str = "fp32"  # which dtype the trained models are stored in; arithmetic is bf16
    fused: str = ""  # triton or torch: output layer and log-probs in one
    microbatch: int = 16
    scoring: int = 16
    tp: int = 1  # vLLM's
    checkpointing: bool = False
    offload: bool = False


def settings(critic: str, gpus: int) -> dict[str, Setting]:
    """By name, the first as verl has it by default; a 7B critic leaves room for micro-batches of 8."""
    first = Setting(microbatch=8 if critic == "7b" else 16)
    if gpus < 4 and critic == "7b":
        first = replace(first, microbatch=4, checkpointing=True, offload=True)
    found = {
        "default": first,
        "fused-triton": replace(first, fused="triton"),
        "unsharded": replace(first, strategy="fsdp2", reshard=False),
        "microbatch": replace(first, microbatch=first.microbatch // 2),
        "fused-torch": replace(first, fused="torch"),
        "bf16-weights": replace(first, weights="bfloat16"),
    }
    return found | {f"tp{tp}": replace(first, tp=tp) for tp in (2, 4) if tp <= gpus}


def combined(tried: Mapping[str, Setting], seconds: Mapping[str, float]) -> Setting | None:
    """All changes together whose run was faster than the first; of two values for one field the faster run's.
    None where fewer than two changes helped."""
    first = tried["default"]
    best, changes = first, 0
    if "default" not in seconds:
        return None
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        if name in tried and seconds[name] < seconds["default"]:
            changed = {f.name: getattr(tried[name], f.name) for f in fields(Setting)}
            best = replace(best, **{k: v for k, v in changed.items() if v != getattr(first, k)})
            changes += 1
    return best if changes > 1 else None


@dataclass(frozen=True)
class Host:
    """Where and what is run, whatever the setting: `work` is what `prepare` wrote, `extra` more options."""

    work: Path
    critic: str
    gpus: int
    steps: int
    attention: str
    extra: tuple[str, ...] = ()


def options(host: Host, setting: Setting) -> dict[str, object]:
    """verl's configuration, by the dotted names of its options."""
    work, gpus = host.work, host.gpus
    found: dict[str, object] = {
        "algorithm.adv_estimator": "gae",
        "algorithm.gamma": 1.0,
        "algorithm.lam": 0.95,
        "algorithm.use_kl_in_reward": True,
        "data.train_files": work / "train.parquet",
        "data.val_files": work / "val.parquet",
        "data.train_batch_size": ROWS * gpus,
        "data.max_prompt_length": PROMPT,
        "data.max_response_length": RESPONSE,
        "data.dataloader_num_workers": 0,
        "reward.custom_reward_function.path": work / "reward.py",
        "reward.custom_reward_function.name": "score",
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": gpus,
        "trainer.total_epochs": host.steps,
        "trainer.total_training_steps": host.steps,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "trainer.logger": "[console,file]",
    }
    actor, rollout = "actor_rollout_ref", "actor_rollout_ref.rollout"
    trained = {f"{actor}.actor": f"{actor}.actor.fsdp_config", "critic": "critic.fsdp"}
    for role, sharding in trained.items():
        found |= {
            f"{role}.strategy": setting.strategy,
            f"{role}.ppo_epochs": 1,
            f"{role}.ppo_micro_batch_size_per_gpu": setting.microbatch,
            f"{role}.use_dynamic_bsz": False,
            f"{sharding}.reshard_after_forward": setting.reshard,
            f"{sharding}.model_dtype": setting.weights,
            f"{sharding}.param_offload": setting.offload,
            f"{sharding}.optimizer_offload": setting.offload,
        }
    for owner, path in ((actor, work / "7b"), ("critic", work / host.critic)):
        found |= {
            f"{owner}.model.path": path,
            f"{owner}.model.use_remove_padding": False,  # nothing is padded: one length
            f"{owner}.model.enable_gradient_checkpointing": setting.checkpointing,
            f"+{owner}.model.override_config.attn_implementation": host.attention,
        }
    for role in (f"{actor}.ref", rollout):
        found[f"{role}.log_prob_micro_batch_size_per_gpu"] = setting.scoring
    found["critic.forward_micro_batch_size_per_gpu"] = setting.scoring
    found |= {
        f"{actor}.actor.ppo_mini_batch_size": ROWS * gpus,
        f"{actor}.actor.use_kl_loss": False,
        f"{actor}.actor.entropy_coeff": 0,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": 1,
        f"{rollout}.tensor_model_parallel_size": setting.tp,
        f"{rollout}.gpu_memory_utilization": 0.4,
        f"{rollout}.ignore_eos": True,  # every response has the full length
        f"{rollout}.max_num_batched_tokens": 16384,
        f"{rollout}.enable_prefix_caching": False,
    }
    if setting.fused:
        found |= {
            f"{actor}.model.use_fused_kernels": True,
            f"{actor}.model.fused_kernel_options.impl_backend": setting.fused,
        }
    return found


def command(host: Host, setting: Setting) -> list[str]:
    """What runs verl."""
    words = [f"{name}={value}" for name, value in options(host, setting).items()]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *words, *host.extra]


def environment(folder: Path) -> dict[str, str]:
    """Of a run whose metrics go into `folder`: nothing is fetched or reported, NVLink multicast stays off."""
    off = (
        "NCCL_NVLS_ENABLE",
        "VLLM_ALLREDUCE_USE_SYMM_MEM",
        "VLLM_USE_NCCL_SYMM_MEM",
        "RAY_USAGE_STATS_ENABLED",
    )
    on = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "VLLM_NO_USAGE_STATS", "TORCH_SYMM_MEM_DISABLE_MULTICAST")
    return {
        **os.environ,
        **dict.fromkeys(off, "0"),
        **dict.fromkeys(on, "1"),
        "HYDRA_FULL_ERROR": "1",
        "RAY_memory_monitor_refresh_ms": "0",  # which takes a guest's memory, as it grows, for used up
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
    }


def prepare(work: Path, prompts: int) -> None:
    """Write model folders with random weights, whose words are tokens, prompts of 256 words, and a reward."""
    work.mkdir(parents=True, exist_ok=True)  # before minutes are spent on what could not be written
    import pandas
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (hidden, layers, heads) in SHAPES.items():
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=11008, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, rms_norm_eps=1e-5, dtype=torch.bfloat16,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        with torch.device(device):
            LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    draw = random.Random(0)
    for name, number in (("train", prompts), ("val", 8)):
        texts = [" ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(PROMPT)) for _ in range(number)]
        rows = [
            {
                "data_source": "random",
                "prompt": [{"role": "user", "content": text}],
                "reward_model": {"style": "rule", "ground_truth": ""},
            }
            for text in texts
        ]
        pandas.DataFrame(rows).to_parquet(work / f"{name}.parquet")
    (work / "reward.py").write_text(
        "def score(data_source, solution_str, ground_truth, **more):\n"
        "    return len(solution_str) % 10 / 10\n"
    )


def _tokenizer() -> Any:
    """A tokenizer of words w2, w3, ...: a text of n words is n tokens, whatever they are."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    plain = Tokenizer(WordLevel(words, unk_token="</s>"))
    plain.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="</s>"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def steps_of(metrics: Path) -> list[dict[str, float]]:
    """Seconds of the parts of every step that verl's file logger wrote, the first one too."""
    try:
        rows = [json.loads(line)["data"] for line in metrics.read_text().splitlines() if line.strip()]
        return [
            {part: float(row[f"timing_s/{part}"]) for part in PARTS if f"timing_s/{part}" in row}
            for row in rows
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{metrics}: is no log of verl's file logger ({error})") from None


def means(metrics: Path) -> dict[str, float]:
    """Mean seconds of each part over the steps after the first; empty where there are none."""
    late = steps_of(metrics)[1:] if metrics.exists() else []
    return {
        part: fmean(row[part] for row in late) for part in PARTS if late and all(part in row for row in late)
    }


def search(host: Host, out: Path, minutes: float) -> None:
    """Run what OUT does not have yet, as far as the minutes go; a setting that failed is not tried again."""
    began, longest = time.monotonic(), 0.0
    tried = settings(host.critic, host.gpus)
    for name in [*tried, "combined"]:
        if (out / name / "verl.log").exists():
            continue
        setting = tried.get(name) or combined(tried, seconds_of(out, tried))
        if setting is None:
            continue
        left, wanted = 60 * minutes - (time.monotonic() - began), longest or FIRST_SECONDS
        if left < wanted:
            print(f"{name}: not started; {left:.0f} s are left, and a run takes about {wanted:.0f}")
            return
        start = time.monotonic()
        code = run(host, setting, out / name)
        longest = max(longest, time.monotonic() - start)
        found = means(out / name / "metrics.jsonl")
        print(
            f"{name}: {found['step']:.2f} s" if found else f"{name}: ended with {code}, no numbers",
            flush=True,
        )


def run(host: Host, setting: Setting, folder: Path) -> int:
    """Run verl with its metrics and its output in `folder`; its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "verl.log").open("w") as log:
        ended = subprocess.run(
            command(host, setting), stdout=log, stderr=subprocess.STDOUT, env=environment(folder), check=False
        )
    return ended.returncode


def seconds_of(out: Path, names: Iterable[str]) -> dict[str, float]:
    """Mean seconds of a step by setting, of those that have numbers."""
    found = {name: means(out / name / "metrics.jsonl") for name in names}
    return {name: parts["step"] for name, parts in found.items() if parts}


def table(out: Path) -> str:
    """Settings with numbers, the fastest first, in seconds; then those without."""
    found = {path.name: means(path / "metrics.jsonl") for path in sorted(out.iterdir()) if path.is_dir()}
    lines = [f"{'setting':<14}" + "".join(f"{part:>16}" for part in PARTS)]
    for name in sorted((name for name in found if found[name]), key=lambda name: found[name]["step"]):
        lines.append(
            f"{name:<14}" + "".join(f"{found[name].get(part, float('nan')):16.2f}" for part in PARTS)
        )
    return "\n".join([*lines, *(f"{name}: no numbers" for name in found if not found[name])])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 after a mistake, which gets one line."""
    return exit_code(lambda: do(sys.argv[1:] if arguments is None else arguments))


def do(arguments: Sequence[str]) -> None:
    """What the command line says."""
    assert __doc__ is not None
    parser = Parser(prog=Path(__file__).name, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("prepare", "search", "table", "command"))
    parser.add_argument("folders", nargs="+", type=named, metavar="WORK|OUT")
    parser.add_argument("--gpus", type=whole(1), default=4)
    parser.add_argument("--critic", choices=SHAPES, default="350m")
    parser.add_argument("--minutes", type=real(0.0), default=50.0)
    parser.add_argument("--steps", type=whole(2), default=4, help="iterations, of which the first warms up")
    parser.add_argument("--attention", default="flash_attention_2")
    parser.add_argument("--only", help="of `command`: one setting")
    parser.add_argument("--extra", nargs="+", default=[], metavar="KEY=VALUE", help="more of verl's options")
    given = parser.parse_args(arguments)
    wanted = 2 if given.what in ("search", "command") else 1
    if len(given.folders) != wanted:
        parser.error(f"{given.what} takes {'WORK and OUT' if wanted == 2 else 'one folder'}")
    folders = [folder.resolve() for folder in given.folders]
    host = Host(folders[0], given.critic, given.gpus, given.steps, given.attention, tuple(given.extra))
    if given.what == "prepare":
        prepare(folders[0], prompts=1024)
    elif given.what == "table":
        print(table(folders[0]))
    elif given.what == "search":
        if not (host.work / "train.parquet").is_file():
            raise UserError(f"{host.work}: `prepare` has not written prompts here")
        search(host, folders[1], given.minutes)
    else:
        known = settings(given.critic, given.gpus)
        if given.only and given.only not in known:
            parser.error(f"--only {given.only}: there are {', '.join(known)}")
        for name, setting in known.items():
            if given.only in (None, name):
                logged = f"VERL_FILE_LOGGER_PATH={folders[1] / name / 'metrics.jsonl'}"
                print(f"{logged} {shlex.join(command(host, setting))}")


if __name__ == "__main__":
    sys.exit(main())
