"""Several logs of one run, and logs that contradict themselves: which counts, and what is said."""

from pathlib import Path

import pytest

from puzzle.runlog import load_runs
from puzzle.runlog.published.scan import scan
from tests.runlog import texts
from tests.runlog.test_load import ours, put

NAME = "figure8/orion/llama_7b_350m_opt_2024-04-29T20:35:57{}.log"


@pytest.mark.parametrize(
    ("changed", "numbers"),
    [
        ({}, "the same numbers"),
        ({"7367.424": "7367.425", "12959.740": "12959.741"}, "OTHER numbers"),  # one series of five
        ({"0.08359861373901367": "0.08359861373901366"}, "OTHER numbers"),
    ],
)
def test_of_two_logs_of_the_same_time_the_first_counts(
    tmp_path: Path, changed: dict[str, str], numbers: str
) -> None:
    data = texts.as_bytes(texts.puzzle_lines())
    other = data
    for old, new in changed.items():
        other = other.replace(old.encode(), new.encode())
    first = put(tmp_path, NAME.format("+0800"), data)
    second = put(tmp_path, NAME.format("+08:00"), other)
    loaded = load_runs(tmp_path)
    (run,) = loaded.runs
    (report,) = loaded.reports
    assert {run.source, report.source} == {str(first)}
    assert report.what == f"used for figure8/orion/7b_350m_opt; {second} has the same time and {numbers}"


@pytest.mark.parametrize("counts", [(2, 2), (2, 4), (4, 2)])
def test_of_two_copies_of_our_run_the_longer_counts(tmp_path: Path, counts: tuple[int, int]) -> None:
    """Copies of one length are one run, too."""
    for name, count in zip("ab", counts, strict=True):
        ours(tmp_path / name, count=count)
    loaded = load_runs(tmp_path)
    (run,) = loaded.runs
    assert len(run.iterations) == max(counts)
    if counts[0] != counts[1]:
        assert run.source == str(tmp_path / "ab"[counts.index(max(counts))] / "run.jsonl")


def test_a_file_that_cannot_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unreadable one comes first, in the middle, and last."""
    closed = [put(tmp_path, f"{name}/run.jsonl", b"secret") for name in "ace"]
    ours(tmp_path / "b")
    ours(tmp_path / "d", repeat=1)
    real = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self in closed:
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    loaded = load_runs(tmp_path)
    assert [run.repeat for run in loaded.runs] == [0, 1]
    assert [report.source for report in loaded.reports] == list(map(str, closed))


@pytest.mark.parametrize(
    ("path", "doubts"),
    [
        (NAME.format("+0800"), []),
        (
            "x/" + NAME.format("+0800").rpartition("/")[2],
            ["in no folder figureN or tableN: it belongs to no figure"],
        ),
        (
            NAME.format("+0800").replace("04-29", "13-99"),
            ["the time in the name is none: other logs of this run count as newer"],
        ),
    ],
)
def test_what_a_name_does_not_say_is_doubted(tmp_path: Path, path: str, doubts: list[str]) -> None:
    put(tmp_path, path)
    (run,) = load_runs(tmp_path).runs
    assert [report.what for report in run.reports] == doubts
    assert run.figures == (("figure8",) if path.startswith("figure8") else ())


def engine(gather: str = "1.50", share: str = "3.95") -> str:
    """A whole iteration of 38 s whose engine line says this of the gather."""
    line = texts.engine_line(38.0, 1.5, 18.5, 9.4).replace(
        "latency=1.50s (3.95%)", f"latency={gather}s ({share}%)"
    )
    return "\n".join(
        ["Generation time: 20.0, exp gen time: 27.0", "Training time: 9.4", texts.step_line(0), line]
    )


@pytest.mark.parametrize(
    ("gather", "share", "fits"),
    [
        ("1.50", "3.95", True),
        # 1.5 s may be 1.495 to 1.505 and 38 s 37.995 to 38.005: shares of 3.933 to 3.961 %.
        ("1.50", "3.93", True),
        ("1.50", "3.96", True),
        ("1.50", "3.92", False),
        ("1.50", "3.97", False),
        ("1.50", "3.99", False),
        ("2.50", "3.95", False),
        ("38.00", "100.03", True),
        ("38.00", "100.05", False),
    ],
)
def test_an_engine_lines_shares_are_those_of_its_times(gather: str, share: str, fits: bool) -> None:
    said = [what for _, what in scan(texts.as_bytes([engine(gather, share)])).reports if " % of " in what]
    assert said == (
        []
        if fits
        else [f"gather_latency {float(gather)} s is not {float(share)} % of 38.0 s, as its line says"]
    )


@pytest.mark.parametrize("whole", ["0.00", "-1.00"])
def test_an_iteration_without_a_time_has_no_shares(whole: str) -> None:
    line = engine().replace("E2E latency=38.00s", f"E2E latency={whole}s")
    said = [what for _, what in scan(texts.as_bytes([line])).reports if " % of " in what]
    assert said[0] == f"gather_latency 1.5 s is not 3.95 % of {float(whole)} s, as its line says"
    assert len(said) == 4


@pytest.mark.parametrize(("slowest", "said"), [(9.4, False), (9.51, False), (9.515, True), (12.0, True)])
def test_ranks_that_train_in_step_take_the_same_time(slowest: float, said: bool) -> None:
    """Up to a hundredth apart is chance, and half a last digit of a print; more is of another iteration."""
    lines = ["Generation time: 20.0, exp gen time: 27.0", "Training time: 9.41", f"Training time: {slowest}"]
    found = scan(texts.as_bytes([*lines, texts.step_line(0), texts.engine_line(38.0, 1.5, 18.5, 9.4)]))
    low, high = sorted((9.41, slowest))
    told = [f"iteration 0: training times from {low} to {high} s"] if said else []
    assert [what for _, what in found.reports if "training times from" in what] == told


def blocks(*steps: tuple[int, float]) -> list[str]:
    """PUZZLE's lines of these iterations with these seconds of training."""
    return [texts.puzzle_line(step, 9000.0, 2500.0, 1000 * training) for step, training in steps]


