"""Whole models as Programs against torch's float32 autograd, from each family's own initial values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.models.initial import named_parameters
from runtime.philox import key_of
from runtime.program.build import build_training_program, chain_of
from runtime.program.training import TrainingProgram, chunk_lengths
from runtime.recipe import Recipe, parse_recipe

TOLERANCE = {2: 2e-3, 3: 2e-4}
"""Norm of the error over the norm of the gradient, a parameter, by slices.

A net of norms and ReLU is measured at s = 3 alone: at s = 2 a few activations change side at 0, where the gradient
jumps, and with so few elements one such jump is several per cent of a parameter's gradient."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What the build needs to know of a dataset."""

    shape: tuple[int, ...]
    vocab: int
    is_text: bool


TEXT = Examples(shape=(12,), vocab=256, is_text=True)
IMAGES = Examples(shape=(1, 8, 8), vocab=10, is_text=False)

MODELS: dict[str, tuple[str, Examples]] = {
    "gpt": ('family = "gpt"\nlayers = 2\nwidth = 32\nheads = 2', TEXT),
    "gpt untied": ('family = "gpt"\nlayers = 1\nwidth = 32\nheads = 4\ntied = false\nbias = false', TEXT),
    "llama": ('family = "llama"\nlayers = 2\nwidth = 32\nheads = 4\nkv_heads = 2', TEXT),
    "llama tied": ('family = "llama"\nlayers = 1\nwidth = 32\nheads = 2\ntied = true', TEXT),
    "mlp": ('family = "mlp"\nhidden = [24, 24, 16]\nactivation = "gelu"', IMAGES),
    "mlp silu": ('family = "mlp"\nhidden = [24]\nactivation = "silu"', IMAGES),
    "convnet group": ('family = "convnet"\nchannels = [8, 16]\nblocks = 2\ngroups = 4', IMAGES),
    "convnet batch": ('family = "convnet"\nchannels = [4, 8, 8]\nnorm = "batch"', IMAGES),
}


@cache
def built(name: str, slices: int) -> tuple[Recipe, Examples, TrainingProgram]:
    model, examples = MODELS[name]
    recipe = recipe_of(model, examples, slices=slices)
    return recipe, examples, build_training_program(recipe, examples)


def recipe_of(model: str, examples: Examples, *, slices: int = 2, dropout: float = 0.0) -> Recipe:
    data = 'corpus = "kjv"\ncontext = 12' if examples.is_text else 'images = "digits"'
    dropped = f"dropout = {dropout}\n" if dropout else ""
    return parse_recipe(
        f'name = "tiny"\nseed = 5\n[model]\n{model}\n{dropped}[data]\n{data}\n'
        f"[training]\nsteps = 4\nbatch = 8\nmicro_batches = 2\n[arithmetic]\nslices = {slices}\n"
    )


def batch_of(examples: Examples, size: int) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(3)
    if examples.is_text:
        tokens = source.integers(0, 64, (size, examples.shape[0] + 1))
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()
    return source.random((size, *examples.shape), np.float32), source.integers(0, examples.vocab, size)


def rng_at(recipe: Recipe, *, place: int, first: int = 0) -> np.ndarray:
    low, high = key_of(recipe.seed)
    return np.array([low, high, 0, 0, place, first], np.int64)


def initial_weights(run: Any, recipe: Recipe, program: TrainingProgram) -> dict[str, np.ndarray]:
    found = {}
    for index, spec in enumerate(program.tensors):
        elements, parts = int(np.prod(spec.shape)), []
        for length in chunk_lengths(elements):
            first = sum(p.size for p in parts)
            parts += run(program.init_program(index, length), rng_at(recipe, place=index, first=first))
        found[spec.name] = np.concatenate(parts).reshape(spec.shape)
    return found


@dataclass(frozen=True, kw_only=True)
class Step:
    """One micro-batch, forward and backward."""

    logits: np.ndarray
    evaluated: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


def step_of(
    run: Any, recipe: Recipe, program: TrainingProgram, weights: Any, x: np.ndarray, target: np.ndarray
) -> Step:
    inputs, tested = [x], x
    for index, block in enumerate(program.blocks):
        held = [weights[name] for name in block.tensors]
        kind = program.kind_of(index)
        inputs += run(kind.forward, *held, inputs[-1], rng_at(recipe, place=index))
        (tested,) = run(kind.evaluate, *held, tested)
    loss, dy = run(program.loss, inputs[-1], target)
    totals = {name: np.zeros(w.shape, np.int64) for name, w in weights.items()}
    for index in reversed(range(len(program.blocks))):
        names = program.blocks[index].tensors
        found = run(
            program.kind_of(index).backward,
            *(weights[n] for n in names), inputs[index], rng_at(recipe, place=index), dy,
        )  # fmt: skip
        if len(found) > len(names):
            dy, *found = found
        for name, gradient in zip(names, found, strict=True):
            totals[name] += gradient
    gradients = {name: g * 2.0**-44 for name, g in totals.items()}
    return Step(logits=inputs[-1], evaluated=tested, loss=float(loss) * 2.0**-44, gradients=gradients)


