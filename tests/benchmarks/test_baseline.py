"""The plain PyTorch training that parity compares with, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.baseline import gradients, load_weights, train_baseline
from runtime.models.chain import Chain, build_chain
from runtime.models.initial import named_parameters
from runtime.models.shape import DataShape
from runtime.recipe import Recipe, parse_recipe

SHAPE = DataShape(example=(1, 8, 8), classes=10)
RECIPE = """
name = "tiny"
[model]
family = "mlp"
hidden = [6]
[data]
images = "digits"
[training]
steps = 4
batch = 8
micro_batches = 2
[optimiser]
{optimiser}
[schedule]
kind = "constant"
warmup = 2
"""


def recipe(optimiser: str) -> Recipe:
    return parse_recipe(RECIPE.format(optimiser=optimiser))


def chain_and_start() -> tuple[Chain, dict[str, NDArray[np.float32]]]:
    torch.manual_seed(3)
    chain = build_chain(recipe("kind = 'sgd'").model, SHAPE)
    return chain, {name: value.detach().numpy().copy() for name, value in named_parameters(chain.blocks).items()}


def batches(step: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    generator = np.random.default_rng(step)
    return generator.random((8, 1, 8, 8), dtype=np.float32), generator.integers(0, 10, 8)


def test_micro_batches_do_not_change_the_gradient_of_the_mean() -> None:
    chain, _ = chain_and_start()
    whole, parts = gradients(chain, *batches(0)), gradients(chain, *batches(0), micro_batches=4)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_one_step_of_sgd_is_the_formula(clip: float) -> None:
    chain, start = chain_and_start()
    slope = gradients(chain, *batches(0))
    norm = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in slope.values()))
    factor = min(1.0, clip / norm) if clip else 1.0
    settings = f"kind = 'sgd'\nlearning_rate = 0.5\nmomentum = 0.0\nweight_decay = 0.1\nclip = {clip}"
    losses = list(train_baseline(recipe(settings), chain, start, batches, 1))
    assert len(losses) == 1
    rate = 0.25  # half-way through the warm-up
    for name, value in named_parameters(chain.blocks).items():
        kept = 1 - rate * 0.1 if value.ndim == 2 else 1.0
        expected = start[name] * kept - rate * factor * slope[name]
        np.testing.assert_allclose(value.detach().numpy(), expected, atol=2e-6)


def test_adamw_starts_with_a_step_of_the_rate_and_learns() -> None:
    chain, start = chain_and_start()
    settings = "learning_rate = 0.01\nweight_decay = 0.0\nclip = 0"
    list(train_baseline(recipe(settings), chain, start, batches, 1))
    moved = named_parameters(chain.blocks)["block001.linear.bias"].detach().numpy() - start["block001.linear.bias"]
    np.testing.assert_allclose(np.abs(moved), 0.005, rtol=1e-3)
    losses = list(train_baseline(recipe(settings), chain, start, lambda _: batches(0), 30))
    assert losses[-1] < losses[0]


def test_it_starts_from_the_given_weights_each_time() -> None:
    chain, start = chain_and_start()
    settings = recipe("kind = 'adamw'")
    first = list(train_baseline(settings, chain, start, batches, 3))
    assert list(train_baseline(settings, chain, start, batches, 3)) == first


def test_weights_that_do_not_fit_are_refused() -> None:
    chain, start = chain_and_start()
    with pytest.raises(KeyError, match=r"block000\.linear\.bias"):
        load_weights(chain.blocks, {name: value for name, value in start.items() if name != "block000.linear.bias"})
    with pytest.raises(ValueError, match="expected shape"):
        load_weights(chain.blocks, start | {"block000.linear.bias": np.zeros(7, dtype=np.float32)})
