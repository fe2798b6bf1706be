"""A recipe's model as DeepSpeed's PipelineModule takes it: a list of blocks and a loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from runtime.models import convnet, gpt, llama, mlp
from runtime.models.loss import CrossEntropy
from runtime.models.shape import DataShape
from runtime.recipe import ConvnetConfig, FactoryConfig, GptConfig, LlamaConfig, MlpConfig, ModelConfig
from storage.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A model: each block takes one tensor and returns one, the loss takes the last one and the target."""

    blocks: tuple[nn.Module, ...]
    loss: Loss

    def output(self, x: Tensor) -> Tensor:
        """What the last block returns for an input of the first."""
        for block in self.blocks:
            x = block(x)
        return x


def build_chain(config: ModelConfig, shape: DataShape) -> Chain:
    """The blocks and the loss of a [model] table; blocks of equal configuration are structurally identical.

    The values the parameters hold are torch's and mean nothing: a run starts from `initialisers`. UsageError: a family
    that does not read this data, a factory that cannot be imported or returns something else.
    """
    kind = "text" if shape.is_text else "images"
    if kind not in config.reads:
        raise UsageError(
            f"[model] family: expected one that reads {kind}, got {config.family!r}; change family or [data]"
        )
    match config:
        case GptConfig():
            return Chain(blocks=tuple(gpt.blocks(config, shape)), loss=CrossEntropy())
        case LlamaConfig():
            return Chain(blocks=tuple(llama.blocks(config, shape)), loss=CrossEntropy())
        case MlpConfig():
            return Chain(blocks=tuple(mlp.blocks(config, shape)), loss=CrossEntropy())
        case ConvnetConfig():
            return Chain(blocks=tuple(convnet.blocks(config, shape)), loss=CrossEntropy())
        case FactoryConfig():
            return factory_chain(config, shape)
    raise UsageError(f"[model] family: expected one with blocks, got {config.family!r}; choose another family")


def factory_chain(config: FactoryConfig, shape: DataShape) -> Chain:
    """The chain of `factory(shape, **arguments)`, which returns blocks, or a pair of blocks and a loss.

    This imports and runs the submitter's code, so only the submitter calls it.
    """
    blocks = load_factory(config.factory)(shape, **config.arguments)
    loss: object = CrossEntropy()
    if isinstance(blocks, tuple) and len(blocks) == 2 and not isinstance(blocks[0], nn.Module):
        blocks, loss = blocks
    if not isinstance(blocks, Sequence | nn.ModuleList | nn.Sequential) or not len(blocks):
        raise refusal(config, "a list of torch.nn.Module", type(blocks).__name__)
    strangers = [type(block).__name__ for block in blocks if not isinstance(block, nn.Module)]
    if strangers:
        raise refusal(config, "a list of torch.nn.Module", f"a list with a {strangers[0]}")
    if not callable(loss):
        raise refusal(config, "a loss callable as loss(output, target)", type(loss).__name__)
    return Chain(blocks=tuple(blocks), loss=loss)


def load_factory(path: str) -> Callable[..., object]:
    """The function at "package.module:function". UsageError: nothing of that name can be imported."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"[model] factory: expected something importable at {path!r}, got {error}; run from the folder that "
            "holds the package, or install it"
        ) from error
    if not callable(found):
        raise UsageError(
            f"[model] factory: expected a function at {path!r}, got {type(found).__name__}; name a function"
        )
    return found  # type: ignore[no-any-return]


def refusal(config: FactoryConfig, expected: str, got: str) -> UsageError:
    """The error of a factory that returned something else."""
    return UsageError(f"[model] factory {config.factory!r}: expected {expected}, got {got}; change what it returns")