def in_torch(recipe: Recipe, examples: Examples, weights: Any, x: np.ndarray, target: np.ndarray) -> tuple[Any, Any]:
    chain = chain_of(recipe, examples)
    parameters = named_parameters(chain.blocks)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(torch.from_numpy(weights[name]))
    logits = chain.output(torch.from_numpy(x))
    loss: Tensor = chain.loss(logits, torch.from_numpy(target))
    loss.backward()
    return (logits.detach().numpy(), float(loss.detach())), {name: p.grad.numpy() for name, p in parameters.items()}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("gpt", 2), ("gpt", 3), ("gpt untied", 2), ("llama", 2), ("llama tied", 2),
        ("mlp", 2), ("mlp silu", 2), ("convnet group", 3), ("convnet batch", 3),
    ],
)  # fmt: skip
def test_forward_and_gradients(name: str, slices: int, run_program: Any) -> None:
    recipe, examples, program = built(name, slices)
    weights = initial_weights(run_program, recipe, program)
    x, target = batch_of(examples, recipe.training.micro_batch)
    step = step_of(run_program, recipe, program, weights, x, target)
    (logits, loss), gradients = in_torch(recipe, examples, weights, x, target)

    tolerance = TOLERANCE[slices]
    assert error(step.logits, logits) < tolerance
    assert step.evaluated.tobytes() == step.logits.tobytes(), "no dropout: evaluation is the forward"
    assert abs(step.loss / loss - 1) < tolerance
    assert set(step.gradients) == set(gradients)
    errors = {key: error(step.gradients[key], gradients[key]) for key in gradients}
    worst = max(errors, key=errors.__getitem__)
    print(f"{name} s={slices}: {errors}")  # noqa: T201
    assert errors[worst] < tolerance, f"gradient of {worst} is {errors[worst]:.2e} off; all: {errors}"

    value, hits, count = run_program(program.metric, step.logits, target)
    assert abs(float(value) * 2.0**-44 / loss - 1) < tolerance
    assert count == target.size
    assert hits == (logits.reshape(-1, logits.shape[-1]).argmax(-1) == target.reshape(-1)).sum()


@pytest.mark.parametrize(
    ("name", "slices", "expected"),
    [
        ("gpt", 2, [0, 1, 1, 2]),
        ("llama", 2, [0, 1, 1, 2]),
        ("convnet group", 3, [0, 1, 1, 2, 3, 4]),  # of the second stage's blocks the first has a stride
    ],
)
def test_equal_layers_share_their_programs(name: str, slices: int, expected: list[int]) -> None:
    _, _, program = built(name, slices)
    assert [block.kind for block in program.blocks] == expected
    assert len(program.kinds) == len(set(expected))


def test_building_again_gives_the_same_root() -> None:
    recipe, examples, program = built("gpt untied", 2)
    assert program.root == build_training_program(recipe, examples).root


def test_tied_weights_are_one_tensor_of_two_blocks() -> None:
    _, _, program = built("gpt", 2)
    first, last = program.blocks[0].tensors, program.blocks[-1].tensors
    assert set(first) & set(last) == {"block000.token.weight"}
    assert [t.name for t in program.tensors].count("block000.token.weight") == 1
    assert {t.name: t.decay for t in program.tensors}["block000.token.weight"]


def test_dropout_in_a_whole_model(run_program: Any) -> None:
    """The same words forward and backward: a difference quotient in the direction of the gradient sees its length."""
    model, examples = MODELS["mlp"]
    recipe = recipe_of(model, examples, slices=3, dropout=0.2)
    program = build_training_program(recipe, examples)
    weights = initial_weights(run_program, recipe, program)
    x, target = batch_of(examples, recipe.training.micro_batch)
    step = step_of(run_program, recipe, program, weights, x, target)
    assert error(step.evaluated, step.logits) > 1e-2, "nothing was dropped"
    square = sum(float((g**2).sum()) for g in step.gradients.values())
    reach = 1e-2 / square**0.5
    losses = [
        step_of(
            run_program, recipe, program,
            {k: (w + s * reach * step.gradients[k]).astype(np.float32) for k, w in weights.items()}, x, target,
        ).loss
        for s in (1, -1)
    ]  # fmt: skip
    assert abs((losses[0] - losses[1]) / (2 * reach) / square - 1) < 1e-2
