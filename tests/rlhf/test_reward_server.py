"""Rewards of a server: real sockets on loopback, and servers that do not behave."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from puzzle.cli import main
from puzzle.errors import UserError
from puzzle.rlhf.rewards.batch import RewardBatch

pytest.importorskip("requests")

from puzzle.rlhf.rewards import server as module
from puzzle.rlhf.rewards.server import Limits, ServerReward

ROOT = Path(__file__).parents[2]
BATCH = RewardBatch(
    ["p"] * 3,
    ["a", "bb", "ccc"],
    [[1], [2, 2], [3]],
    [None, None, [{"role": "user", "content": "p"}]],
    ["x", "y", "z"],
    [True, False, True],
    {"answer": ["4", None, "5"]},
)


WORKING: dict[str, Any] = {"batch": 30.0}


class Odd(BaseHTTPRequestHandler):
    """Answers as its server's list of behaviours says, the last one again and again."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((dict(self.headers), body, self.client_address[1]))
            how = server.behaviour[min(len(server.asked), len(server.behaviour)) - 1]
        responses = body["responses"]
        if how == "stall":
            server.stalled.wait(30)
            how = "die"
        if how == "die":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if how == "trickle":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not server.stalled.wait(0.05):
                self.wfile.write(b" ")
            return
        status, content = 200, json.dumps({"scores": [float(len(r)) for r in responses]})
        if isinstance(how, int):
            status, content = how, '{"error": "because"}'
        elif how == "cut":
            content = content[:-5]
        elif how == "short":
            content = json.dumps({"scores": [1.0]})
        elif how not in ("right", "broken"):
            content = how
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) + (9 if how == "broken" else 0)))
        if status == 302:
            self.send_header("Location", "/other")
        self.end_headers()
        self.wfile.write(content.encode())
        if how == "broken":  # ends before its length
            self.close_connection = True

    def log_message(self, format, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts a server of behaviours; gives it and its URL."""
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def run(*behaviour):
        server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
        server.daemon_threads = True
        server.behaviour, server.asked = behaviour, []
        server.lock, server.stalled = threading.Lock(), threading.Event()
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_address[1]}/score"

    yield run
    for server in servers:
        server.stalled.set()
        server.shutdown()
        server.server_close()


def reward_of(url, workers=None, token_env=None, **limits):
    return ServerReward(url, token_env, workers, Limits(**{**WORKING, **limits}))


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_a_server_is_asked_with_all_that_there_is(serve, monkeypatch, workers) -> None:
    monkeypatch.setenv("REWARDS_OWN_TOKEN", " s3cret\n")
    server, url = serve("right")
    reward = reward_of(url, workers, "REWARDS_OWN_TOKEN")
    assert reward.columns(["answer", "ids"], "data") == ["answer"]
    assert [reward.score(BATCH) for _ in range(3)] == [[1.0, 2.0, 3.0]] * 3
    assert len(server.asked) == (9 if workers else 3)
    assert {headers["Authorization"] for headers, _, _ in server.asked} == {"Bearer s3cret"}
    assert len({port for _, _, port in server.asked}) <= (workers or 1)  # connections are kept
    if workers is None:
        assert server.asked[0][1] == {
            "prompts": ["p", "p", "p"],
            "responses": ["a", "bb", "ccc"],
            "response_ids": [[1], [2, 2], [3]],
            "messages": [None, None, [{"role": "user", "content": "p"}]],
            "ids": ["x", "y", "z"],
            "finished": [True, False, True],
            "columns": {"answer": ["4", None, "5"]},
        }
    else:
        assert sorted(body["responses"] for _, body, _ in server.asked[:3]) == [["a"], ["bb"], ["ccc"]]
        assert all(len(body["columns"]["answer"]) == 1 for _, body, _ in server.asked)


@pytest.mark.parametrize("first", [("die",), (503,), (429, 500), ("broken",)])
def test_it_is_asked_again_where_that_may_help(serve, first) -> None:
    server, url = serve(*first, "right")
    assert reward_of(url).score(BATCH) == [1.0, 2.0, 3.0]
    assert len(server.asked) == len(first) + 1


def test_names_and_passwords_of_this_host_are_not_sent(serve, monkeypatch, tmp_path) -> None:
    """A ~/.netrc is for others; a server gets the token that it was given, or nothing."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server, url = serve("right")
    reward_of(url).score(BATCH)
    monkeypatch.setenv("REWARDS_OWN_TOKEN", "s3cret")
    reward_of(url, None, "REWARDS_OWN_TOKEN").score(BATCH)
    assert [headers.get("Authorization") for headers, _, _ in server.asked] == [None, "Bearer s3cret"]


NONSENSE = [
    ("short", "gave 1 scores for 3 responses"),
    ("cut", r"answered '.*scores.*', which is no JSON"),
    ("<html>", "answered '<html>', which is no JSON"),
    ("", "answered '', which is no JSON"),
    ("[1, 2, 3]", r'answered \[1, 2, 3\]; answer \{"scores": \[a number per response\]\}'),
    ('{"score": [1, 2, 3]}', "answered {'score': .*; answer"),
    ('{"scores": [1, NaN, 3]}', r"gave nan for the response 'bb' \(2 of 3\)"),
    ('{"scores": [1, 2, null]}', r"gave None for the response 'ccc' \(3 of 3\)"),
    ('{"scores": [1, "2", 3]}', r"gave '2' for the response 'bb' \(2 of 3\)"),
    ('{"scores": [1e300, 2, 3]}', "gave 1e.300 for the response 'a' .*float32 ends"),
    (401, "cannot be used: it answered 401 Unauthorized: .*because.*; see reward.token_env"),
    (404, "cannot be used: it answered 404 Not Found"),
    (302, "cannot be used: it answered 302 Found"),
]


@pytest.mark.parametrize(("how", "words"), NONSENSE)
def test_nonsense_is_named_and_not_asked_for_again(serve, how, words) -> None:
    server, url = serve(how)
    with pytest.raises(UserError, match=f"^reward.url {url} {words}") as raised:
        reward_of(url).score(BATCH)
    assert "\n" not in str(raised.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("die", "failed 3 times: .*(closed|reset|abort)"),
        (503, "failed 3 times: it answered 503"),
        ("broken", "failed 3 times: .*(more expected|Incomplete)"),
    ],
)
def test_a_server_that_fails_for_good(serve, how, words) -> None:
    server, url = serve(how)
    with pytest.raises(UserError, match=f"^reward.url {url} {words}"):
        reward_of(url, retries=2).score(BATCH)
    assert len(server.asked) == 3


