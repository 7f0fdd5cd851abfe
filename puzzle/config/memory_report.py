"""How much device memory a configuration needs: the table of `puzzle train --dry-run`, and its refusal."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from puzzle.config.resolve import Plan, RunPlan
from puzzle.errors import UserError
from puzzle.plan.layout import Placement
from puzzle.plan.memory import (
    RankMemory,
    Switched,
    Use,
    Work,
    deferred_gather_bytes,
    fitting_pages,
    kind_of_rank,
    rank_memory,
)
from puzzle.plan.pages import KEPT_FREE, Cache

KEPT_BESIDE = 0.1
"""The part of a device that stays free where generation's memory is kept beside training: CUDA and NCCL took
up to 3.4 GiB outside of torch, and peaks were up to 2.7 % above what is counted (docs/memory.md)."""
GIB = 1 << 30
UNITS = {"GB": 10**9, "GiB": GIB, "MB": 10**6, "MiB": 1 << 20}
SMALL = GIB // 8
"""Bytes of a device below which a table is written in MiB."""

# The end of a term's name, and the option that makes it smaller.
REMEDIES = {
    "generation weights": "choose a generation.layout nearer to the actor's, or raise its tp or pp",
    "weights": "raise {model}.layout.tp or pp",
    "masters": "raise {model}.layout.dp, tp or pp",
    "moments": "raise {model}.layout.dp, tp or pp",
    "gradients": "raise {model}.layout.tp or pp",
    "activations": "lower algorithm.microbatch (or microbatch_tokens) or set recompute",
    "logits": "lower algorithm.microbatch (or microbatch_tokens),"
    " or generation.decode_microbatch where it generates",
    "one layer": "lower algorithm.microbatch (or microbatch_tokens),"
    " or generation.prefill_microbatch where it generates",
    "deferred all-gather": "raise {model}.layout.tp or pp instead of dp",
    "graphs": "set generation.keep_graphs to false",
    "cache": "lower generation.max_sequences or max_new_tokens, or raise generation.layout.tp or pp",
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
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?) ?([GM]i?B)", text)
    if match is None:
        raise UserError(f"--device-memory {text}: give a number and GB, GiB, MB or MiB, such as 80GB")
    return int(float(match[1]) * UNITS[match[2]])


def _uses(plan: Plan, fused: bool) -> list[Use]:
    """The models of a run, the one that it is about first."""
    config = plan.config
    return [
        Use(
            role,
            model.spec,
            model.placement,
            plan.itemsize,
            model.trained,
            recompute=model.trained and config.recompute,
            fused=fused,
            compiled=config.compile,
            offload=config.offloads(role),
            split=model.trained and config.split_backward,
            borrowed=model.shares is not None,
            merged=isinstance(plan, RunPlan) and plan.merges and role == "actor",
            parts=config.parts,
        )
        for role, model in plan.models.items()
    ]


def estimate(plan: Plan, fused: bool, limit: int | None = None) -> list[RankMemory]:
    """Every rank's memory. `fused`: norms are single kernels, as on CUDA. Where `limit` bytes of a device do
    not hold all sequences of a replica at full length, the cache has as many pages as they do hold, and those
    of the longest sequence at least. It is kept beside training where `generation.keep_graphs` says so."""
    if fused and isinstance(plan, RunPlan) and plan.config.keeps_graphs is not False:
        kept = _estimate(plan, fused, None, keep=True)
        fits = limit is not None and max(rank.peak for rank in kept) <= (1 - KEPT_BESIDE) * limit
        if fits or plan.config.keeps_graphs is True:
            return kept
    found = _estimate(plan, fused, None)
    if limit is None or not isinstance(plan, RunPlan):
        return found
    if all(rank.total("generation") <= (1 - KEPT_FREE) * limit for rank in found):
        return found
    return _estimate(plan, fused, fitting_pages(_estimate(plan, fused, 0), limit))


def _estimate(plan: Plan, fused: bool, pages: int | None, keep: bool = False) -> list[RankMemory]:
    uses, batch = _uses(plan, fused), plan.batch
    switched, generation = [Switched()] * plan.world, None
    prefill = decode = most = None
    samples, limits = 1, dict[str, int]()
    if isinstance(plan, RunPlan):
        switched, placement = _switched(plan, uses[0])
        spec, parts = plan.generation_spec, plan.config.parts
        generation = Use("generation", spec, placement, plan.itemsize, fused=fused, parts=parts)
        prefill = plan.config.generation.prefill_microbatch
        decode = plan.config.generation.decode_microbatch
        samples, most = plan.config.generation.samples, plan.config.generation.max_sequences
        limits["prefill_tokens"] = plan.config.generation.prefill_tokens
    work = Work(
        batch.sequences,
        batch.minibatch,
        batch.prompt,
        batch.response,
        plan.config.algorithm.microbatch,
        prefill,
        decode,
        plan.config.algorithm.microbatch_tokens,
        samples,
        most,
        **limits,
    )
    shared = plan.training.may_share
    known: dict[object, RankMemory] = {}
    found = []
    for rank in range(plan.world):
        kind = (kind_of_rank(rank, uses, generation), switched[rank])
        if kind not in known:
            known[kind] = rank_memory(rank, uses, generation, work, switched[rank], shared, pages, keep)
        found.append(replace(known[kind], rank=rank))
    return found


def _switched(plan: RunPlan, actor: Use) -> tuple[list[Switched], Placement]:
    """What every rank needs to generate in another layout, and the placement in which it does."""
    if plan.switch is None:
        return [Switched()] * plan.world, plan.generation
    options, switch = plan.config.switch, plan.switch.plan
    if options.transport == "peer":
        switch = switch.by_peer_copies()
    found = []
    for rank in range(plan.world):
        part = switch.for_rank(rank)
        weights = plan.itemsize * sum(param.size for param in part.allocate)
        deferred_gather = deferred_gather_bytes(actor, actor.placement.coord_of(rank)) if switch.zero else 0
        filling = max(part.peak_extra, weights + deferred_gather)
        staged = part.peak_extra if options.overlap == "prefill" else weights
        found.append(Switched(staged, filling, deferred_gather))
    return found, switch.destination


def unit_of(peak: int) -> tuple[str, int]:
    """The unit in which a rank's memory is told, and its bytes: GiB, of toys MiB."""
    unit = "GiB" if peak >= SMALL else "MiB"
    return unit, UNITS[unit]


