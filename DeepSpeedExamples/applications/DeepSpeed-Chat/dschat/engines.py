"""The four models as DeepSpeed engines, and what the project's algorithm asks of models and of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import deepspeed
import torch
import transformers
from torch import Tensor, nn

from dschat.options import ZeroOptions
from puzzle.config.resolve import RunPlan
from puzzle.config.run import Role, TrainConfig
from puzzle.engine.pipeline.stage import OutputFn
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model.hf import open_checkpoint
from puzzle.model.logprobs import TokenStats
from puzzle.model.packing import PackedBatch
from puzzle.model.weights import random_tensor
from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.rlhf.models import DTYPES, ROLE_SEEDS, Models, OffloadPolicy, learning_rate
from puzzle.rlhf.policy_generator import PolicyGenerator
from puzzle.spec.model import ModelSpec

# The last transformers whose LLaMA layers the Hybrid Engine's kernels can replace.
HYBRID_TRANSFORMERS = (4, 35)


def hybrid_obstacle(zero: ZeroOptions, device: torch.device) -> str | None:
    """Why the Hybrid Engine cannot run here; None if it can."""
    if device.type != "cuda":
        return f"its inference kernels need a GPU, this run is on {device.type}"
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found > HYBRID_TRANSFORMERS:
        return f"it fails with transformers {transformers.__version__}, 4.35 is the last that it works with"
    if zero.inference_tp_size > 1 and zero.actor_zero_stage == 3:
        return "it fails with inference_tp_size above 1 under ZeRO-3"
    return None


class ValueModel(nn.Module):
    """A sequence classifier of one label as a model of values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_RS: Tensor) -> Tensor:
        """(R, S) outputs of the head after every token."""
        model = cast(Any, self.model)
        states = model.base_model(input_ids=input_ids_RS, use_cache=False).last_hidden_state
        return model.score(states)[..., 0]


@torch.no_grad()
def load_model(role: Role, spec: ModelSpec, config: TrainConfig, device: torch.device) -> nn.Module:
    """A transformers model with the same weights as the project's engine starts from.

    The configuration goes through `ModelSpec`, so that any transformers reads folders of any other's keys.
    """
    described = spec.to_hf()
    if spec.head == "value":
        described |= {"num_labels": 1}
    wanted = transformers.AutoConfig.for_model(**described)
    kind = (
        transformers.AutoModelForCausalLM
        if spec.head == "lm"
        else transformers.AutoModelForSequenceClassification
    )
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.dtype])  # `to(dtype)` would round the rotary tables as well
    try:
        with torch.device(device):
            model = cast(nn.Module, kind.from_config(wanted))
    finally:
        torch.set_default_dtype(dtype)
    tensors = {tensor.name: tensor for tensor in spec.tensors()}
    parameters = dict(model.named_parameters())
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[0]
        raise UserError(
            f"{role}: transformers {transformers.__version__} and the project disagree about {odd}"
        )
    seed, folder = config.seed + ROLE_SEEDS[role], getattr(config, role).model
    if folder is None:
        for name, parameter in parameters.items():
            parameter.copy_(random_tensor(tensors[name], seed, device))
        return model
    with open_checkpoint(Path(folder)) as checkpoint:
        checkpoint.check(spec, new_head=role == "critic")
        for name, parameter in parameters.items():
            if name in checkpoint.names:
                parameter.copy_(checkpoint[name][tuple(slice(0, size) for size in parameter.shape)])
            else:
                parameter.copy_(random_tensor(tensors[name], seed, device))
    return model


