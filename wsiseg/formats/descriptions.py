"""parts/descriptions.safetensors: the types that a run describes, with their phrases encoded, for all its shards.

    tensors    tokens.<t>.<k>   float32 (L, C)   phrase k of type t
    metadata   "wsiseg": JSON with version, and of each type name, colour and phrases

Plain tensors: nothing in the file is ever run. Specification: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from wsiseg.errors import FormatError
from wsiseg.records import DescribedType
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VERSION = 1


def write_descriptions(path: Path, types: Sequence[DescribedType]) -> None:
    """Write the types, atomically; same input, same bytes."""
    tensors = {
        f"tokens.{t}.{k}": np.ascontiguousarray(tokens, np.float32)
        for t, of in enumerate(types)
        for k, tokens in enumerate(of.tokens)
    }
    note = {
        "version": VERSION,
        "types": [
            {"name": of.name, "color": of.color, "phrases": of.phrases, "tokens": len(of.tokens)} for of in types
        ],
    }
    data = save(tensors, metadata={"wsiseg": json.dumps(note, sort_keys=True)})
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def read_descriptions(path: Path) -> tuple[DescribedType, ...]:
    """Read a file of :func:`write_descriptions`.

    Raises
    ------
    FormatError
        The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            note: dict[str, Any] = json.loads((file.metadata() or {})["wsiseg"])
            return tuple(
                DescribedType(
                    name=str(of["name"]),
                    color=(int(of["color"][0]), int(of["color"][1]), int(of["color"][2])),
                    phrases=tuple(map(str, of["phrases"])),
                    tokens=tuple(file.get_tensor(f"tokens.{t}.{k}") for k in range(int(of["tokens"]))),
                )
                for t, of in enumerate(note["types"])
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise FormatError(
            f"{path}: damaged ({first_line(error)}); delete it and run the slide's command again"
        ) from error
