"""A state as a folder that transformers opens with AutoModelForCausalLM: the gpt and llama families."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from runtime.data import open_dataset
from runtime.recipe import GptConfig, LlamaConfig, Recipe
from runtime.shards import WEIGHT
from runtime.tokenisers import BpeTokeniser, ByteTokeniser, Tokeniser, open_tokeniser
from storage.checkpoints import Checkpoint
from storage.errors import UsageError
from storage.store import Store
from trueweight.tensor_files import SAFETENSORS, Piece, groups, synced, write_safetensors

WEIGHTS = WEIGHT + "/"


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """A model as transformers has it: config.json, the tensors, the tokeniser if there is one, notes for the user."""

    config: Mapping[str, Any]
    pieces: list[Piece]
    tokeniser: tokenizers.Tokenizer | None
    notes: list[str]


class _Module(NamedTuple):
    """A module of ours with a `weight` of this shape, and what transformers calls it."""

    ours: str
    theirs: str
    shape: tuple[int, ...]


def hf_model(
    checkpoint: Checkpoint, recipe: Recipe | None, tokeniser: Tokeniser | None, *, everything: bool
) -> HfModel:
    """The model as transformers has it; UsageError where it has none such, or the state is another model's."""
    instead = f"use --format {SAFETENSORS}"
    if everything:
        raise UsageError(f"--format hf: expected weights alone, got --all with the optimiser's state; {instead}")
    if recipe is None:
        raise UsageError(
            f"--format hf: expected a run, whose recipe says what the model is, got a state; name a run, or {instead}"
        )
    shapes = {
        entry.name.removeprefix(WEIGHTS): entry.shape
        for entry in checkpoint.manifest.tensors
        if entry.name.startswith(WEIGHTS) and entry.dtype == "f32"
    }
    notes = []
    match recipe.model:
        case GptConfig() as model:
            config, pieces = _gpt(model, shapes)
            if not model.bias:
                notes.append("the model has no biases and GPT-2 always has: they are written as 0")
        case LlamaConfig() as model:
            config, pieces = _llama(model, shapes, recipe.data.context)
        case other:
            raise UsageError(f"--format hf: expected [model] family gpt or llama, got {other.family!r}; {instead}")
    expected = {
        piece.source.removeprefix(WEIGHTS): piece.shape[::-1] if piece.transposed else piece.shape
        for piece in pieces
        if piece.source is not None
    }
    if odd := sorted(expected.items() ^ shapes.items()):
        name = odd[0][0]
        raise UsageError(
            f"--format hf: expected the state of a run of recipe {recipe.name}, with {name} of shape "
            f"{expected.get(name)}, got {shapes.get(name)}; {instead}"
        )
    if tokeniser is None and recipe.data.tokeniser == "bytes":
        tokeniser = ByteTokeniser()
    made = hf_tokeniser(tokeniser)
    if made is None:
        notes.append("no tokeniser was written: the run's own is not at hand")
    return HfModel(config=config, pieces=pieces, tokeniser=made, notes=notes)


def _gpt(model: GptConfig, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], list[Piece]]:
    """GPT2LMHeadModel, whose linear layers are stored transposed; biases that the model has not are 0."""
    width = model.width
    first, *places, last = _places(model.layers)
    vocab, positions = (shapes.get(f"{first}.{name}", (0,))[0] for name in ("token.weight", "position"))
    layer = [
        _Module("norm_attention", "ln_1", (width,)),
        _Module("attention.qkv", "attn.c_attn", (3 * width, width)),
        _Module("attention.output", "attn.c_proj", (width, width)),
        _Module("norm_feed", "ln_2", (width,)),
        _Module("up", "mlp.c_fc", (4 * width, width)),
        _Module("down", "mlp.c_proj", (width, 4 * width)),
    ]
    pieces = [
        _piece("transformer.wte.weight", f"{first}.token.weight", (vocab, width)),
        _piece("transformer.wpe.weight", f"{first}.position", (positions, width)),
    ]
    final = _Module(f"{last}.norm", "transformer.ln_f", (width,))
    for ours, theirs, shape in (*_layers(places, "transformer.h", layer), final):
        pieces.append(_piece(f"{theirs}.weight", f"{ours}.weight", shape, transposed=len(shape) == 2))
        pieces.append(_piece(f"{theirs}.bias", f"{ours}.bias" if model.bias else None, shape[:1]))
    if not model.tied:
        pieces.append(_piece("lm_head.weight", f"{last}.output.weight", (vocab, width)))
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_positions": positions,
        "n_embd": width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": 4 * width,
        "activation_function": "gelu_new" if model.activation == "gelu" else model.activation,  # the tanh form
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout),
        "layer_norm_epsilon": 1e-5,
    }
    return _completed(config, tied=model.tied), pieces


