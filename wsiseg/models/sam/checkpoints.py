"""Checkpoints of the SAM family: recognising a file and reading its tensors. Nothing is run from a file.

Forms that are read [1]_, by content whatever the name::

    flat               image_encoder.*  prompt_encoder.*  mask_decoder.*      official SAM, micro-sam
    with decoder       {"model_state": flat, "decoder_state": decoder}        exported by micro-sam
    training           the same, keys after "sam.", and objects of training   micro-sam's best.pt
    decoder            base.*  deconvN.*  decoder.*  out_conv.*               micro-sam's second file; given beside the first
    ours               sam.<flat>  decoder.<decoder>                          safetensors, of `wsiseg models import`

Each also below any key, up to two levels deep (``{"ckpt": {"model_state_dict": flat}}``), and with anything before its names (``net.``,
``model.sam.``); ``module.`` and ``_orig_mod.`` are taken out wherever they are. Of several models the outermost is read, then the one whose key
comes first in ``_CONTAINERS``, averaged weights (``ema``) last; the others are named in a note.

References
----------
.. [1] micro-sam, https://github.com/computational-cell-analytics/micro-sam, ``micro_sam/util.py`` and ``micro_sam/instance_segmentation.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wsiseg.errors import WeightsError
from wsiseg.models.sam.torch_files import read_torch_file
from wsiseg.runtime.paths import kind_of, readable, require_regular
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from pathlib import Path

_WRAPPER = re.compile(
    r"(^|\.)(?:(?:_orig_mod|module)\.)+"
)  # of torch.compile and of DataParallel; also around a part of the model
#: Mappings that hold the model, the likeliest first; of others the averaged weights (``ema``) come last.
_CONTAINERS = ("model_state", "state_dict", "model", "model_state_dict", "net", "network", "params", "weights")
_DEPTH = 2  #: mappings within mappings that are looked into
_STATISTICS = {"pixel_mean", "pixel_std"}
_PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
_PATCHES = "image_encoder.patch_embed.proj.weight"
_LAST = "out_conv.weight"
_DECODER_CHANNELS = 3  # foreground, distance to the centre, distance to the boundary
_NAMES = {(768, 12): "ViT-B", (1024, 24): "ViT-L", (1280, 32): "ViT-H"}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model, as they are in the file.

    Attributes
    ----------
    sam
        ``image_encoder.*``, ``prompt_encoder.*``, ``mask_decoder.*``.
    decoder
        Tensors of the instance decoder, without its copy of the encoder; empty when there is none.
    notes
        Notes on what was left out, one message each.
    """

    sam: dict[str, Tensor]
    decoder: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The image encoder, as its tensors' shapes tell it.

    Attributes
    ----------
    dim, depth, heads
        Width, number of blocks, attention heads.
    global_blocks
        Blocks that attend to the whole image, counted from 0; the others attend within windows.
    window
        Side of a window, tokens.
    grid
        Side of the image, tokens.
    patch
        Side of a token, model px.
    """

    dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int
    grid: int
    patch: int

    @property
    def name(self) -> str:
        """``ViT-B``, ``ViT-L``, ``ViT-H``, or width and depth in words."""
        return _NAMES.get((self.dim, self.depth), f"ViT of width {self.dim} and depth {self.depth}")


def read_checkpoint(path: Path, decoder: Path | None = None) -> Checkpoint:
    """Read a checkpoint of the SAM family.

    Parameters
    ----------
    path
        PyTorch or safetensors file of the model.
    decoder
        File of its instance decoder, where that is apart. It takes the place of one in ``path``.

    Returns
    -------
    Checkpoint
        Tensors on the CPU, in the file's own precision. They read the file when they are used: do not change it meanwhile.

    Raises
    ------
    WeightsError
        A file is missing, damaged, or something else than a SAM checkpoint with a plain ViT encoder; or it asks to run code.
    """
    content, notes = _read(path)
    sam, own = _split(content, path, notes)
    _require_sam(sam, path)
    if decoder:
        if own:
            notes.append(f"the decoder in {path.name} is ignored in favour of {decoder.name}")
        content, more = _read(decoder)
        own = _decoder(content, decoder)
        notes += more
    if own:
        _require_decoder(own, decoder or path)
    for tensors, file in ((sam, path), (own, decoder or path)):
        _require_finite(tensors, file)
    try:
        recognise(sam)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return Checkpoint(sam, own, tuple(notes))


def recognise(sam: Mapping[str, Tensor]) -> Architecture:
    """Tell the encoder from the shapes of its tensors.

    Parameters
    ----------
    sam
        Tensors of a `Checkpoint`.

    Returns
    -------
    Architecture
        A block is global when its table of relative positions covers the image and another block's does not.

    Raises
    ------
    WeightsError
        Tensors are missing or do not go together.
    """
    dim, patch = _shape(sam, _PATCHES, 4)[0], _shape(sam, _PATCHES, 4)[-1]
    grid = _shape(sam, "image_encoder.pos_embed", 4)[1]
    blocks = {int(found[1]) for key in sam if (found := re.match(r"image_encoder\.blocks\.(\d+)\.", key))}
    if blocks != set(range(len(blocks))) or not blocks:
        raise WeightsError(
            f"image_encoder.blocks has the numbers {sorted(blocks)}; they must be 0, 1, 2, ...; download the file again"
        )
    tables = [_shape(sam, f"image_encoder.blocks.{k}.attn.rel_pos_h", 2) for k in range(len(blocks))]
    head_dim = tables[0][1]
    if not head_dim or dim % head_dim:
        raise WeightsError(f"width {dim} is not a multiple of the heads' width {head_dim}; this is not a SAM encoder")
    rows = [table[0] for table in tables]
    whole = 2 * grid - 1
    windowed = set(rows) - {whole} or {whole}
    if len(windowed) > 1 or min(windowed) % 2 == 0:
        raise WeightsError(
            f"tables of relative positions of {sorted(set(rows))} rows; SAM has {whole} and one other odd number"
        )
    global_blocks = tuple(k for k, n in enumerate(rows) if n not in windowed)
    return Architecture(
        dim=dim,
        depth=len(rows),
        heads=dim // head_dim,
        global_blocks=global_blocks,
        window=(min(windowed) + 1) // 2,
        grid=grid,
        patch=patch,
    )


def _shape(sam: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if key not in sam:
        raise WeightsError(f"{key} is missing; pass a complete SAM checkpoint (ViT-B, ViT-L or ViT-H)")
    if sam[key].ndim != ndim:
        raise WeightsError(
            f"{key} has the shape {tuple(sam[key].shape)}, not {ndim} dimensions; pass a SAM checkpoint (ViT-B, ViT-L or ViT-H)"
        )
    return tuple(sam[key].shape)


# Reading


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the dict in a file of any known kind, and notes on what was skipped."""
    notes: list[str] = []
    try:
        kind = _kind(path)
        if kind == "safetensors":
            return _read_safetensors(path), notes
        found = read_torch_file(path)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror or error}); check the path, the permissions and the disk"
        ) from error
    if found.foreign:
        shown = ", ".join(found.foreign[:3]) + (", ..." if len(found.foreign) > 3 else "")
        notes.append(f"objects of other programs in {path.name} were not loaded ({shown})")
    if not isinstance(found.content, Mapping):
        what = "a whole pickled model or another object" if found.foreign else f"a {type(found.content).__name__}"
        raise WeightsError(f"{path}: holds {what}, not a dict of tensors; save the model's state_dict() and pass that")
    return {str(key): value for key, value in found.content.items()}, notes


