"""Hostile options and files, by kind: one line of error and code 2, whatever the command."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from puzzle.cli import main
from puzzle.errors import LONGEST_LINE, exit_code, one_line
from puzzle.plotting import curves
from puzzle.plotting.__main__ import main as plot

ROOT = Path(__file__).resolve().parents[2]

HUGE = "9" * 5000
ACTION = {"forward": 1.0, "backward": 2.0, "step": 0.5, "activation": 0.0, "gradient": 0.0}
MANY = [f"m{n}=1" for n in range(9)]
COSTS = {name: {**ACTION, "reduce": 0.1, "norm": 0.0, "gather": 0.1} for name in ("a", "b")}
FUSE = ["plan", "fuse", "--pp", "2", "--training", "a=2", "b=2", "--costs"]
SWITCH = ["plan", "switch", "--model", "7b", "--from", "2,1,1", "--to", "1,1,2"]
BENCH = ["--model", "350m", "--device", "cpu"]
CAMPAIGN = ["campaign", "--dry-run", "--scale", "cpu"]
TRAIN = ["train", "--dry-run", "--actor.init.preset", "350m", "--reward.init.preset", "350m"]

OPTIONS = [
    ([*SWITCH[:4], "--from", "1,1,100000", "--to", "1,1,100000"], "at most 1024"),
    ([*SWITCH[:4], "--from", "1000000000,1,1", "--to", "1,1,1"], "at most 1024"),
    ([*SWITCH[:4], "--from", f"{HUGE},1,1", "--to", "1,1,1"], "three whole numbers"),
    ([*SWITCH[:4], "--from", "\u0663,1,1", "--to", "1,1,3"], "three whole numbers"),
    ([*SWITCH, "--gpus-per-node", "-1"], "at least 1"),
    ([*SWITCH, "--intra-gbs", "inf"], "finite number above 0"),
    ([*SWITCH[:4], "--from", "1,1,64", "--to", "1,1,256", "--zero"], "--zero: 64 replicas to 256 processes"),
    ([*SWITCH, "--out", ""], "the name is empty"),
    ([*SWITCH[:3], "", *SWITCH[4:]], "no published model size ''"),
    (["plan", "fuse", "--pp", "1000000000", "--training", "a=1", "--costs", "costs"], "from 1 to 1024"),
    (["plan", "fuse", "--pp", "2", "--training", "a=1000000", "--costs", "costs"], "at most 2048"),
    (["plan", "fuse", "--pp", "2", "--training", f"a={HUGE}", "--costs", "costs"], "write MODEL=N"),
    (["plan", "fuse", "--pp", "2", "--training", "a=\u00b2", "--costs", "costs"], "write MODEL=N"),
    (["plan", "fuse", "--pp", "2", "--training", "a=1", "a=1", "--costs", "costs"], "given twice"),
    (["plan", "fuse", "--pp", "1", "--inference", *MANY, "--costs", "costs"], "of 9 models at most 0"),
    (["plan", "fuse", "--pp", "8", "--training", "a=40", "b=40", "c=6", "--costs", "costs"], "at most 682"),
    ([*FUSE, "costs", "--tied", "c"], "--tied c: no model"),
    ([*FUSE, ""], "the name is empty"),
    ([*FUSE, "."], "cannot be read"),
    ([*FUSE, "pipe"], "not valid JSON"),
    ([*FUSE, "/dev/null"], "not valid JSON"),
    (["generate", "m", "--jsonl", ""], "the name is empty"),
    (["generate", "m", "--jsonl", "."], "is a folder"),
    (["generate", "m", "--jsonl", "x\udcff"], "is no UTF-8 text, as names of models are"),
    ([*TRAIN, "--out", "o\udcff"], "is no UTF-8 text, as names of models are"),
    (["generate", "m", "--jsonl", "absent/x"], "no folder absent"),
    (["generate", "m", "--jsonl", "n" * 300], "File name too long"),
    (["generate", "m", "--seed", "-1"], "from 0 to 9223372036854775807"),
    (["generate", "m", "--seed", str(2**64)], "from 0 to 9223372036854775807"),
    (["generate", "m", "--temperature", "nan"], "finite number above 0"),
    (["generate", "m", "--top-p", "1.5"], "at most 1"),
    (["generate", "m", "--layout.dp", "1000000000"], "from 1 to 1024"),
    (["generate", "m", "--max-new-tokens", HUGE], "from 1 to 1048576"),
    (["generate", "m", "--field", ""], "give a text"),
    (["generate", "m", "--field", "\udcff"], "is no UTF-8 text"),
    (["generate", "m", "--stop", ""], "give a text"),
    (["generate", "m", "--stop", "\udcff"], "is no UTF-8 text"),
    (["bench", "train", *BENCH, "--rows", "0"], "from 1 to 1048576"),
    (["bench", "train", *BENCH, "--length", "-1"], "from 1 to 1048576"),
    (["bench", "train", *BENCH, "--microbatches", "1000000000"], "from 1 to 4096"),
    (["bench", "train", *BENCH, "--repeats", "0"], "at least 1"),
    (["bench", "train", *BENCH, "--layers", "1000000"], "from 0 to 10000"),
    (["bench", "train", *BENCH, "--layers", "25"], "350m has 16"),
    (["bench", "train", *BENCH, "--layout", "3,1,1"], "tp=3 does not divide"),
    (["bench", "train", *BENCH, "--out", "absent/x"], "no folder absent"),
    (["bench", "generate", *BENCH, "--sequences", "0"], "from 1 to 1048576"),
    (["bench", "fuse", "--actor", "350m", "--critic", "350m", "--layout", "1,30,1"], "pp=30 is more than"),
    (["bench", "switch", *BENCH, "--pairs", "1,1,2:1,1,2", "--rate-bytes", "0"], "from 1 to"),
    (["bench", "overlap", *BENCH, "--pairs", "3,1,1:1,1,3"], "tp=3 does not divide"),
    (["bench", "checkpoint", *BENCH, "--folder", "absent/x"], "no folder absent"),
    (["bench", "check", "--world", "100000"], "from 1 to 1024"),
    (["bench", "check", "--world", "1024", "--device", "cpu"], "too many for this host"),
    (["bench", "transformers", "", "--device", "cpu"], "the name is empty"),
    ([*CAMPAIGN, "--repeats", "1000000000"], "from 1 to 1000"),
    ([*CAMPAIGN, "--iterations", HUGE], "from 2 to"),
    ([*CAMPAIGN, "--cluster", "n" * 300], "1 to 256 characters"),
    ([*CAMPAIGN, "--device-memory", HUGE + "GB"], "give a number and GB"),
    ([*CAMPAIGN, "--table", ""], "the name is empty"),
    ([*CAMPAIGN, "--table", "."], "cannot be read"),
    ([*TRAIN, "--actor", "5"], "--actor '5': a section of keys"),
    ([*TRAIN, "--actor", "[" * 100_000], ": a section of keys"),
    ([*TRAIN, "--actor", HUGE], ": a section of keys"),
    ([*TRAIN, "--log.cluster", ""], "text that is not empty"),
    ([*TRAIN, "--log.cluster", "n" * 300], "at most 256 characters"),
    ([*TRAIN, "--layout.tp", "1000000000"], "at most 1024"),
    ([*TRAIN, "--seed", HUGE], "fewer digits"),
    ([*TRAIN, "--device-memory", ""], "give a number and GB"),
    (["train", "--config", ""], "the name is empty"),
    (["train", "--config", "pipe", "--out", ""], "the name is empty"),
    (["convert", "", "o"], "the name is empty"),
    (["convert", "--package", "", "o"], "is not installed"),
]  # fmt: skip


def refused(command: Callable[[], int], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < LONGEST_LINE + 20
    assert words in err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "costs").write_text(json.dumps(COSTS))
    os.mkfifo(tmp_path / "pipe")  # which nobody writes
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("arguments", "words"), OPTIONS)
def test_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "campaign" and arguments[-2:] in (["--table", "."],):
        assert main(arguments) == 2  # it has said what this machine is
        assert words in capsys.readouterr().err
        return
    refused(lambda: main(arguments), words, capsys)


def with_forward(value: object) -> str:
    return json.dumps({name: {**costs, "forward": value} for name, costs in COSTS.items()})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (with_forward(1).replace(' 1,', f" {HUGE},"), "integer of 5000 digits"),
        (with_forward(1).replace(' 1,', f" {'9' * 390},"), "forward must be a finite number"),
        (with_forward(1e300), "at most 1e+10"),
        (with_forward([]), "from 1 to 2 of them, one per stage"),
        (json.dumps({"a": {"forwards": 1}}), "forwards is no cost; there are activation, "),
    ],
)  # fmt: skip
def test_tables_of_costs(folder: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "costs").write_text(text)
    refused(lambda: main([*FUSE, "costs"]), words, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--logs, --out"),
        (["--logs", "", "--out", "o"], "the name of the folder is empty"),
        (["--nosuch"], "--help tells the options"),
        (["--logs", "absent", "--out", "o"], "absent: no such folder"),
    ],
)
def test_options_of_curves(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(lambda: curves.main(arguments), words, capsys)


def write_log(folder: Path, **changed: object) -> None:
    names = {"run_id": "r", "cluster": "c", "variant": "base", "actor": "7B", "critic": "7B"}
    objects = {name: {} for name in ("config", "layouts", "software", "hardware")}
    numbers = {"seq": 0, "time": 0.0, "schema": 1, "repeat": 0, "figures": []}
    others = {"record": "run", "provenance": "measured", "git_commit": None, "started": None}
    header = {**names, **objects, **numbers, **others, **changed}
    (folder / "run.jsonl").write_text(json.dumps(header) + "\n")


@pytest.mark.parametrize("program", [plot, curves.main])
def test_a_log_with_a_name_without_end(
    folder: Path, program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(folder, actor="x" * 100_000)
    refused(lambda: program(["--logs", ".", "--out", "o"]), "no readable run", capsys)


@pytest.mark.parametrize("config", [{"actor": 5}, {"actor": {}, "critic": []}, {"generation": "x"}])
def test_resuming_a_log_whose_sections_are_none(
    folder: Path, config: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(folder, config=config)
    refused(lambda: main(["train", "--resume", "--out", "."]), "expected a section of keys", capsys)


def test_a_line_is_short_and_printable() -> None:
    assert one_line("a\n b\x1b[31m\udc80") == "a b\\x1b[31m\\udc80"
    long = one_line("start " + "x" * 10_000 + " end")
    assert long.startswith("start ")
    assert long.endswith(" end")
    assert len(long) < LONGEST_LINE + 10


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 2, "error: not enough memory"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), 2, "error: not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, "terminated"),
        (OSError(28, "No space left on device", "x"), 2, "error: x: No space left on device"),
    ],
)
def test_how_commands_end(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise error

    assert exit_code(command) == code
    assert capsys.readouterr().err.startswith(words)


def test_sigterm_is_one_line() -> None:
    def command() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert exit_code(command) == 143


@pytest.mark.parametrize(
    ("shell", "code", "words"),
    [
        ("{} > /dev/full", 2, "No space left on device"),
        ("{} >&-", 0, ""),
        ("set -o pipefail; {} | true", (0, 141), ""),
        ("PYTHONIOENCODING=ascii COLUMNS=0 {}", 0, ""),
    ],
)
def test_odd_outputs(shell: str, code: int | tuple[int, ...], words: str) -> None:
    program = f"'{sys.executable}' -m puzzle.cli --help"
    found = subprocess.run(
        ["bash", "-c", shell.format(program)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert found.returncode in (code if isinstance(code, tuple) else (code,))
    assert words in found.stderr
    assert found.stderr.count("\n") <= 1
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
@pytest.mark.parametrize("program", ["puzzle.plotting", "puzzle.plotting.curves", "puzzle.plotting.timeline"])
def test_signals_while_a_program_imports(
    program: str, number: signal.Signals, words: str, tmp_path: Path
) -> None:
    """In the midst of the imports, which take long: a matplotlib that sends the signal says when."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (128 + number, "", f"{words}\n")