@pytest.mark.parametrize(
    ("steps", "counts", "said"),
    [
        ([(0, 1.0), (1, 2.0), (2, 3.0)], [1.0, 2.0, 3.0], []),
        ([(0, 1.0), (2, 3.0), (1, 2.0)], [1.0, 2.0, 3.0], [(3, "out of order: iteration 1 after 2")]),
        (
            [(2, 3.0), (1, 2.0), (0, 1.0)],
            [1.0, 2.0, 3.0],
            [(2, "out of order: iteration 1 after 2"), (3, "out of order: iteration 0 after 2")],
        ),
        (
            [(0, 1.0), (1, 2.0), (1, 2.0)],
            [1.0, 2.0],
            [(3, "iteration 1 again, with the same numbers: this one counts")],
        ),
        (
            [(0, 1.0), (1, 2.0), (0, 4.0)],
            [4.0, 2.0],
            [(3, "iteration 0 again, with other numbers: this one counts")],
        ),
        ([(0, 1.0), (3, 2.0)], [1.0, 2.0], [(None, "2 iterations are missing, the first is 1")]),
    ],
)
def test_iterations_of_a_published_log_are_put_in_order(
    tmp_path: Path, steps: list[tuple[int, float]], counts: list[float], said: list[tuple[int | None, str]]
) -> None:
    """Each once, the last of each; what was out of order, double or missing is said with its line."""
    path = put(tmp_path, NAME.format("+0800"), texts.as_bytes(blocks(*steps)))
    (run,) = load_runs(tmp_path).runs
    assert [one.iteration for one in run.iterations] == sorted({step for step, _ in steps})
    assert [one.stage_seconds["training"] for one in run.iterations] == counts
    assert run.printed["training"] == tuple(counts)
    assert [(one.source, one.line, one.what) for one in run.reports] == [(str(path), *what) for what in said]


@pytest.mark.parametrize(
    ("name", "argument", "printed", "batch"),
    [
        (NAME, True, "512", 128),  # the arguments
        (NAME, False, "512", 512),  # else what the first line prints
        (NAME, False, "5(Role pid=3)12", None),  # unless other text stands in it
        (NAME.replace("350m_opt", "350m_64_8_1_1_opt"), True, "512", 64),  # the name before all
    ],
)
def test_the_batch_is_what_name_arguments_or_lines_say(
    tmp_path: Path, name: str, argument: bool, printed: str, batch: int | None
) -> None:
    lines = [texts.argument("global_batch_size", 128)] * argument
    lines += [
        one.replace("global_batch_size: 128", f"global_batch_size: {printed}") for one in blocks((0, 1.0))
    ]
    lines += [one.replace("global_batch_size: 128", "global_batch_size: 32") for one in blocks((1, 1.0))]
    put(tmp_path, name.format("+0800"), texts.as_bytes(lines))
    (run,) = load_runs(tmp_path).runs
    assert run.config.get("global_batch_size") == batch
    assert run.config.keys() <= {"global_batch_size"}


PROMISED = {
    "global_batch_size": 64,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 8,
    "data_parallel_size": 4,
}


