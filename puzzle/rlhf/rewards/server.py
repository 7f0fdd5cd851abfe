"""Rewards of a server: JSON out, JSON in (docs/rewards.md has the schema)."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle.errors import UserError, lacking
from puzzle.files.jsonio import RepeatedKey, parse
from puzzle.rlhf.patience import TookTooLong
from puzzle.rlhf.rewards.batch import ARGUMENTS, Arriving, RewardBatch
from puzzle.rlhf.rewards.scores import checked_scores, shown

AGAIN = (408, 429, 500, 502, 503, 504)
"""Status codes that say: try again later."""
BACKOFF_SECONDS = 0.5
MOST_BACKOFF_SECONDS = 30.0
CONNECT_SECONDS = 10.0
MOST_BYTES = 256 << 20
"""Of an answer; scores of 2^20 responses are less."""


@dataclass(frozen=True)
class Limits:
    """Seconds (None: no limit) for a batch and for a request about one response, and how often a request is
    repeated; `late_score` is what a response scores that took too long, None where that ends the run."""

    batch: float | None = None
    response: float | None = None
    retries: int = 3
    late_score: float | None = None


class _Failed(Exception):
    """A request found no answer; another one may."""


class ServerReward:
    """One server. A request has the whole batch, or one response where `workers` go out at a time."""

    def __init__(self, url: str, token_env: str | None, workers: int | None, limits: Limits) -> None:
        """UserError where the token's variable is not set, or the package requests is missing."""
        try:
            import requests
            import requests.adapters
            import urllib3
        except ImportError:
            raise UserError(f"reward.url {url}: {lacking('requests')}") from None
        self.what = f"reward.url {url}"
        self._url, self._limits, self._workers = url, limits, workers or 0
        self.each = self._workers > 0
        self._errors: Any = requests.exceptions
        self._broken: Any = urllib3.exceptions.HTTPError
        self._session: Any = requests.Session()  # which keeps connections
        self._session.mount(url, requests.adapters.HTTPAdapter(pool_maxsize=max(1, self._workers)))
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if token_env is not None:
            token = os.environ.get(token_env, "").strip()
            if not token:
                raise UserError(
                    f"reward.token_env: the environment has no {token_env}; set it to the token of {url}"
                )
            self._headers["Authorization"] = f"Bearer {token}"

    def columns(self, names: Collection[str], source: str) -> list[str]:
        """All of them."""
        return [name for name in names if name not in ARGUMENTS]

    def score(self, batch: RewardBatch) -> list[float]:
        """Scores, one per response. UserError with one line that names the server for whatever went wrong."""
        if not self.each:
            return self._ask(batch, 0, len(batch), self._until(time.monotonic()))
        arriving = Arriving(len(batch))
        for row in range(len(batch)):
            arriving.put(row, batch.row(row))
        return self.score_each(arriving)

    def _until(self, began: float | None) -> float:
        """When the scores of a batch must be there; None: it is not whole yet."""
        return math.inf if self._limits.batch is None or began is None else began + self._limits.batch

    def score_each(self, arriving: Arriving) -> list[float]:
        """The same of responses as they come; the batch's time begins with the last one."""
        found: dict[int, float | BaseException] = {}
        threads = [
            threading.Thread(target=self._ask_each, args=(arriving, found), daemon=True)
            for _ in range(min(self._workers, arriving.count))
        ]  # an executor's threads would be awaited at exit, whatever the server does
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for row in sorted(found):
            if isinstance(score := found[row], BaseException):
                raise score
        return [float(found[row]) for row in range(arriving.count)]  # ty: ignore[invalid-argument-type]

    def _ask_each(self, arriving: Arriving, found: dict[int, float | BaseException]) -> None:
        """Take responses until none is left, or one has failed."""
        while (taken := arriving.get()) is not None:
            row, one = taken
            try:
                found[row] = self._ask(one, row, arriving.count, self._until(arriving.whole_at))[0]
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                until = self._until(arriving.whole_at)
                late = isinstance(error, TookTooLong) and time.monotonic() < until
                score = self._limits.late_score if late else None
                found[row] = error if score is None else score
                if score is None:
                    arriving.stop()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _ask(self, batch: RewardBatch, first: int, of: int, until: float) -> list[float]:
        """Scores of the responses from number `first` of `of`."""
        at = f" at response {first + 1} of {of} ({shown(batch.responses[0])})" if self._workers else ""
        what, own = self.what + at, self._limits.response if self._workers else None
        end = until if own is None else min(until, time.monotonic() + own)
        body = request_body(batch)
        for attempt in range(self._limits.retries + 1):
            wait = min(BACKOFF_SECONDS * 2**attempt, MOST_BACKOFF_SECONDS)
            try:
                answer = self._post(body, end)
                break
            except _Failed as error:
                if time.monotonic() + wait >= end:
                    key = "reward.timeout" if end == until else "reward.response_timeout"
                    raise TookTooLong(f"{what} gave no scores in time: {error}; raise {key}") from None
                if attempt == self._limits.retries:
                    times = f" {attempt + 1} times" if attempt else ""
                    raise UserError(f"{what} failed{times}: {error}") from None
            except UserError as error:
                raise UserError(f"{what} {error}") from None
            time.sleep(wait)
        return checked_scores(self.what, _scores(what, answer), batch.responses, first, of)

    def _post(self, body: bytes, end: float) -> bytes:
        """The bytes of an answer. _Failed where another request may help, UserError where none will, both
        without a name."""
        errors, left = self._errors, end - time.monotonic()
        if left <= 0:
            raise _Failed("no time was left for a request")
        read = None if left == math.inf else left
        try:
            with self._session.post(
                self._url,
                data=body,
                headers=self._headers,
                timeout=(min(CONNECT_SECONDS, left), read),
                allow_redirects=False,
                auth=lambda request: request,  # else ~/.netrc would have its say
                stream=True,
            ) as answer:
                content = self._read(answer, end)
                if answer.status_code == 200:
                    return content
                said = f"it answered {answer.status_code} {answer.reason or ''}".rstrip()
                said += f": {shown(content.decode('utf-8', 'replace'), 80)}" if content.strip() else ""
        except errors.Timeout as error:
            kind = "connection" if isinstance(error, errors.ConnectTimeout) else "answer"
            raise _Failed(
                f"no {kind} in {min(left, CONNECT_SECONDS) if kind != 'answer' else left:.3g} s"
            ) from None
        except errors.SSLError as error:
            raise UserError(f"has no certificate that holds: {_reason(error)}") from None
        except (errors.ConnectionError, self._broken) as error:
            raise _Failed(_reason(error)) from None
        except errors.RequestException as error:
            raise UserError(f"cannot be asked: {_reason(error)}") from None
        if answer.status_code in AGAIN:
            raise _Failed(said)
        hint = {401: "; see reward.token_env", 403: "; see reward.token_env"}.get(answer.status_code, "")
        raise UserError(f"cannot be used: {said}{hint}")

    def _read(self, answer: Any, end: float) -> bytes:
        """What comes before the time is over, however slowly."""
        parts, size = [], 0
        while part := answer.raw.read1(1 << 16, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise UserError(f"answered more than {MOST_BYTES >> 20} MiB")
            if time.monotonic() >= end:
                raise _Failed("its answer came too slowly")
        return b"".join(parts)


def request_body(batch: RewardBatch) -> bytes:
    """The JSON of a request; what JSON lacks (dates, bytes) goes as text."""
    whole: dict[str, Any] = {name: getattr(batch, name) for name in ARGUMENTS}
    whole["columns"] = batch.columns
    return json.dumps(whole, default=str).encode()


def _scores(what: str, answer: bytes) -> Sequence[Any]:
    """The list in an answer; UserError for an answer without one."""
    try:
        found = parse(answer, what)
    except RepeatedKey:
        raise
    except UserError:
        text = shown(answer.decode("utf-8", "replace"))
        raise UserError(f"{what} answered {text}, which is no JSON") from None
    scores = found.get("scores") if isinstance(found, Mapping) else None
    if not isinstance(scores, list):
        raise UserError(f'{what} answered {shown(found)}; answer {{"scores": [a number per response]}}')
    return scores


def _reason(error: BaseException) -> str:
    """What is at the bottom of an error of requests, in few words."""
    inner: Any = error
    while (deeper := inner.__cause__ or inner.__context__ or getattr(inner, "reason", None)) is not None:
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    text = " ".join(str(inner).split()) or type(inner).__name__
    return text if len(text) <= 200 else text[:197] + "..."
