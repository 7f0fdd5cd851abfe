"""What an iteration's record says of responses, learning and speed, against numpy and another library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle.config.resolve import resolve
from puzzle.data.endings import Endings
from puzzle.data.prompts import Prompt
from puzzle.engine.runtime.world import World
from puzzle.rlhf import metrics
from puzzle.rlhf.experience import Experience
from puzzle.spec.flops import peak_flops
from tests.helpers import run_ranks
from tests.rlhf.one_process import INIT, configured, run, trainer_of

LONGEST, STOP = 5, (7, 11)


def rows_of(experience: Experience, x_BS: torch.Tensor | None) -> np.ndarray:
    assert x_BS is not None
    return np.concatenate(
        [x_BS[row, : len(r)].double().numpy() for row, r in enumerate(experience.responses)]
    )


def test_records_of_a_run_are_numpy_s() -> None:
    """PPO with a warm-up over two epochs of two steps; some responses reach the limit, some do not."""
    schedule = {"lr": 0.02, "warmup": 6, "schedule": "linear"}
    options = {"epochs": 2, "minibatch": 4, "whiten": False}
    config = configured(
        iterations=3,
        actor={"optimizer": schedule},
        critic={"optimizer": {"lr": 0.003}},
        algorithm=options,
        generation={"samples": 2},
    )
    log = run(trainer_of(config, stop_ids=STOP))
    shares = []
    for number, (experience, record) in enumerate(zip(log.experiences, log.iterations, strict=True)):
        scores = experience.scores_B
        assert scores is not None
        lengths = np.array([len(response) for response in experience.responses])
        prompts = np.array([len(experience.prompt(row)) for row in range(8)])
        cut = [len(r) == LONGEST and r[-1] not in STOP for r in experience.responses]
        shares.append(np.mean(cut))
        advantages = rows_of(experience, experience.advantages_BS)
        values, returns = (rows_of(experience, x) for x in (experience.values_BS, experience.returns_BS))
        step = 4 * (number + 1) - 1  # the last of four a time
        rate = (step + 1) / 6 if step < 6 else (12 - step) / 6
        seconds = record.stage_seconds["generation"]
        expected = {
            "reward_min": scores.double().numpy().min(),
            "reward_max": scores.double().numpy().max(),
            "response_length_min": lengths.min(),
            "response_length_max": lengths.max(),
            "truncated_frac": np.mean(cut),
            "advantage_mean": advantages.mean(),
            "advantage_std": advantages.std(),
            "advantage_min": advantages.min(),
            "advantage_max": advantages.max(),
            "value_mean": values.mean(),
            "return_mean": returns.mean(),
            "explained_variance": 1 - np.var(returns - values) / np.var(returns),
            "actor_lr": 0.02 * rate,
            "critic_lr": 0.003,
        }
        assert record.speed == pytest.approx(
            {
                "tokens_per_device_second": (lengths + prompts).sum() / record.e2e_seconds,
                "generated_per_device_second": lengths.sum() / seconds,
            }
        )  # neither utilisation nor memory on a CPU
        assert {name: record.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert not {name for name in record.metrics if name.startswith(("mfu", "peak", "tokens_per"))}
    assert 0 < np.mean(shares) < 1
    assert len({record.metrics["actor_lr"] for record in log.iterations}) == 3


def experience(**changes: Any) -> Experience:
    made = Experience(((1, 2), (3,)), (0, 1), ((4, 5, 6), (7,), (8, 9), (3, 3, 3)), 2)
    return replace(made, **changes)


def test_fill_is_not_learnt_from_and_padding_counts_nowhere() -> None:
    x_BS = torch.tensor([[1.0, 2.0, 3.0], [6.0, 1e9, 1e9], [50.0, 60.0, 1e9], [70.0, 80.0, 90.0]])
    told = metrics.learning_metrics(experience(advantages_BS=x_BS, fill=1))
    assert told == pytest.approx(
        {"advantage_mean": 3.0, "advantage_std": 3.5**0.5, "advantage_min": 1.0, "advantage_max": 6.0}
    )
    assert set(metrics.learning_metrics(experience(advantages_BS=x_BS, fill=2)).values()) == {0.0}


def test_returns_that_do_not_vary_have_no_explained_variance() -> None:
    values, same = torch.arange(12.0).reshape(4, 3), torch.ones(4, 3)
    told = metrics.learning_metrics(experience(values_BS=values, returns_BS=same))
    assert told == {"value_mean": pytest.approx(np.mean([0, 1, 2, 3, 6, 7, 9, 10, 11])), "return_mean": 1.0}
    perfect = metrics.learning_metrics(experience(values_BS=values, returns_BS=values))
    assert perfect["explained_variance"] == 1.0
    shifted = metrics.learning_metrics(experience(values_BS=values + 5, returns_BS=values))
    assert shifted["explained_variance"] == pytest.approx(1.0)  # a constant error is no variance


def test_a_stop_text_ends_what_reaches_the_limit() -> None:
    """Cut are responses of the longest length that neither a stop token nor a stop text ended."""
    prompts = [Prompt(i, str(i), "", None, (1,)) for i in range(2)]
    scores = torch.arange(4.0)

    def share(endings: Endings) -> float:
        return metrics.response_metrics(experience(), scores, prompts, endings, 3)["truncated_frac"]

    assert share(Endings()) == 2 / 4
    assert share(Endings((6,), (6,))) == 1 / 4
    assert share(Endings((6,), (6,), lambda _prompt: lambda token: token == 3)) == 0.0


def products(init: dict[str, Any], sequences: list[int]) -> tuple[int, int]:
    """FLOPs of a forward pass over sequences without the head, and those of the head at one position, by the
    weights of transformers' own model and by counting the pairs that causal attention looks at."""
    model = LlamaForCausalLM(LlamaConfig(**init))
    weights = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
    pairs = sum(sum(1 for i in range(n) for j in range(n) if j <= i) for n in sequences)
    width = init["hidden_size"]
    return 2 * weights * sum(sequences) + init["num_hidden_layers"] * 4 * width * pairs, (
        2 * model.lm_head.weight.numel()
    )


