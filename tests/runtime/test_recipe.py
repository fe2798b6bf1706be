"""Recipes: what is read, what is refused with which words, and that equal meaning is equal bytes."""

import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import recipe_keys
from runtime.fields import Section
from runtime.recipe import (
    ConvnetConfig,
    DataConfig,
    FactoryConfig,
    GptConfig,
    LlamaConfig,
    MlpConfig,
    OptimiserConfig,
    Recipe,
    ScheduleConfig,
    TrainingConfig,
    decode_recipe,
    load_recipe,
    parse_recipe,
)
from storage.errors import UsageError

ROOT = Path(__file__).parents[2]
RECIPES = ("digits-convnet", "gpt2-small", "llama-tiny", "quickstart")

TEXT = """
name = "tiny"
seed = 3
[model]
family = "gpt"
layers = 2
width = 64
heads = 2
[data]
corpus = "kjv"
context = 32
[training]
steps = 20
batch = 8
micro_batches = 2
validate_every = 10
[optimiser]
betas = [0.9, 0.95]
[schedule]
kind = "linear"
warmup = 5
"""


def tiny(**changes: object) -> Recipe:
    return dataclasses.replace(parse_recipe(TEXT), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_reads_and_returns_from_its_canonical_form(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.toml")
    assert recipe.name == name
    assert decode_recipe(recipe.canonical()) == recipe
    assert recipe.digest == hashlib.sha256(recipe.canonical()).digest()


def test_canonical_form_is_pinned() -> None:
    assert tiny().canonical() == (
        b'{"arithmetic":{"head_slices":3,"slices":2},"data":{"context":32,"corpus":"kjv","tokeniser":"bytes","validation":0.05},'
        b'"format":1,"model":{"activation":"gelu","bias":true,"context":0,"dropout":0.0,"family":"gpt","heads":2,'
        b'"layers":2,"tied":true,"vocab":0,"width":64},"name":"tiny","optimiser":{"betas":[0.9,0.95],"clip":1.0,'
        b'"eps":1e-08,"kind":"adamw","learning_rate":0.001,"weight_decay":0.1},"schedule":{"floor":0.0,'
        b'"kind":"linear","warmup":5},"seed":3,"training":{"batch":8,"micro_batches":2,"segment":10,"steps":20,'
        b'"validate_every":10,"validation_batches":1}}'
    )


@pytest.mark.parametrize(
    "spelling",
    [
        TEXT + "# a comment\n",
        TEXT + "floor = 0\n",
        TEXT + "floor = -0.0\n",
        TEXT.replace("seed = 3\n", "").replace('name = "tiny"', 'seed = 3\nname = "tiny"'),
        TEXT.replace("[optimiser]", "[optimiser]\nlearning_rate = 0.1e-2\nclip = 1"),
        TEXT.replace("0.95]", "0.950]"),
    ],
)
def test_spelling_does_not_change_the_digest(spelling: str) -> None:
    assert parse_recipe(spelling).digest == tiny().digest


def test_keys_without_meaning_do_not_change_the_digest() -> None:
    one = tiny(optimiser=OptimiserConfig(kind="sgd", betas=(0.5, 0.5)))
    other = tiny(optimiser=OptimiserConfig(kind="sgd"))
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 20", "stpes = 20", "unknown key 'stpes' in [training]: did you mean 'steps'?"),
        ("[training]", "[trainig]", "unknown table [trainig]: did you mean 'training'?"),
        ("seed = 3", "sede = 3", "unknown key 'sede' in the top of the recipe: did you mean 'seed'?"),
        ("layers = 2", "zzz = 2", "unknown key 'zzz' in [model]: known are layers, width, heads"),
        ("layers = 2\n", "", "[model] layers: expected an integer of 1 or more, got nothing; add layers = ..."),
        ('name = "tiny"\n', "", "name: expected a string, got nothing; add name = ..."),
        ('name = "tiny"', 'name = "Tiny"', "name: expected up to 64 of a-z"),
        ('name = "tiny"', "name = 3", "name: expected a string, got 3; change name"),
        ("seed = 3", "seed = -1", "seed: expected an integer of 0 to 18446744073709551615, got -1; change seed"),
        ("seed = 3", "seed = true", "seed: expected an integer of 0 to 18446744073709551615, got True"),
        ("batch = 8", 'batch = "8"', "[training] batch: expected an integer of 1 to 4294967295, got '8'"),
        ("batch = 8", "batch = 8.0", "[training] batch: expected an integer of 1 to 4294967295, got 8.0"),
        ("batch = 8", "batch = 9", "[training] batch: expected a multiple of micro_batches = 2, got 9; change"),
        ("[0.9, 0.95]", "[0.9, 1]", "[optimiser] betas: expected a list of 2 numbers of 0 or more and below 1, got"),
        ("[0.9, 0.95]", "[0.9]", "[optimiser] betas: expected a list of 2 numbers"),
        ("betas = [0.9, 0.95]", "eps = nan", "[optimiser] eps: expected a number of 1.17549e-38 to 1, got nan"),
        ("betas = [0.9, 0.95]", "clip = inf", "[optimiser] clip: expected a number of 0 to 1e+06, got inf"),
        ("betas", "learning_rate = 0\nbetas", "learning_rate: expected a number above 0 and at most"),
        ("betas", 'kind = "sgd"\nbetas', "[optimiser] betas: expected no such key with kind = 'sgd', got [0.9, 0.95]"),
        ('"linear"', '"liner"', "[schedule] kind: expected one of 'constant', 'linear', 'cosine', got 'liner'"),
        ("warmup = 5", "warmup = 21", "[schedule] warmup: expected at most [training] steps = 20, got 21"),
        ("heads = 2", "heads = 3", "[model] width: expected a multiple of heads = 3, got 64; change width or heads"),
        ("heads = 2", "heads = 2\nvocab = 100", "[model] vocab: expected 0 or at least the tokeniser's 256, got 100"),
        ("heads = 2", "heads = 2\ncontext = 16", "[model] context: expected 0 or at least [data] context = 32, got 16"),
        ('"gpt"', '"gtp"', "[model] family: expected one of 'gpt', 'llama', 'mlp', 'convnet', 'factory', got 'gtp'"),
        ('family = "gpt"\n', "", "[model] family: expected one of 'gpt'"),
        ('corpus = "kjv"', "", "[data]: expected exactly one of corpus, url, images, got none"),
        (
            'corpus = "kjv"',
            'corpus = "kjv"\nurl = "x"',
            "[data]: expected exactly one of corpus, url, images, got corp",
        ),
        (
            'corpus = "kjv"',
            'corpus = "kjv"\nvocab = 300',
            "[data] vocab: expected no such key with tokeniser = 'bytes'",
        ),
        ('corpus = "kjv"', 'corpus = "kjv"\nvalidation = 0', "[data] validation: expected a share above 0"),
        ('corpus = "kjv"\ncontext = 32', 'images = "digits"', "[model] family: expected a family that reads images"),
        ("validate_every = 10", "validation_batches = 2", "validation_batches: expected no such key without validate"),
        ("[model]", "model = 3\n[data2]", "model: expected a table, got 3; write [model] on a line of its own"),
        ("seed = 3", "seed = ", "expected TOML, got Invalid value"),
    ],
)
def test_refusals_name_the_field_and_the_remedy(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(UsageError) as caught:
        parse_recipe(TEXT.replace(old, new, 1), source="a.toml")
    assert str(caught.value).startswith("a.toml: ")
    assert message in str(caught.value)


def test_missing_table_is_named() -> None:
    with pytest.raises(UsageError, match=r"\[training\]: expected a table, got nothing; add \[training\]"):
        parse_recipe(TEXT[: TEXT.index("[training]")])


def test_missing_and_unreadable_files_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got No such file or directory; check the path"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(UsageError, match="expected UTF-8"):
        load_recipe(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (TrainingConfig, {"steps": 0, "batch": 8}),
        (TrainingConfig, {"steps": 1, "batch": 8, "micro_batches": 3}),
        (ScheduleConfig, {"floor": 1.5}),
        (DataConfig, {"corpus": "bible"}),
        (MlpConfig, {"hidden": ()}),
        (MlpConfig, {"dropout": 1.0}),
        (ConvnetConfig, {"channels": (16, 20)}),
        (LlamaConfig, {"layers": 1, "width": 36, "heads": 4}),
        (LlamaConfig, {"layers": 1, "width": 64, "heads": 4, "kv_heads": 3}),
        (FactoryConfig, {"factory": "mymodels"}),
        (FactoryConfig, {"factory": "m:f", "arguments": {"a": object()}}),
    ],
)
def test_dataclasses_check_themselves(config: type[Section], keys: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        config(**keys)


def test_resolved_sizes() -> None:
    assert LlamaConfig(layers=1, width=128, heads=4).hidden_width == 352
    assert LlamaConfig(layers=1, width=96, heads=4).hidden_width == 256
    assert LlamaConfig(layers=1, width=128, heads=4, kv_heads=2).key_heads == 2
    assert TrainingConfig(steps=1, batch=8, micro_batches=4).micro_batch == 2
    assert ConvnetConfig(channels=[8, 20], norm="batch").channels == (8, 20)  # type: ignore[arg-type]


def test_factory_arguments_survive_the_canonical_form() -> None:
    arguments = {"sizes": [1, 2], "deep": {"rate": 0.5, "on": True}, "name": "ä"}
    recipe = tiny(model=FactoryConfig(factory="mymodels.blocks:build", arguments=arguments))
    assert decode_recipe(recipe.canonical()) == recipe
    assert json.loads(recipe.canonical())["model"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"format":1', b'"format":2'),
        (b'"format":1,', b""),
        (b":20,", b": 20,"),
        (b'"seed":3,', b""),
        (b"}}", b"}"),
        (b"tiny", b"\xff"),
        (b'{"arith', b"[" * 100_000),
    ],
    ids=["format", "no-format", "space", "default", "cut", "utf-8", "nested"],
)
def test_committed_recipe_that_is_not_canonical_is_refused(old: bytes, new: bytes) -> None:
    assert old in tiny().canonical()
    with pytest.raises(UsageError, match="committed recipe"):
        decode_recipe(tiny().canonical().replace(old, new, 1))


@given(
    seed=st.integers(0, 2**64 - 1),
    learning_rate=st.floats(min_value=1e-30, max_value=1.0),
    micro_batches=st.integers(1, 50),
    micro_batch=st.integers(1, 50),
    tied=st.booleans(),
)
def test_canonical_form_returns_every_recipe(
    seed: int, learning_rate: float, micro_batches: int, micro_batch: int, tied: bool
) -> None:
    recipe = tiny(
        seed=seed,
        model=GptConfig(layers=1, width=8, heads=2, tied=tied),
        training=TrainingConfig(steps=5, batch=micro_batch * micro_batches, micro_batches=micro_batches),
        optimiser=OptimiserConfig(learning_rate=learning_rate),
        schedule=ScheduleConfig(),
    )
    assert decode_recipe(recipe.canonical()) == recipe


def test_page_holds_the_generated_reference() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipe_keys.renewed(page) == page, "run python -m runtime.recipe_keys docs/recipes.md"
    with pytest.raises(ValueError, match="expected the lines"):
        recipe_keys.renewed("no markers")


def test_example_of_the_page_is_a_recipe() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    example = page.split("```toml\n")[1].split("```")[0]
    assert parse_recipe(example).name == tomllib.loads(example)["name"]
