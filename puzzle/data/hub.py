"""Models and datasets by their names on the Hugging Face Hub: fetched once, then read from its cache.

A name is ORG/NAME, with @REVISION where another than `main` is meant; of a dataset also :SPLIT, or
:SUBSET:SPLIT, where a split may be a slice or a sum as the library `datasets` writes them: `train[:1%]`,
`train+test[10:20]`. What exists on this machine under such a path is that path.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from puzzle.config.base import RunConfig
from puzzle.errors import UserError, lacking

Kind = Literal["model", "dataset"]
KINDS: Mapping[str, Kind] = {
    "model": "model",
    "tokenizer": "model",
    "prompts": "dataset",
    "eval_prompts": "dataset",
    "examples": "dataset",
    "eval_examples": "dataset",
}
"""The keys of sections that may hold a name, and what it names."""
_SPLIT = r"[\w.-]+(\[[^\[\]]*\])?"
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?"
    rf"(?P<part>((?P<subset>:[\w.-]+)?:(?P<split>{_SPLIT}(\+{_SPLIT})*))?)"
)
_FEW = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")
"""What tells a model's shape and its tokenizer."""
_WEIGHTS = ("*.safetensors",)
_SHA = re.compile("[0-9a-f]{40}")
Run = TypeVar("Run", bound=RunConfig)


@dataclass(frozen=True)
class Name:
    """A name on the Hub. `part` is a dataset's :SPLIT or :SUBSET:SPLIT, `subset` and `split` are what it
    means."""

    repo: str
    revision: str | None
    part: str
    subset: str | None = None
    split: str = "train"

    @classmethod
    def of(cls, text: str, kind: Kind) -> Name | None:
        """The name that `text` is, None for what is a path."""
        found = _NAME.fullmatch(text)
        if found is None or os.path.lexists(text) or Path(text).parent.exists():
            return None
        if kind == "model" and found["part"]:
            return None
        subset, split = (found["subset"] or "").removeprefix(":") or None, found["split"] or "train"
        return cls(found["repo"], found["revision"], found["part"], subset, split)

    def pinned(self, revision: str) -> str:
        """The name of exactly these files."""
        return f"{self.repo}@{revision}{self.part}"

    def command(self, kind: Kind) -> str:
        """What fetches them into a folder."""
        options = "" if kind == "model" else " --repo-type dataset"
        options += "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repo}{options} --local-dir {self.repo.split('/')[1]}"


def localised(
    config: Run, given: Mapping[str, Any] | None, weights: bool = True
) -> tuple[Run, dict[str, Any] | None]:
    """The run with folders of this machine in the place of names on the Hub, fetched where they are not there
    yet, and what was given with their revisions pinned: a run that is resumed reads the same files.

    Without `weights`, of models only what tells their shape. Raises UserError naming the key, and how to get
    the files where there is a network.
    """
    values = config.resolved()
    kept = None if given is None else _copy(given)
    known: dict[tuple[Kind, str], tuple[str, str]] = {}
    for section, inside in values.items():
        for key, kind in KINDS.items():
            text = inside.get(key) if isinstance(inside, dict) else None
            name = Name.of(text, kind) if isinstance(text, str) else None
            if name is None or text is None:
                continue
            if (kind, text) not in known:
                known[kind, text] = fetch(f"{section}.{key}", name, kind, weights)
            folder, pinned = known[kind, text]
            inside[key] = folder
            own = (kept or {}).get(section)
            if isinstance(own, dict) and own.get(key) == text:
                own[key] = pinned
    return (type(config).model_validate(values) if known else config), kept


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def fetch(key: str, name: Name, kind: Kind, weights: bool = True) -> tuple[str, str]:
    """The folder that holds what `name` names, and the name with its revision. UserError naming `key`."""
    get: Callable[[], tuple[str, str]] = (
        (lambda: _model(name, weights)) if kind == "model" else (lambda: _dataset(name))
    )
    try:
        return get()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("puzzle"):
            raise
        raise UserError(f"{key}: {name.repo}: {lacking(error.name.partition('.')[0])}") from None
    except Exception as error:  # noqa: BLE001 - of several libraries: network, names, rights, disk
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{key}: no such folder here as {name.repo}, and the Hugging Face Hub does not give it"
            f" ({type(error).__name__}: {said[:200]}); fetch it where there is a network, by"
            f" {name.command(kind)}, and give {'that folder' if kind == 'model' else 'a file of that folder'}"
        ) from None


def _model(name: Name, weights: bool) -> tuple[str, str]:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        name.repo, revision=name.revision, allow_patterns=[*_FEW, *(_WEIGHTS if weights else ())]
    )
    return folder, name.pinned(Path(folder).name)


def _dataset(name: Name) -> tuple[str, str]:
    """A split as a saved dataset, beside the Hub's own cache: by revision, so that it is made once."""
    from huggingface_hub.constants import HF_HOME

    cache = Path(HF_HOME) / "puzzle" / name.repo.replace("/", "--")
    pointer = cache / f"revision-{(name.revision or 'main').replace('/', '--')}"
    if name.revision is not None and _SHA.fullmatch(name.revision):
        revision = name.revision
    else:
        try:
            revision = _revision(name)
            cache.mkdir(parents=True, exist_ok=True)
            pointer.write_text(revision)
        except Exception:
            if not pointer.is_file():
                raise
            revision = pointer.read_text()  # no network: what it was when there was one
    folder = cache / revision / _folder(name)
    if not folder.exists():
        _save(name, revision, folder)
    return str(folder), name.pinned(revision)


def _folder(name: Name) -> str:
    """What a split is called among those of a revision."""
    said = "-".join(filter(None, (name.subset, name.split)))
    if plain := re.fullmatch(r"[\w.-]+", said):
        return plain[0]
    # The characters of slices mean other things to programs that read folders.
    safe, digest = re.sub(r"[^\w.-]+", "_", said), hashlib.sha256(said.encode()).hexdigest()
    return f"{safe}-{digest[:8]}"


def _revision(name: Name) -> str:
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(name.repo, revision=name.revision).sha
    assert found is not None, "the Hub says the revision of what it has"
    return found


def _save(name: Name, revision: str, folder: Path) -> None:
    """Read a split of the Hub and save it; another process may do the same meanwhile."""
    from datasets import load_dataset

    found = load_dataset(name.repo, name.subset, split=name.split, revision=revision)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        found.save_to_disk(os.path.join(made, "split"))
        with suppress(OSError):  # it is there by now
            os.rename(os.path.join(made, "split"), folder)
    if not folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"{folder} cannot be made")
