"""Files that others read: opened by their own libraries, equal to the byte, whole or absent; and nothing is run."""

import errno
import json
import os
import pickle
import resource
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from runtime.data import prepare
from runtime.models.initial import named_parameters
from runtime.program.build import chain_of
from runtime.recipe import DataConfig, Recipe, parse_recipe
from runtime.tokenisers import ByteTokeniser, Tokeniser, train_bpe
from storage.checkpoints import Checkpoint, open_checkpoint
from storage.errors import FailureError, UsageError
from storage.saving import save_state
from storage.store import memory_store
from trueweight import exports, huggingface, tensor_files

MODELS = {
    "gpt": "family = 'gpt'\nlayers = 2\nwidth = 16\nheads = 2\ndropout = 0.1",
    "gpt-bare": "family = 'gpt'\nlayers = 2\nwidth = 16\nheads = 4\nbias = false\ntied = false\nactivation = 'relu'",
    "gpt-silu": "family = 'gpt'\nlayers = 1\nwidth = 16\nheads = 2\ndropout = 0.2\nactivation = 'silu'\n"
    "vocab = 300\ncontext = 20",
    "gpt-tanh": "family = 'gpt'\nlayers = 1\nwidth = 16\nheads = 1\nactivation = 'tanh'\nbias = false",
    "llama": "family = 'llama'\nlayers = 2\nwidth = 16\nheads = 2\nkv_heads = 1",
    "llama-tied": "family = 'llama'\nlayers = 2\nwidth = 32\nheads = 4\nkv_heads = 2\nhidden = 24\nrope_base = 5e2\n"
    "tied = true\nvocab = 260\ncontext = 64",
}
CONTEXT = 16
TEXT = "In the beginning was the word.\nAnd the word had eight bits, and then more: Ωμέγα, naïve, 漢字 🙂\n" * 40


def recipe(model: str, data: str = "url = 'text.txt'") -> Recipe:
    return parse_recipe(
        f"name = 'tiny'\n[model]\n{model}\n[data]\n{data}\n[training]\nsteps = 1\nbatch = 1\n".replace(
            "'text.txt'", f"'text.txt'\ncontext = {CONTEXT}"
        )
    )


def every_kind() -> dict[str, np.ndarray]:
    """A state with every dtype and with shapes that are easily got wrong."""
    odd = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45], "<f4")
    nan = np.array([0x7FC00000], "<u4").view("<f4")
    return {
        "weight/block000.token.weight": np.random.default_rng(5)
        .normal(size=(300, 1000))
        .astype("<f4"),  # more than a frame
        "weight/block001.up.weight": np.concatenate([odd, nan]),
        "weight/scalar": np.array(2.5, "<f4"),
        "weight/empty": np.empty((0, 3), "<f4"),
        "weight/flags": np.array([True, False, True]),
        "weight/größe": np.array([-128, 127, 5], "|i1"),
        "m/block001.up.weight": np.arange(6, dtype="<i4").reshape(2, 3),
        "steps": np.array(2**40, "<i8"),
    }


def saved(arrays: dict[str, np.ndarray]) -> Checkpoint:
    store = memory_store()
    return open_checkpoint(store, save_state(store, arrays))


