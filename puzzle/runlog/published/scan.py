"""Finds the measurements in the text of a published log, and says what it could not read.

The text is what many processes wrote to one terminal: prefixes, colours, lines inside lines.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from puzzle.runlog.published import lines
from puzzle.runlog.records import Note

# Ranks train in step: their times for one iteration differ by at most this share (0.2 % in the public logs).
_RANK_SPREAD = 0.01
# Milliseconds between a line's end-to-end time and the sum of its stages, all printed with 3 decimals.
_ROUNDING_MS = 0.0025


@dataclass
class Block:
    """The measurements of one iteration: per metric every number printed, in log order; units as printed."""

    line: int
    iteration: int
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, metric: str, value: float) -> None:
        self.values.setdefault(metric, []).append(value)


@dataclass
class Scan:
    """What one log holds. `training` is what figure 12's script reads: the last word of a training line."""

    blocks: list[Block] = field(default_factory=list)
    other_node: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    reports: list[tuple[int | None, str]] = field(default_factory=list)


def scan(data: bytes) -> Scan:
    """All measurements of one published log, in log order."""
    return _Scanner().run(data)


class _Scanner:
    """One pass over the lines; `_pending` and `_current` are DeepSpeed-Chat iterations being filled."""

    def __init__(self) -> None:
        self.found = Scan()
        self._pending: Block | None = None
        self._current: Block | None = None
        self._reshards: list[float] = []
        self._glued = 0
        self._epoch = (0, 0)

    def run(self, data: bytes) -> Scan:
        if not data.strip():
            self._report(None, "empty log")
        # Newlines as Python's text files know them.
        texts = re.split(r"\r\n|\r|\n", data.decode("utf-8", "replace"))
        damaged = [number for number, text in enumerate(texts, 1) if "\ufffd" in text or "\0" in text]
        if damaged:
            self._report(damaged[0], f"not text here, and in {len(damaged)} lines in all")
        for number, text in enumerate(texts, 1):
            clean = lines.ANSI.sub("", text) if "\x1b" in text else text
            if lines.MARKS.search(clean):
                self._measurements(number, clean)
            elif not self.found.blocks and (argument := lines.ARGUMENT.search(clean)):
                name = argument["name"] or argument["key"]
                self.found.arguments.setdefault(name, argument["value"] or argument["number"])
        if texts[-1].strip():
            self._report(len(texts), "no newline at the end of the log: this line may be torn")
        self._finish()
        return self.found

    def _measurements(self, number: int, text: str) -> None:
        """Take what the patterns find in one line, from left to right; report what they leave."""
        if "Training time:" in text:
            self._training_word(number, text)
        rest = []
        position = 0
        for match, take in sorted(self._matches(text), key=lambda item: item[0].start()):
            rest.append(text[position : match.start()])
            position = match.end()
            glued = bool(text[position : position + 1].strip())
            if glued and not lines.GLUED.match(text, position):
                self._report(number, f"number dropped, it goes on in {text[match.start() : position + 8]!r}")
                continue
            # Ranks often print training times into one line, or in front of the epoch's.
            usual = match.re is lines.TRAINING and lines.MARKS.match(text, position)
            if glued and not usual:
                self._report(number, f"repaired: other text right behind {match[0][-40:]!r}")
            take(number, match.groupdict())
        rest.append(text[position:])
        for part in rest:
            if lines.MARKS.search(part):
                self._broken(number, part)

    def _matches(self, text: str) -> Iterator[tuple[re.Match[str], Any]]:
        for pattern, take in (
            (lines.PUZZLE, self._puzzle),
            (lines.RESHARD, self._reshard),
            (lines.GENERATION, self._generation),
            (lines.TRAINING, self._training),
            (lines.CHAT_STEP, self._chat_step),
            (lines.ENGINE, self._engine),
            *((pattern, self._perf) for pattern in lines.CHAT_PERF),
        ):
            for match in pattern.finditer(text):
                yield match, take

    def _training_word(self, number: int, text: str) -> None:
        """The published script takes the last word of a training line, whatever it is."""
        printed = [float(match["training_time"]) for match in lines.TRAINING.finditer(text)]
        word = text.split()[-1]
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self._report(number, f"training line ends in {word[-40:]!r}, no number: nothing is read from it")
            return
        self.found.training.append(value)
        self._glued += len(printed) > 1
        if value not in printed:
            what = (
                f"figure 12's script reads {value} from this line, whose training time is glued to other text"
            )
            self._report(number, what)
            self._note("glued", what, ["training"], len(self.found.training) - 1, values=printed)

    # PUZZLE

    def _puzzle(self, number: int, groups: dict[str, str], repaired: bool = False) -> None:
        step, steps = int(groups["step"]), max(int(groups["steps"]), 1)
        block = Block(number, int(groups["epoch"]) * steps + step)
        for metric, value in groups.items():
            if metric not in ("epoch", "step", "steps"):
                block.add(metric, float(value))
        *stages, e2e = (block.values[name][0] for name in lines.PUZZLE_STAGES)
        left = e2e - math.fsum(stages)
        if abs(left) > _ROUNDING_MS:
            text = f"iteration {block.iteration}: end-to-end time minus its stages is {left:.3f} ms"
            self._report(number, text)
            self._note("sum", text, ["e2e"], block.iteration, seconds=round(left / 1e3, 9))
        for seconds in self._reshards:
            block.add("apply_shadow_model_time", seconds)
        if len(self._reshards) > 1:
            self._report(
                number, f"{len(self._reshards)} re-shard times for one iteration: the largest counts"
            )
        self._reshards = []
        self.found.blocks.append(block)
        if repaired:
            text = f"iteration {block.iteration}: other text inside its line; the stages add up"
            self._report(number, f"repaired: {text}")
            self._note("repaired", text, ["generation", "inference", "training", "e2e"], block.iteration)

    def _note(self, kind: str, text: str, series: Sequence[str], index: int, **more: Any) -> None:
        self.found.notes.append(Note(kind, text, tuple(series), (index,), **more))

    def _reshard(self, number: int, groups: dict[str, str]) -> None:
        self._reshards.append(float(groups["apply_shadow_model_time"]))

    def _broken(self, number: int, part: str) -> None:
        """A PUZZLE line with foreign text inside is mended if its four times are whole: they must add up."""
        times = lines.PUZZLE_MS.findall(part)
        steps = list(lines.PUZZLE_STEP.finditer(part))
        if len(times) == len(lines.PUZZLE_STAGES) and len(steps) == 1:
            *stages, e2e = map(float, times)
            if abs(e2e - math.fsum(stages)) <= _ROUNDING_MS:
                groups = {**steps[0].groupdict(), **dict(zip(lines.PUZZLE_STAGES, times, strict=True))}
                for pattern in lines.PUZZLE_METRICS:
                    if match := pattern.search(part):
                        groups |= match.groupdict()
                self._puzzle(number, groups, repaired=True)
                return
        if "epoch: " in part or "e2e_time" in part:
            self._reshards = []
        self._report(number, f"line dropped, a measurement in it cannot be read: {part.strip()[:80]!r}")

    # DeepSpeed-Chat: generation, training on every rank, then the step's line, its figures, the engine's line

    def _generation(self, number: int, groups: dict[str, str]) -> None:
        if self._pending is not None:
            self._report(self._pending.line, "dropped: an iteration without its Epoch line")
        self._pending = Block(number, -1)
        self._fill(self._pending, groups)

    def _training(self, number: int, groups: dict[str, str]) -> None:
        block = self._pending or self._current
        if block is None and not self.found.blocks:
            self.found.other_node.append(float(groups["training_time"]))
        elif block is None:
            self._report(number, "training time dropped: it stands outside any iteration")
        else:
            block.add("training_time_rank_print", float(groups["training_time"]))

    def _chat_step(self, number: int, groups: dict[str, str]) -> None:
        block = self._pending or Block(number, -1)
        epoch, step = int(groups.pop("epoch")), int(groups.pop("step"))
        if epoch != self._epoch[0]:
            highest = max((known.iteration for known in self.found.blocks), default=-1)
            self._epoch = (epoch, highest + 1)
        block.iteration = self._epoch[1] + step
        block.line = number
        self._fill(block, groups)
        self.found.blocks.append(block)
        self._current, self._pending = block, None

    def _perf(self, number: int, groups: dict[str, str]) -> None:
        block = self._current
        if block is None or self._pending is not None or "e2e_latency" in block.values:
            self._report(number, f"{next(iter(groups))} dropped: it stands outside any iteration")
        elif next(iter(groups)) in block.values:
            self._report(
                number, f"{next(iter(groups))} again: the first of iteration {block.iteration} counts"
            )
        else:
            self._fill(block, groups)

    def _engine(self, number: int, groups: dict[str, str]) -> None:
        self._perf(number, groups)
        e2e = float(groups["e2e_latency"])
        for time, share in (
            ("gather_latency", "gather_pct"),
            ("engine_generate_time", "engine_generate_pct"),
            ("engine_training_time", "engine_training_pct"),
            ("engine_others", "engine_others_pct"),
        ):
            seconds, percent = float(groups[time]), float(groups[share])
            # Both times are rounded to 0.01 s, the share to 0.01 %.
            slack = 0.5 * (1 + abs(seconds) / e2e) / e2e + 0.0051 if e2e > 0 else 0.0
            if e2e <= 0 or abs(100 * seconds / e2e - percent) > slack:
                self._report(number, f"{time} {seconds} s is not {percent} % of {e2e} s, as its line says")

    def _fill(self, block: Block, groups: dict[str, str]) -> None:
        for metric, value in groups.items():
            block.add(metric, float(value))

    # The whole log

    def _finish(self) -> None:
        found = self.found
        if self._pending is not None:
            self._report(self._pending.line, "dropped: the log ends inside this iteration")
        if self._reshards:
            self._report(None, "re-shard time dropped: the log ends inside its iteration")
        if self._glued:
            text = (
                f"{self._glued} lines hold several training times; figure 12's script reads the last of each"
            )
            self._report(None, text)
        if found.blocks and len(found.other_node) % len(found.blocks) == 0:
            each = len(found.other_node) // len(found.blocks)
            for index, seconds in enumerate(found.other_node):
                found.blocks[index // each].add("training_time_other_node_print", seconds)
        elif found.other_node:
            self._report(
                None, f"{len(found.other_node)} training times before the first iteration are of none"
            )
        self._compare_blocks()
        self._compare_ranks()

    def _compare_blocks(self) -> None:
        """Iterations print equally many numbers of a kind: where one does not, lines were lost or moved."""
        blocks = self.found.blocks
        for metric in sorted({metric for block in blocks for metric in block.values}):
            counts = [len(block.values.get(metric, ())) for block in blocks]
            usual = Counter(counts).most_common(1)[0][0]
            for block, count in zip(blocks, counts, strict=True):
                # The engine prints an iteration when the next begins: the last one's line is often missing.
                unended = block is blocks[-1] and metric in lines.ENGINE.groupindex
                if count != usual and not (count == 0 and unended):
                    what = f"iteration {block.iteration}: {count} times {metric}, others have {usual}"
                    self._report(block.line, what)

    def _compare_ranks(self) -> None:
        """Ranks that train in step print nearly, but never quite the same time."""
        for block in self.found.blocks:
            names = ("training_time_rank_print", "training_time_other_node_print", "perf_training_latency")
            times = [seconds for name in names for seconds in block.values.get(name, ())]
            ranks = block.values.get("training_time_rank_print", ())
            if len(set(ranks)) < len(ranks):
                what = f"iteration {block.iteration}: the same training time twice, a line may be doubled"
                self._report(block.line, what)
            if times and max(times) - min(times) > _RANK_SPREAD * max(times) + 0.0051:
                what = f"iteration {block.iteration}: training times from {min(times)} to {max(times)} s"
                self._report(block.line, what)

    def _report(self, line: int | None, what: str) -> None:
        self.found.reports.append((line, what))
