"""Adapters on real ranks against peft: gradients and steps of supervised training, GRPO and PPO, exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from puzzle.cli import main
from puzzle.engine.train.offload import HostMemory, MergedAdapters
from puzzle.model import hf
from puzzle.model.decoder import Decoder
from puzzle.model.packing import pack
from puzzle.model.parallel import TensorGroup
from puzzle.plan.layout import Coord, Layout
from puzzle.rlhf.experience import Experience
from puzzle.spec.lora import PROJECTIONS
from tests.helpers import run_ranks
from tests.reference.tiny import save_lm, save_value
from tests.rlhf import peft_truth as peft
from tests.rlhf import ppo_ranks
from tests.rlhf import supervised_truth as truth
from tests.rlhf.ppo_ranks import Case as PPO
from tests.rlhf.ppo_truth import drifted
from tests.rlhf.supervised_ranks import Case, Seen, run
from tests.rlhf.test_supervised import (
    LAYOUTS,
    MARGINS,
    PAIRS,
    TRAIN,
    assert_resumed,
    preferring,
    resuming,
    sft,
)

STEPS, CLOSE = 2, 1e-5
OPTIMIZER = {"lr": 1e-2, "eps": 1e-4, "grad_clip": 0.5}
SOME = ("q_proj", "v_proj", "up_proj", "o_proj")


def adapting(case: Case, folder: Path, targets: tuple[str, ...] = PROJECTIONS) -> Case:
    """The same run of several steps, with adapters alone."""
    role = "reward" if case.config["task"] == "reward-model" else "actor"
    section = {"model": str(folder), "optimizer": OPTIMIZER, "lora": peft.lora(targets)}
    return replace(case, config={**case.config, "iterations": STEPS, role: section})


def together(shapes: dict[str, Any], pieces: list[Any]) -> dict[str, Tensor]:
    """Whole tensors out of what ranks own."""
    found = {name: torch.full(tuple(shape), torch.nan) for name, shape in shapes.items()}
    for name, intervals, values in pieces:
        if name in found:
            found[name][tuple(slice(a, b) for a, b in intervals)] = values
    return found


def assert_learned(seen: list[Seen], model: Any, loss: Callable[[Any], Tensor], role: str) -> None:
    """Every step's loss and gradients, and the weights after the last: trained ones are `model`'s, which
    learns the same here; the others are as they were."""
    frozen = {peft.name_of(n): p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses, grads = peft.learn(model, loss, STEPS, OPTIMIZER)
    shapes = {name: p.shape for name, p in peft.trained(model).items()}
    for step in range(STEPS):
        assert seen[0].metrics[step][f"{role}_loss"] == pytest.approx(losses[step], rel=CLOSE, abs=CLOSE)
        pieces = [piece for one in seen for piece in one.grads[step]]
        assert {name for name, *_ in pieces} == set(shapes), "what is trained, and nothing else"
        found = together(shapes, pieces)
        for name, wanted in grads[step].items():
            assert_close(found[name], wanted, f"{name}, step {step}")
    weights = [piece for one in seen for piece in one.weights]
    found = together(shapes, weights)
    for name, parameter in peft.trained(model).items():
        assert_close(found[name], parameter.detach(), name)
    for name, intervals, values in weights:
        if name not in shapes and name in frozen:
            assert torch.equal(values, frozen[name][tuple(slice(a, b) for a, b in intervals)]), name


def assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=CLOSE, atol=CLOSE, msg=partial("{}: {}".format, what))


def test_sft_learns_what_peft_learns(tmp_path: Path) -> None:
    """Llama and Qwen2 (with biases beside q, k and v), all projections or some; where tensor ranks share
    key and value heads; with recomputation; resumed in another layout, and bitwise in the same."""
    llama, qwen2 = save_lm(tmp_path / "llama"), save_lm(tmp_path / "qwen2", "qwen2")
    apart = {"microbatch_tokens": None, "microbatch": 1}
    runs: list[tuple[Path, tuple[str, ...], Case]] = [
        *((llama, PROJECTIONS, sft(llama, layout)) for layout in LAYOUTS.values()),
        (qwen2, PROJECTIONS, sft(qwen2, {"tp": 4, "pp": 1, "dp": 1})),
        (qwen2, SOME, sft(qwen2, LAYOUTS["tp2-pp2"], algorithm=apart, recompute=True)),
    ]
    cases = [adapting(case, folder, targets) for folder, targets, case in runs]
    goes_on = resuming(adapting(sft(llama, LAYOUTS["tp2-dp2"]), llama, SOME), tmp_path / "states")
    found = run_ranks(run, 4, 4, [*cases, *goes_on])
    assert_resumed(found)
    assert_sft(found, runs)


@pytest.mark.long
def test_sft_learns_what_peft_learns_in_every_layout(tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "qwen3"):
        folder = save_lm(tmp_path / family, family)
        runs: list[tuple[Path, tuple[str, ...], Case]] = [
            (folder, targets, sft(folder, layout))
            for targets in (PROJECTIONS, SOME)
            for layout in LAYOUTS.values()
        ]
        found = run_ranks(run, 4, 4, [adapting(case, folder, targets) for _, targets, case in runs])
        assert_sft(found, runs)


def assert_sft(found: list[list[Seen]], runs: list[tuple[Path, tuple[str, ...], Case]]) -> None:
    for number, (folder, targets, _) in enumerate(runs):
        model = peft.adapted(folder, 1, targets)
        loss = partial(truth.cross_entropy, examples=TRAIN, average="token")
        assert_learned([rank[number] for rank in found], model, loss, "actor")


@pytest.mark.long
def test_preferences_are_learned_as_by_peft(tmp_path: Path) -> None:
    """A reward model, whose score head is trained in full; DPO, whose reference is the base."""
    judge, folder = save_value(tmp_path / "judge"), save_lm(tmp_path / "lm")
    kinds = [LAYOUTS[name] for name in ("tp2-pp2", "tp2-dp2")]
    options = {"beta": 0.3, "label_smoothing": 0.1}
    cases = [
        *(adapting(preferring("reward-model", judge, layout), judge) for layout in kinds),
        *(adapting(preferring("dpo", folder, layout, algorithm=options), folder) for layout in kinds),
    ]
    found = run_ranks(run, 4, 4, cases)
    base = truth.causal(folder)
    losses: list[Callable[[Any], Tensor]] = [
        partial(truth.bradley_terry, pairs=PAIRS, margins=MARGINS),
        partial(truth.dpo, before=base, pairs=PAIRS, beta=0.3, wrong=0.1),
    ]
    for number in range(4):
        role = "reward" if number < 2 else "actor"
        model = peft.adapted(judge, 3) if number < 2 else peft.adapted(folder, 1)
        assert_learned([rank[number] for rank in found], model, losses[number // 2], role)


def aligning(folders: dict[str, Path], shape: tuple[int, int, int], **changes: Any) -> PPO:
    """A run by PPO of actor and critic with adapters, of which those of the actor soon tell."""
    optimizer = {"lr": 3e-3, "eps": 1e-4}
    tp, pp, dp = shape
    config: dict[str, Any] = {
        "iterations": 3,
        "batch": 4,
        "device": "cpu",
        "layout": {"tp": tp, "pp": pp, "dp": dp},
        "actor": {"model": str(folders["lm"]), "optimizer": optimizer, "lora": peft.lora(merge=True)},
        "critic": {"model": str(folders["value"]), "optimizer": optimizer, "lora": peft.lora(SOME)},
        "reward": {"model": str(folders["value"])},
        "data": {"random_tokens": 4, "tokenizer": "bytes"},
        "generation": {"max_new_tokens": 6, "samples": 2},
        "switch": {"verify": True},
        "algorithm": {"minibatch": 4, "microbatch": 2},
    }
    config |= {key: {**config[key], **value} for key, value in changes.items()}
    generator = torch.Generator().manual_seed(5)
    prompts = tuple(tuple(torch.randint(0, 259, (n,), generator=generator).tolist()) for n in (3, 7, 1, 5))
    return PPO(config, prompts)


def test_ppo_with_adapters_is_the_same_in_every_layout(tmp_path: Path) -> None:
    """Generation with merged weights in the training layout and in another one, and beside the adapters.
    The reference is the base, of which there is one copy; after generation it is what it was, bit for bit."""
    folders = {"lm": save_lm(tmp_path / "lm"), "value": save_value(tmp_path / "value")}
    kept = {"actor": {"lora": peft.lora(merge=False)}}
    (alone,) = run_ranks(ppo_ranks.run, 1, 1, [aligning(folders, (1, 1, 1))])[0]
    cases = [
        aligning(folders, (2, 2, 1)),
        aligning(folders, (2, 1, 2), generation={"layout": {"tp": 1, "pp": 2, "dp": 2}}),
        aligning(folders, (1, 2, 2), generation={"layout": {"tp": 4, "pp": 1, "dp": 1}}),
    ]
    cases[2].config["actor"]["lora"] = kept["actor"]["lora"]
    every = run_ranks(ppo_ranks.run, 4, 4, cases)
    base = truth.causal(folders["lm"])
    frozen = dict(base.named_parameters())
    shapes = {t.name: t.shape for role in folders.values() for t in peft.ours(role).tensors() if t.trained}
    wanted = {role: together(shapes, pieces) for role, pieces in alone.weights.items()}
    assert max(metrics["kl"] for metrics in alone.metrics) > 1e-3
    for number in range(len(cases)):
        watches = [rank[number] for rank in every]
        assert not drifted(watches)
        for ours, theirs in zip(watches[0].experiences, alone.experiences, strict=True):
            assert ours.responses == theirs.responses
            assert_reference(base, ours)
        for ours, theirs in zip(watches[0].metrics, alone.metrics, strict=True):
            for name in ("actor_loss", "critic_loss", "kl", "reward", "actor_grad_norm", "critic_grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=CLOSE), name
            assert ours["logprob_gap_max"] < CLOSE
        for role, name, intervals, values in [
            (r, *x) for w in watches for r in w.weights for x in w.weights[r]
        ]:
            place = tuple(slice(a, b) for a, b in intervals)
            if name in shapes:
                torch.testing.assert_close(values, wanted[role][name][place], rtol=1e-3, atol=1e-4)
            elif role == "actor":
                assert torch.equal(values, frozen[name][place]), name


def assert_reference(base: Any, experience: Experience) -> None:
    """The reference's log-probs are those of the model without adapters."""
    assert experience.ref_logprobs_BS is not None
    for row in range(len(experience)):
        tokens = tuple(experience.sequence(row))
        start = len(tokens) - len(experience.responses[row])
        with torch.no_grad():
            wanted = truth.logprobs(base, (tokens, (start, len(tokens))))
        assert_close(experience.ref_logprobs_BS[row, : len(wanted)], wanted, "the reference")


