"""Plain PyTorch float32 training of a recipe: what `parity` compares the exact arithmetic with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from runtime.models.chain import Chain
from runtime.models.initial import decayed, named_parameters
from runtime.recipe import OptimiserConfig, Recipe
from runtime.schedule import learning_rates

Array = NDArray[np.generic]
Batches = Callable[[int], tuple[NDArray[Any], NDArray[Any]]]  # step from 0 -> inputs and targets of the whole batch


def load_weights(blocks: Sequence[nn.Module], start: Mapping[str, NDArray[np.float32]]) -> None:
    """The chain then holds `start`, by names in the whole model. KeyError or ValueError where they do not fit."""
    parameters = named_parameters(blocks)
    if missing := sorted(set(parameters) ^ set(start)):
        raise KeyError(
            f"start weights: expected exactly the model's {len(parameters)}, got a difference at {missing[0]!r}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if start[name].shape != tuple(parameter.shape):
                raise ValueError(f"{name}: expected shape {tuple(parameter.shape)}, got {start[name].shape}")
            parameter.copy_(torch.from_numpy(start[name].copy()))


def accumulate(chain: Chain, inputs: Array, targets: Array, micro_batches: int) -> float:
    """The mean loss of one batch in nats, leaving the gradient of that mean in the parameters."""
    total = 0.0
    for part in zip(np.split(inputs, micro_batches), np.split(targets, micro_batches), strict=True):
        x, target = (torch.from_numpy(np.ascontiguousarray(array)) for array in part)
        loss = chain.loss(chain.output(x), target) / micro_batches
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def gradients(chain: Chain, inputs: Array, targets: Array, micro_batches: int = 1) -> dict[str, NDArray[np.float32]]:
    """The float32 gradient of the mean loss of one batch for every parameter, from zero."""
    parameters = named_parameters(chain.blocks)
    for parameter in parameters.values():
        parameter.grad = None
    accumulate(chain, inputs, targets, micro_batches)
    found = {}
    for name, parameter in parameters.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = grad.detach().numpy().copy()
        parameter.grad = None
    return found


def make_optimiser(config: OptimiserConfig, blocks: Sequence[nn.Module]) -> torch.optim.Optimizer:
    """torch's own optimiser over two groups: matrices with weight decay, the rest without."""
    parameters, decays = named_parameters(blocks), decayed(blocks)
    groups = [
        {
            "params": [parameter for name, parameter in parameters.items() if decays[name] is chosen],
            "weight_decay": config.weight_decay if chosen else 0.0,
        }
        for chosen in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    for group in groups:
        group["decoupled"] = group.pop("weight_decay")  # torch's SGD adds its decay to the gradient: see `update`
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov)


def update(optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float, clip: float) -> None:
    """The parameters are then one step further: clipped by the global norm, decayed, moved."""
    if clip > 0:
        nn.utils.clip_grad_norm_(parameters, clip)
    with torch.no_grad():
        for group in optimiser.param_groups:
            group["lr"] = rate
            for parameter in group["params"] if "decoupled" in group else ():
                parameter.mul_(1 - rate * group["decoupled"])
    optimiser.step()
    optimiser.zero_grad()


def train_baseline(
    recipe: Recipe, chain: Chain, start: Mapping[str, NDArray[np.float32]], batches: Batches, steps: int
) -> Iterator[float]:
    """The training loss of each step in nats, before the step's update; the chain ends with the trained weights.

    Starts from `start` and follows the recipe's optimiser, schedule (made for the recipe's own number of steps, or for
    `steps` where that is more), clipping and micro-batches. Dropout draws from torch's generator.
    """
    load_weights(chain.blocks, start)
    parameters = list(named_parameters(chain.blocks).values())
    optimiser = make_optimiser(recipe.optimiser, chain.blocks)
    optimiser.zero_grad()
    rates = learning_rates(recipe.optimiser, recipe.schedule, max(steps, recipe.training.steps))
    for step in range(steps):
        inputs, targets = batches(step)
        yield accumulate(chain, inputs, targets, recipe.training.micro_batches)
        update(optimiser, parameters, float(rates[step]), recipe.optimiser.clip)
