"""Low-rank adapters (Hu et al. 2021, "LoRA", arXiv:2106.09685): a frozen matrix W acts as W + scale B A.

             x (T, in)
          +------+------+
          |             |  A (rank, in)
     W (out, in)        v
          |          (T, rank)
          |             |  B (out, rank), times alpha / rank
          +-----> + <---+
                  |
             y (T, out)

Names are those of the package peft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from puzzle.spec.tensors import Split, TensorSpec

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer, as Hugging Face names them."""


@dataclass(frozen=True)
class Lora:
    """`targets` are the adapted ones of `PROJECTIONS`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


def adapter_names(weight: str) -> tuple[str, str]:
    """Names of A and B beside the matrix called `weight`."""
    stem = weight.removesuffix("weight")
    return f"{stem}lora_A.weight", f"{stem}lora_B.weight"


def adapted(tensors: list[TensorSpec], lora: Lora) -> list[TensorSpec]:
    """A layer's tensors, frozen, with an A and a B right behind every matrix among the targets.

    Each lies where the matrix does. A matrix that is cut along its outputs has a whole A and a B cut alike;
    one that is cut along its inputs has an A cut alike and a whole B.
    """
    found = []
    for tensor in tensors:
        found.append(replace(tensor, trained=False))
        *_, module, kind = tensor.name.split(".")
        if kind != "weight" or module not in lora.targets:
            continue
        (outputs, inputs), (a, b) = tensor.shape, adapter_names(tensor.name)
        assert isinstance(tensor.split, Split), f"{tensor.name} is cut by heads or blocks"
        cut = tensor.split.dim
        sides = (None, tensor.split) if cut == 0 else (tensor.split, None)
        found.append(TensorSpec(a, (lora.rank, inputs), tensor.place, sides[0], adapter="A"))
        found.append(TensorSpec(b, (outputs, lora.rank), tensor.place, sides[1], adapter="B"))
    return found
