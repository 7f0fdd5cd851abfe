"""Schedules of one model: 1F1B training and forward-only inference, for any P stages and M micro-batches.

A backward may be split: the gradient of what a stage read goes to the stage before at once, those of its
weights are computed s units later on stage s, where the drain leaves it idle. A stage then holds P units
between forward and the end of backward, as the first stage does anyway. (Qi et al. 2024, "Zero Bubble
Pipeline Parallelism", schedule ZB-H1.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from puzzle.plan.schedule import Action, Op, Schedule, Work
from puzzle.plan.wiring import Wiring, pipeline_flow

Unit = tuple[str, int]
"""A micro-batch of a model."""


def one_f_one_b(
    num_stages: int,
    microbatches: int,
    model: str = "actor",
    *,
    optimizer: bool = False,
    tied: bool = False,
    split: bool = False,
) -> Schedule:
    """One forward, one backward: (M + P - 1)(f + b) seconds with equal costs and free transfers, holding
    min(P - s, M) micro-batches on stage s. `optimizer` ends it with the optimizer's actions; `tied`: see
    `Work`. With `split` backwards (of several stages) M (f + b) + (P - 1)(f + b - 2w), if a backward's part
    w for weights is at most the other and at most f."""
    units = [(model, m) for m in range(microbatches)]
    reach = [[min(j + num_stages - s, microbatches) for j in range(microbatches)] for s in range(num_stages)]
    split = split and num_stages > 1
    behind = range(num_stages) if split else None
    slots = [
        optimizer_slots(units, stage, num_stages, behind=behind or ()) if optimizer else {}
        for stage in range(num_stages)
    ]
    work = Work(model, microbatches, backward=True, optimizer=optimizer, tied=tied, split=split)
    return pipeline("1f1b", interleave(units, reach, slots, behind), (work,))


def forward_only(num_stages: int, microbatches: int, model: str = "actor") -> Schedule:
    """Every micro-batch forward: (M + P - 1) f seconds with equal costs and free transfers."""
    passes = [[Action(Op.FORWARD, model, m) for m in range(microbatches)] for _ in range(num_stages)]
    return pipeline("forward", passes, (Work(model, microbatches),))


def interleave(
    units: Sequence[Unit],
    reach: Sequence[Sequence[int]],
    slots: Sequence[Mapping[int, list[Action]]],
    behind: Sequence[int] | None = None,
) -> list[list[Action]]:
    """The passes of every stage for a stream of units; forwards and backwards both keep the stream's order.

    `reach[s][j]` is how many forwards stage s has done before its backward of unit j: more than j, never
    falling with j, and at each stage as much as at the next or one more: no stage waits for a forward that
    the stage before withholds until its next backward, nor for the next stage to take a forward that it
    has no place for. So the stream is deadlock-free. `slots[s][j]` follows the backward of unit j. With
    `behind`, backwards are split: the weights' gradients of unit j follow the backward of `behind[s]` units
    later, or of the last.
    """
    passes = []
    for s, (row, after) in enumerate(zip(reach, slots, strict=True)):
        done = weights_done = 0
        stage: list[Action] = []
        for j, unit in enumerate(units):
            stage.extend(Action(Op.FORWARD, *u) for u in units[done : row[j]])
            done = row[j]
            stage.append(Action(Op.BACKWARD if behind is None else Op.BACKWARD_INPUT, *unit))
            if behind is not None:
                due = len(units) if j == len(units) - 1 else max(0, j + 1 - behind[s])
                stage.extend(Action(Op.BACKWARD_WEIGHT, *u) for u in units[weights_done:due])
                weights_done = due
            stage.extend(after.get(j, ()))
        passes.append(stage)
    return passes


def optimizer_slots(
    units: Sequence[Unit],
    stage: int,
    num_stages: int,
    defer: int = 1,
    tied: Collection[str] = (),
    behind: Sequence[int] = (),
) -> dict[int, list[Action]]:
    """Where the optimizers of the models in a stream act on a stage: after which unit's backward.

    A model's gradient reduction starts with its last backward; `defer` units later it is waited for and
    the norms start to be summed. That sum is over when the first stage has come so far. A backward moves
    one stage in at most the time that a unit takes, so the step comes `stage + defer` units later still,
    and costs no waiting; its gather ends with the stream. The reduction of a model with `tied` embeddings
    joins the first and the last stage, which has to wait for the first. What finds no units left comes at
    the end, in the order in which models end. With split backwards (`behind` as in `interleave`) a model's
    gradients are whole that many units later, and everywhere after the most of them.
    """
    last, most = len(units) - 1, max(behind, default=0)
    ends = {model: j for j, (model, _) in enumerate(units)}
    slots: defaultdict[int, list[Action]] = defaultdict(list)
    joined = False
    for model, end in sorted(ends.items(), key=lambda item: item[1]):
        joined = joined or model in tied  # norms are summed in one order, so later models wait as well
        lag = num_stages - 1 if joined else stage
        whole = min(last, end + (behind[stage] if behind else 0))
        end += most
        norm = end + defer + (lag if joined and stage == num_stages - 1 else 0)
        # First in its slot: it needs nothing but the backward just done, others' waits may hold up the stage.
        slots[whole].insert(0, Action(Op.REDUCE, model))
        slots[min(norm, last)] += [Action(op, model) for op in (Op.WAIT_REDUCE, Op.NORM)]
        step = end + lag + 2 * defer
        slots[min(step, last)] += [Action(op, model) for op in (Op.WAIT_NORM, Op.STEP, Op.GATHER)]
    slots[last] += [Action(Op.WAIT_GATHER, model) for model in ends]
    return dict(slots)


def pipeline(name: str, passes: Sequence[Sequence[Action]], work: tuple[Work, ...]) -> Schedule:
    """A schedule from the passes of every stage of a plain pipeline. ValueError for impossible numbers."""
    num_stages = len(passes)
    if num_stages < 1 or any(w.microbatches < 1 for w in work):
        raise ValueError(f"{name}: stages and micro-batches must be at least 1")
    flow = pipeline_flow(num_stages)
    actions = []
    for stage, order in enumerate(passes):
        wiring = Wiring(stage, flow)
        actions.append((*wiring.part(order), *wiring.drain()))
    return Schedule(name, num_stages, tuple(actions), work)
