"""A Hugging Face Hub on loopback: folders ORG/NAME below `models` and `datasets`, of one revision each."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """`asked` are the methods and paths of all requests."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[tuple[str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def revision(self, repo: Path) -> str:
        """Of what the repository holds now."""
        found = hashlib.sha1()
        for file in sorted(path for path in repo.rglob("*") if path.is_file()):
            found.update(file.read_bytes())
        return found.hexdigest()


@contextmanager
def serving(root: Path) -> Generator[Hub]:
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def log_message(self, format: str, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.hub.asked.append((self.command, self.path))
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        if parts[0] == "api" and parts[1] in ("models", "datasets") and len(parts) >= 4:
            self._api(parts[1], parts[2:], body, "recursive" in parse_qs(url.query))
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[1:] if kind == "datasets" else parts
            if len(parts) > 4 and parts[2] == "resolve":
                self._file(self.hub.root / kind / parts[0] / parts[1], parts[3], "/".join(parts[4:]))
            else:
                self._no("EntryNotFound")

    do_HEAD = do_POST = do_GET

    def _api(self, kind: str, parts: list[str], body: bytes, recursive: bool) -> None:
        repo, rest = self.hub.root / kind / parts[0] / parts[1], parts[2:]
        if not repo.is_dir():
            return self._no("RepoNotFound")
        sha = self.hub.revision(repo)
        if len(rest) > 1 and rest[1] not in ("main", sha):
            return self._no("RevisionNotFound")
        files = sorted(path for path in repo.rglob("*") if path.is_file())
        names = [file.relative_to(repo).as_posix() for file in files]
        if not rest or rest[0] == "revision":
            told: Any = {"id": f"{parts[0]}/{parts[1]}", "sha": sha, "private": False, "downloads": 0}
            told |= {"tags": [], "siblings": [{"rfilename": name} for name in names]}
        elif rest[0] == "tree":
            folder = "/".join(rest[2:])
            inside = [name for name in names if name.startswith(f"{folder}/" if folder else "")]
            told = [self._entry(repo, name) for name in inside if recursive or "/" not in name]
        else:
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            told = [self._entry(repo, name) for name in asked if name in names]
        self._say(json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _entry(self, repo: Path, name: str) -> dict[str, Any]:
        data = (repo / name).read_bytes()
        return {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
            "lastCommit": None,
        }

    def _file(self, repo: Path, revision: str, name: str) -> None:
        sha = self.hub.revision(repo) if repo.is_dir() else ""
        if revision not in ("main", sha) or not (repo / name).is_file():
            return self._no("EntryNotFound")
        data = (repo / name).read_bytes()
        self._say(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha})

    def _no(self, code: str) -> None:
        self._say(b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": "no such thing"}, 404)

    def _say(self, body: bytes, headers: dict[str, str], code: int = 200) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
