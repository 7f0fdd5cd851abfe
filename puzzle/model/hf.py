"""Hugging Face model folders in and out: config.json, safetensors (one file or several), tokenizer files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puzzle import durable
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.weights import Sliceable, fill, random_tensor
from puzzle.spec.model import Head, ModelSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_spec(folder: Path, head: Head | None = None) -> ModelSpec:
    """The model in a folder, by its config.json; UserError if there is none that the decoder computes."""
    try:
        return ModelSpec.from_hf(read_config(folder), head)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    return _read_json(folder / "config.json")


class Checkpoint:
    """The tensors of a model folder, read box by box."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in _weight_files(folder):
            try:
                self._files[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / file}: not a whole safetensors file ({error})") from None
            self._file_of |= dict.fromkeys(self._files[file].keys(), file)

    @property
    def names(self) -> set[str]:
        """Names of all tensors in the folder."""
        return set(self._file_of)

    def __getitem__(self, name: str) -> Sliceable:
        """Reads boxes of a tensor."""
        return self._files[self._file_of[name]].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def check(self, spec: ModelSpec, new_head: bool) -> None:
        """UserError unless the folder holds exactly the tensors of `spec` (a `new_head` may be missing)."""
        wanted = {tensor.name: tensor.shape for tensor in spec.tensors()}
        optional = {"score.weight"} if new_head else set()
        missing = [name for name in wanted if name not in self.names | optional]
        if missing:
            raise UserError(f"{self.folder}: {_count(missing)} missing from the weights: {missing[0]}")
        ignored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.num_layers)}
        if spec.tied or spec.head == "value":
            ignored.add("lm_head.weight")
        # The caller may have asked for the first layers of a deeper model.
        ignored |= {tensor.name for tensor in read_spec(self.folder, spec.head).tensors()}
        extra = sorted(self.names - set(wanted) - ignored)
        if extra:
            raise UserError(f"{self.folder}: {_count(extra)} in the weights but not in the model: {extra[0]}")
        for name in wanted.keys() & self.names:
            if self.shape(name) != wanted[name]:
                found = self.shape(name)
                raise UserError(f"{self.folder}: {name} has shape {found}, config.json says {wanted[name]}")


@contextmanager
def open_checkpoint(folder: Path) -> Generator[Checkpoint]:
    """The weights of a folder while the context lasts.

    UserError if absent, truncated or in another format.
    """
    with ExitStack() as stack:
        yield Checkpoint(folder, stack)


def load(decoder: Decoder, folder: Path, head_seed: int | None = None) -> tuple[str, ...]:
    """Read this stage's boxes from a folder; the names of tensors that were initialised instead.

    Given `head_seed`, a value head that the folder lacks starts at random from (head_seed, name).
    """
    tensors = {tensor.name: tensor for tensor in decoder.spec.tensors()}
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check(decoder.spec, new_head=head_seed is not None)

        def source(name: str) -> Sliceable:
            if name in checkpoint.names:
                return checkpoint[name]
            assert head_seed is not None
            return random_tensor(tensors[name], head_seed, decoder.device)

        fill(decoder, source)
        return tuple(name for name in tensors if name not in checkpoint.names)


def save(
    folder: Path,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None = None,
    shard_bytes: int = 5 << 30,
) -> None:
    """Write a model folder: config, `tensors` (whole, by name, one at a time), another folder's tokenizer.

    The folder appears, or replaces the one of that name, when it is complete.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        dtype = _write_shards(partial, tensors, shard_bytes)
        config = spec.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
        if tokenizer is not None:
            source = read_config(tokenizer) if (tokenizer / "config.json").exists() else {}
            config |= {key: source[key] for key in TOKEN_IDS if key in source}
            for name in TOKENIZER_FILES:
                if (tokenizer / name).exists():
                    shutil.copyfile(tokenizer / name, partial / name)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        durable.put(partial, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot write the model: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> str:
    """Write safetensors files of at most `shard_bytes` (or one tensor) each; the dtype's name."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total, dtype = 0, torch.float32

    def flush() -> None:
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor.detach().cpu().contiguous()
        total, dtype = total + tensor.nbytes, tensor.dtype
    flush()
    if len(shards) == 1:
        os.replace(folder / "part-0", folder / SINGLE)
    else:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {}
        for i, (file, names) in enumerate(zip(files, shards, strict=True)):
            os.replace(folder / f"part-{i}", folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return str(dtype).removeprefix("torch.")


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).exists():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX}: has no weight_map")
        files = sorted(set(map(str, weight_map.values())))
    else:
        files = [SINGLE]
    absent = [file for file in files if not (folder / file).is_file()]
    if absent and any(folder.glob("*.bin")):
        raise UserError(f"{folder}: pickled weights (*.bin) can run code; convert them to safetensors first")
    if absent:
        raise UserError(f"{folder / absent[0]}: no such file; a model folder needs safetensors weights")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder needs it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return content


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
