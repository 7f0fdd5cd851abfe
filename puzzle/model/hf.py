"""Hugging Face model folders in and out: config.json, safetensors (one file or several), tokenizer files."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puzzle.errors import UserError, fetching
from puzzle.files import durable
from puzzle.files.jsonio import Fields, read_object, shown
from puzzle.model import peft
from puzzle.model.decoder import Decoder
from puzzle.model.rope import frequencies
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
)
DTYPES = ("F64", "F32", "F16", "BF16")
"""What weights may be stored as: integers and 8-bit floats mean nothing without scales."""


def read_spec(folder: Path, head: Head | None = None) -> ModelSpec:
    """The model in a folder, by its config.json; UserError if there is none that the decoder computes."""
    try:
        return ModelSpec.from_hf(read_config(folder), head)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder{fetching(folder)}")
    return read_object(folder / "config.json")


class Loaded(NamedTuple):
    """Names of tensors: those `initialised` instead of read, and those in the files that nothing reads."""

    initialised: tuple[str, ...]
    unused: tuple[str, ...]

    def warn(self, folder: Path) -> None:
        """Say on standard error what is not read."""
        if self.unused:
            print(
                f"warning: {folder}: {_count(list(self.unused))} not used: {self.unused[0]}", file=sys.stderr
            )


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
            for name in self._files[file].keys():  # noqa: SIM118 - no dictionary
                if name in self._file_of:
                    both = f"{self._file_of[name]} and {file}"
                    raise UserError(f"{folder}: {both} both hold {shown(name)}; remove one of them")
                self._file_of[name] = file
        absent = [name for name, file in _weight_map(folder).items() if self._file_of.get(name) != file]
        if absent:
            raise UserError(f"{folder / INDEX}: {shown(absent[0])} is not in the file that it names")

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
        wanted = {tensor.name: tensor.shape for tensor in spec.base.tensors()}
        optional = {"score.weight"} if new_head else set()
        missing = [name for name in wanted if name not in self.names | optional]
        if missing:
            raise UserError(f"{self.folder}: {_count(missing)} missing from the weights: {missing[0]}")
        extra = sorted(self.names - set(wanted) - self._known(spec))
        if extra:
            raise UserError(
                f"{self.folder}: {_count(extra)} in the weights but not in the model: {shown(extra[0])}"
            )
        for name in (name for name in wanted if name in self.names):
            file = self.folder / self._file_of[name]
            tensor = self._files[self._file_of[name]].get_slice(name)
            if tuple(tensor.get_shape()) != wanted[name]:
                found = tuple(tensor.get_shape())
                raise UserError(f"{file}: {name} has shape {found}, config.json says {wanted[name]}")
            if tensor.get_dtype() not in DTYPES:
                known = ", ".join(DTYPES)
                raise UserError(f"{file}: {name} is stored as {tensor.get_dtype()}; weights must be {known}")
        if spec.tied and "lm_head.weight" in self.names:
            self._check_shape_of_tied(wanted["model.embed_tokens.weight"])

    def _known(self, spec: ModelSpec) -> set[str]:
        """What may be in the files without being read, and why it changes nothing or was asked for."""
        # Buffers that follow from config.json, as old versions of transformers saved them.
        known = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.num_layers)}
        # The caller may have asked for the first layers of a deeper model.
        known |= {tensor.name for tensor in read_spec(self.folder, spec.head).tensors()}
        # `_Weights` compares a tied head with the embedding; a value head takes its place.
        if spec.tied or spec.head == "value":
            known.add("lm_head.weight")
        return known

    def unused(self, spec: ModelSpec) -> tuple[str, ...]:
        """Tensors that nothing reads though they may mean something: a language head beside a value head, or
        rotary frequencies that are not those of config.json."""
        beside = spec.head == "value" and {"score.weight", "lm_head.weight"} <= self.names
        found = ["lm_head.weight"] if beside else []
        plain = replace(spec.rope, scaling="default")
        known = [frequencies(rope, spec.head_dim) for rope in (spec.rope, plain)]
        for name in sorted(name for name in self.names if name.endswith("rotary_emb.inv_freq")):
            values = self[name][(slice(None),)].float()
            # Half precision keeps the smallest ones to a few percent.
            if not any(values.shape == f.shape and torch.allclose(values, f, 0.02, 1e-6) for f in known):
                found.append(name)
        return tuple(found)

    def _check_shape_of_tied(self, wanted: tuple[int, ...]) -> None:
        if self.shape("lm_head.weight") != wanted:
            raise UserError(_untied(self.folder))


class _Weights:
    """A tensor of a folder, whose boxes are checked as they are read."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype, twin: str | None) -> None:
        """Boxes are given in `dtype`; `twin` names a tensor that must be the same."""
        self._checkpoint, self._name, self._dtype, self._twin = checkpoint, name, dtype, twin

    def __getitem__(self, slices: tuple[slice, ...], /) -> Tensor:
        """The box cut out by one slice per dimension. UserError for numbers that are not finite."""
        box = self._checkpoint[self._name][slices]
        if self._twin is not None and not torch.equal(box, self._checkpoint[self._twin][slices]):
            raise UserError(_untied(self._checkpoint.folder))
        values = box.to(self._dtype)
        # The sum is not finite if any value is not; finite ones may have such a sum too.
        if not values.float().sum().isfinite() and not values.isfinite().all():
            kind = str(self._dtype).removeprefix("torch.")
            raise UserError(
                f"{self._checkpoint.folder}: {self._name} holds NaN or infinite numbers as {kind}; "
                "no model comes of such weights"
            )
        return values


