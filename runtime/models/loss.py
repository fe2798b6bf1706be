"""The loss of every family, and the metric that a validation reports."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class CrossEntropy(nn.Module):
    """Mean cross-entropy in nats over all positions of a micro-batch."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output [..., classes] f32 logits, target [...] int64 -> [] f32."""
        return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def metric(output: Tensor, target: Tensor) -> Tensor:
    """Hits: positions whose target has the strictly largest logit, so a tie is a miss and no order of elements matters.

    output [..., classes] f32, target [...] int64 -> [] int64.
    """
    logits, wanted = output.flatten(0, -2), target.flatten()
    picked = logits.gather(1, wanted[:, None])
    at_least = (logits >= picked).sum(1)
    return (at_least == 1).sum()
