"""The last block of a language model."""

from __future__ import annotations

from torch import Tensor, nn

from runtime.models.initial import transformer_initial


class Head(nn.Module):
    """Norm, then logits of every token, with weights that may be the embedding's."""

    def __init__(self, norm: nn.Module, width: int, vocab: int, shared: nn.Embedding | None) -> None:
        super().__init__()
        self.norm = norm
        self.output = nn.Linear(width, vocab, bias=False)
        if shared is not None:
            self.output.weight = shared.weight
        self.initial = transformer_initial(self, layers=1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x [batch, context, width] f32 -> logits [batch, context, vocab] f32."""
        logits: Tensor = self.output(self.norm(x_BTD))
        return logits