@pytest.mark.parametrize("how", ["stall", "trickle"])
def test_a_server_that_does_not_come_to_an_end(serve, how) -> None:
    _, url = serve(how)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=f"^reward.url {url} gave no scores in time: .*; raise reward.timeout"
    ):
        reward_of(url, batch=1.0).score(BATCH)
    assert time.monotonic() - began < 25


def test_one_response_that_takes_too_long(serve) -> None:
    server, url = serve("right", "stall", "right")
    late: dict[str, Any] = {"workers": 1, "response": 0.5, "retries": 0}
    assert reward_of(url, **late, late_score=-2.0).score(BATCH) == [1.0, -2.0, 3.0]
    server.asked.clear()
    words = r"at response 2 of 3 \('bb'\) gave no scores in time: .*; raise reward.response_timeout"
    with pytest.raises(UserError, match=words):
        reward_of(url, **late).score(BATCH)


def test_nobody_listens_and_no_token(monkeypatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port}/s failed 2 times: .*refused"):
        reward_of(f"http://127.0.0.1:{port}/s", retries=1).score(BATCH)
    monkeypatch.delenv("REWARDS_OWN_TOKEN", raising=False)
    with pytest.raises(UserError, match="the environment has no REWARDS_OWN_TOKEN; set it to the token of"):
        reward_of("http://127.0.0.1/", None, "REWARDS_OWN_TOKEN")


@pytest.fixture
def example():
    """The example's server, with a token; gives process and URL."""
    command = [sys.executable, str(ROOT / "examples/reward_server.py"), "--port", "0"]
    environment = {**os.environ, "REWARD_TOKEN": "right"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


CONFIG = """\
iterations: 2
batch: 2
actor:
  init: {vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
         num_attention_heads: 2, max_position_embeddings: 64}
data: {prompts: prompts.txt, tokenizer: bytes, max_prompt_tokens: 24}
generation: {max_new_tokens: 9}
checkpoint: {save: false}
log: {plots: false}
"""


def test_a_run_with_the_example_and_one_whose_server_was_killed(
    tmp_path, monkeypatch, capsys, example
) -> None:
    process, url = example
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    options = ["--config", "run.yaml", "--reward.url", url, "--reward.token_env", "REWARDS_OWN_TOKEN"]
    monkeypatch.setenv("REWARDS_OWN_TOKEN", "right")
    assert main(["train", *options, "--out", "out"]) == 0
    for row in map(json.loads, (tmp_path / "out/samples.jsonl").read_text().splitlines()):
        words = row["response"].lower().split()
        new = [word for word in words if word not in row["prompt"].split()]
        assert row["reward"] == pytest.approx(len(new) / max(1, len(words)))
    assert "right" not in (tmp_path / "out/run.jsonl").read_text()  # the token
    monkeypatch.setenv("REWARDS_OWN_TOKEN", "wrong")
    capsys.readouterr()
    assert main(["train", *options, "--out", "other"]) == 2
    assert "cannot be used: it answered 401 Unauthorized" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert main(["train", *options, "--out", "third", "--reward.retries", "0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: reward.url {url} failed: ")
    assert err.count("\n") == 1
