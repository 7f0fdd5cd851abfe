"""What a run writes: metrics of an experience, the log, samples, model folders, plots."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from puzzle.config.base import RunConfig
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SupervisedConfig
from puzzle.data.endings import Endings
from puzzle.data.prompts import Prompt
from puzzle.data.saving import padding, tokenizer_folder
from puzzle.data.tokenizers import has_tokenizer, load_tokenizer
from puzzle.engine.checkpoint.checkpoint import Saved
from puzzle.engine.checkpoint.export import whole_tensors
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError, describe, lacking
from puzzle.files import durable
from puzzle.model import hf
from puzzle.plan.simulate.timeline import Timeline
from puzzle.rlhf.algorithms.policy import Estimator, token_kl
from puzzle.rlhf.console import POLICY, Reporter, supervised
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.models import RunModels
from puzzle.rlhf.scoring import Scores
from puzzle.rlhf.trackers import Trackers
from puzzle.runlog import RunHeader, RunWriter, load_runs
from puzzle.runlog.record import Record
from puzzle.runlog.records import Checkpoint, End, Evaluation, Iteration, Rank, Resume, Trace, Warned

FAILED_SECONDS = 3.0
"""So long trackers of a run that failed may send what they hold: other processes wait for its end."""
DRAWS = find_spec("matplotlib") is not None
"""Whether this installation can draw curves (the extra `plot`)."""


def experience_metrics(experience: Experience, scores_B: Tensor, estimator: Estimator) -> dict[str, float]:
    """What docs/log-schema.md says of an iteration's responses; no KL where there is no reference."""
    assert experience.logprobs_BS is not None
    mask = experience.mask_BS.to(experience.logprobs_BS.device)
    tokens = float(mask.sum())
    scores_B = scores_B.double()  # sums of large float32 scores would be infinite
    metrics = {
        "reward": float(scores_B.mean()),
        "reward_std": float(scores_B.std(correction=0)),
        "response_tokens": tokens,
        "response_length": tokens / len(experience),
        "entropy": -float(torch.where(mask, experience.logprobs_BS, 0.0).double().sum()) / tokens,
        "repetition": repetition(experience.responses),
    }
    if experience.sampled_tokens is not None:
        metrics["useful_token_share"] = tokens / experience.sampled_tokens
    if experience.ref_logprobs_BS is not None:
        kl = token_kl(experience.logprobs_BS, experience.ref_logprobs_BS, estimator)
        total = float(torch.where(mask, kl, 0.0).double().sum())
        metrics |= {"kl": total / tokens, "kl_response": total / len(experience)}
    return metrics


def held_out_metrics(scores_B: Tensor) -> dict[str, float]:
    """The mean held-out reward and half its 95 % confidence interval, which one response has none of."""
    scores_B = scores_B.double()
    metrics = {"reward": float(scores_B.mean())}
    if len(scores_B) > 1:
        metrics["reward_ci95"] = 1.96 * float(scores_B.std()) / len(scores_B) ** 0.5
    return metrics


def repetition(responses: Sequence[Sequence[int]]) -> float:
    """Share of token pairs that occurred earlier in their response."""
    pairs = [list(pairwise(r)) for r in responses]
    total = sum(map(len, pairs))
    return 1.0 - sum(len(set(p)) for p in pairs) / total if total else 0.0


def describe_rank(models: RunModels, world: World, peaks: Mapping[str, int] | None = None) -> Rank:
    """What this rank is and holds; `peaks` are bytes by stage."""
    coordinates = {m.name: {"t": m.coord.t, "p": m.coord.p, "d": m.coord.d} for m in models.all()}
    return Rank(
        world.rank,
        coordinates=coordinates,
        parameter_bytes=sum({p: p.nbytes for m in models.all() for p in m.decoder.parameters()}.values()),
        device=str(world.device),
        collective_bytes=moved_bytes(models, world),
        peak_bytes=dict(peaks) if peaks else None,
        device_bytes=device_bytes(world.device),
    )