def logits(model: Any) -> Tensor:
    model.config.pad_token_id = None
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_exports_load_in_peft_and_merged(tmp_path: Path) -> None:
    """Of actor and critic; a run that goes on in another layout learns the same."""
    folders = {"lm": save_lm(tmp_path / "lm"), "value": save_value(tmp_path / "value")}
    config = {**aligning(folders, (1, 1, 1)).config, "iterations": 2, "log": {"plots": False}}
    config["checkpoint"] = {"every": 1}
    config["algorithm"] = {**config["algorithm"], "minibatch": 8}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--out"]
    assert main([*command, str(straight)]) == 0
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints/state-2")
    assert main(["train", "--out", str(resumed), "--resume", "--layout.tp", "2"]) == 0
    for name, base, kind in (("last", "lm", truth.causal), ("last-critic", "value", truth.classifier)):
        folder = straight / "checkpoints" / name
        merged = logits(kind(folder))
        adapted = PeftModel.from_pretrained(kind(folders[base]), folder / "adapter")
        assert (logits(kind(folders[base])) - merged).abs().max() > 1e-3, "it has learned"
        assert_close(logits(adapted), merged, name)
        assert_close(logits(kind(resumed / "checkpoints" / name)), merged, name)
        said = json.loads((folder / "adapter/adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == str(folders[base])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_are_put_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Merged, a decoder without adapters gives what one with them does; then nothing has changed."""
    folder = save_lm(tmp_path / "lm")
    spec = peft.ours(folder)
    layout = Layout.even(1, 1, 1, spec.num_layers)
    made = [Decoder(s, layout, Coord(0, 0, 0), TensorGroup(), dtype) for s in (spec, spec.base)]
    for decoder in made:
        hf.load(decoder, folder)
    adapted, plain = made
    for _, adapter in adapted.adapted():
        torch.nn.init.normal_(adapter.b, std=0.1)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    batch = pack([list(range(20))], 1)
    with torch.no_grad():
        wanted = adapted.logits(adapted(batch.tokens_T, batch))
        merging = MergedAdapters(HostMemory(torch.device("cpu")), adapted)
        for _ in range(2):
            merging.merge()
            plain.load_state_dict({name: adapted.get_parameter(name) for name, _ in plain.named_parameters()})
            found = plain.logits(plain(batch.tokens_T, batch))
            merging.restore()
            for name, p in adapted.named_parameters():
                assert torch.equal(p, before[name]), name
    close = CLOSE if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, wanted, rtol=close, atol=close * float(wanted.abs().max()))