def _kind(path: Path) -> str:
    """``torch`` or ``safetensors``, by the first bytes."""
    found = kind_of(path, WeightsError)
    if found == "folder":
        raise WeightsError(f"{path}: is a folder; pass the weight file in it")
    if found == "nothing":
        raise WeightsError(f"{path}: no such file; check the path")
    with readable(path, WeightsError):
        require_regular(path)
        with path.open("rb") as stream:
            head = stream.read(512)
    if not head:
        raise WeightsError(f"{path}: the file is empty; copy or download it again")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "torch"
    if head[:1] == b"\x80":
        return "torch"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return "safetensors"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise WeightsError(
            f"{path}: a web page, not a weight file; the download got an error or a login page: download the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: a pointer of Git LFS, not the file itself; run `git lfs pull` where it is from")
    raise WeightsError(
        f"{path}: not a checkpoint; pass a PyTorch file (.pt, .pth) or a .safetensors file of a SAM model"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError) as error:
        reason = first_line(error)
        raise WeightsError(
            f"{path}: not a readable safetensors file ({reason}); it may be truncated: download it again"
        ) from error


# Sorting


@dataclass(frozen=True)
class _State:
    """A mapping of names to tensors in a file. ``place``: its keys, ``model`` or ``ckpt.ema``; empty for the file's own."""

    place: str
    tensors: dict[str, Tensor]
    rest: tuple[str, ...]


