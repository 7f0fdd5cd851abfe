"""The section `reward` of a run's configuration: a model, functions, servers, and how they are called."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, model_validator

from puzzle.config.sections import ModelConfig, Name, Natural, Positive, Section, Weight
from puzzle.files.limits import MOST_NAME


class RewardPart(Section):
    """One of several rewards, of which `weight` times its score counts."""

    function: str | None = Field(None, description="as reward.function")
    url: str | None = Field(None, description="as reward.url")
    weight: Weight = Field(1.0, description="may be negative")
    name: Name | None = Field(None, description="in the log; default: the function's, or the server's host")

    @model_validator(mode="after")
    def _one(self) -> RewardPart:
        if (self.function is None) == (self.url is None):
            raise ValueError("each of functions has function or url, one of them")
        if self.url is not None:
            _check_url(self.url)
        return self

    @property
    def label(self) -> str:
        """What the log calls it."""
        if self.name is not None:
            return self.name
        if self.url is not None:
            return urlsplit(self.url).netloc[:MOST_NAME]
        return str(self.function).rpartition(":")[2][:MOST_NAME]


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("url: expected http://HOST[:PORT]/PATH or https://...")
    if parts.username or parts.password:
        raise ValueError("url: the log would show its password; put a token in a variable, see token_env")


MODEL_PART = "model"
"""What the log calls the score of the reward model where functions are added to it."""


class RewardConfig(ModelConfig):
    """The reward: a model with a score head, a Python function, a server, or a weighted sum of them
    (docs/rewards.md)."""

    function: str | None = Field(
        None, description="module:name, path/file.py:name, or given: the callable that Python hands over"
    )
    url: str | None = Field(None, description="of a server that scores: http://... or https://...")
    functions: tuple[RewardPart, ...] = Field(
        (), description="several of them, which are added, also to a model's score"
    )
    weight: Weight = Field(1.0, description="of the model's score")
    workers: Natural | None = Field(
        None,
        description="processes (requests at a time) that score one response per call; null: one call with the"
        " whole batch, in a process of its own; 0: the same in the trainer's process",
    )
    timeout: Positive | None = Field(
        3600.0, description="seconds in which a batch must be scored; null: no limit"
    )
    response_timeout: Positive | None = Field(
        None, description="seconds for one response, with workers; null: no limit"
    )
    timeout_score: Weight | None = Field(
        None, description="what a response scores that took too long; null: that ends the run"
    )
    token_env: Name | None = Field(
        None, description="variable of the environment that holds the bearer token for url"
    )
    retries: Natural = Field(3, description="so often is a request repeated that found no answer")

    @model_validator(mode="after")
    def _parts_fit(self) -> RewardConfig:
        if self.url is not None:
            _check_url(self.url)
        if self.functions and (self.function is not None or self.url is not None):
            raise ValueError("give function or url (one reward), or functions (several), not both")
        names = [part.label for part in self.parts] + ([MODEL_PART] if self.functions else [])
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"functions: two are called {name!r}; give each a name")
        if self.weight != 1 and not self.has_model:
            raise ValueError("weight: is that of a model's score; give each of functions its own")
        if not self.workers:
            for key in ("response_timeout", "timeout_score"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: without workers a call has the whole batch; give workers")
        elif self.timeout_score is not None and self.response_timeout is None:
            raise ValueError("timeout_score: nothing takes too long without response_timeout")
        if self.token_env is not None and all(part.url is None for part in self.parts):
            raise ValueError("token_env: there is no url to send the token to")
        return self

    @property
    def parts(self) -> tuple[RewardPart, ...]:
        """All that is no model."""
        if self.function is None and self.url is None:
            return self.functions
        return (RewardPart(function=self.function, url=self.url),)

    @property
    def has_model(self) -> bool:
        """Whether a model scores."""
        return self.model is not None or self.init is not None
