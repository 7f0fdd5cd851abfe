"""From a configuration to values of `spec` and `plan`, and what can be checked before any process starts."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from puzzle.capabilities import missing
from puzzle.config import ROLES, LayoutConfig, ModelConfig, Role, TrainConfig
from puzzle.data.prompts import read_rows
from puzzle.errors import UserError, describe
from puzzle.plan.fused import why_not_fused
from puzzle.plan.layout import Layout, Placement
from puzzle.rlhf.rewards import FunctionReward
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
        config = read_model_config(f"{role}.model", Path(source.model))
    elif source.init is not None:
        base: dict[str, Any] = {"model_type": "llama"}
        if source.init.preset is not None:
            base = {k: v for k, v in published(source.init.preset).to_hf().items() if k not in _DERIVED}
        config = base | source.init.fields()
    else:
        raise UserError(f"{role}: no model; give {role}.model or {role}.init")
    try:
        spec = ModelSpec.from_hf(config, head_of(role))
    except UserError as error:
        raise UserError(f"{role}: {source.model or 'init'}: {error}") from None
    if source.layers is None:
        return spec
    if source.layers > spec.num_layers:
        raise UserError(f"{role}.layers is {source.layers}, but the model has only {spec.num_layers}")
    return replace(spec, num_layers=source.layers)


def read_model_config(key: str, folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a Hugging Face folder; UserError naming `key` if it is none."""
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "no such folder"
        hint = (
            "; puzzle convert makes a folder of it" if folder.is_file() and folder.suffix == ".gguf" else ""
        )
        raise UserError(f"{key}: {folder}: {what}{hint}")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{key}: {folder} has no config.json; it is not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{key}: {file} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{key}: {describe(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {file} holds no object")
    return config


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


def specs_of(config: TrainConfig) -> dict[str, ModelSpec]:
    """The models of the run, by role; a function reward and an unused reference are left out."""
    used = [role for role in ROLES if role in config.layouts()]
    return {role: spec_of(role, getattr(config, role)) for role in used}


def sharing_roles(config: TrainConfig) -> dict[str, list[Role]]:
    """Which models can share a pipeline, by key of `intra`, in the order in which they run."""
    used = config.layouts()
    inferred: list[Role] = ["actor"] if config.ppo.old_logprobs == "recompute" else []
    inferred += [role for role in ("reference", "critic", "reward") if role in used]
    return {"fuse_training": ["actor", "critic"], "fuse_inference": inferred}


def check(config: TrainConfig) -> None:
    """Raise UserError for what is wrong with features, files, shapes, layouts or lengths."""
    lacks = missing(config)
    if lacks:
        raise UserError(f"this version does not have: {'; '.join(lacks)}")
    specs = specs_of(config)
    for role, spec in specs.items():
        if spec.head == "value" and spec.num_labels != 1:
            raise UserError(
                f"{role}: its head has {spec.num_labels} labels, a score is 1; set num_labels to 1"
            )
    layouts = {
        name: layout_of(name, layout, specs["actor" if name == "generation" else name])
        for name, layout in config.layouts().items()
    }
    for key, roles in sharing_roles(config).items():
        reason = why_not_fused({role: Placement.default(layouts[role]) for role in roles})
        if getattr(config.intra, key) is True and reason:
            raise UserError(
                f"intra.{key}: {reason}; give all these models one pp, or set it to auto or false"
            )
    retokenised = {"reward"} if config.reward.model and config.data.prompts else set()
    reading = specs.keys() - retokenised  # these get the actor's token ids
    for role in sorted(reading):
        if specs[role].vocab_size != specs["actor"].vocab_size:
            sizes = f"{specs[role].vocab_size} tokens, the actor's {specs['actor'].vocab_size}"
            raise UserError(f"{role}: its vocabulary has {sizes}; both must read the same tokens")
    for role in ("actor", "critic"):
        if getattr(config, role).optimizer.backend == "apex" and find_spec("apex") is None:
            raise UserError(f"{role}.optimizer.backend: apex cannot be imported; install it, or choose torch")
    prompt = config.data.random_tokens or config.data.max_prompt_tokens
    longest = prompt + config.generation.max_new_tokens
    for role in sorted(reading):
        if longest > specs[role].max_positions:
            raise UserError(
                f"{role}: {prompt} prompt and {config.generation.max_new_tokens} new tokens exceed its "
                f"{specs[role].max_positions} positions; lower generation.max_new_tokens or the prompts"
            )
    for key in ("prompts", "eval_prompts"):
        path = getattr(config.data, key)
        if path is not None:
            read_rows(Path(path), config.data.field, config.data.id_field)
    if config.reward.function is not None:
        FunctionReward(config.reward.function)
