"""parts/plan.json and parts/clicks.*: what the end of a run needs besides its parts, so that `merge` needs neither slide nor GPU.

    plan.json           JSON: slide, resolved settings, names of all blocks with their tiles, digests, length of a descriptor
    clicks.safetensors  the bank, where there are clicks (formats/bank.py): every shard of a run types by the same one
    clicks.cells        the clicked cells (formats/parts.py)
    descriptions.safetensors   the described types, where there are any (formats/descriptions.py)

plan.json is written last: where it is, the others are. Private to a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsiseg.config import RunConfig, from_mapping
from wsiseg.errors import FormatError
from wsiseg.formats.bank import restore_bank, write_bank
from wsiseg.formats.descriptions import read_descriptions, write_descriptions
from wsiseg.formats.given import write_given
from wsiseg.formats.parts import read_part, write_part
from wsiseg.records import DescribedType, SlideInfo
from wsiseg.runtime.atomic import write_json
from wsiseg.runtime.paths import read_text, refusal
from wsiseg.slide.stain import AS_HE, SlideStain
from wsiseg.slide.tiling import TileGrid

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from wsiseg.records import Bank

VERSION = 1
_DESCRIBED = "descriptions.safetensors"


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run, fixed before the first tile is read.

    Attributes
    ----------
    info
        Metadata of the slide.
    config
        Resolved.
    bank
        Bank made from the clicks; its cells lie in the searched area.
    tiles
        Number of tiles by name of the block, in order.
    run_hash, parts_hash
        Hashes of everything that decides the result, and of everything that decides the parts.
    weights
        sha256 of the model's.
    descriptor_size
        D.
    tissue_mm2
        Area that is searched, as far as it is known.
    warnings
        Warnings about the slide and the clicks.
    target
        Identity of the slide's file, links followed (:func:`wsiseg.runtime.paths.target`).
    seeds
        Name of clicks that are in no file; empty for those of a file.
    stain
        The slide's stain, and how the network is to see it.
    described
        The types that a detector is asked for, their phrases encoded.
    grid
        Where the tiles lie; ``None`` in plans of earlier versions, and without tiles.
    """

    info: SlideInfo
    config: RunConfig
    bank: Bank | None
    tiles: dict[str, int]
    run_hash: str
    parts_hash: str
    weights: str
    descriptor_size: int
    tissue_mm2: float
    warnings: tuple[str, ...] = ()
    target: str = ""
    seeds: str = ""
    stain: SlideStain = AS_HE
    described: tuple[DescribedType, ...] = ()
    grid: TileGrid | None = None


def keep_plan(
    folder: Path, plan: RunPlan, given: tuple[NDArray[np.object_], NDArray[np.float64]] | None = None
) -> None:
    """Write the files unless this run's are there already: all its shards use the same.

    ``given`` are the outlines that are not searched for, and a point inside each (formats/given.py).
    """
    if read_plan(folder, plan.run_hash) is None:
        if given is not None:
            write_given(folder, *given)
        write_plan(folder, plan)


def write_plan(folder: Path, plan: RunPlan) -> None:
    """Write the files into the folder of the parts."""
    if plan.bank is not None:
        write_bank(folder / "clicks.safetensors", plan.bank, plan.info.path, plan.weights)
        write_part(folder / "clicks.cells", plan.bank.cells, plan.run_hash, {})
    if plan.described:
        write_descriptions(folder / _DESCRIBED, plan.described)
    note = {k: v for k, v in vars(plan).items() if k not in {"bank", "described"}}
    note |= {"clicks_sha256": _digest(folder) if plan.bank is not None else ""}
    note |= {
        "version": VERSION,
        "info": dataclasses.asdict(plan.info),
        "config": dataclasses.asdict(plan.config),
        "stain": dataclasses.asdict(plan.stain),
        "grid": dataclasses.asdict(plan.grid) if plan.grid else None,
        "clicks": plan.bank is not None,
        "described_sha256": hashlib.sha256((folder / _DESCRIBED).read_bytes()).hexdigest() if plan.described else "",
    }
    note["tiles"] = list(plan.tiles.items())  # in order
    write_json(folder / "plan.json", note)


def read_plan(folder: Path, run_hash: str | None = None) -> RunPlan | None:
    """Read the files of :func:`write_plan`; ``None`` when there are none of this run (``run_hash``).

    Raises
    ------
    FormatError
        It is damaged.
    """
    path = folder / "plan.json"
    try:
        note: dict[str, Any] = json.loads(read_text(path))
        if note["version"] != VERSION or run_hash not in (None, note["run_hash"]):
            return None
        bank = None
        if note["clicks"]:
            if _digest(folder) != note["clicks_sha256"]:  # another run was started over this one, and stopped
                return None
            bank = dataclasses.replace(
                restore_bank(folder / "clicks.safetensors"), cells=read_part(folder / "clicks.cells")[0]
            )
        described = tuple[DescribedType, ...]()
        if note.get("described_sha256"):
            if hashlib.sha256((folder / _DESCRIBED).read_bytes()).hexdigest() != note["described_sha256"]:
                return None
            described = read_descriptions(folder / _DESCRIBED)
        known = {f.name for f in dataclasses.fields(RunPlan)}
        rest = {k: v for k, v in note.items() if k in known}
        rest |= {"tiles": {str(name): int(count) for name, count in note["tiles"]}, "warnings": tuple(note["warnings"])}
        stain: dict[str, Any] = note.get("stain", {})
        rest["stain"] = SlideStain(**stain | {k: tuple(v) for k, v in stain.items() if isinstance(v, list)})
        grid = note.get("grid")
        rest["grid"] = TileGrid(**grid | {"origin_px0": tuple(grid["origin_px0"])}) if grid else None
        rest |= {"info": _info(note["info"]), "config": from_mapping(note["config"], str(path))}
        return RunPlan(**rest | {"bank": bank, "described": described})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        if isinstance(error, OSError):
            raise FormatError(f"{path}: {refusal(error)}") from error
        raise FormatError(
            f"{path}: damaged ({error!r}); delete it and run the slide's command again: finished parts are used"
        ) from error


def _digest(folder: Path) -> str:
    return hashlib.sha256(
        (folder / "clicks.safetensors").read_bytes() + (folder / "clicks.cells").read_bytes()
    ).hexdigest()


def _info(note: dict[str, Any]) -> SlideInfo:
    sizes = tuple((int(w), int(h)) for w, h in note["level_sizes"])
    bounds = tuple(int(n) for n in note["bounds"]) if note["bounds"] else None
    lists = {
        "level_sizes": sizes,
        "downsamples": tuple(note["downsamples"]),
        "bounds": bounds,
        "warnings": tuple(note["warnings"]),
    }
    return SlideInfo(**note | lists)