def _untied(folder: Path) -> str:
    return (
        f"{folder}: config.json says tie_word_embeddings, but lm_head.weight differs from the embedding; "
        "set it to false to use both"
    )


@contextmanager
def open_checkpoint(folder: Path) -> Generator[Checkpoint]:
    """The weights of a folder while the context lasts.

    UserError if absent, truncated or in another format.
    """
    with ExitStack() as stack:
        yield Checkpoint(folder, stack)


def check_weights(folder: Path, spec: ModelSpec, new_head: bool = False) -> None:
    """UserError unless the folder holds what `load` will read, by names, shapes and dtypes."""
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check(spec, new_head)


def load(
    decoder: Decoder,
    folder: Path,
    head_seed: int | None = None,
    tick: Callable[[], None] = lambda: None,
    *,
    adapter_seed: int = 0,
) -> Loaded:
    """Read this stage's boxes from a folder.

    Given `head_seed`, a value head that the folder lacks starts at random from (head_seed, name); adapters do
    from (adapter_seed, name). `tick` is called as `weights.fill` does.
    """
    tensors = {tensor.name: tensor for tensor in decoder.spec.tensors()}
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check(decoder.spec, new_head=head_seed is not None)
        tied = decoder.spec.tied and "lm_head.weight" in checkpoint.names
        twins = {"model.embed_tokens.weight": "lm_head.weight"} if tied else {}

        def source(name: str) -> Sliceable:
            if name in checkpoint.names:
                return _Weights(checkpoint, name, decoder.dtype, twins.get(name))
            seed = adapter_seed if tensors[name].adapter else head_seed
            assert seed is not None
            return random_tensor(tensors[name], seed, decoder.device)

        fill(decoder, source, tick)
        initialised = tuple(name for name in tensors if name not in checkpoint.names)
        return Loaded(initialised, checkpoint.unused(decoder.spec))


def save(
    folder: Path,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None = None,
    shard_bytes: int = 5 << 30,
    gate: AbstractContextManager[object] | None = None,
    *,
    more: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> None:
    """Write a model folder: config, `tensors` (whole, by name, one at a time), another folder's tokenizer.

    `more` are further keys of config.json; `generation` is what generation_config.json says (None: there is
    none). Adapters are added to the weights, and lie beside them in a folder of their own that names the
    `base`'s. The folder appears, or replaces the one of that name, when it is complete; while it does, `gate`
    is held.
    """
    trained: dict[str, Tensor] = {}
    if spec.lora is not None:
        tensors = peft.merged(spec, tensors, trained)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        dtype = _write_shards(partial, tensors, shard_bytes)
        config = spec.to_hf() | {"dtype": dtype, "torch_dtype": dtype} | dict(more or {})
        for name in TOKENIZER_FILES:
            if tokenizer is not None and (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, partial / name)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if spec.lora is not None:
            peft.write(partial / peft.FOLDER, spec, trained, base)
        if generation is not None:
            (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        durable.put(partial, folder, gate or nullcontext())
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
        part = folder / f"part-{len(shards)}"
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        save_file(held, part, metadata={"format": "pt"})
        part.chmod(mode)  # safetensors puts a temporary file in its place, which others cannot read
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


def _weight_map(folder: Path) -> dict[str, str]:
    """File by tensor, as the index of a folder with several files says; empty where there is none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    found = Fields(read_object(path), str(path)).section("weight_map")
    if not found.values:
        raise UserError(f"{path}: its weight_map is empty")
    for name in found:
        file = found.text(name)
        if Path(file).name != file or file in ("", ".", "..") or len(file) > 255:
            raise UserError(f"{path}: {shown(file)} must be a file of the same folder")
    return dict(found.values)


def _weight_files(folder: Path) -> list[str]:
    files = sorted(set(_weight_map(folder).values())) or [SINGLE]
    absent = [file for file in files if not (folder / file).is_file()]
    if absent and any(folder.glob("*.bin")):
        raise UserError(f"{folder}: pickled weights (*.bin) can run code; convert them to safetensors first")
    if absent:
        raise UserError(f"{folder / absent[0]}: no such file; a model folder needs safetensors weights")
    if files != [SINGLE] and (folder / SINGLE).exists():
        raise UserError(f"{folder}: has {SINGLE} and {INDEX}, which names other files; remove one of them")
    return files


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
