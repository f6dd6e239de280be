"""bank.safetensors: the clicks of one slide, for typing the cells of other slides (``--bank``).

    tensors    clicked.<t>, negative.<t>   float32 (n, D)   descriptors of the cells clicked as type t, and as not of it
               clicks.<t>, negative_clicks.<t>   float64 (n, 2)   where, level-0 px of the slide that was clicked on
               high.<t>, low.<t>           float32 (m, C)   Chain-of-Prompts' prototypes; only from runs with --method cop
               floors                      float32 (T,)     their floors
    metadata   "wsiseg": JSON with version, names and colours of the types, slide, sha256 of the model's weights

Plain tensors: nothing in the file is ever run. Specification: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from wsiseg.errors import FormatError, SeedsError
from wsiseg.formats.seed_rules import check_names
from wsiseg.records import Bank, Cells, ChainPrototypes, TypePrototypes
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.paths import require_regular
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

VERSION = 1


def write_bank(path: Path, bank: Bank, slide: str, weights: str) -> None:
    """Write a bank, atomically; same input, same bytes.

    Parameters
    ----------
    path
        The file to write.
    bank
        Its cells are not in the file.
    slide
        Name of the slide that was clicked on.
    weights
        sha256 of the weights that made the descriptors; others do not understand them.
    """
    tensors: dict[str, NDArray[Any]] = {
        "floors": np.array([chain.similarity_threshold for chain in bank.chains], np.float32)
    }
    for t, of in enumerate(bank.types):
        found = {"clicked": of.clicked, "negative": of.negative, "clicks": of.clicks}
        if of.chain is not None:
            found |= {"high": of.chain.high, "low": of.chain.low}
        if of.negative_clicks is not None:
            found |= {"negative_clicks": of.negative_clicks}
        tensors |= {f"{name}.{t}": np.ascontiguousarray(rows) for name, rows in found.items()}
    note = {
        "version": VERSION,
        "names": bank.names,
        "colors": [of.color for of in bank.types],
        "slide": slide,
        "weights": weights,
        "foreign": bank.from_other_slide,
    }
    data = save(tensors, metadata={"wsiseg": json.dumps(note, sort_keys=True)})
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def restore_bank(path: Path) -> Bank:
    """Restore the bank of a run without its cells: its clicks are on this slide, unless it came from another slide.

    Raises
    ------
    FormatError
        The file is missing, damaged, or no bank.
    """
    bank, note = read_bank(path)
    if note.get("foreign"):
        return bank
    try:
        with safe_open(path, framework="numpy") as file:
            clicks = [file.get_tensor(f"clicks.{t}") for t in range(len(bank.types))]
            known = "negative_clicks.0" in file.keys()  # noqa: SIM118 - not a mapping
            against = [file.get_tensor(f"negative_clicks.{t}") if known else None for t in range(len(bank.types))]
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: holds no click positions; delete it and run the slide's command again") from error
    types = tuple(replace(of, clicks=clicks[t], negative_clicks=against[t]) for t, of in enumerate(bank.types))
    return replace(bank, types=types, from_other_slide=False)


def read_bank(path: Path) -> tuple[Bank, dict[str, Any]]:
    """Read a file of :func:`write_bank`.

    Parameters
    ----------
    path
        A bank.safetensors.

    Returns
    -------
    tuple of (Bank, dict)
        The bank is ``from_other_slide``: its clicks are not positions on this slide. The note has ``slide`` and ``weights``.

    Raises
    ------
    FormatError
        The file is missing, damaged, or no bank.
    """
    try:
        require_regular(path)
        with safe_open(path, framework="numpy") as file:
            note: dict[str, Any] = json.loads((file.metadata() or {})["wsiseg"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if note["version"] != VERSION:
            raise FormatError(
                f"{path}: a bank of version {note['version']}; this wsiseg reads version {VERSION}; make the bank again"
            )
        note["weights"], note["slide"] = str(note["weights"]), str(note["slide"])
        floors, with_chain = tensors["floors"], "high.0" in tensors
        types = tuple(
            TypePrototypes(
                name=str(name),
                color=(int(r), int(g), int(b)),
                clicks=np.empty((0, 2)),
                clicked=tensors[f"clicked.{t}"].astype(np.float32),
                negative=tensors[f"negative.{t}"].astype(np.float32),
                chain=ChainPrototypes(tensors[f"high.{t}"], tensors[f"low.{t}"], float(floors[t]))
                if with_chain
                else None,
            )
            for t, (name, (r, g, b)) in enumerate(zip(note["names"], note["colors"], strict=True))
        )
        size = types[0].clicked.shape[1]
        bank = Bank(types, Cells.empty(size), from_other_slide=True)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file; give the bank.safetensors of a run with --seeds") from error
    except (KeyError, IndexError, TypeError, ValueError, OSError, SafetensorError) as error:
        if isinstance(error, FormatError):
            raise
        reason = first_line(error)
        raise FormatError(
            f"{path}: not a bank of wsiseg ({reason}); give the bank.safetensors of a run with --seeds"
        ) from error
    sound = all(
        rows.ndim == 2 and rows.shape[1] == size and np.isfinite(rows).all()
        for of in types
        for rows in (of.clicked, of.negative)
    )
    try:
        check_names(list(bank.names), [f"{path}: types[{number}]" for number in range(len(types))])
    except SeedsError as error:
        raise FormatError(f"{error}; correct it in the seeds, and make the bank again") from error
    if not sound or not all(len(of.clicked) for of in types):
        raise FormatError(
            f"{path}: damaged: a type without clicked cells, or numbers that are not finite; make the bank again"
        )
    return bank, note