def checkpointing(model: Any) -> None:
    """Keep layers' inputs alone for backward passes; transformers 5 renames how to ask for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def zero_config(stage: int, offload: bool, config: TrainConfig, passes: int) -> dict[str, Any]:
    """What DeepSpeed is told of any engine; the limits of stage 3 are those of DeepSpeed-Chat."""
    where = {"device": "cpu", "pin_memory": torch.cuda.is_available()} if offload else {"device": "none"}
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 30_000_000,
            "stage3_prefetch_bucket_size": 30_000_000,
            "memory_efficient_linear": False,
            "offload_param": where,
        }
    return {
        "train_micro_batch_size_per_gpu": config.algorithm.microbatch or config.minibatch // config.world,
        "gradient_accumulation_steps": passes,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bf16"},
    }


def trained_config(
    role: Role, zero: ZeroOptions, config: TrainConfig, passes: int, cuda: bool
) -> dict[str, Any]:
    """What DeepSpeed is told of an engine with an optimizer."""
    stage = zero.actor_zero_stage if role == "actor" else zero.critic_zero_stage
    options = getattr(config, role).optimizer
    told = zero_config(stage, zero.offload, config, passes)
    if zero.offload and stage:
        told["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    told["gradient_clipping"] = options.grad_clip or 0.0
    told["zero_force_ds_cpu_optimizer"] = cuda
    values = {
        "lr": options.lr,
        "betas": options.betas,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
    }
    # On a GPU DeepSpeed's own fused or CPU Adam, as its users have it; on CPUs torch's: nothing to build.
    told["optimizer"] = {"type": "AdamW", "params": values | {"torch_adam": not cuda}}
    return told


@dataclass(frozen=True)
class Passed:
    """Results per micro-batch."""

    results: list[Tensor]


class Outputs:
    """What `puzzle.rlhf` asks of a decoder, where passes give logits (T, V) or values (T,) at once."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def parameters(self) -> Iterator[Tensor]:
        """What this process holds of the weights."""
        for parameter in self.module.parameters():
            yield getattr(parameter, "ds_tensor", parameter)

    def token_stats(
        self,
        logits: Tensor,
        rows_N: Tensor,
        targets_N: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> TokenStats:
        """float32 (N,) log-probabilities of `targets_N` after the tokens `rows_N`, and entropies."""
        chosen_NV = logits.index_select(0, rows_N).float() / temperature
        log_NV = torch.log_softmax(chosen_NV, dim=-1)
        spread = -(log_NV.exp() * log_NV).sum(-1) if entropy else None
        return TokenStats(log_NV.gather(1, targets_N[:, None])[:, 0], spread)

    def values(self, values: Tensor) -> Tensor:
        """float32 (T,)."""
        return values.float()


class ZeroModel:
    """A model under ZeRO, with what the algorithm asks of a `puzzle.engine.pipeline.model.ModelRuntime`."""

    owns_results = True

    def __init__(
        self, name: Role, spec: ModelSpec, world: World, engine: Any, rate: Callable[[int], float] | None
    ):
        self.name, self.spec, self.world, self.engine, self._rate = name, spec, world, engine, rate
        self.placement = Placement.default(Layout.even(1, 1, world.size, spec.num_layers))
        self.coord = Coord(0, 0, world.rank)
        self.tensor = SimpleNamespace(size=1)
        self.stage = SimpleNamespace(numerics=SimpleNamespace(multiple=1))  # packed tokens are not padded
        self.decoder = Outputs(engine.module)
        self._norms: list[float] = []
        self.optimizer = SimpleNamespace(pop_grad_norms=self._take_norms, release=lambda: None)
        self._steps = 0

    def rows(self, count: int) -> range:
        """This replica's rows of `count`; all have equally many."""
        each = count // self.world.size
        return range(self.world.rank * each, (self.world.rank + 1) * each)

    def collect(self, local_RS: Tensor, rows: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Every replica's rows of a tensor of `shape` on every rank."""
        whole = torch.zeros(shape, dtype=local_RS.dtype, device=self.world.device)
        whole[torch.tensor(rows, device=whole.device)] = local_RS
        return self.world.sum(whole)

    @torch.no_grad()
    def infer(self, batches: Sequence[PackedBatch], output_fn: OutputFn) -> Passed:
        """`output_fn(index, outputs)` of every batch."""
        return Passed([output_fn(i, self._forward(batch)) for i, batch in enumerate(batches)])

    def train(self, batches: Sequence[PackedBatch], loss_fn: OutputFn) -> Passed:
        """Add the gradients of all batches over all replicas, and step once."""
        self.engine.train()
        losses = []
        # DeepSpeed averages over passes and replicas; our losses are parts of one sum.
        scale = len(batches) * self.world.size
        assert self._rate is not None
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._rate(self._steps)
        for i, batch in enumerate(batches):
            loss = loss_fn(i, self._forward(batch))
            self.engine.backward(loss * scale)
            self.engine.step()
            losses.append(loss.detach())
        self._steps += 1
        norm = self.engine.get_global_grad_norm()
        self._norms.append(float("nan") if norm is None else float(norm))
        return Passed(losses)

    def _take_norms(self) -> list[float]:
        """Gradient norms of the steps since the last call."""
        norms, self._norms = self._norms, []
        return norms

    def _forward(self, batch: PackedBatch) -> Tensor:
        """Outputs at the packed tokens. Behind its end a row holds token 0, which no earlier token sees."""
        count, width = len(batch.lengths), max(batch.lengths)
        used_RS = torch.arange(width) < torch.tensor(batch.lengths)[:, None]
        used_RS = used_RS.to(batch.tokens_T.device)
        ids_RS = batch.tokens_T.new_zeros((count, width)).masked_scatter(used_RS, batch.tokens_T)
        if self.spec.head == "lm":
            outputs = self.engine(input_ids=ids_RS, use_cache=False).logits
        else:
            outputs = self.engine(ids_RS)
        return outputs.flatten(0, 1) if sum(batch.lengths) == count * width else outputs[used_RS]


def build(plan: RunPlan, zero: ZeroOptions, world: World, hybrid: bool) -> Models:
    """Every model in use, under DeepSpeed."""
    made: dict[Role, ZeroModel] = {}
    config, steps = plan.config, plan.batch.all_steps
    rows = plan.batch.minibatch // world.size
    passes = -(-rows // (config.algorithm.microbatch or rows))
    cuda = world.device.type == "cuda"
    for role, planned in plan.models.items():
        spec = planned.spec
        model = load_model(role, spec, config, world.device)
        rate = None
        if planned.trained:
            told = trained_config(role, zero, config, passes, cuda)
            if role == "actor" and hybrid:
                told["hybrid_engine"] = {
                    "enabled": True,
                    "max_out_tokens": (config.data.random_tokens or config.data.max_prompt_tokens)
                    + config.generation.max_new_tokens,
                    "inference_tp_size": zero.inference_tp_size,
                    "enable_cuda_graph": zero.enable_cuda_graph,
                    "release_inference_cache": zero.release_inference_cache,
                    "pin_parameters": not zero.unpin_actor_parameters,
                    "tp_gather_partition_size": zero.tp_gather_partition_size,
                }
            if zero.actor_gradient_checkpointing if role == "actor" else zero.critic_gradient_checkpointing:
                checkpointing(model)
            rate = learning_rate(getattr(config, role).optimizer, steps)
        else:
            stage = zero.actor_zero_stage if role == "reference" else zero.critic_zero_stage
            offload = zero.offload_reference_model and role == "reference"
            # Without an optimizer only stage 3 shards anything; offloaded weights need it.
            told = zero_config(3 if stage == 3 or offload else 0, offload, config, passes)
            model.requires_grad_(False)
        module = model if spec.head == "lm" else ValueModel(model)
        engine = deepspeed.initialize(model=module, config=told)[0]
        engine.train(rate is not None)
        made[role] = ZeroModel(role, spec, world, engine, rate)
    found: Any = made
    trained: dict[str, Any] = {role: found[role] for role in config.trained}
    return Models(found, trained, OffloadPolicy(world), PolicyGenerator(found["actor"]))
