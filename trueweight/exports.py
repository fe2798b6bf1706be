"""A checkpoint as files for other programs: what `trueweight store export` writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.recipe import Recipe
from runtime.tokenisers import Tokeniser
from storage.checkpoints import Checkpoint
from storage.errors import UsageError
from trueweight.huggingface import WEIGHTS, hf_model, write_hf
from trueweight.tensor_files import (
    METADATA_KEY,
    SAFETENSORS,
    TORCH,
    Piece,
    check_target,
    synced,
    whole,
    write_safetensors,
    write_torch,
)

Tell = Callable[[str], None]

HF = "hf"
FORMS = (SAFETENSORS, TORCH, HF)
SHARD_BYTES = 5 * 10**9
"""A file of an hf folder holds no more than this, unless it holds one tensor."""


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    form: str,
    everything: bool,
    recipe: Recipe | None,
    tell: Tell,
    facts: Mapping[str, str] | None = None,
    tokeniser: Tokeniser | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """What has been written to `out`: format, path, files, tensors, bytes, state_root, and notes for the user.

    `safetensors` and `torch` are files with the weights under the module's own names or, with `everything`, the whole
    state under its full names; `hf` is a folder for transformers' AutoModelForCausalLM. `facts` go into the metadata of
    safetensors. `tokeniser` is the data's (see `tokeniser_of`): an hf folder needs it where it is a BPE. `tell` is told
    the notes.

    UsageError: something is at `out`, its folder is missing, or the form cannot express the state. FailureError: the
    disk refuses, or the checkpoint is damaged.
    """
    if form not in FORMS:
        raise UsageError(f"format {form!r}: expected one of {', '.join(FORMS)}; choose one")
    check_target(out)
    notes: list[str] = []
    if form == HF:
        model = hf_model(checkpoint, recipe, tokeniser, everything=everything)
        pieces, notes = model.pieces, model.notes
        with whole(out, folder=True) as folder:
            write_hf(checkpoint, folder, model, _metadata(checkpoint, "pt", recipe, facts), shard_bytes)
            files = sorted(path.name for path in folder.iterdir())
            size = sum((folder / name).stat().st_size for name in files)
    else:
        pieces, files = _pieces(checkpoint, everything=everything), [out.name]
        with whole(out, folder=False) as temporary, synced(temporary) as file:
            if form == SAFETENSORS:
                metadata = _metadata(checkpoint, "trueweight-state 1", recipe, facts)
                write_safetensors(file, checkpoint, pieces, metadata)
            else:
                write_torch(file, out, checkpoint, pieces)
            size = file.tell()
    for note in notes:
        tell(f"{out}: {note}")
    return {
        "format": form,
        "path": str(out),
        "files": files,
        "tensors": len(pieces),
        "bytes": size,
        "state_root": checkpoint.root.hex(),
        "notes": notes,
    }


def _pieces(checkpoint: Checkpoint, *, everything: bool) -> list[Piece]:
    """The tensors of a file that keeps our layout; UsageError where there are none, or a name cannot be written."""
    kept = [entry for entry in checkpoint.manifest.tensors if everything or entry.name.startswith(WEIGHTS)]
    if not kept and not everything:
        raise UsageError(
            f"state {checkpoint.root.hex()}: expected names that begin with {WEIGHTS!r}, as a run's weights have, "
            f"got {', '.join(map(repr, checkpoint.names[:3])) or 'no tensors'}; export it with --all"
        )
    names = [entry.name if everything else entry.name.removeprefix(WEIGHTS) for entry in kept]
    if METADATA_KEY in names:
        raise UsageError(f"tensor {METADATA_KEY!r}: expected another name, this one is safetensors' own; rename it")
    return [Piece(name, entry.name, entry.dtype, tuple(entry.shape)) for name, entry in zip(names, kept, strict=True)]


def _metadata(
    checkpoint: Checkpoint, form: str, recipe: Recipe | None, facts: Mapping[str, str] | None
) -> dict[str, str]:
    found = dict(facts or {})
    if recipe is not None:
        found |= {"recipe": recipe.digest.hex()}
    return found | {"format": form, "state_root": checkpoint.root.hex()}