def _llama(
    model: LlamaConfig, shapes: Mapping[str, tuple[int, ...]], context: int
) -> tuple[dict[str, Any], list[Piece]]:
    """LlamaForCausalLM, which turns the same pairs of q and k as `runtime.models.llama`: nothing is reordered."""
    width, hidden = model.width, model.hidden_width
    head_width = width // model.heads
    first, *places, last = _places(model.layers)
    vocab = shapes.get(f"{first}.token.weight", (0,))[0]
    layer = [
        _Module("norm_attention", "input_layernorm", (width,)),
        _Module("attention.query", "self_attn.q_proj", (width, width)),
        _Module("attention.key", "self_attn.k_proj", (model.key_heads * head_width, width)),
        _Module("attention.value", "self_attn.v_proj", (model.key_heads * head_width, width)),
        _Module("attention.output", "self_attn.o_proj", (width, width)),
        _Module("norm_feed", "post_attention_layernorm", (width,)),
        _Module("gate", "mlp.gate_proj", (hidden, width)),
        _Module("up", "mlp.up_proj", (hidden, width)),
        _Module("down", "mlp.down_proj", (width, hidden)),
    ]
    modules = [
        _Module(f"{first}.token", "model.embed_tokens", (vocab, width)),
        *_layers(places, "model.layers", layer),
        _Module(f"{last}.norm", "model.norm", (width,)),
        *([] if model.tied else [_Module(f"{last}.output", "lm_head", (vocab, width))]),
    ]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "max_position_embeddings": model.context or context,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "head_dim": head_width,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},  # what transformers 5 reads
        "attention_bias": False,
        "mlp_bias": False,
    }
    pieces = [_piece(f"{theirs}.weight", f"{ours}.weight", shape) for ours, theirs, shape in modules]
    return _completed(config, tied=model.tied), pieces


def _places(layers: int) -> list[str]:
    """The blocks' names in a state (`runtime.models.initial.local_names`): embedding, layers, head."""
    digits = max(3, len(str(layers + 1)))
    return [f"block{number:0{digits}}" for number in range(layers + 2)]


def _layers(places: Sequence[str], theirs: str, layer: Sequence[_Module]) -> list[_Module]:
    """The modules of every layer."""
    return [
        _Module(f"{place}.{module.ours}", f"{theirs}.{number}.{module.theirs}", module.shape)
        for number, place in enumerate(places)
        for module in layer
    ]


def _piece(name: str, source: str | None, shape: tuple[int, ...], *, transposed: bool = False) -> Piece:
    """A tensor of a float32 weight; `shape` is ours."""
    found = None if source is None else WEIGHTS + source
    return Piece(name, found, "f32", shape[::-1] if transposed else shape, transposed)


def _completed(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The config with what all models of ours have: no token begins or ends a text."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {**config, **tokens, "tie_word_embeddings": tied, "dtype": "float32"}


def write_hf(
    checkpoint: Checkpoint, folder: Path, model: HfModel, metadata: Mapping[str, str], shard_bytes: int
) -> None:
    """Write config, weights and tokeniser into an empty folder."""
    _write_json(folder / "config.json", model.config)
    shards = list(groups(model.pieces, shard_bytes))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        where |= {piece.name: name for piece in shard}
        with synced(folder / name) as file:
            write_safetensors(file, checkpoint, shard, metadata)
    if len(shards) > 1:
        size = sum(piece.size for piece in model.pieces)
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    if model.tokeniser is not None:
        with synced(folder / "tokenizer.json") as file:
            file.write(model.tokeniser.to_str(pretty=True).encode())
        positions = model.config.get("n_positions") or model.config["max_position_embeddings"]
        settings = {"clean_up_tokenization_spaces": False, "model_max_length": positions}
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **settings})


def tokeniser_of(store: Store, data: bytes) -> Tokeniser | None:
    """The tokeniser of the prepared data with this root; None where the data is images."""
    digest = open_dataset(store, data).record.tokeniser
    return None if digest is None else open_tokeniser(store.get(digest), f"{digest.hex()} in {store}")


def hf_tokeniser(tokeniser: Tokeniser | None) -> tokenizers.Tokenizer | None:
    """The tokeniser as the tokenizers library has it; None where there is none, or that cannot express it."""
    if isinstance(tokeniser, BpeTokeniser):
        return tokeniser._model
    if not isinstance(tokeniser, ByteTokeniser):
        return None
    made = tokenizers.Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _byte_characters() -> dict[str, int]:
    """The bytes by GPT-2's printable characters for them: a byte's own in Latin-1, else one from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with synced(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")
