"""Where models come from: a section of the configuration to a `ModelSpec` and a `Layout`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from puzzle.config.run import LayoutConfig, ModelConfig, Role, TrainedConfig
from puzzle.errors import UserError, fetching
from puzzle.files import jsonio
from puzzle.plan.layout import Layout
from puzzle.spec.lora import Lora
from puzzle.spec.model import Head, ModelSpec
from puzzle.spec.published import published

# A published size fixes these through others unless they are given.
_DERIVED = ("architectures", "head_dim", "num_key_value_heads", "rope_parameters", "rope_scaling")


def head_of(role: Role) -> Head:
    """Which head a role's model has."""
    return "lm" if role in ("actor", "reference") else "value"


def spec_of(role: Role, source: ModelConfig) -> ModelSpec:
    """The model that `source` names, with the head of `role`; UserError naming key or file."""
    if source.model is not None:
        spec = folder_spec(f"{role}.model", Path(source.model), head_of(role))
    elif source.init is not None:
        base: dict[str, Any] = {"model_type": "llama"}
        if source.init.preset is not None:
            base = {k: v for k, v in published(source.init.preset).to_hf().items() if k not in _DERIVED}
        try:
            spec = ModelSpec.from_hf(base | source.init.fields(), head_of(role))
        except UserError as error:
            raise UserError(f"{role}: init: {error}") from None
    else:
        raise UserError(f"{role}: no model; give {role}.model or {role}.init")
    if source.layers is not None:
        if source.layers > spec.num_layers:
            raise UserError(f"{role}.layers is {source.layers}, but the model has only {spec.num_layers}")
        spec = replace(spec, num_layers=source.layers)
    lora = source.lora if isinstance(source, TrainedConfig) else None
    if lora is not None and lora.rank > spec.hidden_size:
        raise UserError(
            f"{role}.lora.rank is {lora.rank}, but no matrix of the model has more than {spec.hidden_size}"
            " (hidden_size); lower it"
        )
    return spec if lora is None else replace(spec, lora=Lora(lora.rank, lora.alpha, lora.targets))


def folder_spec(key: str, folder: Path, head: Head) -> ModelSpec:
    """The model of a Hugging Face folder by its `config.json`; UserError naming `key` and folder."""
    config = read_model_config(key, folder)
    try:
        return ModelSpec.from_hf(config, head)
    except UserError as error:
        raise UserError(f"{key}: {folder}: {error}") from None


def read_model_config(key: str, folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a Hugging Face folder; UserError naming `key` if it is none."""
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "no such folder"
        hint = (
            "; puzzle convert makes a folder of it" if folder.is_file() and folder.suffix == ".gguf" else ""
        )
        raise UserError(f"{key}: {folder}: {what}{hint}{fetching(folder)}")
    file = folder / "config.json"
    if not file.is_file():
        last = folder / "checkpoints" / "last"
        made = f" but that of a run, whose model is {last}" if (last / "config.json").is_file() else ""
        if (folder / "adapter_config.json").is_file():
            made = " but adapters, which are added to the weights in the folder around an export's"
        raise UserError(f"{key}: {folder} has no config.json; it is not a Hugging Face model folder{made}")
    try:
        return jsonio.read_object(file)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def layout_of(name: str, layout: LayoutConfig, spec: ModelSpec) -> Layout:
    """The plan's layout for one model; UserError, beginning with `name`, if the model cannot have it."""
    tp, pp, dp = layout.tp, layout.pp, layout.dp
    try:
        if layout.stages == "even":
            made = Layout.even(tp, pp, dp, spec.num_layers)
        elif layout.stages == "balanced":
            made = Layout.balanced(tp, pp, dp, spec)
        else:
            made = Layout(tp, pp, dp, tuple(int(count) for count in layout.stages))
        made.check(spec)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return made
