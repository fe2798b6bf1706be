"""GPT-2 (Radford et al. 2019): learned positions, norm before each part, causal attention, tied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.models.head import Head
from runtime.models.initial import transformer_initial
from runtime.models.parts import ACTIVATIONS
from runtime.models.shape import DataShape
from runtime.recipe import GptConfig

RESIDUAL = ("attention.output.weight", "down.weight")


class Embedding(nn.Module):
    """The first block: token plus position."""

    def __init__(self, config: GptConfig, *, vocab: int, positions: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, config.width)
        self.position = nn.Parameter(torch.zeros(positions, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.initial = transformer_initial(self, layers=config.layers)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens [batch, context] int64 -> [batch, context, width] f32."""
        length = tokens_BT.shape[1]
        position = self.position if length == self.position.shape[0] else self.position[:length]
        x_BTD: Tensor = self.dropout(self.token(tokens_BT) + position)
        return x_BTD


class Attention(nn.Module):
    """Causal multi-head attention, dropout on its weights included."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x [batch, context, width] f32 -> the same shape."""
        batch, length, width = x_BTD.shape
        qkv = self.qkv(x_BTD).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q_BHTC, k_BHTC, v_BHTC = qkv[0], qkv[1], qkv[2]
        dropout = self.dropout if self.training else 0.0
        y_BHTC = functional.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True, dropout_p=dropout)
        y_BTD: Tensor = self.output(y_BHTC.transpose(1, 2).reshape(batch, length, width))
        return y_BTD


class Layer(nn.Module):
    """One transformer layer: attention and feed-forward, each added to the stream."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = Attention(config)
        self.norm_feed = nn.LayerNorm(config.width, bias=config.bias)
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.initial = transformer_initial(self, layers=config.layers, residual=RESIDUAL)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x [batch, context, width] f32 -> the same shape."""
        x_BTD = x_BTD + self.dropout(self.attention(self.norm_attention(x_BTD)))
        fed_BTD: Tensor = self.dropout(self.down(self.activation(self.up(self.norm_feed(x_BTD)))))
        return x_BTD + fed_BTD


def blocks(config: GptConfig, shape: DataShape) -> list[nn.Module]:
    """Embedding, `layers` equal layers, head; with `tied` the head's weight is the embedding's very Parameter."""
    vocab, positions = shape.vocabulary(config.vocab), shape.positions(config.context)
    embedding = Embedding(config, vocab=vocab, positions=positions)
    norm = nn.LayerNorm(config.width, bias=config.bias)
    head = Head(norm, config.width, vocab, embedding.token if config.tied else None)
    return [embedding, *(Layer(config) for _ in range(config.layers)), head]