@pytest.mark.parametrize("wrong", [None, *PROMISED])
def test_arguments_that_are_not_what_the_name_promises_are_said(tmp_path: Path, wrong: str | None) -> None:
    """Each of the four numbers of a name, batch, pp, dp, tp; the name counts."""
    given = {name: value + (name == wrong) for name, value in PROMISED.items()}
    lines = [texts.argument(*one) for one in given.items()] + blocks((0, 1.0))
    put(tmp_path, NAME.replace("350m", "350m_64_8_4_2").format("+0800"), texts.as_bytes(lines))
    (run,) = load_runs(tmp_path).runs
    assert [report.what for report in run.reports] == (
        []
        if wrong is None
        else [f"the name says {wrong} {PROMISED[wrong]}, the log {given[wrong]}; the name counts"]
    )
    assert run.layouts == {"training": {"tp": 2, "pp": 8, "dp": 4}}
    assert run.config["global_batch_size"] == 64


@pytest.mark.parametrize("lost", ["tensor_model", "pipeline_model", "data"])
@pytest.mark.parametrize("value", ["0", "-1", "None", "True", "many", None])
def test_a_layout_that_is_not_told_whole_is_unknown(tmp_path: Path, lost: str, value: str | None) -> None:
    told = {f"{name}_parallel_size": 2 for name in ("tensor_model", "pipeline_model", "data")}
    arguments = {**told, "world_size": 8 if value is None else value, f"{lost}_parallel_size": value}
    lines = [texts.argument(name, given) for name, given in arguments.items() if given is not None]
    put(tmp_path, NAME.format("+0800"), texts.as_bytes(lines + blocks((0, 1.0))))
    (run,) = load_runs(tmp_path).runs
    assert run.layouts == {}
    assert run.hardware == ({"devices": 8} if value is None else {})


@pytest.mark.parametrize(
    ("shadow", "layout"),
    [
        (("True", 2, 4), {"tp": 2, "pp": 4, "dp": 2}),
        (("True", 16, 1), {"tp": 16, "pp": 1, "dp": 1}),
        (("False", 2, 4), {"tp": 1, "pp": 8, "dp": 2}),  # the training's
        (("True", 0, 4), None),
        (("True", 2, "None"), None),
        (("None", 2, 4), None),
    ],
)
def test_the_layout_of_generation_has_the_ranks_of_training(
    tmp_path: Path, shadow: tuple[str, object, object], layout: dict[str, int] | None
) -> None:
    names = ("use_shadow", "shadow_tensor_model_parallel_size", "shadow_pipeline_model_parallel_size")
    training = {"tp": 1, "pp": 8, "dp": 2}
    arguments = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 8,
        "data_parallel_size": 2,
        **dict(zip(names, shadow, strict=True)),
    }
    lines = [texts.argument(name, given) for name, given in arguments.items()]
    put(tmp_path, NAME.format("+0800"), texts.as_bytes(lines + blocks((0, 1.0))))
    (run,) = load_runs(tmp_path).runs
    assert run.layouts.get("generation") == layout
    assert run.layouts["training"] == training


@pytest.mark.parametrize("reshards", [(0.5, 0.25), (0.5, None), (None, None), (0.0, 0.25)])
def test_what_printed_no_re_shard_has_no_switch(
    tmp_path: Path, reshards: tuple[float | None, float | None]
) -> None:
    lines = []
    for step, seconds in enumerate(reshards):
        lines += [] if seconds is None else [texts.reshard_line(seconds)]
        lines += blocks((step, 1.0))
    put(tmp_path, NAME.format("+0800"), texts.as_bytes(lines))
    (run,) = load_runs(tmp_path).runs
    timed = [(step, seconds) for step, seconds in enumerate(reshards) if seconds]
    assert [(one.iteration, one.seconds) for one in run.switches] == timed
    assert [one.stage_seconds["switch"] for one in run.iterations] == [seconds or 0.0 for seconds in reshards]
    printed = tuple(seconds for seconds in reshards if seconds is not None)
    assert run.printed.get("reshard", ()) == printed
    assert run.ended


def test_a_log_of_both_formats_is_puzzles(tmp_path: Path) -> None:
    """Where lines of both were written, the times of PUZZLE's lines are the series."""
    lines = [*blocks((0, 1.0), (1, 2.0)), *texts.chat_lines()[4:]]
    lines = [line.replace("Step: 0 ", "Step: 2 ").replace("Step: 1 ", "Step: 3 ") for line in lines]
    put(tmp_path, NAME.format("+0800"), texts.as_bytes(lines))
    (run,) = load_runs(tmp_path).runs
    assert run.printed["training"] == (1.0, 2.0)
    assert run.printed["e2e"] == (12.5, 13.5)
    assert "gather" not in run.printed
