"""Where a weight starts: the kind and scale of each parameter's initial values, and the names parameters go by.

Only descriptions are made here. The values come from a Program over Philox words, never from a torch generator: those
differ between instruction sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from runtime.models.parts import RmsNorm
from storage.errors import UsageError

Kind = Literal["normal", "uniform", "zeros", "ones", "given"]

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.RMSNorm, RmsNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Init:
    """Initial values of one tensor.

    kind: "normal" has standard deviation `scale`, "uniform" lies in [-scale, scale), "given" is what the submitter's
    module holds (stored in the program as a constant); "zeros" and "ones" ignore `scale`.
    """

    kind: Kind
    scale: float = 0.0


ZEROS = Init(kind="zeros")
ONES = Init(kind="ones")


def local_names(blocks: Sequence[nn.Module]) -> list[dict[str, str]]:
    """For each block its parameter names, in the module's order, mapped to names in the whole model.

    For example "attention.qkv.weight" to "block003.attention.qkv.weight". Numbers are padded, so sorted names run along
    the chain. A tensor shared by two blocks has the name of the first.
    """
    digits = max(3, len(str(len(blocks) - 1)))
    first: dict[int, str] = {}
    chain: list[dict[str, str]] = []
    for index, block in enumerate(blocks):
        names = {}
        for local, parameter in block.named_parameters(remove_duplicate=False):
            names[local] = first.setdefault(id(parameter), f"block{index:0{digits}}.{local}")
        chain.append(names)
    return chain


def named_parameters(blocks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Every distinct parameter of the chain under its name in the whole model, in the order of the chain."""
    found: dict[str, nn.Parameter] = {}
    for names, block in zip(local_names(blocks), blocks, strict=True):
        for local, parameter in block.named_parameters(remove_duplicate=False):
            found.setdefault(names[local], parameter)
    return found


def decayed(blocks: Sequence[nn.Module]) -> dict[str, bool]:
    """Whether weight decay acts on a parameter: on matrices and kernels, not on biases and the scales of norms."""
    return {name: parameter.ndim >= 2 for name, parameter in named_parameters(blocks).items()}


def initialisers(blocks: Sequence[nn.Module]) -> dict[str, Init]:
    """The Init of every distinct parameter, by its name in the whole model.

    A block overrides the rules of torch with an attribute `initial`, a mapping of its own parameter names to Init; for
    a shared tensor the first block decides. UsageError: a parameter for which neither the block nor its module's type
    says anything.
    """
    found: dict[str, Init] = {}
    for names, block in zip(local_names(blocks), blocks, strict=True):
        declared: Mapping[str, Init] = getattr(block, "initial", {})
        if strangers := sorted(set(declared) - set(names)):
            raise UsageError(
                f"{type(block).__name__}.initial: expected names of the block's parameters, got {strangers[0]!r}; "
                f"use one of {', '.join(names)}"
            )
        for local, name in names.items():
            if name not in found:
                found[name] = declared.get(local) or default_initial(block, local)
    return found


def default_initial(block: nn.Module, local: str) -> Init:
    """What torch itself would draw for the parameter, from the type of the module that owns it."""
    path, _, leaf = local.rpartition(".")
    owner = block.get_submodule(path)
    if isinstance(owner, NORMS):
        return ONES if leaf == "weight" else ZEROS
    if isinstance(owner, nn.Embedding):
        return Init(kind="normal", scale=1.0)
    if isinstance(owner, nn.Linear):
        return Init(kind="uniform", scale=1 / math.sqrt(owner.in_features))
    if isinstance(owner, CONVOLUTIONS):
        fan_in = math.prod(owner.kernel_size) * owner.in_channels // owner.groups
        return Init(kind="uniform", scale=1 / math.sqrt(fan_in))
    raise UsageError(
        f"initial values of {local!r} in {type(block).__name__}: expected a parameter of a linear, convolution, "
        f"embedding or norm layer, got one of {type(owner).__name__}; "
        f"give the block an attribute initial = {{{local!r}: Init(...)}}"
    )


def transformer_initial(block: nn.Module, *, layers: int, residual: Sequence[str] = ()) -> dict[str, Init]:
    """GPT-2's convention: matrices normal with 0.02, those that write to the residual stream divided by sqrt(2 layers).

    Source: Radford et al. 2019, section 2.3. Biases start at zero; norms keep torch's rule. `residual` names the
    matrices that write to the stream.
    """
    initial = {}
    for local, parameter in block.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2:
            scale = 0.02 / math.sqrt(2 * layers) if local in residual else 0.02
            initial[local] = Init(kind="normal", scale=scale)
        elif local.endswith("bias"):
            initial[local] = ZEROS
    return initial
