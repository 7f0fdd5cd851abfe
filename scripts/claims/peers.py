"""The claims of the page about other systems."""

from __future__ import annotations

from claims.claim import Claim
from claims.generation import peers_rows
from claims.logs import (
    FOUR,
    OURS,
    first_of_verl,
    run,
    seconds,
    switched,
    trl,
    trl_versions,
    trl_work,
    verl,
)

PAGE = "docs/peers.md"
SEARCH = "baseline/4xh200-search/"
STAGES = {
    "generation": ("generation", ("gen",)),
    "weights into generation's layout": ("switch", ("update_weights",)),
    "log-probs, reference, values, advantages": ("inference", ("old_log_prob", "ref", "values", "adv")),
    "training, actor and critic": ("training", ("update_critic", "update_actor")),
}
"""Rows of a table: our stage, and verl's parts."""
SWITCHES = (
    ((1, 4, 1), (2, 2, 1)),
    ((1, 4, 1), (4, 1, 1)),
    ((2, 2, 1), (4, 1, 1)),
    ((1, 4, 1), (1, 1, 4)),
)


def peers_page() -> list[Claim]:
    """All of them."""
    return [
        *_layouts(),
        *(claim for critic in OURS for claim in _beside_verl(critic)),
        *_stages(),
        *_trl(),
        Claim(PAGE, "its first iteration, {:.0f} s, do not count", first_of_verl),
        *peers_rows(),
        *_switches(),
    ]


def _layouts() -> list[Claim]:
    """Other layouts of ours, and DeepSpeed-Chat."""
    claims = []
    for words, critic, folder in (
        ("trains as 1,1,4, generates as 4,1,1, filled from ZeRO shards", "350m", f"{SEARCH}350m-opt-114-411"),
        ("1,1,4 throughout", "350m", f"{FOUR}350m-base-114"),
        ("trains as 2,1,2, generates as 4,1,1, filled from ZeRO shards", "7b", f"{SEARCH}7b-212-411"),
        ("1,4,1 throughout", "7b", f"{FOUR}7b-base-141"),
        ("| ZeRO-2, without its Hybrid Engine: transformers' `generate`", "350m", f"{FOUR}350m-ds-plain"),
        ("| ZeRO-2, without its Hybrid Engine: transformers' `generate`", "7b", f"{FOUR}7b-ds-plain"),
        ("its samples do not match its weights", "7b", f"{FOUR}7b-ds-published"),
    ):
        faster = "|" if "filled" in words else "{:.2f} |"
        claims.append(
            Claim(
                PAGE,
                f"{words} | {{:d}} | {{:.2f}} | {faster}",
                lambda critic=critic, folder=folder, faster=faster: [
                    len(run(folder).iterations) - 1,
                    seconds(folder),
                    *([] if faster == "|" else [seconds(folder) / seconds(OURS[critic])]),
                ],
            )
        )
    return claims


def _beside_verl(critic: str) -> list[Claim]:
    """Our best layout and verl, of one size of critic."""
    said, count, legend = {"350m": ("7B/350M", 4, " (tp,pp,dp)"), "7b": ("7B/7B", 3, "")}[critic]
    ours = OURS[critic]
    return [
        Claim(
            PAGE,
            f"| {said} | PUZZLE | trains as 1,4,1{legend}, generates as 2,2,1, shared pipelines | {{:d}} |"
            " {:.2f} | |",
            lambda: [len(run(ours).iterations) - 1, seconds(ours)],
        ),
        Claim(
            PAGE,
            f"| | verl + vLLM | FSDP | {count} | {{:.2f}} | {{:.2f}} |",
            lambda: [verl(critic, "step"), verl(critic, "step") / seconds(ours)],
        ),
        Claim(
            PAGE,
            f"{said} PUZZLE |{{}}| {{:.2f}} s verl + vLLM |{{}}| {{:.2f}} s DeepSpeed-Chat |{{}}| {{:.2f}} s",
            lambda: _bars(seconds(ours), verl(critic, "step"), seconds(f"{FOUR}{critic}-ds-plain")),
        ),
    ]


def _bars(*values: float) -> list[str | float]:
    """Each value behind its bar of two characters a second."""
    return [part for value in values for part in ("=" * round(2 * value), value)]


def _stages() -> list[Claim]:
    """Seconds of stages, ours and verl's."""
    return [
        Claim(
            PAGE,
            f"| {words} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.2f}} |",
            lambda stage=stage, parts=parts: [
                number for critic in OURS for number in (seconds(OURS[critic], stage), verl(critic, *parts))
            ],
        )
        for words, (stage, parts) in STAGES.items()
    ]


def _trl() -> list[Claim]:
    """TRL on a CPU."""
    row = "| {:d} |" + 2 * " {:.2f} +- {:.2f} | {:.2f} +- {:.2f} | {:.2f} |"
    return [
        *(Claim(PAGE, f"| {n} tokens {row}", lambda tokens=n: trl(tokens)) for n in (32, 48)),
        Claim(
            PAGE,
            "a CPU: {:d} prompts of {:d} tokens, {:d} responses to each, a function as reward, KL to a"
            " reference, one step of AdamW over all {:d}, micro-batches of {:d};",
            trl_work,
        ),
        Claim(PAGE, "transformers differ ({} and {})", trl_versions),
    ]


def _switches() -> list[Claim]:
    """Switches between layouts beside Megatron-core's."""
    return [
        Claim(
            PAGE,
            f"| {' -> '.join(','.join(map(str, layout)) for layout in pair)} |" + 5 * " {:.2f} |",
            lambda pair=pair: switched(pair),
        )
        for pair in SWITCHES
    ]
