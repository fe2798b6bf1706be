"""Llama (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, grouped-query attention, no bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.models.head import Head
from runtime.models.initial import transformer_initial
from runtime.models.parts import RmsNorm
from runtime.models.shape import DataShape
from runtime.recipe import LlamaConfig

RESIDUAL = ("attention.output.weight", "down.weight")


def rotary_tables(length: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_width / 2] f32 of position x base^(-2 i / head_width), rounded from binary64.

    Computed by the submitter and stored in the program: a table that each machine made itself could be one ulp off.
    """
    frequencies = [math.pow(base, -2 * i / head_width) for i in range(head_width // 2)]
    angles = [[position * frequency for frequency in frequencies] for position in range(length)]
    cosines = torch.tensor([[math.cos(angle) for angle in row] for row in angles], dtype=torch.float64)
    sines = torch.tensor([[math.sin(angle) for angle in row] for row in angles], dtype=torch.float64)
    return cosines.float(), sines.float()


class Embedding(nn.Module):
    """The first block: one vector a token."""

    def __init__(self, config: LlamaConfig, *, vocab: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, config.width)
        self.initial = transformer_initial(self, layers=config.layers)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens [batch, context] int64 -> [batch, context, width] f32."""
        x_BTD: Tensor = self.token(tokens_BT)
        return x_BTD


class Attention(nn.Module):
    """Causal attention with rotary positions; each key and value head serves heads / kv_heads query heads."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, config: LlamaConfig, tables: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.heads, self.key_heads = config.heads, config.key_heads
        self.head_width = config.width // config.heads
        key_width = self.key_heads * self.head_width
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, key_width, bias=False)
        self.value = nn.Linear(config.width, key_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.register_buffer("cosines", tables[0], persistent=False)
        self.register_buffer("sines", tables[1], persistent=False)

    def split(self, x_BTD: Tensor, heads: int) -> Tensor:
        """[batch, context, heads x head width] -> [batch, heads, context, head width]."""
        batch, length, _ = x_BTD.shape
        return x_BTD.view(batch, length, heads, self.head_width).transpose(1, 2)

    def rotate(self, x_BHTC: Tensor) -> Tensor:
        """Each pair (i, i + head width / 2) turned by its position's angle; shape kept."""
        half = self.head_width // 2
        first, second = x_BHTC[..., :half], x_BHTC[..., half:]
        turned = (first * self.cosines - second * self.sines, second * self.cosines + first * self.sines)
        return torch.cat(turned, dim=-1)

    def shared(self, x_BKTC: Tensor) -> Tensor:
        """Key or value heads repeated for the query heads they serve: [batch, heads, context, head width]."""
        batch, key_heads, length, width = x_BKTC.shape
        if key_heads == self.heads:
            return x_BKTC
        group = self.heads // key_heads
        wide = x_BKTC[:, :, None].expand(batch, key_heads, group, length, width)
        return wide.reshape(batch, self.heads, length, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x [batch, context, width] f32 -> the same shape."""
        q_BHTC = self.rotate(self.split(self.query(x_BTD), self.heads))
        k_BHTC = self.shared(self.rotate(self.split(self.key(x_BTD), self.key_heads)))
        v_BHTC = self.shared(self.split(self.value(x_BTD), self.key_heads))
        y_BHTC = functional.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
        y_BTD: Tensor = self.output(y_BHTC.transpose(1, 2).reshape(x_BTD.shape))
        return y_BTD


class Layer(nn.Module):
    """One transformer layer: attention and SwiGLU, each added to the stream."""

    def __init__(self, config: LlamaConfig, tables: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.norm_attention = RmsNorm(config.width)
        self.attention = Attention(config, tables)
        self.norm_feed = RmsNorm(config.width)
        self.gate = nn.Linear(config.width, config.hidden_width, bias=False)
        self.up = nn.Linear(config.width, config.hidden_width, bias=False)
        self.down = nn.Linear(config.hidden_width, config.width, bias=False)
        self.initial = transformer_initial(self, layers=config.layers, residual=RESIDUAL)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x [batch, context, width] f32 -> the same shape."""
        x_BTD = x_BTD + self.attention(self.norm_attention(x_BTD))
        y_BTD = self.norm_feed(x_BTD)
        fed_BTD: Tensor = self.down(functional.silu(self.gate(y_BTD)) * self.up(y_BTD))
        return x_BTD + fed_BTD


def blocks(config: LlamaConfig, shape: DataShape) -> list[nn.Module]:
    """Embedding, `layers` equal layers, head; with `tied` the head's weight is the embedding's very Parameter."""
    vocab = shape.vocabulary(config.vocab)
    shape.positions(config.context)
    tables = rotary_tables(shape.example[0], config.width // config.heads, config.rope_base)
    embedding = Embedding(config, vocab=vocab)
    head = Head(RmsNorm(config.width), config.width, vocab, embedding.token if config.tied else None)
    return [embedding, *(Layer(config, tables) for _ in range(config.layers)), head]
