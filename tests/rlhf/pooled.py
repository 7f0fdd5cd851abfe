"""Reward functions that do what they are told."""

import sys

from puzzle.rlhf.rewards.pool import Limits, PoolReward
from puzzle.rlhf.rewards.worker import Setup

MODULE = """
import ctypes, os, signal, subprocess, sys, time
def lengths(prompts, responses, weight):
    return [w * len(p + r) for p, r, w in zip(prompts, responses, weight)]
def vowels(responses): return [sum(c in "aeiou" for c in r) for r in responses]
def pid(responses): time.sleep(0.05); return [os.getpid()] * len(responses)
def all_at_once(responses): return [len(responses)] * len(responses)
def at(responses, ids, event):
    for response, what in zip(responses, event):
        if what == "exit": os._exit(3)
        if what == "leave": os._exit(0)
        if what == "sysexit": sys.exit("no more")
        if what == "raise": raise ValueError("odd one")
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "close": os.closerange(3, 1024)
        if what == "sleep": time.sleep(60)
        if what == "nan": return [float("nan")]
        if what == "native": ctypes.PyDLL(None).usleep(60_000_000)
        if what == "stubborn":
            while True:
                try: time.sleep(60)
                except BaseException: pass
        if what == "fork": os.fork()
        if what == "daemon":
            if not os.fork():
                os.setsid(); time.sleep(60); os._exit(0)
            os._exit(4)
        if what == "print":
            print("printed"); print("on stderr", file=sys.stderr); os.write(1, b"raw bytes"); sys.stdin.read()
        if what == "child": subprocess.run([sys.executable, "-c", "pass"], check=True)
    return [float(len(r)) for r in responses]
def slow(responses): time.sleep(0.5); return [0.0] * len(responses)
"""


def laid_out(tmp_path, monkeypatch):
    """A fixture: a working folder with those functions."""
    (tmp_path / "pooled.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("puzzle.rlhf.rewards.pool.GRACE_SECONDS", 3.0)
    yield tmp_path
    sys.modules.pop("pooled", None)


def pooled(name, workers, response=None, whole=None, late_score=None):
    limit, key = (response, "reward.response_timeout") if workers else (whole, "reward.timeout")
    setup = Setup(f"pooled:{name}", limit, 60.0, key)
    return PoolReward(setup, workers, Limits(whole, response, 60.0, late_score))
