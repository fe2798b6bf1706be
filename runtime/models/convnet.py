"""A residual convolutional net (He et al. 2015): stem, stages of residual blocks, global average pool, linear."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from runtime.models.shape import DataShape
from runtime.recipe import ConvnetConfig


def norm(config: ConvnetConfig, channels: int) -> nn.Module:
    """Group norm, or batch norm by the micro-batch's own statistics: running averages would be hidden state."""
    if config.norm == "group":
        return nn.GroupNorm(config.groups, channels)
    return nn.BatchNorm2d(channels, track_running_stats=False)


def convolution(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image's size, up to its stride; no bias, since a norm follows."""
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class Stem(nn.Module):
    """The first block: from the image's channels to the first stage's."""

    def __init__(self, config: ConvnetConfig, channels: int) -> None:
        super().__init__()
        self.convolution = convolution(channels, config.channels[0])
        self.norm = norm(config, config.channels[0])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x [batch, channels, height, width] f32 -> [batch, first channels, height, width] f32."""
        return functional.relu(self.norm(self.convolution(x_BCHW)))


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is a 1 x 1 convolution where the size changes."""

    def __init__(self, config: ConvnetConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.first_norm = norm(config, outputs)
        self.second = convolution(outputs, outputs)
        self.second_norm = norm(config, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, size=1, stride=stride), norm(config, outputs))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x [batch, inputs, height, width] f32 -> [batch, outputs, height / stride, width / stride] f32, rounded up."""
        y_BCHW = functional.relu(self.first_norm(self.first(x_BCHW)))
        return functional.relu(self.second_norm(self.second(y_BCHW)) + self.shortcut(x_BCHW))


class Pool(nn.Module):
    """The last block: the mean over each channel's pixels, then logits of every class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x [batch, channels, height, width] f32 -> logits [batch, classes] f32."""
        logits: Tensor = self.linear(x_BCHW.mean((2, 3)))
        return logits


def blocks(config: ConvnetConfig, shape: DataShape) -> list[nn.Module]:
    """Stem, then one block a residual block, then the pool; weights start as torch starts them."""
    chain: list[nn.Module] = [Stem(config, shape.example[0])]
    inputs = config.channels[0]
    for stage, outputs in enumerate(config.channels):
        for index in range(config.blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            chain.append(Residual(config, inputs, outputs, stride))
            inputs = outputs
    return [*chain, Pool(inputs, shape.classes)]
