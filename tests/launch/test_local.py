import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puzzle.config.load import build
from puzzle.engine.runtime.identity import Identity, launched
from puzzle.errors import UserError
from puzzle.launch import local
from tests.helpers import PATIENCE
from tests.launch.running import config, of_test

ROOT = Path(__file__).parents[2]
TARGETS = "tests.launch.targets"
FAILING = "tests.launch.failing:meets_failure"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def pids(folder: Path, world: int, seconds: float = 60) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        texts = [p.read_text() for p in folder.glob("*.pid")]
        if len(texts) == world and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.05)
    raise AssertionError("workers did not start")


def gone(processes: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(alive, processes)):
        time.sleep(0.05)
    return not any(map(alive, processes))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_workers_meet_and_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local.run(f"{TARGETS}:add_ranks", (tmp_path,), 3, Path("ranks"))
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert [(tmp_path / f"{r}.txt").read_text() for r in range(3)] == [f"3.0 {r} {threads}" for r in range(3)]
    assert (tmp_path / "ranks/rank-002.txt").read_text() == "hello from 2\n"
    assert not (tmp_path / "ranks/rank-000.txt").exists()
    assert "RANK" not in os.environ
    assert "OMP_NUM_THREADS" not in os.environ


def test_ranks_that_share_a_device_talk_through_the_host(tmp_path):
    local.run(f"{TARGETS}:share", (tmp_path,), 3, tmp_path / "ranks")
    all_have, pair = ["staged", [6.0, 6.0], [0, 1, 2], [0]], ["staged", [0.0]]
    for rank, more in enumerate((pair, [], pair)):
        assert (tmp_path / f"{rank}.txt").read_text() == repr([*all_have, *more])


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("user", UserError, "the third prompt is empty"),
        ("disk", UserError, "somewhere/file: No space left on device"),
        ("bug", local.WorkerError, "rank 1 on .*: ValueError: a bug; its log: .*rank-001.txt"),
        ("kill", local.WorkerError, r"rank 1 on .*: killed by SIGKILL \(out of memory, or by hand\)"),
        ("terminate", local.WorkerError, r"rank 1 on .*: killed by SIGTERM \(by hand, or a scheduler\)"),
        ("leave", local.WorkerError, "rank 1 on .*: ended with exit code 0 before its work was done"),
    ],
)
def test_first_failure_ends_all_with_its_line(tmp_path, kind, error, words):
    with pytest.raises(error, match=words) as raised:
        local.run(f"{TARGETS}:fail", (tmp_path, kind), 3, tmp_path / "ranks")
    assert time.time() - (tmp_path / "1.failed").stat().st_mtime < 10
    assert gone(pids(tmp_path, 3, 1), 0)
    if kind == "bug":
        assert raised.value.code == 1
        assert "with details" in (tmp_path / "ranks/rank-001.txt").read_text()
    if kind == "kill":
        assert raised.value.code == 137
    if kind == "leave":
        assert raised.value.code == 1


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("memory", UserError, r"^CUDA out of memory on rank 1; most of it, [\d.]+ MiB, is .+: .+$"),
        ("bug", local.WorkerError, "^rank 1 on .*: ValueError: a bug; its log: .*rank-001.txt$"),
        ("file", UserError, "^checkpoint 1 failed: rank-00001.safetensors: No space left on device; free "),
    ],
)
def test_a_failure_of_one_rank_in_a_run_ends_all_within_ten_seconds(tmp_path, kind, error, words):
    """The others wait for it: in a pipeline's messages, or for its file of a checkpoint."""
    run = build(config(layout={"tp": 1, "pp": 2, "dp": 1}), str)
    with pytest.raises(error, match=words):
        local.run(FAILING, (run.resolved(), str(tmp_path), kind), 2, tmp_path / "ranks")
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 10
    assert json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])["status"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_the_parent(tmp_path, number):
    code = (
        "import sys; from pathlib import Path; from puzzle.launch import local\n"
        f"local.run('{TARGETS}:sleep', (Path(sys.argv[1]),), 2)"
    )
    marked = {**os.environ, "PUZZLE_TEST": str(tmp_path)}
    words = [sys.executable, "-c", code, str(tmp_path)]
    parent = subprocess.Popen(words, env=marked, stderr=subprocess.DEVNULL)
    workers = pids(tmp_path, 2)
    parent.send_signal(number)
    assert parent.wait(timeout=PATIENCE) != 0
    if number == signal.SIGKILL:
        assert gone(workers)
    else:  # neither workers nor what started them outlive it by a moment
        assert not of_test(tmp_path)


def test_a_dead_fork_server_is_named_and_its_workers_end(tmp_path):
    """The launcher hears of them through the server alone; they are gone before anything starts again."""
    code = (
        "import sys; from pathlib import Path; from puzzle.launch import local\n"
        "from tests.launch.test_local import alive, pids\n"
        "try: local.run(sys.argv[2], (Path(sys.argv[1]),), 2)\n"
        "except local.WorkerError as error: print(sum(map(alive, pids(Path(sys.argv[1]), 2))), error)"
    )
    marked = {**os.environ, "PUZZLE_TEST": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, str(tmp_path), f"{TARGETS}:sleep"]
    parent = subprocess.Popen(words, env=marked, stdout=subprocess.PIPE, text=True)
    workers = pids(tmp_path, 2)
    (server,) = {pid for pid, line in of_test(tmp_path).items() if "forkserver" in line} - set(workers)
    os.kill(server, signal.SIGKILL)
    (line,) = parent.communicate(timeout=PATIENCE)[0].splitlines()
    assert re.fullmatch(r"0 rank 0 on \S+: its fork server was killed by SIGKILL \(out of memory.*", line)
    assert not of_test(tmp_path)


@pytest.mark.parametrize(("target", "said"), [("accuse", "hang rank 7 hangs"), ("sleep", "told to end")])
def test_an_agent_that_is_told_to_end_hands_on_what_its_workers_have_told(tmp_path, target, said):
    """The death that it is told for may follow from what they know: a rank is killed because it hangs."""
    code = (
        "import signal, sys; from pathlib import Path; from puzzle.launch import local, network\n"
        "signal.signal(local.PEER_ENDED, local.peer_ended)\n"
        "share = local.Share(2, 0, 2, '127.0.0.1', network.listen('127.0.0.1').port)\n"
        "try: death = local.host(sys.argv[2], (Path(sys.argv[1]),), share, None)\n"
        "except ConnectionError: print('told to end')\n"
        "else: print(death.kind, death.line)"
    )
    marked = {**os.environ, "PUZZLE_TEST": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, str(tmp_path), f"{TARGETS}:{target}"]
    agent = subprocess.Popen(words, env=marked, stdout=subprocess.PIPE, text=True)
    pids(tmp_path, 2)
    agent.send_signal(local.PEER_ENDED)
    assert agent.communicate(timeout=PATIENCE)[0] == f"{said}\n"
    assert not of_test(tmp_path)


def test_the_fork_server_ends_at_once_and_what_it_forked_as_ever():
    """Of a server that clears torch away, a killed agent's host heard for seconds."""
    code = (
        "import os, sys\n"
        "class Slow:\n"
        "    def __del__(self): os.write(1, b'cleared ')\n"
        "slow = Slow()\n"
        "import puzzle.launch.inside_fork_server\n"
        "if (child := os.fork()) == 0: sys.exit(3)\n"
        "os.write(1, b'%d ' % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "raise SystemExit"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleared 3 ", "")


def test_what_ranks_are_forked_from_asks_for_no_device():
    """CUDA that was asked for anything works in no process that is forked afterwards."""
    code = (
        "import sys, torch\n"
        "asked = []\n"
        "for name, thing in list(vars(torch.cuda).items()):\n"
        "    if type(thing) is type(lambda: 0) and name != '_is_compiled':\n"
        "        setattr(torch.cuda, name, lambda *_, name=name, **__: asked.append(name))\n"
        "import puzzle.rlhf.process\n"
        "print(asked, 'puzzle.rlhf.trainer' in sys.modules)\n"
        "torch.cuda.is_available()\n"
        "print(asked)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[] True\n['is_available']\n", done.stdout + done.stderr


def test_one_process_may_die_apart_from_this_one():
    with pytest.raises(local.WorkerError, match=r"rank 0 on .*: killed by SIGABRT") as raised:
        local.run("os:abort", (), 1, apart=True)
    assert raised.value.code == 128 + signal.SIGABRT


PLACE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_one_process_is_a_plain_call(tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(local, "_resolve", lambda target: calls.append)
    for given in ("active", ""):  # how OpenMP waits is chosen before torch loads, unless given
        monkeypatch.setenv("OMP_WAIT_POLICY", given) if given else monkeypatch.delenv("OMP_WAIT_POLICY")
        local.run("nowhere:nothing", (0,), 1)
        assert os.environ["OMP_WAIT_POLICY"] == (given or "passive")
    calls.clear()
    local.run("nowhere:nothing", (1,), 1)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    local.run("nowhere:nothing", (2,), 4)
    assert calls == [1, 2]
    with pytest.raises(UserError, match=r"4 processes were started \(WORLD_SIZE\) but tp x pp x dp is 2"):
        local.run("nowhere:nothing", (3,), 2)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, Identity(1, 4, 1, 4)),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Identity(1, 4, 0, 1)),
        ({"LOCAL_WORLD_SIZE": "1"}, Identity(1, 4, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "x"}, Identity()),
        ({"RANK": "", "WORLD_SIZE": " "}, None),
        ({"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": "seven"}, None),
        ({"WORLD_SIZE": None}, "RANK=1 is set but WORLD_SIZE is not"),
        ({"RANK": ""}, "WORLD_SIZE=4 is set but RANK is not"),
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4 do not fit"),
        ({"RANK": "-1"}, "RANK=-1: expected a whole number"),
        ({"RANK": "1.0"}, "RANK=1.0: expected"),
        ({"RANK": "\u0661"}, "RANK=\u0661: expected"),
        ({"RANK": "9" * 5000}, "RANK=9+\\.\\.\\.: expected"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "do not fit"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: expected"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: expected a port"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: expected"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4 and WORLD_SIZE=4 do not fit"),
        ({"LOCAL_WORLD_SIZE": "8"}, "do not fit"),
    ],
)
def test_variables_of_launchers_are_taken_or_refused(changes: dict[str, str | None], found: object) -> None:
    values = {name: value for name, value in (PLACE | changes).items() if value is not None}
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            launched(values)
    else:
        assert launched(values) == found


def test_a_working_folder_is_no_place_for_modules(tmp_path: Path) -> None:
    """Neither the server of the ranks nor a rank, and a kill of everything leaves no temporary folder."""
    for name in ("types", "random", "calendar", "torch", "yaml", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open('imported', 'a').write('{name} ')\nraise ImportError")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = (
        "import sys; from pathlib import Path; from puzzle.launch import local\n"
        f"if __name__ == '__main__': local.run('{TARGETS}:sleep', (Path(sys.argv[1]),), 2)"
    )
    (tmp_path / "script").mkdir()
    (tmp_path / "script/start.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script/start.py"), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        start_new_session=True,
    )
    pids(tmp_path, 2, 60)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    assert not (tmp_path / "imported").exists()
    assert list(temporary.iterdir()) == []


def test_whoever_outlives_its_launcher_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setenv(local.REPORT, str(writer))
    local.report("the store does not answer", True)
    os.close(writer)
