"""A multilayer perceptron over flattened images."""

from __future__ import annotations

from torch import Tensor, nn

from runtime.models.parts import ACTIVATIONS
from runtime.models.shape import DataShape
from runtime.recipe import MlpConfig


class Hidden(nn.Module):
    """One hidden layer; the first one flattens the image."""

    def __init__(self, features: int, width: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, ...] f32 -> [batch, width] f32."""
        y_BD: Tensor = self.dropout(self.activation(self.linear(x.flatten(1))))
        return y_BD


class Output(nn.Module):
    """The last block: logits of every class."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, ...] f32 -> logits [batch, classes] f32."""
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def blocks(config: MlpConfig, shape: DataShape) -> list[nn.Module]:
    """One block a hidden layer, then the output; weights start as torch starts them."""
    chain: list[nn.Module] = []
    features = shape.features
    for width in config.hidden:
        chain.append(Hidden(features, width, config.activation, config.dropout))
        features = width
    return [*chain, Output(features, shape.classes)]