def _states(content: Mapping[Any, Any], place: str = "", depth: int = _DEPTH) -> list[_State]:
    """Every mapping that holds tensors, the outermost first, then in the order of ``_CONTAINERS``; names without wrappers."""
    names = {str(key): value for key, value in content.items()}
    tensors = {_WRAPPER.sub(r"\1", key): value for key, value in names.items() if isinstance(value, Tensor)}
    found = (
        [_State(place, tensors, tuple(sorted(key for key, value in names.items() if not isinstance(value, Tensor))))]
        if tensors
        else []
    )
    inner = sorted(
        (key for key, value in names.items() if isinstance(value, Mapping)),
        key=lambda key: (_CONTAINERS.index(key) if key in _CONTAINERS else len(_CONTAINERS), "ema" in key.lower(), key),
    )
    if depth:
        levels = [_states(names[key], f"{place}.{key}" if place else key, depth - 1) for key in inner]
        found += [
            state for states in levels for state in states if state.place.count(".") == place.count(".") + bool(place)
        ]
        found += [
            state for states in levels for state in states if state.place.count(".") > place.count(".") + bool(place)
        ]
    return found


def _prefixes(tensors: Mapping[str, Tensor], ending: str) -> list[str]:
    """Prefixes before ``ending`` in names, empty or ending in a dot; the shortest first."""
    before = {key.removesuffix(ending) for key in tensors if key.endswith(ending)}
    whole = [prefix for prefix in before if not prefix or prefix.endswith(".")]
    return sorted(whole, key=lambda prefix: ("ema" in prefix.lower(), len(prefix), prefix))


