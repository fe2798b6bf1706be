"""Makes the known-answer vectors of whole blocks: `python -m runtime.program.block_vectors FILE`.

A GPT layer with dropout, forward and backward, on random weights. Not in `vectors.py`, because it needs the code of a
model, which whoever runs or checks Programs never imports.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from runtime.executors import reference
from runtime.models.gpt import Layer
from runtime.program.executor import Executor
from runtime.program.lowering import lower_block
from runtime.program.program import Program
from runtime.program.vectors import Vector, floats, text
from runtime.recipe import GptConfig

BATCH, CONTEXT, WIDTH, HEADS = 2, 5, 8, 2
RNG = np.array([11, 12, 3, 1, 2, 0], np.int64)


def make_blocks(executor: Executor) -> list[Vector]:
    """The vectors, answered by `executor`."""
    layer = Layer(GptConfig(layers=1, width=WIDTH, heads=HEADS, dropout=0.2))
    example = torch.zeros(BATCH, CONTEXT, WIDTH)
    programs, _ = lower_block(layer, example, slices=2, terms=4, name="gpt layer")
    made = []
    for name, program in (("forward", programs.forward), ("backward", programs.backward)):
        inputs = _inputs(program)
        handles = executor.run(program, [executor.put(array) for array in inputs])
        outputs = tuple(executor.get(handle) for handle in handles)
        made.append(Vector(name=f"gpt layer, {name}", program=program, inputs=inputs, outputs=outputs))
    return made


def _inputs(program: Program) -> tuple[np.ndarray, ...]:
    """Everyday numbers: after the special ones every second one of `floats` is of the order of 1."""
    return tuple(
        RNG if name == "rng" else floats(40 + place, 2 * t.elements + 64)[65::2].reshape(t.shape)
        for place, (name, t) in enumerate(program.inputs)
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text(make_blocks(reference(1))), encoding="utf-8")
