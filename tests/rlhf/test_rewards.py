import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle.errors import UserError
from puzzle.launch.local import terminate_as_exit
from puzzle.rlhf.patience import Patience
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.functions import FunctionReward
from puzzle.rlhf.rewards.weighted import probe
from tests.rlhf.one_process import configured


def batch_of(prompts, responses, **columns):
    """A batch of these texts, as the trainer makes one."""
    count = len(responses)
    ids = [str(row) for row in range(count)]
    return RewardBatch(
        list(prompts),
        list(responses),
        [[row] for row in range(count)],
        [None] * count,
        ids,
        [True] * count,
        columns,
    )


def probed(name, timeout=60.0):
    """What `puzzle train` finds out before it starts processes."""
    config = configured(reward={"function": name})
    section = config.reward.model_copy(update={"timeout": timeout})
    rewards = probe(config.model_copy(update={"reward": section}))
    assert rewards is not None
    try:
        return rewards.columns((), "no data")
    finally:
        rewards.close()


def call(name, prompts, responses, **columns):
    return FunctionReward(name).score(batch_of(prompts, responses, **columns))


MODULE = """
import numpy
def lengths(prompts, responses): return [len(p) + len(r) for p, r in zip(prompts, responses)]
def array(prompts, responses): return numpy.ones(len(responses), dtype=numpy.float32)
def fails(prompts, responses): return [1 / 0]
def short(prompts, responses): return [1.0]
def nan(prompts, responses): return [1.0, float("nan")]
def infinite(prompts, responses): return [1.0, float("inf")]
def words(prompts, responses): return ["good", "bad"]
def nothing(prompts, responses): return None
constant = 5
import decimal, json, os, signal, sys, time, torch
class Other(BaseException): pass
class Mute(Exception):
    def __str__(self): raise RuntimeError
class Odd:
    def __float__(self): raise KeyError("odd")
    __repr__ = __float__
def exits(prompts, responses): sys.exit(0)
def exits_with_words(prompts, responses): sys.exit("no model here")
def other(prompts, responses): raise Other("mine")
def mute(prompts, responses): raise Mute
def stops(prompts, responses): raise StopIteration
def interrupts(prompts, responses): raise KeyboardInterrupt
def interrupted(prompts, responses): os.kill(os.getpid(), signal.SIGINT); time.sleep(9)
def terminated(prompts, responses): os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)
def files(prompts, responses):
    held = []
    while len(held) < 5000: held.append(open(os.devnull))
def deep(prompts, responses):
    return json.loads("{")
def text(prompts, responses): return "12"
def octets(prompts, responses): return b"12"
def dictionary(prompts, responses): return {0: 1.0, 1: 2.0}
def unordered(prompts, responses): return {1.0, 2.0}
def generator(prompts, responses): return (1.0 for _ in responses)
def column(prompts, responses): return torch.ones(2, 1)
def single(prompts, responses): return torch.tensor(1.0)
def none(prompts, responses): return [1.0, None]
def digits(prompts, responses): return ["1", "2"]
def complexes(prompts, responses): return numpy.array([1j, 2j])
def complex_items(prompts, responses): return [numpy.complex64(1j)] * 2
def too_large(prompts, responses): return [1.0, 1e300]
def huge(prompts, responses): return [10**5000, 1]
def odd(prompts, responses): return [Odd(), 1]
def right(prompts, responses):
    return [decimal.Decimal("0.5"), True, numpy.float16(2), torch.tensor(3.0), -4, 3e38]
def tensor(prompts, responses): return torch.tensor([1.0, 2.0], requires_grad=True)
def rows(prompts, responses): prompts.clear(); responses.clear(); return (1, 2)
def one(prompts): return [1.0]
def keywords(prompts, *, responses): return [1.0]
async def later(prompts, responses): return [1.0, 2.0]
def yields(prompts, responses): yield 1.0
class Scorer:
    def __init__(self, prompts, responses): pass
    def __call__(self, prompts, responses): return [7.0 for _ in responses]
scorer = Scorer([], [])
def sleeps(prompts, responses): time.sleep(60)
def computes(prompts, responses):
    while True: pass
def ends_late(prompts, responses):
    try: time.sleep(60)
    except BaseException: return [1.0, 2.0]
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = {
        "own_scorers": MODULE,
        "syntax": "def f(:",
        "leaves": "import sys; sys.exit(0)",
        "lacks": "import absent_one",
        "hostile": "class Ended(BaseException): pass\nraise Ended",
        "vanishes": "import os; os._exit(0)",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield
    for name in modules:
        sys.modules.pop(name, None)


def test_functions_of_the_working_directory():
    assert call("own_scorers:lengths", ["ab", "c"], ["d", "efg"]) == [3.0, 4.0]
    assert call("own_scorers:array", ["ab", "c"], ["d", "efg"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", r"own_scorers:fails raised ZeroDivisionError: division by zero \(.*scorers\.py:5\)"),
        ("short", "gave 1 scores for 2 responses"),
        ("nan", "gave nan for the response 'second'"),
        ("infinite", "gave inf for the response 'second'"),
        ("words", "gave 'good' for the response 'first'"),
        ("nothing", "own_scorers:nothing gave None; return a list"),
        ("exits", r"own_scorers:exits raised SystemExit: 0 \(.*scorers\.py:\d+\)"),
        ("exits_with_words", "raised SystemExit: no model here"),
        ("other", r"raised Other: mine \(.*scorers\.py:\d+\)"),
        ("mute", r"raised Mute \("),
        ("stops", r"raised StopIteration \("),
        ("interrupts", r"raised KeyboardInterrupt \("),
        ("files", r"raised OSError: \[Errno 24\] Too many open files: .*scorers\.py:\d+"),
        ("deep", r"raised JSONDecodeError: .* \(.*own_scorers\.py:\d+\)"),
        ("text", "gave '12'; return a list of one number per response"),
        ("octets", "gave b'12'; return a list"),
        ("dictionary", r"gave \{0: 1.0, 1: 2.0\}; return a list"),
        ("unordered", r"gave \{1.0, 2.0\}; return a list"),
        ("generator", "gave <generator object .*; return a list"),
        ("column", r"gave \[1.0\] for the response 'first' \(1 of 2\)"),
        ("single", r"gave tensor\(1.\); return a list"),
        ("none", r"gave None for the response 'second' \(2 of 2\)"),
        ("digits", "gave '1' for the response 'first'"),
        ("complexes", "gave 1j for the response 'first'"),
        ("complex_items", "gave .*1j.* for the response 'first'"),
        ("too_large", "gave 1e.300 for the response 'second' .*float32 ends at 3.4e.38, scale or clip it"),
        ("huge", "gave a value of type int for the response 'first'"),
        ("odd", "gave a value of type Odd for the response 'first'"),
    ],
)
def test_bad_scores_name_the_function(name, words):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    score = FunctionReward(f"own_scorers:{name}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, limits[0]), limits[1]))
    try:
        with pytest.raises(UserError, match=words) as raised:
            score.score(batch_of(["a", "b"], ["first", "second"]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "\n" not in str(raised.value)


def test_all_kinds_of_numbers():
    texts = [""] * 6
    numbers = call("own_scorers:right", texts, texts)
    assert numbers == [0.5, 1.0, 2.0, 3.0, -4.0, 3e38]
    assert {type(number) for number in numbers} == {float}
    assert call("own_scorers:tensor", ["", ""], ["", ""]) == [1.0, 2.0]
    given = ["a", "b"]
    assert call("own_scorers:rows", given, given) == [1.0, 2.0]
    assert given == ["a", "b"]
    assert call("own_scorers:scorer", ["", ""], ["", ""]) == [7.0, 7.0]


@pytest.mark.parametrize(("name", "ends"), [("interrupted", KeyboardInterrupt), ("terminated", SystemExit)])
def test_signals_are_not_the_functions_faults(name, ends):
    score = FunctionReward(f"own_scorers:{name}")
    with terminate_as_exit(), pytest.raises(ends):
        score.score(batch_of(["a", "b"], ["first", "second"]))


@pytest.mark.parametrize("name", ["sleeps", "computes", "ends_late"])
def test_a_function_is_waited_for_as_long_as_its_limit_says(name, capfd):
    score = FunctionReward(f"own_scorers:{name}", Patience(limit=2.0, notice=0.1))
    words = rf"own_scorers:{name} computed for more than 2 s \(.*own_scorers\.py:\d+\); .* reward.timeout"
    with pytest.raises(UserError, match=words):
        score.score(batch_of(["a", "b"], ["first", "second"]))
    notices = capfd.readouterr().err.splitlines()
    assert [line for line in notices if "has computed for 0.1 s" in line and "reward.timeout: 2 s" in line]
    # Nothing is left of it that could interrupt what comes next.
    assert call("own_scorers:array", ["", ""], ["", ""]) == [1.0, 1.0]


def test_a_function_that_catches_its_end_ends_with_its_process():
    code = (
        "import time\n"
        "from puzzle.rlhf.patience import Patience, patience\n"
        "with patience('the function', Patience(limit=0.1)):\n"
        "    while True:\n"
        "        try: time.sleep(60)\n"
        "        except BaseException: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: the function computed for more than 0.1 s; make it faster, or raise reward.timeout"
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("os.close(1)", "standard output"),
        ("os.close(2)", "standard error"),
        ("os.closerange(1, 3)", "standard output and standard error"),
        ("sys.stdout.close()", "standard output"),
        ("sys.stderr.close()", "standard error"),
        ("os.close(2); raise ValueError", "standard error"),
    ],
)
@pytest.mark.parametrize("imported", [False, True])
def test_a_function_that_closes_what_is_printed_to_is_named(tmp_path, line, words, imported):
    """The next file would get the number, and all that is printed; that arrives where it should."""
    call = (
        "def f(prompts, responses): return [0.0]"
        if imported
        else f"def f(prompts, responses): {line}; return [0.0]"
    )
    (tmp_path / "closes.py").write_text(f"import os, sys\n{line if imported else ''}\n{call}\n")
    code = (
        f"text = {line!r}\n"
        "import os, sys\n"
        "from puzzle.errors import UserError\n"
        "from puzzle.rlhf.rewards.functions import FunctionReward\n"
        "from puzzle.rlhf.rewards.batch import RewardBatch\n"
        "try: FunctionReward('closes:f').score(RewardBatch([''], [''], [[1]], [None], ['0'], [True]))\n"
        "except UserError as error: found = error\n"
        "file = open('next', 'w')\n"
        "print('out', flush=True)\n"
        "if sys.stderr.errors != 'backslashreplace' or 'stdout.close' in text and "
        "sys.stdout.errors != 'backslashreplace': sys.exit(9)\n"
        "print('err', found, file=sys.stderr)\n"
        "sys.stdout = sys.stderr = None\n"  # whoever takes their place closes nothing
        "os.write(1, b'end\\n'); os.write(2, b'end\\n')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    what = f"reward.function closes:f{': its import' if imported else ''} closed {words} of its process"
    assert (done.stdout, done.stderr) == ("out\nend\n", f"err {what}; leave it open\nend\n")
    assert (tmp_path / "next").read_text() == ""


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_that_was_closed_before_is_nobodys_fault(tmp_path, number):
    """A daemon may have none; characters that its encoding lacks are shown, where it is made anew."""
    (tmp_path / "closes.py").write_text("import sys\ndef f(prompts, responses): return [0.5]\n")
    code = (
        "import os\n"
        "from puzzle.rlhf.rewards.functions import FunctionReward\n"
        "from puzzle.rlhf.rewards.batch import RewardBatch\n"
        f"os.close({number})\n"
        "score = FunctionReward('closes:f').score(RewardBatch([''], [''], [[1]], [None], ['0'], [True]))\n"
        f"os.write({3 - number}, repr(score).encode())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, env=environment)
    assert (done.stderr if number == 1 else done.stdout) == b"[0.5]"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_scorers", "expected module:name"),
        (":lengths", "expected module:name"),
        ("own_scorers:absent", "has no function absent"),
        ("own_scorers:constant", "has no function constant"),
        ("own_scorers:Scorer", "has no function Scorer"),
        ("no_such_module:f", "No module named 'no_such_module'; it is looked for in .* and among installed"),
        ("no.such:f", "No module named 'no'; it is looked for"),
        (".relative:f", "its import raised TypeError"),
        ("own_scorers:later", "is async; make it a plain function"),
        ("own_scorers:yields", "yields its scores; return a list"),
        ("syntax:f", r"syntax:f: its import raised SyntaxError: .* \(.*syntax\.py:1\)"),
        ("leaves:f", r"leaves:f: its import raised SystemExit: 0 \(.*leaves\.py:1\)"),
        ("lacks:f", r"lacks:f: its import raised ModuleNotFoundError: .*absent_one.* \(.*lacks\.py:1\)"),
        ("hostile:f", "hostile:f: its import raised Ended"),
    ],
)
def test_absent_functions_are_named(name, words):
    with pytest.raises(UserError, match=words):
        FunctionReward(name)


def test_a_module_that_ends_its_process_is_found_out_in_another_one():
    with pytest.raises(UserError, match="vanishes:f: its import ended the process with exit code 0"):
        probed("vanishes:f")
    with pytest.raises(UserError, match=r"leaves:f: its import raised SystemExit: 0 \(.*leaves\.py:1\)"):
        probed("leaves:f")
    probed("own_scorers:lengths")
    assert "own_scorers" not in sys.modules


def test_a_module_whose_import_does_not_end_is_ended(tmp_path):
    """And what imported it, so that nothing waits for it."""
    source = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nwhile True: time.sleep(0.1)\n"
    (tmp_path / "endless.py").write_text(source)
    with pytest.raises(UserError, match="endless:f: its import computed for more than 3 s"):
        probed("endless:f", timeout=3.0)
    began = tmp_path / "pid"  # not there, where the host was too busy to come so far
    assert not began.exists() or not Path(f"/proc/{began.read_text()}").exists()


def test_a_fault_in_a_library_is_placed_there():
    """Where no line of the user's is to be named."""
    with pytest.raises(UserError, match=r"textwrap:indent raised AttributeError: .* \(.*textwrap\.py:\d+\)$"):
        FunctionReward("textwrap:indent").score(batch_of(["a"], ["b"]))


def test_letters_are_counted():
    score = FunctionReward("puzzle.rlhf.rewards:letter_share")
    assert score.score(batch_of(["", "", ""], ["ab c", "a1é!", ""])) == [1.0, 0.25, 0.0]


def test_sentiment_reads_the_response_alone():
    pytest.importorskip("vaderSentiment")
    score = FunctionReward("puzzle.rlhf.rewards:vader_sentiment")
    texts = ["I love it, great!", "I hate it.", "It is a table."]
    happy, sad, none = score.score(batch_of(["awful", "wonderful", "great"], texts))
    assert happy > 0.5
    assert sad < -0.3
    assert none == 0


def test_the_process_that_imports_finds_no_modules_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("multiprocessing", "types", "random", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    source = (
        "import os\nassert 'PYTHONSAFEPATH' not in os.environ\ndef score(prompts, responses): return []\n"
    )
    (tmp_path / "of_mine.py").write_text(source)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    probed("of_mine:score")
    assert "PYTHONSAFEPATH" not in os.environ