def device_bytes(device: torch.device) -> dict[str, int] | None:
    """Memory of a GPU: `reserved` by torch for tensors, at most, and `outside` of that (CUDA, NCCL, other
    processes), now."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return {"reserved": torch.cuda.max_memory_reserved(device), "outside": max(0, outside)}


def moved_bytes(models: RunModels, world: World) -> dict[str, int]:
    """Bytes that this rank has put into messages and collectives, by kind; tensor-parallel ones per model."""
    runtimes = {m.name: m for m in models.runtimes()}
    tensor = {f"tensor_parallel.{m.name}": m.tensor.moved for m in runtimes.values() if m.tensor.size > 1}
    return {**world.moved, **tensor}


@dataclass(frozen=True)
class Resumed:
    """How a run goes on: iterations done, the checkpoint's folder (None: from the start), what to warn of."""

    done: int = 0
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def _changes(settings: Mapping[str, tuple[Any, Any]], most: int = 12) -> list[str]:
    """One line about settings that are other than before, none without."""
    told = [f"{key} {_shown(old)} -> {_shown(new)}" for key, (old, new) in settings.items()]
    if len(told) > most:
        told[most:] = [f"{len(told) - most} more (run.jsonl has them)"]
    return [f"resumed with other settings: {', '.join(told)}"] if told else []


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


LAST = Path("checkpoints", "last")
"""In a run's folder: the model as it was at the end."""