def _split(content: dict[str, Any], path: Path, notes: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the model and of its decoder, under their plain names."""
    states = _states(content)
    if not states:
        shown = ", ".join(sorted(content)[:3]) or "nothing"
        raise WeightsError(f"{path}: holds no tensors by name (found: {shown}); pass a SAM checkpoint")
    own = content.get("decoder_state")
    if own is not None and not isinstance(own, Mapping):
        raise WeightsError(
            f"{path}: decoder_state is a {type(own).__name__}, not a dict of tensors; download the file again"
        )
    models = [
        (state, prefix)
        for state in states
        for prefix in _prefixes(state.tensors, _PATCHES)
        if all(any(key.startswith(prefix + part) for key in state.tensors) for part in _PARTS)
    ]
    if not models:  # it is named for what it is later; the model's part is the first that is not the decoder
        state = next((state for state in states if state.place != "decoder_state"), states[0])
        return _without_common_prefix(state.tensors), {}
    (state, prefix), others = models[0], models[1:]
    if others:
        named = [_named(other, before) for other, before in others]
        notes.append(
            f"{path.name} holds {len(models)} models; {_named(state, prefix)} was taken, not {', '.join(named[:3])}{_dots(named, 3)}"
        )
    inside = {key.removeprefix(prefix): value for key, value in state.tensors.items() if key.startswith(prefix)}
    sam = {key: value for key, value in inside.items() if key.startswith(_PARTS) or _is_adapter(key)}
    decoder, holder, before = _decoder_of(states, state)
    skipped = [
        key
        for key in state.tensors
        if key.removeprefix(prefix) not in _STATISTICS
        and not (key.startswith(prefix) and key.removeprefix(prefix) in sam)
        and not (holder is state and key.startswith(before))
    ]
    _note_rest(content, state, holder, skipped, path, notes)
    return sam, decoder


def _decoder_of(states: list[_State], model: _State) -> tuple[dict[str, Tensor], _State | None, str]:
    """The instance decoder: where the file says ``decoder_state``, beside the model, or elsewhere; and where it was, with what before its names."""
    stated = [state for state in states if state.place == "decoder_state"]
    for state in (*stated, model, *states):
        for prefix in _prefixes(state.tensors, _LAST):
            if any(key.startswith(f"{prefix}deconv1.") for key in state.tensors):
                return _without_encoder(state.tensors, prefix), state, prefix
    if stated:
        return _without_encoder(stated[0].tensors, ""), stated[0], ""  # refused later, by the names in it
    return {}, None, ""


def _note_rest(
    content: dict[str, Any], state: _State, holder: _State | None, skipped: list[str], path: Path, notes: list[str]
) -> None:
    """Note what was left out: around the mappings that were used, in them, and beside the model's tensors."""
    within = {state.place, holder.place if holder else state.place}
    taken = within - {""}
    around = {part for place in taken for part in _parents(place)}
    rest: list[str] = []

    def look(members: Mapping[Any, Any], place: str) -> None:
        for key, value in members.items():
            name = f"{place}.{key}" if place else str(key)
            if name in around and isinstance(value, Mapping):
                look(value, name)
            elif name not in taken and not (isinstance(value, Tensor) and (place in within or str(key) in _STATISTICS)):
                rest.append(name)

    look(content, "")
    rest += [f"{state.place}.{key}" for key in state.rest if state.place and f"{state.place}.{key}" not in rest]
    rest += [f"{state.place}.{key}" if state.place else key for key in skipped]
    rest = sorted(dict.fromkeys(rest))
    if rest:
        notes.append(f"left out of {path.name}: {', '.join(rest[:5])}{_dots(rest, 5)}")


def _parents(place: str) -> list[str]:
    parts = place.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _named(state: _State, prefix: str) -> str:
    return f"{'.'.join(filter(None, (state.place, prefix.rstrip('.')))) or 'the one at the top'}"


def _dots(names: list[str], shown: int) -> str:
    return ", ..." if len(names) > shown else ""


def _is_adapter(key: str) -> bool:
    return "lora_" in key or "w_a_linear" in key or "w_b_linear" in key


def _without_common_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the common prefix of all names, and the constants of the input."""
    while True:
        tensors = {key: value for key, value in tensors.items() if key not in _STATISTICS}
        firsts = (
            {key.split(".", 1)[0] + "." for key in tensors if "." in key}
            if all("." in key for key in tensors)
            else set()
        )
        if len(firsts) != 1 or firsts <= {*_PARTS, "vision_encoder."} or any(map(_is_adapter, firsts)):
            return tensors
        tensors = {key.removeprefix(min(firsts)): value for key, value in tensors.items()}


def _without_encoder(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    plain = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in plain.items() if not key.startswith("encoder.") and key not in _STATISTICS}


def _decoder(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Read the instance decoder from a file given as one."""
    states = _states(content)
    found = _decoder_of(states, states[0])[0] if states else {}
    if _is_decoder(found):
        return found
    if any(_prefixes(state.tensors, _PATCHES) for state in states):
        raise WeightsError(
            f"{path}: given as a decoder, but it holds a SAM model; pass micro-sam's decoder file, or leave --decoder out"
        )
    shown = ", ".join(sorted(found or (states[0].tensors if states else ()))[:3]) or "no tensors"
    raise WeightsError(
        f"{path}: not an instance decoder (found: {shown}); pass micro-sam's decoder file, or leave --decoder out"
    )


def _is_decoder(keys: Mapping[str, Tensor]) -> bool:
    return _LAST in keys and any(key.startswith("deconv1.") for key in keys)


# Refusing


def _require_sam(sam: dict[str, Tensor], path: Path) -> None:
    """Refuse what is not a complete SAM with a plain ViT, naming what it is instead."""
    supported = "pass a SAM checkpoint with a ViT-B, ViT-L or ViT-H encoder"
    if any(_is_adapter(key) for key in sam):
        if _PATCHES not in sam:
            raise WeightsError(
                f"{path}: holds only a LoRA adapter, not the model; merge it into the base model first and pass the result"
            )
        raise WeightsError(
            f"{path}: a model with LoRA layers in it; merge them into the base weights first and pass the result"
        )
    if any(key.startswith("image_encoder.trunk.") for key in sam):
        raise WeightsError(f"{path}: a SAM 2 checkpoint, which is not supported; {supported}")
    if any(key.startswith("vision_encoder.") for key in sam):
        raise WeightsError(
            f"{path}: a SAM of the transformers library, whose tensors have other names; {supported} in its original form"
        )
    if any(key.startswith("image_encoder.") for key in sam) and _PATCHES not in sam:
        if any(key.startswith(("image_encoder.patch_embed.seq", "image_encoder.layers.")) for key in sam):
            raise WeightsError(f"{path}: MobileSAM (ViT-T), which is not supported; {supported}")
        raise WeightsError(f"{path}: its image encoder has no patch_embed.proj.weight, so it is not SAM's; {supported}")
    if _is_decoder(sam):
        _require_no_unetr(sam, path)
    missing = [part.rstrip(".") for part in _PARTS if not any(key.startswith(part) for key in sam)]
    if len(missing) == len(_PARTS):
        raise WeightsError(f"{path}: not a SAM checkpoint (it has {', '.join(sorted(sam)[:3])}, ...); {supported}")
    if missing:
        raise WeightsError(f"{path}: no {' and no '.join(missing)} in it; {supported} with all its parts")


def _require_no_unetr(sam: dict[str, Tensor], path: Path) -> None:
    channels = sam["out_conv.weight"].shape[0]
    if channels != _DECODER_CHANNELS:
        raise WeightsError(
            f"{path}: a semantic model ({channels} classes), whose head is not supported; pass the SAM checkpoint it was trained from, and click "
            "the types instead"
        )
    if any(key.startswith("encoder.") for key in sam):
        raise WeightsError(
            f"{path}: encoder and instance decoder without SAM's mask decoder; pass the SAM checkpoint, and this with --decoder"
        )
    raise WeightsError(
        f"{path}: an instance decoder, not a model; pass the SAM checkpoint, and this file with --decoder"
    )


def _require_decoder(decoder: dict[str, Tensor], path: Path) -> None:
    if not _is_decoder(decoder):
        shown = ", ".join(sorted(decoder)[:3])
        raise WeightsError(
            f"{path}: decoder_state is not an instance decoder of micro-sam (found: {shown}, ...); pass the checkpoint without it"
        )
    channels = decoder["out_conv.weight"].shape[0]
    if channels != _DECODER_CHANNELS:
        raise WeightsError(
            f"{path}: a decoder with {channels} channels; the semantic head is not supported: pass the instance decoder, which has 3"
        )


def _require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    broken = sorted(
        key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()
    )
    if broken:
        raise WeightsError(
            f"{path}: {len(broken)} tensors hold NaN or infinity (first: {broken[0]}); the file is damaged: download it again"
        )
