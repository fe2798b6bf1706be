"""Model families: the [model] table of each, with its usual hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from runtime.fields import Section, about

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The [model] table of one family; `family` says which, the fields are that family's hyperparameters."""

    table: ClassVar[str] = "model"
    family: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ("text", "images")

    def as_json(self) -> dict[str, Any]:
        """The table as JSON values, with its family."""
        return {"family": self.family, **super().as_json()}


@dataclass(frozen=True, kw_only=True)
class GptConfig(ModelConfig):
    """GPT-2: learned positions, layer norm before each part, tanh-form GELU unless another activation is named."""

    family: ClassVar[str] = "gpt"
    reads: ClassVar[tuple[str, ...]] = ("text",)
    layers: int = field(metadata=about("transformer layers", low=1))
    width: int = field(metadata=about("width of the residual stream", low=1))
    heads: int = field(metadata=about("attention heads; divides width", low=1))
    vocab: int = field(default=0, metadata=about("rows of the embedding; 0 takes the tokeniser's", low=0))
    context: int = field(default=0, metadata=about("learned positions; 0 takes [data] context", low=0))
    dropout: float = field(default=0.0, metadata=about("share of activations dropped", low=0, below=1))
    tied: bool = field(default=True, metadata=about("the head uses the embedding's weights"))
    bias: bool = field(default=True, metadata=about("linear layers and norms have a bias"))
    activation: str = field(
        default="gelu", metadata=about("of the feed-forward part; gelu is the tanh form", choices=ACTIVATIONS)
    )

    def _check(self) -> None:
        if self.width % self.heads:
            raise self.refusal("width", f"a multiple of heads = {self.heads}", self.width, "change width or heads")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no bias."""

    family: ClassVar[str] = "llama"
    reads: ClassVar[tuple[str, ...]] = ("text",)
    layers: int = field(metadata=about("transformer layers", low=1))
    width: int = field(metadata=about("width of the residual stream", low=1))
    heads: int = field(metadata=about("query heads; divides width, width / heads is even", low=1))
    kv_heads: int = field(default=0, metadata=about("key and value heads; divides heads; 0 takes heads", low=0))
    hidden: int = field(
        default=0, metadata=about("width of the feed-forward part; 0 takes 8/3 width, rounded up to 32", low=0)
    )
    vocab: int = field(default=0, metadata=about("rows of the embedding; 0 takes the tokeniser's", low=0))
    context: int = field(default=0, metadata=about("positions of the rotary table; 0 takes [data] context", low=0))
    rope_base: float = field(default=10000.0, metadata=about("base of the rotary frequencies", above=1, high=1e12))
    tied: bool = field(default=False, metadata=about("the head uses the embedding's weights"))

    @property
    def key_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.kv_heads or self.heads

    @property
    def hidden_width(self) -> int:
        """Width of the feed-forward part, resolved."""
        return self.hidden or -(-8 * self.width // 96) * 32

    def _check(self) -> None:
        if self.width % (2 * self.heads):
            expected = f"a multiple of 2 heads = {2 * self.heads} (rotary pairs)"
            raise self.refusal("width", expected, self.width, "change width or heads")
        if self.heads % self.key_heads:
            raise self.refusal("kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads, "change kv_heads")


@dataclass(frozen=True, kw_only=True)
class MlpConfig(ModelConfig):
    """A multilayer perceptron over flattened images."""

    family: ClassVar[str] = "mlp"
    reads: ClassVar[tuple[str, ...]] = ("images",)
    hidden: tuple[int, ...] = field(default=(128,), metadata=about("width of each hidden layer", low=1))
    activation: str = field(default="relu", metadata=about("after each hidden layer", choices=ACTIVATIONS))
    dropout: float = field(default=0.0, metadata=about("share of activations dropped", low=0, below=1))


@dataclass(frozen=True, kw_only=True)
class ConvnetConfig(ModelConfig):
    """A residual net of 3 x 3 convolutions: `blocks` residual blocks a stage, the image halved between stages."""

    family: ClassVar[str] = "convnet"
    reads: ClassVar[tuple[str, ...]] = ("images",)
    channels: tuple[int, ...] = field(default=(16, 32), metadata=about("channels of each stage", low=1))
    blocks: int = field(default=1, metadata=about("residual blocks in a stage", low=1))
    norm: str = field(default="group", metadata=about("normalisation", choices=("group", "batch")))
    groups: int = field(default=8, metadata=about("groups of the group norm; divides every channels", low=1))

    def _unused(self) -> Mapping[str, str]:
        return {"groups": "with norm = 'batch'"} if self.norm == "batch" else {}

    def _check(self) -> None:
        if self.norm == "group" and any(channels % self.groups for channels in self.channels):
            expected = f"multiples of groups = {self.groups}"
            raise self.refusal("channels", expected, self.channels, "change channels or groups")


@dataclass(frozen=True, kw_only=True)
class FactoryConfig(ModelConfig):
    """One's own blocks: `factory(shape, **arguments)`, imported by the submitter only; `shape` describes the data."""

    family: ClassVar[str] = "factory"
    factory: str = field(metadata=about("'package.module:function' of one's own that returns the blocks"))
    arguments: Mapping[str, Any] = field(default_factory=dict, metadata=about("its keyword arguments"))

    def _check(self) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", self.factory):
            remedy = "write for example factory = 'mymodels.blocks:build'"
            raise self.refusal("factory", "'package.module:function'", self.factory, remedy)


FAMILIES: Mapping[str, type[ModelConfig]] = {
    config.family: config for config in (GptConfig, LlamaConfig, MlpConfig, ConvnetConfig, FactoryConfig)
}
