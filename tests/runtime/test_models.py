"""The model families in plain torch: shapes, names, tied weights, initial values, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from runtime.models.chain import Chain, build_chain
from runtime.models.initial import Init, decayed, initialisers, local_names, named_parameters
from runtime.models.llama import rotary_tables
from runtime.models.loss import metric
from runtime.models.shape import DataShape
from runtime.recipe import ConvnetConfig, FactoryConfig, GptConfig, LlamaConfig, MlpConfig, ModelConfig
from storage.errors import UsageError

TEXT = DataShape(example=(8,), classes=11)
IMAGES = DataShape(example=(1, 8, 8), classes=10)

CASES: dict[str, tuple[ModelConfig, DataShape]] = {
    "gpt": (GptConfig(layers=2, width=12, heads=3), TEXT),
    "gpt-untied-dropout": (GptConfig(layers=2, width=12, heads=3, tied=False, bias=False, dropout=0.1), TEXT),
    "llama": (LlamaConfig(layers=2, width=16, heads=4, kv_heads=2), TEXT),
    "llama-tied": (LlamaConfig(layers=2, width=16, heads=2, tied=True), TEXT),
    "mlp": (MlpConfig(hidden=(6, 6, 6)), IMAGES),
    "convnet-group": (ConvnetConfig(channels=(4, 8), blocks=2, groups=2), IMAGES),
    "convnet-batch": (ConvnetConfig(channels=(4, 8), norm="batch"), IMAGES),
}


@pytest.fixture(params=CASES)
def chain(request: pytest.FixtureRequest) -> tuple[Chain, DataShape]:
    torch.manual_seed(0)
    config, shape = CASES[request.param]
    return build_chain(config, shape), shape


def example(shape: DataShape, size: int = 3) -> tuple[Tensor, Tensor]:
    if shape.is_text:
        tokens = torch.randint(0, shape.classes, (size, shape.example[0] + 1))
        return tokens[:, :-1], tokens[:, 1:]
    return torch.rand(size, *shape.example), torch.randint(0, shape.classes, (size,))


def test_every_parameter_gets_a_finite_gradient(chain: tuple[Chain, DataShape]) -> None:
    model, shape = chain
    inputs, target = example(shape)
    output = model.output(inputs)
    assert output.shape == (*target.shape, shape.classes)
    loss = model.loss(output, target)
    assert loss.shape == ()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in named_parameters(model.blocks).items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_every_parameter_has_initial_values_and_a_sorted_name(chain: tuple[Chain, DataShape]) -> None:
    model, _ = chain
    names = list(named_parameters(model.blocks))
    assert list(initialisers(model.blocks)) == names
    assert list(decayed(model.blocks)) == names
    blocks = [name.partition(".")[0] for name in names]
    assert blocks == sorted(blocks)


@pytest.mark.parametrize(
    ("case", "distinct", "length"), [("gpt", 3, 4), ("llama", 3, 4), ("mlp", 3, 4), ("convnet-group", 5, 6)]
)
def test_equal_blocks_are_structurally_identical(case: str, distinct: int, length: int) -> None:
    blocks = build_chain(*CASES[case]).blocks
    forms = set()
    for block in blocks:
        forms.add((repr(block), tuple((name, parameter.shape) for name, parameter in block.named_parameters())))
    assert (len(forms), len(blocks)) == (distinct, length)


@pytest.mark.parametrize("case", ["gpt", "llama-tied"])
def test_a_tied_head_holds_the_embedding_itself(case: str) -> None:
    blocks = build_chain(*CASES[case]).blocks
    assert blocks[-1].get_parameter("output.weight") is blocks[0].get_parameter("token.weight")
    assert local_names(blocks)[-1]["output.weight"] == "block000.token.weight"
    assert "block003.output.weight" not in named_parameters(blocks)


@pytest.mark.parametrize("case", ["gpt-untied-dropout", "llama"])
def test_an_untied_head_has_its_own_weights(case: str) -> None:
    blocks = build_chain(*CASES[case]).blocks
    assert blocks[-1].get_parameter("output.weight") is not blocks[0].get_parameter("token.weight")
    assert initialisers(blocks)["block003.output.weight"] == Init(kind="normal", scale=0.02)


@pytest.mark.parametrize("case", ["gpt", "llama"])
def test_no_position_sees_a_later_one(case: str) -> None:
    torch.manual_seed(1)
    model = build_chain(*CASES[case])
    tokens, _ = example(TEXT, size=1)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % TEXT.classes
    before, after = model.output(tokens), model.output(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_gpt_starts_as_gpt2_does() -> None:
    initial = initialisers(build_chain(*CASES["gpt"]).blocks)
    assert initial["block000.token.weight"] == Init(kind="normal", scale=0.02)
    assert initial["block000.position"] == Init(kind="normal", scale=0.02)
    assert initial["block001.attention.qkv.weight"] == Init(kind="normal", scale=0.02)
    assert initial["block001.attention.output.weight"] == Init(kind="normal", scale=0.02 / 2)
    assert initial["block002.down.weight"] == Init(kind="normal", scale=0.02 / 2)
    assert initial["block001.down.bias"] == Init(kind="zeros")
    assert initial["block001.norm_feed.weight"] == Init(kind="ones")


@pytest.mark.parametrize("case", ["mlp", "convnet-group", "convnet-batch"])
def test_uniform_scales_are_the_bounds_torch_draws_from(case: str) -> None:
    torch.manual_seed(2)
    blocks = build_chain(*CASES[case]).blocks
    parameters = named_parameters(blocks)
    for name, init in initialisers(blocks).items():
        values = parameters[name].detach()
        if init.kind == "uniform":
            assert values.abs().max() <= init.scale
            assert values.abs().max() > init.scale / 2 or values.numel() < 10
        else:
            expected = torch.ones_like(values) if init.kind == "ones" else torch.zeros_like(values)
            assert torch.equal(values, expected)


def test_decay_spares_biases_and_norms() -> None:
    decays = decayed(build_chain(*CASES["gpt"]).blocks)
    assert decays["block001.up.weight"]
    assert decays["block000.token.weight"]
    assert not decays["block001.up.bias"]
    assert not decays["block003.norm.weight"]


def test_a_block_overrides_the_initial_values() -> None:
    block = nn.Linear(4, 4)
    block.initial = {"bias": Init(kind="zeros")}  # type: ignore[assignment]
    assert initialisers([block]) == {
        "block000.weight": Init(kind="uniform", scale=0.5),
        "block000.bias": Init(kind="zeros"),
    }
    block.initial = {"bais": Init(kind="zeros")}  # type: ignore[assignment]
    with pytest.raises(UsageError, match="'bais'"):
        initialisers([block])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_parameter_without_a_rule_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"'scale' in Bare.*attribute initial"):
        initialisers([Bare()])


def test_rotary_tables_turn_by_the_position() -> None:
    cosines, sines = rotary_tables(5, 4, 10000.0)
    assert cosines.shape == sines.shape == (5, 2)
    assert cosines.dtype == torch.float32
    assert torch.equal(cosines[0], torch.ones(2))
    assert cosines[3, 1].item() == pytest.approx(math.cos(3 / 100), abs=1e-7)
    assert sines[4, 0].item() == pytest.approx(math.sin(4), abs=1e-7)


def test_rotary_tables_are_constants_and_not_state() -> None:
    layer = build_chain(*CASES["llama"]).blocks[1]
    assert {name for name, _ in layer.named_buffers()} == {"attention.cosines", "attention.sines"}
    assert not any("cosines" in name or "sines" in name for name in layer.state_dict())


def test_batch_norm_keeps_no_running_state() -> None:
    for block in build_chain(*CASES["convnet-batch"]).blocks:
        assert not list(block.buffers())


def test_hits_are_strict_maxima() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0], [5.0, 4.0, 6.0]])
    assert metric(logits, torch.tensor([1, 0, 2])).item() == 2
    assert metric(logits, torch.tensor([0, 1, 1])).item() == 0
    assert metric(logits.expand(2, 3, 3), torch.tensor([[1, 0, 2], [1, 0, 0]])).item() == 3


@pytest.mark.parametrize(
    ("config", "shape", "match"),
    [
        (GptConfig(layers=1, width=4, heads=1, vocab=5), TEXT, "vocab"),
        (GptConfig(layers=1, width=4, heads=1, context=4), TEXT, "context"),
        (LlamaConfig(layers=1, width=4, heads=1, context=4), TEXT, "context"),
        (MlpConfig(), TEXT, "family"),
        (GptConfig(layers=1, width=4, heads=1), IMAGES, "family"),
        (FactoryConfig(factory="no_such_package.blocks:build"), IMAGES, "importable"),
        (FactoryConfig(factory="math:no_such_function"), IMAGES, "importable"),
        (FactoryConfig(factory="math:pi"), IMAGES, "function"),
    ],
)
def test_what_does_not_fit_is_a_usage_error(config: ModelConfig, shape: DataShape, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        build_chain(config, shape)


def test_more_positions_and_tokens_than_the_data_has_are_fine() -> None:
    model = build_chain(GptConfig(layers=1, width=4, heads=1, context=16, vocab=32), TEXT)
    assert model.output(example(TEXT)[0]).shape == (3, 8, 32)


def one_block(shape: DataShape, *, width: int = 1) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(shape.features, width), nn.Linear(width, shape.classes)]


def with_loss(shape: DataShape) -> tuple[list[nn.Module], nn.Module]:
    return one_block(shape), nn.CrossEntropyLoss()


def nothing(shape: DataShape) -> None:
    return None


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], FactoryConfig]:
    def install(function: Callable[..., object]) -> FactoryConfig:
        monkeypatch.setattr("runtime.models.chain.load_factory", lambda _: function)
        return FactoryConfig(factory="somewhere:else", arguments={} if function is not one_block else {"width": 3})

    return install


def test_a_factory_gets_the_shape_and_its_arguments(
    factory: Callable[[Callable[..., object]], FactoryConfig],
) -> None:
    chain = build_chain(factory(one_block), IMAGES)
    assert [block.weight.shape for block in chain.blocks[1:] if isinstance(block, nn.Linear)] == [(3, 64), (10, 3)]
    assert isinstance(build_chain(factory(with_loss), IMAGES).loss, nn.CrossEntropyLoss)


def test_a_factory_that_returns_something_else_is_refused(
    factory: Callable[[Callable[..., object]], FactoryConfig],
) -> None:
    with pytest.raises(UsageError, match=r"expected a list of torch\.nn\.Module, got NoneType"):
        build_chain(factory(nothing), IMAGES)