def test_operations_of_stages_are_those_of_the_models() -> None:
    """Actor and reference of one shape, critic and reward of another; two epochs."""
    config = configured(algorithm={"epochs": 2}, critic={"init": {**INIT, "hidden_size": 8}})
    plan, found = resolve(config), experience()
    lengths, answered = [5, 3, 3, 4], 9
    body, head = products(INIT, lengths)
    small = products({**INIT, "hidden_size": 8}, lengths)[0]
    actor = body + answered * head
    critic, reward = small + answered * 2 * 8, body + answered * 2 * 16  # a head of one value
    expected = {
        "generation": actor,
        "inference": sum({"reference": actor, "critic": critic, "reward": reward}.values()),
        "training": 3 * 2 * (actor + critic),
    }
    assert metrics.stage_flops(plan, found) == expected
    seconds = {"generation": 0.5, "inference": 0.25, "training": 2.0, "switch": 0.0, "other": 0.0}
    told = metrics.speed_metrics(plan, found, seconds, 2.75, 1e9)
    assert {name: told[name] for name in told if name.startswith("mfu")} == pytest.approx(
        {f"mfu_{stage}": flops / seconds[stage] / 1e9 for stage, flops in expected.items()}
    )
    assert told["tokens_per_device_second"] == pytest.approx(15 / 2.75)


def test_several_devices_share_the_tokens() -> None:
    plan = resolve(configured(layout={"dp": 2}))
    seconds = {"generation": 0.5, "inference": 0.0, "training": 2.0}
    told = metrics.speed_metrics(plan, experience(), seconds, 2.5, 1e9)
    assert told["generated_per_device_second"] == pytest.approx(9 / 0.5 / 2)
    assert told["tokens_per_device_second"] == pytest.approx(15 / 2.5 / 2)
    assert told["mfu_training"] == pytest.approx(metrics.stage_flops(plan, experience())["training"] / 4e9)
    assert "mfu_inference" not in told


@pytest.mark.parametrize(
    ("name", "rate"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)]
)
def test_data_sheets_go_by_words(name: str, rate: float | None) -> None:
    assert peak_flops(name) == rate


def peak_of(rank: int) -> dict[str, float]:
    world = World(rank, 2, torch.device("cpu"))
    return metrics.memory_metrics(world, {"generation": 100 + rank, "training": 50 * (1 - rank)})


def test_the_peak_is_that_of_the_fullest_device() -> None:
    world = World(0, 1, torch.device("cpu"))
    assert metrics.memory_metrics(world, {}) == {}
    assert metrics.memory_metrics(world, {"generation": 3, "training": 8}) == {"peak_bytes": 8.0}
    assert run_ranks(peak_of, 2) == [{"peak_bytes": 101.0}] * 2
