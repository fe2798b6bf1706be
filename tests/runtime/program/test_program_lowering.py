"""Lowering rules: modules of one operation against torch, forward and gradients, and refusals that say where."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.program.aten import RULES
from runtime.program.build import structure
from runtime.program.executor import ArithmeticFault
from runtime.program.lowering import lower_block, lower_loss, lower_metric
from storage.errors import UsageError

RNG = np.array([1, 2, 3, 4, 5, 0], np.int64)
F = functional


class Apply(nn.Module):
    """A function of x as a block."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Weighted(nn.Module):
    """A function of x and one weight as a block."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def close(name: str, found: np.ndarray, expected: Tensor | None, tolerance: float) -> None:
    wanted = np.zeros(found.shape) if expected is None else expected.detach().double().numpy()
    assert found.shape == wanted.shape, name
    size = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
    same = (found == wanted) | (np.abs(found - wanted) <= tolerance * size) | (np.isnan(found) & np.isnan(wanted))
    assert same.all(), f"{name}: expected {wanted[~same][:4]}, got {found[~same][:4]}"


def check(
    run: Callable[..., Any],
    block: nn.Module,
    x: Tensor,
    *,
    slices: int = 3,
    tolerance: float = 2e-5,
    train: bool = True,
) -> None:
    """Forward, gradient of x, gradients of parameters, and evaluation, all against torch."""
    made, output = lower_block(block, x, slices=slices, terms=1, name="block 0")
    parameters = dict(block.named_parameters())
    weights = [p.detach().numpy() for p in parameters.values()]
    x = x.clone().requires_grad_(x.is_floating_point())
    y = block(x)
    assert output.shape == y.shape
    (found,) = run(made.forward, *weights, x.detach().numpy(), RNG)
    with np.errstate(invalid="ignore"):
        close("forward", found, y, tolerance)
        (evaluated,) = run(made.evaluate, *weights, x.detach().numpy())
        close("evaluate", evaluated, block.eval()(x), tolerance)
        if not train:
            return
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        if y.requires_grad:
            y.backward(dy)
        gradients = run(made.backward, *weights, x.detach().numpy(), RNG, dy.numpy())
        if x.is_floating_point():
            close("dx", gradients.pop(0), x.grad, tolerance)
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            assert g.dtype == np.int64
            close(name, g * 2.0**-44, p.grad, tolerance)


def masked(x: Tensor) -> Tensor:
    """Scores with -infinity above the diagonal."""
    return x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool).triu(1), -math.inf)


def assigned(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, 1:3] = x[:, 0:2] * 2
    return y


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + x * 2,
    "add alpha": lambda x: torch.add(x, x * x, alpha=0.5),
    "sub": lambda x: 1.0 - x,
    "rsub alpha": lambda x: torch.sub(x * x, x, alpha=3),
    "mul by int": lambda x: x * 3,
    "div": lambda x: x / (x * x + 1.0),
    "div by number": lambda x: x / 3,
    "number by": lambda x: 2.0 / (x.abs() + 1.0),
    "neg": lambda x: -x,
    "abs": lambda x: x.abs(),
    "square": lambda x: x.square(),
    "pow 2": lambda x: x**2,
    "pow 3": lambda x: x.pow(3),
    "pow -1": lambda x: (x.abs() + 0.5) ** -1,
    "pow half": lambda x: (x.abs() + 0.5) ** 0.5,
    "pow 1.5": lambda x: (x.abs() + 0.5) ** 1.5,
    "pow -half": lambda x: (x.abs() + 0.5).pow(-0.5),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "rsqrt": lambda x: torch.rsqrt(x * x + 1e-5),
    "reciprocal": lambda x: torch.reciprocal(x + 10.0),
    "exp": torch.exp,
    "log": lambda x: torch.log(x.abs() + 0.1),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp min": lambda x: x.clamp(min=-0.5),
    "maximum": lambda x: torch.maximum(x, -x * 0.5),
    "minimum": lambda x: torch.minimum(x, x * x),
    "where": lambda x: torch.where(x > 0.1, x * 2, x * x),
    "where of comparisons": lambda x: torch.where((x >= 0) & ~(x < 0.5) | (x <= -1), x, torch.zeros_like(x)),
    "masked fill": lambda x: x.masked_fill(x > 0.5, 0.25),
    "comparison as number": lambda x: x * (x > 0) + (x != 0).float() - (x == x).to(torch.float32),
    "sum": lambda x: x.sum(),
    "sum of an axis": lambda x: x.sum(1),
    "sum kept": lambda x: x.sum((0, -1), keepdim=True),
    "mean": lambda x: x.mean(),
    "mean of axes": lambda x: x.mean((0, 2)),
    "mean kept": lambda x: x.mean(-1, keepdim=True) * x,
    "var": lambda x: x.var(-1),
    "var of population": lambda x: x.var((0, 1), correction=0, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, 1)[0] + torch.var_mean(x, 1)[1],
    "std": lambda x: x.std(-1),
    "amax": lambda x: x.amax(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "softmax of an inner axis": lambda x: F.softmax(x, 1),
    "softmax masked": lambda x: masked(x @ x.transpose(-2, -1)).softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "log_softmax of an inner axis": lambda x: F.log_softmax(x * 30, 0),
    "logsumexp": lambda x: x.logsumexp(-1),
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "layer norm of two axes": lambda x: F.layer_norm(x, (4, 6)),
    "rms norm": lambda x: F.rms_norm(x, (6,)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "matmul": lambda x: x @ x.transpose(1, 2),
    "einsum": lambda x: torch.einsum("btc,bsc->bts", x, x),
    "outer": lambda x: x[0, 0, :, None] * x[0, 1],
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True),
    "attention bias": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(4, 4).tril() - 0.5),
    "view": lambda x: x.view(3, 24) * 2,
    "flatten": lambda x: x.flatten(1),
    "reshape with -1": lambda x: x.reshape(2, -1, 3),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(0, -1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "repeat interleave": lambda x: x.repeat_interleave(2, 1),
    "unsqueeze, squeeze": lambda x: x.unsqueeze(1).squeeze(1)[:, None, :1].squeeze(),
    "select": lambda x: x[:, 1] * x[:, -1],
    "slice": lambda x: x[:, 1:3],
    "slice with steps": lambda x: x[::2, 1:, ::3],
    "slice from the end": lambda x: x[..., -2:],
    "slice of everything": lambda x: x[:, :, 0:99],
    "split": lambda x: x.split([1, 5], -1)[1] * x.chunk(3, -1)[0][..., :1],
    "unbind": lambda x: x.unbind(1)[2],
    "narrow": lambda x: x.narrow(2, 1, 3),
    "cat": lambda x: torch.cat([x, x[:, :1] * 2, x], 1),
    "stack": lambda x: torch.stack([x, -x], 1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3)),
    "pad and cut": lambda x: F.pad(x, (-1, 2)),
    "in place": lambda x: (x * 2).add_(1.0).mul_(x).relu_(),
    "tril": lambda x: x.tril(),
    "arange": lambda x: x * torch.arange(6) + torch.arange(1, 7, dtype=torch.float32),
    "ones, full": lambda x: x + torch.ones(6) + torch.full((4, 1), 0.5) + torch.zeros_like(x),
    "gather": lambda x: x.gather(-1, torch.arange(12).clamp(max=5).view(3, 4, 1)),
    "gather of several": lambda x: x.gather(1, (torch.arange(54) & 3).view(3, 3, 6)),
    "repeat of fewer axes": lambda x: x[0].repeat(2, 3, 2),
    "sign": lambda x: x * x.sign(),
    "index": lambda x: x[torch.arange(2)],
    "any": lambda x: x * (x > 1.0).any(-1, keepdim=True),
    "count": lambda x: x * (x > 0).sum(-1, keepdim=True),
    "count as floats": lambda x: (x * (x > 0).sum(-1, keepdim=True, dtype=torch.float32)) / x.sum(dtype=torch.float32),
    "broadcast with itself": lambda x: x * x[:1],
    "scalar": lambda x: x.sum() * x.mean(),
    "detach": lambda x: x * x.detach(),
    "dropout of 0": lambda x: F.dropout(x, 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, run_program: Any) -> None:
    torch.manual_seed(1)
    check(run_program, Apply(FUNCTIONS[name]), torch.randn(3, 4, 6))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return y


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (7, 6)),
    "linear of one row": (lambda: nn.Linear(1, 5), (1, 1)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 4, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (3, 4, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 4, 5)),
    "group norm of channels": (lambda: nn.GroupNorm(6, 6, affine=False), (3, 6, 7)),
    "batch norm": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (3, 6, 4, 5)),
    "batch norm of rows": (lambda: nn.BatchNorm1d(6, track_running_stats=False), (8, 6)),
    "weight and broadcast": (lambda: Weighted(lambda x, w: x * w + w.sum() * x.mean(), 4, 1), (3, 4, 6)),
    "batched matmul": (lambda: Weighted(lambda x, w: x @ w, 3, 6, 2), (3, 4, 6)),
    "matmul of a vector": (lambda: Weighted(lambda x, w: x @ w, 6), (3, 4, 6)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2), nn.Tanh()), (5, 6)),
    "weight used twice": (lambda: Weighted(lambda x, w: (x @ w).relu() @ w.T, 6, 3), (5, 6)),
    "multi-head attention": (SelfAttention, (2, 4, 6)),
    "unused weight": (lambda: Weighted(lambda x, w: x * 2.0, 3), (5, 6)),
    "global pool": (lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 4, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, run_program: Any) -> None:
    torch.manual_seed(2)
    make, shape = LAYERS[name]
    check(run_program, make(), torch.randn(*shape), tolerance=5e-5)


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((5, 6), 3, {}),
        ((5, 6), 3, {"padding": 1}),
        ((7, 5), 3, {"stride": 2, "padding": 1}),
        ((8, 8), 3, {"stride": 2, "padding": 1, "bias": False}),
        ((6, 5), 1, {"stride": 2}),
        ((6, 5), 1, {"padding": 1}),
        ((9, 8), (3, 2), {"stride": (2, 3), "padding": (0, 1), "dilation": (2, 1)}),
        ((9, 9), 3, {"dilation": 3, "padding": 3, "stride": 2}),
        ((4, 4), 4, {}),
        ((5, 5), 2, {"stride": 3}),
        ((5, 6), (1, 3), {"padding": "same"}),
    ],
)
def test_convolution(size: tuple[int, int], kernel: Any, options: dict[str, Any], run_program: Any) -> None:
    torch.manual_seed(3)
    check(run_program, nn.Conv2d(3, 4, kernel, **options), torch.randn(2, 3, *size), tolerance=5e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 1, 4)])
def test_embedding(shape: tuple[int, ...], run_program: Any) -> None:
    torch.manual_seed(4)
    check(run_program, nn.Embedding(7, 3), torch.randint(0, 7, shape), tolerance=1e-6)


def test_embedding_refuses_tokens_outside(run_program: Any) -> None:
    made, _ = lower_block(nn.Embedding(7, 3), torch.zeros(4, dtype=torch.int64), slices=2, terms=1, name="block 0")
    with pytest.raises(ArithmeticFault, match=r"expected an index in \[0, 7\)") as caught:
        run_program(made.forward, np.zeros((7, 3), np.float32), np.array([1, 2, 7, 0]), RNG)
    assert caught.value.element == 2
    assert "embedding" in caught.value.label


def test_a_wholly_masked_row_is_a_fault_or_nan_as_in_torch(run_program: Any) -> None:
    x = torch.zeros(2, 3)
    x[1] = -math.inf
    made, _ = lower_block(Apply(lambda x: x.softmax(-1)), x, slices=2, terms=1, name="block 0")
    (found,) = run_program(made.forward, x.numpy(), RNG)
    np.testing.assert_array_equal(found, x.softmax(-1).numpy())


def test_amax_keeps_nan_of_either_sign(run_program: Any) -> None:
    x = np.array([[0xFFC00000, 0x3F800000], [0x3F800000, 0x7FC00000]], np.uint32).view(np.float32)
    made, _ = lower_block(Apply(lambda x: x.amax(-1)), torch.zeros(2, 2), slices=2, terms=1, name="block 0")
    assert np.isnan(run_program(made.forward, x, RNG)[0]).all()


def test_the_gradient_of_integers_input_is_left_out(run_program: Any) -> None:
    made, _ = lower_block(nn.Embedding(7, 3), torch.zeros(4, dtype=torch.int64), slices=2, terms=1, name="block 0")
    assert [str(t) for t in made.backward.output_types] == ["i64[7, 3]"]
    assert [name for name, _ in made.backward.inputs] == ["weight", "x", "rng", "dy"]


# losses and metrics --------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "cross entropy": (F.cross_entropy, (6, 5), (6,)),
    "of one row": (F.cross_entropy, (1, 3), (1,)),
    "of one class": (F.cross_entropy, (4, 1), (4,)),
    "of pixels": (F.cross_entropy, (2, 5, 3, 4), (2, 3, 4)),
    "flattened": (lambda y, t: F.cross_entropy(y.flatten(0, -2), t.flatten()), (2, 3, 7), (2, 3)),
    "smoothed": (lambda y, t: F.cross_entropy(y, t, label_smoothing=0.1), (6, 5), (6,)),
    "summed": (lambda y, t: F.cross_entropy(y, t, reduction="sum") / 6, (6, 5), (6,)),
    "nll": (lambda y, t: F.nll_loss(y.log_softmax(-1), t), (6, 5), (6,)),
    "squared": (lambda y, t: F.mse_loss(y[:, 0], t.float()), (6, 5), (6,)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str, run_program: Any) -> None:
    torch.manual_seed(6)
    loss, shape, target_shape = LOSSES[name]
    y, target = torch.randn(*shape) * 3, torch.randint(0, shape[1] if len(shape) != 3 else shape[-1], target_shape)
    program = lower_loss(loss, torch.empty(shape), torch.zeros(target_shape, dtype=torch.int64), terms=4, slices=2)
    value, dy = run_program(program, y.numpy(), target.numpy())
    y.requires_grad_()
    expected = loss(y, target)
    expected.backward()
    assert value.dtype == np.int64
    assert value.shape == ()
    close("loss", value * 2.0**-44, expected, 2e-6)
    close("dy", dy, y.grad, 2e-6)


def test_loss_refuses_targets_outside(run_program: Any) -> None:
    program = lower_loss(F.cross_entropy, torch.empty(4, 5), torch.zeros(4, dtype=torch.int64), terms=1, slices=2)
    for wrong in (5, -1, 9):
        with pytest.raises(ArithmeticFault, match=r"expected an index in \[0, 5\)") as caught:
            run_program(program, np.zeros((4, 5), np.float32), np.array([0, 1, wrong, 4]))
        assert caught.value.element == 2


def test_ignored_targets_do_not_count(run_program: Any) -> None:
    program = lower_loss(F.cross_entropy, torch.empty(4, 5), torch.zeros(4, dtype=torch.int64), terms=1, slices=2)
    y, target = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, -100, 2, -100])
    value, dy = run_program(program, y.numpy(), target.numpy())
    close("loss", value * 2.0**-44, F.cross_entropy(y, target), 2e-6)
    assert (dy[[1, 3]] == 0).all()


def test_metric(run_program: Any) -> None:
    from runtime.models.loss import CrossEntropy, metric

    y = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(7))
    y[0, 0] = 0.0  # a tie is a miss
    target = y.argmax(-1)
    target[1, 2] = (target[1, 2] + 1) % 5
    program = lower_metric(CrossEntropy(), metric, torch.empty_like(y), target, terms=1, slices=2)
    value, hits, count = run_program(program, y.numpy(), target.numpy())
    close("loss", value * 2.0**-44, CrossEntropy()(y, target), 2e-6)
    assert (int(hits), int(count)) == (4, 6)


# refusals ------------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        return torch.sort(y)[0]  # refused here


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.parts = nn.ModuleList([nn.ReLU(), Inner()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        for part in self.parts:
            x = part(x)
        return x


def here(text: str) -> int:
    """The line of this file that ends with the text."""
    with open(__file__, encoding="utf-8") as file:  # noqa: PTH123
        return next(number for number, line in enumerate(file, 1) if line.rstrip().endswith(text))


def refusal(block: nn.Module, *shape: int) -> str:
    with pytest.raises(UsageError) as caught:
        lower_block(block, torch.zeros(*shape), slices=2, terms=1, name="block 3 (Outer)")
    return str(caught.value)


def test_an_operator_without_a_rule_is_named_with_its_source() -> None:
    text = refusal(Outer(), 3, 4)
    assert "ATen operator 'sort" in text
    assert "module 'parts.1' of block 3 (Outer)" in text
    assert f"{__file__}:{here('# refused here')}" in text
    assert text.endswith("or add a rule to runtime/program/aten/")


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()  # and here


def test_so_is_a_function_with_many_operators() -> None:
    text = refusal(Fourier(), 3, 4)
    assert "fft" in text
    assert "module 'itself'" in text
    assert f":{here('# and here')}" in text


TABLE = torch.ones(4)
"""A tensor that is neither a parameter nor a buffer."""


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.double().float(), "element type torch.float64"),
        (lambda x: (x * 2).to(torch.int64).float(), "float32 to integers"),
        (lambda x: x**0.3, "power 0.3"),
        (lambda x: x.floor(), "floor"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounding_mode|floor"),
        (lambda x: x.cumsum(0), "cumsum"),
        (lambda x: F.pad(x, (1, 1), value=2.0), "padding with 2.0"),
        (torch.bernoulli, "rand"),
        (F.elu, "elu"),
        (assigned, "strided"),
        (F.softplus, "log1p"),
        (lambda x: F.avg_pool2d(x[None], 2), "avg_pool2d"),
        (lambda x: x @ x, "expected a model that torch can trace"),
        (lambda x: x if x.sum() > 0 else -x, "let no shape or branch depend on values"),
        (lambda x: x * x.sum().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x * TABLE, "register tensors that are not parameters as buffers"),
        (lambda x: x + torch.randn(3, 4), "rand"),
        (lambda x: F.conv1d(x[None], torch.ones(2, 3, 2)), "convolution of rank 3"),
    ],
)
def test_arguments_without_a_rule_are_refused(function: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        lower_block(Apply(function), torch.zeros(3, 4), slices=2, terms=1, name="block 0")


def test_running_statistics_are_refused() -> None:
    text = refusal(nn.Sequential(nn.BatchNorm2d(3)), 2, 3, 4, 4)
    assert "block 3 (Outer)" in text
    assert "track_running_stats=False" in text


@pytest.mark.parametrize(
    "function", [lambda x: (x, x), lambda x: x > 0, lambda x: x.argmax(-1), lambda x: None], ids=range(4)
)
def test_a_block_returns_one_float_tensor(function: Any) -> None:
    with pytest.raises(UsageError, match="expected one float32 tensor"):
        lower_block(Apply(function), torch.zeros(3, 4), slices=2, terms=1, name="block 0")


def test_labels_say_where_operators_come_from() -> None:
    class Good(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    made, _ = lower_block(Good(), torch.zeros(3, 4), slices=2, terms=1, name="block 0")
    paths = {op.label.split(",")[0] for op in made.forward.ops}
    assert {"first", "second.0", "second.1"} <= paths
    assert {"first", "second.0", "second.1"} <= {op.label.split(",")[0] for op in made.backward.ops}
    assert not any("/" in op.label for op in (*made.forward.ops, *made.backward.ops)), "a path of this machine"


def test_rules_name_operators_that_torch_has() -> None:
    from torch._decomp import core_aten_decompositions

    decomposed = {str(k) for k in core_aten_decompositions()}
    for name in RULES:
        packet, _, overload = name.partition(".")
        found = getattr(torch.ops.aten, packet)
        assert not overload or overload in found.overloads(), name
        assert decomposed, name


# kinds ---------------------------------------------------------------------------------------------------------------


class Settings(nn.Module):
    """A block with a setting, a function and a buffer."""

    def __init__(self, *, factor: float = 2.0, function: Any = torch.tanh, table: Tensor | None = None) -> None:
        super().__init__()
        self.factor, self.function = factor, function
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4) if table is None else table)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(self.linear(x) * self.factor) * self.table
        return y


X = torch.zeros(3, 4)


def test_equal_blocks_share_a_kind() -> None:
    assert structure(Settings(), X) == structure(Settings(), X)
    assert hash(structure(Settings(), X)) == hash(structure(Settings(), X))
    assert structure(nn.Linear(4, 4), X) == structure(nn.Linear(4, 4), X)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Settings(factor=2.5),
        lambda: Settings(function=torch.sigmoid),
        lambda: Settings(table=torch.tensor([1.0, 1.0, 1.0, 2.0])),
        lambda: Settings(table=torch.ones(1, 4)),
        lambda: Settings(table=torch.ones(4).view(torch.int32)),
        lambda: nn.Sequential(Settings()),
        lambda: nn.Linear(4, 4),
    ],
    ids=["number", "function", "buffer", "buffer's shape", "buffer's type", "depth", "class"],
)
def test_a_block_that_differs_is_another_kind(other: Any) -> None:
    assert structure(Settings(), X) != structure(other(), X)


def test_a_block_of_another_input_is_another_kind() -> None:
    assert structure(Settings(), X) != structure(Settings(), X[:2])
    assert structure(Settings(), X) != structure(Settings(), X.long())


def test_lowering_again_gives_the_same_root() -> None:
    def made() -> Any:
        torch.manual_seed(0)
        return lower_block(Settings(), X, slices=2, terms=4, name="block 0")[0]

    first, second = made(), made()
    for field in dataclasses.fields(first):
        assert getattr(first, field.name).root == getattr(second, field.name).root