def table(ranks: Sequence[RankMemory]) -> str:
    """Text: one line per kind of rank, in GiB (of toys MiB); below it every term of the rank that needs
    most."""
    names = list(ranks[0].stages)
    most = max(ranks, key=lambda rank: rank.peak)
    unit, scale = unit_of(most.peak)
    head = "".join(f"{name:>12}" for name in ("ranks", "resident", *names, "peak"))
    lines = [f"device memory in {unit}, all sequences at full length", head]
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in ranks:
        stages = (sum(rank.stages[name].values()) for name in names)
        groups.setdefault((sum(rank.resident.values()), *stages, rank.peak), []).append(rank.rank)
    for sizes, members in groups.items():
        lines.append(f"{_ranges(members):>12}" + "".join(f"{size / scale:12.2f}" for size in sizes))
    lines.append(f"rank {most.rank} in {most.worst}:")
    terms = {**most.resident, **most.stages[most.worst]}
    lines += [f"{size / scale:>12.2f}  {name}" for name, size in terms.items() if size]
    lines += [_together(most.cache, unit)] if most.cache is not None else []
    host = max(rank.host for rank in ranks)
    if host:
        lines.append(f"offloaded to host memory: up to {host / scale:.2f} {unit} per rank")
    return "\n".join(lines)


def _together(cache: Cache, unit: str) -> str:
    """How many sequences are generated at a time."""
    room = f"in {cache.pages} pages, {cache.pages * cache.page_bytes / UNITS[unit]:.2f} {unit}"
    if cache.together < cache.rows:
        room += f", {cache.together} of them at full length: short ones leave room for more, the others wait"
    kept = "; all of it is kept beside training, with the graphs that read it" if cache.kept else ""
    return f"generation: up to {cache.rows} sequences of a replica at a time {room}{kept}"


def require(ranks: Sequence[RankMemory], limit: int, host: str | None = None) -> None:
    """UserError, naming the largest term and what lowers it, if a rank needs more than `limit` bytes: of its
    device or, where `host` tells so in front of the number, of its host."""
    most = max(ranks, key=lambda rank: rank.peak)
    if most.peak > limit:
        unit, scale = unit_of(most.peak)
        raise UserError(
            f"rank {most.rank} needs {most.peak / scale:.1f} {unit} in {most.worst},"
            f" {host or 'its device has'} {limit / scale:.1f}; {remedy(most, host is not None)}"
        )


@contextmanager
def unless_skipped(skip: bool, option: str, warn: Callable[[str | None], None]) -> Generator[None]:
    """What is refused inside says which `option` skips the check; with `skip`, `warn` is told it, or None."""
    refused = None
    try:
        yield
    except UserError as error:
        if not skip:
            raise UserError(f"{error}; {option} begins anyway") from None
        refused = f"{error}; begun anyway"
    if skip:
        warn(refused)


def remedy(rank: RankMemory, on_host: bool = False) -> str:
    """The largest term at a rank's peak, and the option that lowers it. Where models lie in a host's memory,
    neither more ranks of that host nor offloading to it make room."""
    name, size = rank.largest
    advice = next(text for end, text in REMEDIES.items() if name.endswith(end))
    for end, (option, stage) in OFFLOADS.items():
        if name in rank.resident and name.endswith(end) and rank.worst != stage:
            advice = f"set {option}"
    if on_host and advice.startswith(("raise", "set offload")):
        advice = "choose a smaller {model}"
    unit, scale = unit_of(rank.peak)
    return f"most of it, {size / scale:.1f} {unit}, is {name}: {advice.format(model=name.partition(' ')[0])}"


def _ranges(members: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    runs: list[list[int]] = []
    for rank in members:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