def export(checkpoint: Checkpoint, out: Path, form: str, **more: Any) -> dict[str, Any]:
    given = {"everything": False, "recipe": None, "tell": lambda _: None}
    return exports.export(checkpoint, out, form=form, **(given | more))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether names, dtypes, shapes and bytes are equal."""
    return one.keys() == other.keys() and all(
        (one[name].dtype, one[name].shape, one[name].tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name in one
    )


def weights(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("weight/"): value for name, value in arrays.items() if name.startswith("weight/")}


# -------------------------------------------------------------------------------------------- safetensors and torch


@pytest.mark.parametrize("everything", [False, True])
def test_the_safetensors_library_opens_an_export(tmp_path: Path, everything: bool) -> None:
    arrays, out = every_kind(), tmp_path / "state.safetensors"
    checkpoint = saved(arrays)
    told = export(checkpoint, out, "safetensors", everything=everything, facts={"run": "tiny", "format": "x"})
    expected = arrays if everything else weights(arrays)
    assert same(load_file(out), expected)
    with safe_open(out, framework="np") as file:
        assert file.metadata() == {
            "format": "trueweight-state 1",
            "state_root": checkpoint.root.hex(),
            "run": "tiny",
        }
    assert told == {
        "format": "safetensors",
        "path": str(out),
        "files": ["state.safetensors"],
        "tensors": len(expected),
        "bytes": out.stat().st_size,
        "state_root": checkpoint.root.hex(),
        "notes": [],
    }


@pytest.mark.parametrize("everything", [False, True])
def test_torch_opens_an_export_without_running_anything(tmp_path: Path, everything: bool) -> None:
    arrays, out = every_kind(), tmp_path / "state.pt"
    told = export(saved(arrays), out, "torch", everything=everything)
    loaded = torch.load(out, weights_only=True)
    assert same({name: value.numpy() for name, value in loaded.items()}, arrays if everything else weights(arrays))
    assert told["bytes"] == out.stat().st_size


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("batch", [1, tensor_files._READ_BYTES])
def test_a_round_trip_gives_the_same_state_root(
    tmp_path: Path, form: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_READ_BYTES", batch)
    checkpoint = saved(every_kind())
    export(checkpoint, tmp_path / "state", form, everything=True)
    found = tensor_files.load_file(tmp_path / "state", form)
    assert save_state(memory_store(), found) == checkpoint.root


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_the_same_state_gives_the_same_bytes(tmp_path: Path, form: str) -> None:
    arrays, facts = every_kind(), {f"fact {number}": "x" for number in range(9)}
    export(saved(arrays), tmp_path / "one", form, facts=facts)
    export(saved(dict(reversed(arrays.items()))), tmp_path / "two", form, facts=dict(reversed(facts.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    arrays = every_kind()
    export(saved(arrays), tmp_path / "x", "safetensors", everything=True)
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, row in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            assert (8 + size + row["data_offsets"][0]) % arrays[name].itemsize == 0, name


def test_the_recipe_is_named_and_others_may_read_the_file(tmp_path: Path) -> None:
    made = recipe(MODELS["gpt"])
    before = os.umask(0o022)
    try:
        export(saved(every_kind()), tmp_path / "x", "safetensors", recipe=made)
    finally:
        os.umask(before)
    with safe_open(tmp_path / "x", framework="np") as file:
        assert file.metadata()["recipe"] == made.digest.hex()
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


# ------------------------------------------------------------------------------------------------- whole or absent


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 500_000])
@pytest.mark.parametrize("form", exports.FORMS)
def test_nothing_is_left_where_the_disk_is_full(tmp_path: Path, form: str, size: int) -> None:
    made = recipe(MODELS["gpt"] + "\nvocab = 30000")
    checkpoint = saved(state_of(made)[1])
    with small_disk(size), pytest.raises(FailureError, match=r"writing .*out: File too large; check that disk"):
        export(checkpoint, tmp_path / "out", form, recipe=made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", exports.FORMS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_where_the_end_fails(
    tmp_path: Path, form: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise error

    made = recipe(MODELS["llama"])
    checkpoint = saved(state_of(made)[1])
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files.os, "fsync", fail)
        kind = FailureError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(kind, match="No space left on device; free space" if isinstance(error, OSError) else None):
            export(checkpoint, tmp_path / "out", form, recipe=made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", exports.FORMS)
def test_a_damaged_state_is_not_exported(tmp_path: Path, form: str) -> None:
    made = recipe(MODELS["gpt"])
    checkpoint = saved(state_of(made)[1])
    objects = checkpoint.store.objects
    (pack,) = objects.list("packs/")
    data = bytearray(objects.read(pack.key) or b"")
    data[99::1000] = b"!" * len(data[99::1000])
    objects.replace(pack.key, bytes(data))
    with pytest.raises(FailureError, match="is damaged"):
        export(checkpoint, tmp_path / "out", form, recipe=made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", exports.FORMS)
def test_nothing_is_replaced(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(MODELS["gpt"])
    checkpoint = saved(state_of(made)[1])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(UsageError, match=f"{name}: expected a path where nothing is, got a "):
            export(checkpoint, tmp_path / name, form, recipe=made)
    with monkeypatch.context() as patch:  # somebody else comes in between
        patch.setattr(exports, "check_target", lambda _: None)
        for name in ("file", "folder"):
            with pytest.raises(UsageError, match="expected a path where nothing is"):
                export(checkpoint, tmp_path / name, form, recipe=made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(tensor_files.os, "link", refuse)
    arrays = every_kind()
    export(saved(arrays), tmp_path / "x", "safetensors")
    assert same(load_file(tmp_path / "x"), weights(arrays))
    assert len(list(tmp_path.iterdir())) == 1


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "expected"),
    [("no/x", "no, got nothing there; make it first"), ("file/x", "file, got a file; make it first")],
)
def test_a_target_without_a_folder_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=expected):
        export(saved(every_kind()), tmp_path / name, "safetensors")


def test_what_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"format 'onnx': expected one of safetensors, torch, hf; choose one"):
        export(saved(every_kind()), out, "onnx")
    with pytest.raises(UsageError, match=r"expected names that begin with 'weight/', .* got 'a'; export it with --all"):
        export(saved({"a": np.zeros(3, "<f4")}), out, "torch")
    with pytest.raises(UsageError, match=r"tensor '__metadata__': expected another name"):
        export(saved({"weight/__metadata__": np.zeros(3, "<f4")}), out, "safetensors")
    with pytest.raises(UsageError, match=r"expected a run, .* or use --format safetensors"):
        export(saved(every_kind()), out, "hf")
    with pytest.raises(UsageError, match=r"expected weights alone, got --all .*; use --format safetensors"):
        export(saved(every_kind()), out, "hf", everything=True, recipe=recipe(MODELS["gpt"]))
    for model in ("family = 'mlp'", "family = 'convnet'", "family = 'factory'\nfactory = 'a:b'"):
        with pytest.raises(
            UsageError, match=r"expected \[model\] family gpt or llama, got .*; use --format safetensors"
        ):
            export(saved(every_kind()), out, "hf", recipe=recipe(model, "images = 'digits'"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype", "none"])
def test_hf_refuses_the_state_of_another_model(tmp_path: Path, family: str, change: str) -> None:
    made = recipe(MODELS[family])
    arrays = state_of(made)[1]
    name = "weight/block001.up.weight"
    match change:
        case "missing":
            del arrays[name]
        case "extra":
            arrays["weight/block009.up.weight"] = arrays[name]
        case "shape":
            arrays[name] = arrays[name].T
        case "dtype":
            arrays[name] = arrays[name].view("<i4")
        case "none":
            arrays = {"other": arrays[name]}
    with pytest.raises(UsageError, match=r"expected the state of a run of recipe tiny, with block.*use --format"):
        export(saved(arrays), tmp_path / "out", "hf", recipe=made)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- reading


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["zip", "old", "pickle", "nested"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, marker = tmp_path / "x.pt", tmp_path / "ran"
    value = {"weight": torch.zeros(3), "other": Hostile(marker)}
    match how:
        case "zip":
            torch.save(value, path)
        case "old":
            torch.save(value, path, _use_new_zipfile_serialization=False)
        case "pickle":
            path.write_bytes(pickle.dumps({"other": Hostile(marker)}))
        case "nested":
            torch.save({"state": [value]}, path)
    asked = "more than tensors" if how == "pickle" else r"posix\.system"
    with pytest.raises(UsageError, match=rf"got a pickle that asks for {asked}, which was not run; save its") as caught:
        tensor_files.load_file(path, "torch")
    assert "weights_only" not in str(caught.value)
    assert not marker.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # the test would have seen it


def test_torchscript_is_refused_and_not_run(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/version", b"3")
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", b"")
    with pytest.raises(UsageError, match=r"got something else \(RuntimeError: .*TorchScript") as caught:
        tensor_files.load_file(tmp_path / "x.pt", "torch")
    assert "set to `False`" not in str(caught.value)


def test_what_torch_saves_of_a_module_is_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3))
    module[1].weight = torch.nn.Parameter(module[0].weight.T)  # shares memory, and is not contiguous
    expected = {name: value.detach().contiguous().numpy() for name, value in module.state_dict().items()}
    torch.save(module.state_dict(), tmp_path / "a.pt")
    torch.save(dict(module.named_parameters()), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pt"):
        assert same(tensor_files.load_file(tmp_path / name, "torch"), expected)


TENSOR = torch.zeros(4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": TENSOR.half()}, r"'a' as f32, .* got float16; convert it first, real numbers to float32"),
        ({"a": TENSOR, "b": TENSOR.bfloat16()}, r"'b' as f32, .* got bfloat16; convert"),
        ({"a": TENSOR.double()}, r"'a' as f32, .* got float64; convert"),
        ({"a": TENSOR.to(torch.uint8)}, r"'a' as f32, .* got uint8; convert"),
        ({"a": torch.eye(3).to_sparse()}, r"'a' to be a dense tensor .* layout torch.sparse_coo"),
        ({"a": torch.zeros(3, device="meta")}, r"'a' to be a dense tensor with values, got .* on meta"),
        ({"a": torch.zeros(1).expand(10**15)}, r"'a' to have a value for each element"),
        ({"model": {"a": TENSOR}}, r"'model' to be a tensor, got dict; save a dictionary of tensors alone"),
        ({"a": TENSOR, "epoch": 3}, r"'epoch' to be a tensor, got int"),
        ({3: TENSOR}, r"tensors by name, got the key 3"),
        ([TENSOR], r"expected a dictionary of tensors, got list; save its tensors"),
        ({"a": np.zeros(3)}, r"a pickle that asks for numpy\._core\.multiarray\._reconstruct, which was not run"),
        (torch.nn.Linear(2, 2), r"a pickle that asks for torch\.nn\.modules\.linear\.Linear, which was not run"),
    ],
)
def test_torch_files_with_something_else_are_refused(tmp_path: Path, value: object, expected: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=expected):
        tensor_files.load_file(tmp_path / "x.pt", "torch")


@pytest.mark.parametrize("dtype", ["<f2", "<f8", "<u1", "<i2"])
def test_safetensors_of_other_dtypes_are_refused(tmp_path: Path, dtype: str) -> None:
    save_file({"a": np.zeros(2, "<f4"), "b": np.zeros(2, dtype)}, tmp_path / "x")
    with pytest.raises(UsageError, match=r"expected 'b' as f32, i8, i32, i64, bool, got .*; convert it first"):
        tensor_files.load_file(tmp_path / "x", "safetensors")


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("data", [b"", b"x", b"hello " * 100, bytes(range(256)), "half"])
def test_files_of_something_else_are_refused(tmp_path: Path, form: str, data: bytes | str) -> None:
    path = tmp_path / "x"
    if isinstance(data, str):
        export(saved(every_kind()), path, form)
        whole = path.read_bytes()
        data = whole[: len(whole) // 2]
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"x: expected a (safetensors file|dictionary of tensors by torch.save), got"):
        tensor_files.load_file(path, form)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, form: str) -> None:
    with pytest.raises(UsageError, match=r"no: expected a readable file, got No such file.*; check the path"):
        tensor_files.load_file(tmp_path / "no", form)
    with pytest.raises(UsageError, match=r"expected a readable file, got Is a directory; check the path"):
        tensor_files.load_file(tmp_path, form)


def test_the_form_is_guessed_from_the_suffix() -> None:
    names = {"a.safetensors": "safetensors", "a.pt": "torch", "a.pth": "torch", "pytorch_model.bin": "torch"}
    assert {name: tensor_files.guess_form(Path(name)) for name in names} == names
    for name in ("a.gguf", "a"):
        with pytest.raises(UsageError, match=r"expected a name that ends in .*; say --format safetensors or --format"):
            tensor_files.guess_form(Path(name))
    with pytest.raises(UsageError, match="expected a file in the format safetensors or torch, got 'hf'"):
        tensor_files.load_file(Path("a"), "hf")


# ---------------------------------------------------------------------------------------------------- transformers


def state_of(made: Recipe) -> tuple[Any, dict[str, np.ndarray]]:
    """The recipe's model in torch with random weights, and a state that holds them and moments."""
    images = made.data.reads == "images"
    data = SimpleNamespace(shape=(1, 8, 8) if images else (made.data.context,), vocab=256, is_text=not images)
    chain, rng = chain_of(made, data), np.random.default_rng(7)
    arrays = {}
    for name, parameter in named_parameters(chain.blocks).items():
        values = rng.normal(0, 0.3, parameter.shape).astype("<f4") + np.float32("norm" in name)
        parameter.data = torch.from_numpy(values)
        arrays |= {f"weight/{name}": values, f"m/{name}": values * 2}
    for block in chain.blocks:
        block.eval()
    return chain, arrays


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be downloaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("shard_bytes", [exports.SHARD_BYTES, 3000])
@pytest.mark.parametrize("model", MODELS)
def test_transformers_computes_the_same_logits(tmp_path: Path, offline: None, model: str, shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM

    made = recipe(MODELS[model])
    chain, arrays = state_of(made)
    told = export(saved(arrays), tmp_path / "hf", "hf", recipe=made, shard_bytes=shard_bytes, facts={"run": "tiny"})
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert told["files"] == sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert ("model.safetensors.index.json" in told["files"]) == (shard_bytes == 3000)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    tokens = torch.from_numpy(np.random.default_rng(9).integers(0, 256, (3, CONTEXT)))
    with torch.no_grad():
        ours, theirs = chain.output(tokens), loaded.eval()(tokens).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert told["notes"] == (
        ["the model has no biases and GPT-2 always has: they are written as 0"]
        if "bias = false" in MODELS[model]
        else []
    )


def test_transformers_config_has_the_models_training_settings(tmp_path: Path, offline: None) -> None:
    from transformers import AutoConfig

    for model in ("gpt-silu", "llama-tied"):
        made = recipe(MODELS[model])
        export(saved(state_of(made)[1]), tmp_path / model, "hf", recipe=made)
    gpt, llama = (AutoConfig.from_pretrained(tmp_path / model) for model in ("gpt-silu", "llama-tied"))
    assert (gpt.resid_pdrop, gpt.embd_pdrop, gpt.attn_pdrop) == (0.2, 0.2, 0.2)
    assert (gpt.n_positions, gpt.vocab_size, gpt.tie_word_embeddings, gpt.eos_token_id) == (20, 300, True, None)
    assert llama.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert (llama.max_position_embeddings, llama.vocab_size, llama.tie_word_embeddings) == (64, 260, True)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_transformers_gives_the_same_tokens(tmp_path: Path, offline: None, kind: str) -> None:
    from transformers import AutoTokenizer

    tokeniser: Tokeniser = ByteTokeniser() if kind == "bytes" else train_bpe(TEXT, 300)
    made = recipe(MODELS["llama"], f"url = 'text.txt'\ntokeniser = '{kind}'" + "\nvocab = 300" * (kind == "bpe"))
    given = {} if kind == "bytes" else {"tokeniser": tokeniser}
    told = export(saved(state_of(made)[1]), tmp_path / "hf", "hf", recipe=made, **given)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(told["files"])
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT, "  two  spaces\n\n", "\0\x01 \x7f\x80é\u3000", ""):
        tokens = tokeniser.encode(text)
        assert found(text)["input_ids"] == tokens.tolist()
        assert found.decode(tokens.tolist()) == text
    assert found.model_max_length == CONTEXT


def test_a_bpe_that_is_not_at_hand_is_left_out(tmp_path: Path) -> None:
    made = recipe(MODELS["gpt"], "url = 'text.txt'\ntokeniser = 'bpe'\nvocab = 300")
    heard: list[str] = []
    told = export(saved(state_of(made)[1]), tmp_path / "hf", "hf", recipe=made, tell=heard.append)
    assert told["files"] == ["config.json", "model.safetensors"]
    assert told["notes"] == ["no tokeniser was written: the run's own is not at hand"]
    assert heard == [f"{tmp_path / 'hf'}: {told['notes'][0]}"]


def test_the_tokeniser_of_prepared_data_is_found(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    store = memory_store()
    for kind, size in (("bytes", {}), ("bpe", {"vocab": 300})):
        data = prepare(DataConfig(url="text.txt", tokeniser=kind, context=8, **size), store, folder=tmp_path)
        found = huggingface.tokeniser_of(store, data)
        assert found is not None
        assert json.loads(found.to_bytes())["kind"] == kind
    assert huggingface.tokeniser_of(store, prepare(DataConfig(images="digits"), store)) is None