class Recorder:
    """The log of a run. All ranks hold one; rank 0 writes."""

    def __init__(
        self, out: Path, config: RunConfig, world: World, header: RunHeader, resumed: Resumed | None = None
    ) -> None:
        """With `resumed`, the log that is there goes on."""
        self.out, self.config, self.world = out, config, world
        self.note: str | None = None
        self.writer = None
        if world.rank == 0:
            self.writer = RunWriter(out, header, resumed is not None, world.progress.writing)
        done = 0 if resumed is None else resumed.done
        log, told = config.log, header.config
        self.trackers = Trackers(log.trackers if self.writer else (), out, log.project, header.run_id, told)
        self.reporter = None
        if self.writer is not None:
            columns = supervised(config.trained[0]) if isinstance(config, SupervisedConfig) else POLICY
            self.reporter = Reporter(config.iterations, done, columns=columns)
            if config.log.plots and not DRAWS:
                self.warn(f"log.plots: no curves will be drawn: {lacking('matplotlib')}")
        if self.writer is not None and resumed is not None:
            folder = None if resumed.folder is None else str(resumed.folder.relative_to(out))
            self.writer.write(Resume(done, folder))
            for note in (*resumed.notes, *_changes(self.writer.settings)):
                self.warn(note)

    def warn(self, note: str) -> None:
        """Log what people should know, and say it; rank 0 alone does."""
        if self.writer is None:
            return
        self.write(Warned(note))
        print(f"warning: {note}", file=sys.stderr)

    def sync(self) -> None:
        """What the log says is on the disk, whatever happens next."""
        if self.writer is not None:
            self.writer.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reporter is not None:
            self.reporter.close()
        if self.writer is None:
            return
        if error is None:
            for note in self.trackers.close():
                self.warn(note)
            self.writer.write(End("completed", self.note))
            self._plot()
            if self.reporter is not None:
                self.reporter.ended(self.out, self.out / LAST if self.config.checkpoint.save else None)
            return
        status, why = "failed", " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            status, why = "interrupted", "by a signal"
        notes = self.trackers.close(FAILED_SECONDS)
        try:
            for note in notes:
                self.warn(note)
            self.writer.write(End(status, why))
        except UserError:
            return  # the disk is full: what stopped the run says so

    def ranks(self, own: Rank) -> None:
        """Log every rank's description; call on every rank."""
        self.write(*self.world.gather(own))

    def write(self, *records: Record | None) -> None:
        """Log records, and show those of iterations and evaluations; None is what there was none of."""
        if self.writer is None or self.reporter is None:
            return
        for record in records:
            if record is not None:
                self.writer.write(record)
            if isinstance(record, Iteration):
                told = (record.stage_seconds, record.e2e_seconds, record.metrics)
                self.reporter.iteration(record.iteration, *told)
                self.trackers.iteration(record)
            elif isinstance(record, Evaluation):
                self.reporter.evaluation(record.iteration, record.metrics)
                self.trackers.evaluation(record)
        for note in self.trackers.lost():
            self.warn(note)

    def trace(self, iteration: int, timeline: Timeline) -> None:
        """Write an iteration's timeline for Perfetto into traces/."""
        if self.writer is None:
            return
        name = f"traces/iteration-{iteration}.json"
        self._put(name, iteration, lambda part: part.write_text(json.dumps(timeline.to_perfetto())))

    @contextmanager
    def profiled(self, iteration: int) -> Generator[None]:
        """Record an iteration of `log.profile` by torch's profiler, in a file per rank."""
        if iteration not in self.config.log.profile:
            yield
            return
        kinds = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        with profile(activities=kinds) as profiler:
            yield
        name = f"profiles/iteration-{iteration}-rank-{self.world.rank:03d}.json.gz"
        self._put(name, iteration, lambda part: profiler.export_chrome_trace(str(part)))

    def _put(self, name: str, iteration: int, writer: Callable[[Path], object]) -> None:
        """Write a trace of an iteration and log it; neither begun nor ended once the run is declared dead."""
        file, gate = self.out / name, self.world.progress.writing
        try:
            with gate:
                file.parent.mkdir(exist_ok=True)
            durable.write(file, writer, gate)
        except OSError as error:
            raise UserError(f"{file}: {describe(error)}") from None
        self.write(Trace(name, iteration))

    def samples(
        self,
        iteration: int,
        experience: Experience,
        prompts: Sequence[Prompt],
        said: tuple[Sequence[str], Sequence[str]],
        scores: Scores,
        held_out: bool = False,
    ) -> None:
        """Prompts and responses with reward, its parts and KL, up to `log.samples` of them.

        `prompt_id` is what `data.id_field` holds, else the prompt's position in its file.
        """
        if self.writer is None:
            return
        kl = None
        if experience.ref_logprobs_BS is not None and experience.logprobs_BS is not None:
            gap = experience.logprobs_BS - experience.ref_logprobs_BS
            kl = torch.where(experience.mask_BS.to(gap.device), gap, 0.0).sum(1).tolist()
        rewards = scores.total_B.tolist()
        named = isinstance(self.config, TrainConfig) and self.config.data.id_field is not None
        for row in range(min(len(experience), self.config.log.samples)):
            prompt = prompts[row // experience.samples]
            prompt_id = prompt.id if named else prompt.index
            fields = {"reward": rewards[row], "prompt_id": prompt_id, "held_out": held_out}
            if scores.parts:
                fields["rewards"] = {name: float(part[row]) for name, part in scores.parts.items()}
            if kl is not None:
                fields["kl"] = kl[row]
            self.writer.sample(iteration, said[0][row], said[1][row], **fields)

    def states(self, complete: Sequence[Saved]) -> None:
        """Log checkpoints to resume from that have become complete."""
        for saved in complete:
            folder = str(saved.folder.relative_to(self.out))
            self.write(Checkpoint(saved.number, folder, saved.seconds, saved.bytes))

    def save(self, model: ModelRuntime, name: str, done: int, endings: Endings) -> None:
        """Write the model as a Hugging Face folder under checkpoints/, replacing one of that name.

        `endings` are those that it was trained with.
        """
        if not self.config.checkpoint.save:
            return
        folder = self.out / "checkpoints" / name
        tensors = whole_tensors(model)
        if self.writer is None:
            for _ in tensors:
                pass
            return
        durable.make_folder(folder.parent)
        tokenizer, more, pad = self.config.tokenizer, endings.config, None
        # A run on random tokens may begin with a folder that has none.
        if model.spec.head == "value" and tokenizer is not None and has_tokenizer(tokenizer):
            pad = padding(load_tokenizer(tokenizer), endings.eos)
            more = {**more, "pad_token_id": pad}
        with tokenizer_folder(tokenizer, folder.parent, pad) as files:
            generation, gate = endings.generation, self.world.progress.writing
            source = getattr(self.config, model.name).model
            hf.save(
                folder, model.spec, tensors, files, gate=gate, more=more, generation=generation, base=source
            )
        self.write(Checkpoint(done, str(folder.relative_to(self.out))))
        self._prune()

    def _prune(self) -> None:
        """Keep the newest `checkpoint.keep` numbered folders."""
        numbered = durable.numbered(self.out / "checkpoints", "iteration")
        for folder in list(numbered.values())[: -self.config.checkpoint.keep]:
            shutil.rmtree(folder, ignore_errors=True)

    def _plot(self) -> None:
        if not self.config.log.plots or not DRAWS:
            return
        # matplotlib takes a second to import: not for runs without plots.
        from puzzle.plotting import curves

        folder = self.out / "plots"
        try:
            folder.mkdir(exist_ok=True)
            curves.write(load_runs(self.out).runs, folder)
        except OSError as error:
            raise UserError(f"{folder}: {describe(error)}") from None
