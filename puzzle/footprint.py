"""How much device memory a configuration needs: the table of `puzzle train --dry-run`, and its refusal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from puzzle.config import TrainConfig
from puzzle.errors import UserError
from puzzle.plan.cluster import Cluster
from puzzle.plan.fused import why_not_fused
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.memory import RankMemory, Switched, Use, Work, rank_memory, spreading_bytes
from puzzle.plan.switch import plan_switch
from puzzle.sources import layout_of, specs_of

ITEMSIZE = {"fp32": 4, "bf16": 2}
GIB = 1 << 30
UNITS = {"GB": 10**9, "GiB": GIB, "MB": 10**6, "MiB": 1 << 20}

# The end of a term's name, and the option that makes it smaller.
REMEDIES = {
    "generation weights": "choose a generation.layout nearer to the actor's, or raise its tp or pp",
    "weights": "raise {model}.layout.tp or pp",
    "masters": "raise {model}.layout.dp, tp or pp",
    "moments": "raise {model}.layout.dp, tp or pp",
    "gradients": "raise {model}.layout.tp or pp",
    "activations": "lower ppo.microbatch or set recompute",
    "logits": "lower ppo.microbatch, or generation.decode_microbatch where it generates",
    "one layer": "lower ppo.microbatch, or generation.prefill_microbatch where it generates",
    "spreading": "raise {model}.layout.tp or pp instead of dp",
    "cache": "lower batch or generation.max_new_tokens, or raise generation.layout.tp or pp",
    "staging": "choose a generation.layout nearer to the actor's, or lower switch.staging_bytes",
}
# The end of a resident term's name, the option that takes it to the host, and the stage that needs it.
OFFLOADS = {
    "masters": ("offload.optimizer", "training"),
    "moments": ("offload.optimizer", "training"),
    "reference weights": ("offload.reference", "inference"),
    "reward weights": ("offload.reward", "inference"),
}


def parse_bytes(text: str) -> int:
    """Bytes of "80GB" (1e9) or "74.5GiB" (2**30). UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM]i?B)", text)
    if match is None:
        raise UserError(f"--device-memory {text}: give a number and GB, GiB, MB or MiB, such as 80GB")
    return int(float(match[1]) * UNITS[match[2]])


def _uses(config: TrainConfig, fused: bool) -> list[Use]:
    """The models of a run, the actor first."""
    uses = []
    for role, spec in specs_of(config).items():
        section = getattr(config, role)
        placement = Placement.default(layout_of(role, section.layout, spec))
        trained = role in ("actor", "critic")
        uses.append(
            Use(
                role,
                spec,
                placement,
                ITEMSIZE[config.dtype],
                trained,
                recompute=trained and config.recompute,
                fused=fused,
                compiled=config.compile,
                offload=config.offload.optimizer if trained else getattr(config.offload, role),
                split=trained and config.intra.split_backward,
            )
        )
    return uses


def estimate(config: TrainConfig, fused: bool) -> list[RankMemory]:
    """Every rank's memory. `fused`: norms are single kernels, as on CUDA."""
    uses, item = _uses(config, fused), ITEMSIZE[config.dtype]
    actor, options = uses[0], config.switch
    layout = layout_of("generation", config.generation.layout, actor.spec)
    if options.nest:
        layout = Layout.nested(layout.tp, layout.pp, layout.dp, actor.placement.layout)
    switched, placement = dict.fromkeys(range(config.world), Switched()), actor.placement
    if layout != placement.layout:
        plan = plan_switch(
            actor.spec,
            placement,
            Placement.default(layout),
            Cluster(options.gpus_per_node or min(8, config.world)),
            strategy=options.strategy,
            itemsize=item,
            staging_bytes=options.staging_bytes,
            zero=options.fill == "shards",
        )
        plan = plan.by_peer_copies() if options.transport == "peer" else plan
        placement = plan.destination
        for rank in switched:
            part = plan.for_rank(rank)
            weights = item * sum(param.size for param in part.allocate)
            spreading = spreading_bytes(actor, actor.placement.coord_of(rank)) if plan.zero else 0
            filling = max(part.peak_extra, weights + spreading)
            staged = part.peak_extra if options.beside == "prefill" else weights
            switched[rank] = Switched(staged, filling, spreading)
    generation = Use("generation", actor.spec, placement, item, fused=fused)
    prompt = config.data.random_tokens or config.data.max_prompt_tokens
    microbatch, tokens = config.ppo.microbatch, config.ppo.microbatch_tokens
    if tokens is not None:
        microbatch = max(1, tokens // (prompt + config.generation.max_new_tokens))
    work = Work(
        config.batch * config.generation.samples,
        config.minibatch,
        prompt,
        config.generation.max_new_tokens,
        microbatch,
        config.generation.prefill_microbatch,
        config.generation.decode_microbatch,
    )
    trained = {use.name: use.placement for use in uses if use.trained}
    shared = bool(config.intra.fuse_training) and why_not_fused(trained) is None
    return [rank_memory(rank, uses, generation, work, switched[rank], shared) for rank in range(config.world)]


def table(ranks: Sequence[RankMemory]) -> str:
    """Text: one line per kind of rank, GiB; below it every term of the rank that needs most."""
    names = list(ranks[0].stages)
    head = "".join(f"{name:>12}" for name in ("ranks", "resident", *names, "peak"))
    lines = ["device memory in GiB, all sequences at full length", head]
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in ranks:
        stages = (sum(rank.stages[name].values()) for name in names)
        groups.setdefault((sum(rank.resident.values()), *stages, rank.peak), []).append(rank.rank)
    for sizes, members in groups.items():
        lines.append(f"{_ranges(members):>12}" + "".join(f"{size / GIB:12.2f}" for size in sizes))
    most = max(ranks, key=lambda rank: rank.peak)
    lines.append(f"rank {most.rank} in {most.worst}:")
    terms = {**most.resident, **most.stages[most.worst]}
    lines += [f"{size / GIB:>12.2f}  {name}" for name, size in terms.items() if size]
    host = max(rank.host for rank in ranks)
    if host:
        lines.append(f"offloaded to host memory: up to {host / GIB:.2f} per rank")
    return "\n".join(lines)


def require(ranks: Sequence[RankMemory], limit: int) -> None:
    """UserError, naming the largest term and what lowers it, if a rank needs more than `limit` bytes."""
    most = max(ranks, key=lambda rank: rank.peak)
    if most.peak > limit:
        raise UserError(
            f"rank {most.rank} needs {most.peak / GIB:.1f} GiB in {most.worst}, its device has"
            f" {limit / GIB:.1f}; {remedy(most)}"
        )


def remedy(rank: RankMemory) -> str:
    """The largest term at a rank's peak, and the option that lowers it."""
    name, size = rank.largest
    advice = next(text for end, text in REMEDIES.items() if name.endswith(end))
    for end, (option, stage) in OFFLOADS.items():
        if name in rank.resident and name.endswith(end) and rank.worst != stage:
            advice = f"set {option}"
    return f"most of it, {size / GIB:.1f} GiB, is {name}: {advice.format(model=name.partition(' ')[0])}"


def _ranges(members: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    runs: list[list[int]] = []
    for rank in members:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
