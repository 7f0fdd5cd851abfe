#!/usr/bin/env python
"""A reward server for `reward.url`, of the standard library alone: a start for your own.

    REWARD_TOKEN=secret python examples/reward_server.py --port 8001
    REWARD_TOKEN=secret puzzle train --config run.yaml --out runs/served \
        --reward.url http://127.0.0.1:8001/score --reward.token_env REWARD_TOKEN

A response scores the share of its words that its prompt has not. docs/rewards.md has the schema.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOST_BYTES = 256 << 20


def score(asked: dict[str, list[Any]]) -> list[float]:
    """One number per response. `asked` has prompts, responses, response_ids, messages, ids, finished and
    columns (name -> list), each list with one entry per response."""
    found = []
    for prompt, response in zip(asked["prompts"], asked["responses"], strict=True):
        known, words = set(prompt.lower().split()), response.lower().split()
        found.append(sum(word not in known for word in words) / max(1, len(words)))
    return found


class Handler(BaseHTTPRequestHandler):
    """Answers POST with {"scores": [...]}, and what is wrong with {"error": "..."}."""

    protocol_version = "HTTP/1.1"  # keeps the connection
    timeout = 600
    token = ""

    def do_POST(self) -> None:
        """Score what was sent."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True
            return self._answer(
                411 if not length.isdigit() else 413, {"error": "its length is missing or too large"}
            )
        body = self.rfile.read(int(length))
        given = self.headers.get("Authorization", "").encode()
        if self.token and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            return self._answer(401, {"error": "the token is missing or another one"})
        try:
            return self._answer(200, {"scores": score(json.loads(body))})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self._answer(400, {"error": f"{type(error).__name__}: {error}"})

    def _answer(self, status: int, what: dict[str, Any]) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a run asks often."""


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone can ask")
    parser.add_argument("--port", type=int, default=8001, help="0: any that is free")
    options = parser.parse_args()
    Handler.token = os.environ.get("REWARD_TOKEN", "")
    with ThreadingHTTPServer((options.host, options.port), Handler) as server:
        print(f"http://{server.server_address[0]}:{server.server_address[1]}/score", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
