"""manifest.json: settings, input and results of a run. docs/output.md describes its keys."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Self

from wsiseg.errors import FormatError, RunError
from wsiseg.records import SlideInfo
from wsiseg.runtime.atomic import write_json
from wsiseg.runtime.paths import read_text, refusal
from wsiseg.runtime.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.runs.plan_file import RunPlan

_LIBRARIES = (
    "torch",
    "numpy",
    "scipy",
    "shapely",
    "scikit-image",
    "openslide-python",
    "tiffslide",
    "pyarrow",
    "geopandas",
    "distributed",
)
FRAME = "slide level-0 px, x right, y down, origin at the outer corner of pixel (0, 0)"


class Status(StrEnum):
    """State of a run; the values are those in the files."""

    RUNNING = "running"  #: begun; or killed, when no process works on it
    INTERRUPTED = "interrupted"  #: stopped in an orderly way
    COMPLETE = "complete"
    INCOMPLETE = "incomplete"  #: finished without tiles that could not be read
    SHARD = "shard"  #: a shard's blocks are done
    RETYPING = "retyping"  #: the files are being replaced with other types


FINISHED = (Status.COMPLETE, Status.INCOMPLETE)  #: the final files are there


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a run. Its fields are the keys of the file; those of the result are there once the run has one.

    Attributes
    ----------
    slide, config, seeds, model, run_hash, parts_hash, frame, wsiseg, versions, status
        Of every run.
    folder, files, failures, tiles, warnings, counts, types, typing, seconds, seconds_per_mm2, model_share, peak_ram_mb, peak_vram_mb
        The result.
    retyped
        `wsiseg type` has replaced the types.
    status_before
        While it does: the status to come back to.
    other
        Keys that this version does not know; they are kept.
    already
        The run was complete before this call, which changed nothing; not in the file.
    """

    slide: dict[str, Any]
    config: dict[str, Any]
    seeds: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    run_hash: str
    parts_hash: str = ""
    frame: str = FRAME
    wsiseg: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    status: str = Status.RUNNING

    folder: str = ""
    files: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    tiles: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    typing: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_per_mm2: float = 0.0
    model_share: float = 0.0
    peak_ram_mb: float = 0.0
    peak_vram_mb: float = 0.0

    retyped: bool = False
    status_before: str = ""
    other: dict[str, Any] = field(default_factory=dict)
    already: bool = False

    @classmethod
    def of(cls, plan: RunPlan) -> Self:
        """Manifest of a run that begins: its inputs and settings, and the versions of the program and its libraries."""
        info, config = plan.info, plan.config
        return cls(
            slide={
                "path": info.path,
                "target": plan.target or info.path,
                "reader": info.reader,
                "format": info.format,
                "size_px0": list(info.size_px0),
                "mpp": info.mpp,
                "mpp_source": info.mpp_source,
                "bounds": list(info.bounds) if info.bounds else None,
                "searched_mm2": round(plan.tissue_mm2, 4),
                "stain": str(plan.stain),
            },
            config=dataclasses.asdict(config),
            seeds=config.seeds or config.bank or plan.seeds or None,
            model={"name": config.model, "sha256": plan.weights},
            run_hash=plan.run_hash,
            parts_hash=plan.parts_hash,
            wsiseg=__version__,
            versions=_versions(),
        )

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the file; ``None`` when there is none of wsiseg's.

        Raises
        ------
        RunError
            There is one, and it cannot be read.
        """
        try:
            content = json.loads(read_text(path))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError as error:
            raise RunError(f"{path}: {refusal(error)}") from error
        if not isinstance(content, dict) or not all(
            isinstance(content.get(key), kind) for key, kind in _IDENTITY.items()
        ):
            return None
        known: dict[str, Any] = {
            k: tuple(v) if k in _LISTS else v for k, v in content.items() if isinstance(v, _KINDS.get(k, ()))
        }
        return cls(**known, other={k: v for k, v in content.items() if k not in known})

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, self.content())

    def slide_info(self, place: Path) -> SlideInfo:
        """What the run knew of the slide.

        Raises
        ------
        FormatError
            The manifest, of which ``place`` is the path, is damaged.
        """
        try:
            slide = self.slide
            size, bounds = slide["size_px0"], slide["bounds"]
            return SlideInfo(
                path=slide["path"],
                reader=slide["reader"],
                format=slide["format"],
                level_sizes=((int(size[0]), int(size[1])),),
                downsamples=(1.0,),
                mpp=float(slide["mpp"]),
                mpp_source=slide["mpp_source"],
                bounds=tuple(bounds) if bounds else None,
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FormatError(f"{place}: damaged ({error!r}); run the slide again") from error

    def content(self) -> dict[str, Any]:
        """Keys and values of the file."""
        names = _OF_EVERY_RUN + (_OF_RESULTS if self.seconds else ())
        names += tuple(name for name in ("retyped", "status_before") if getattr(self, name))
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | self.other


_IDENTITY = {"run_hash": str, "slide": dict, "config": dict}  #: without these, a manifest.json is somebody else's
_LISTS = ("files", "failures", "warnings")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("slide", "config", "model", "versions", "tiles", "counts", "types", "typing", "seconds"), dict),
    **dict.fromkeys(("run_hash", "parts_hash", "frame", "wsiseg", "status", "folder", "status_before"), str),
    **dict.fromkeys(("seconds_per_mm2", "model_share", "peak_ram_mb", "peak_vram_mb"), (int, float)),
    **dict.fromkeys(_LISTS, list),
    "seeds": (str, type(None)),
    "retyped": bool,
}
_OF_EVERY_RUN = ("slide", "config", "seeds", "model", "run_hash", "parts_hash", "frame", "wsiseg", "versions", "status")
_OF_RESULTS = (
    "folder",
    "files",
    "failures",
    "tiles",
    "warnings",
    "counts",
    "types",
    "typing",
    "seconds",
    "seconds_per_mm2",
    "model_share",
    "peak_ram_mb",
    "peak_vram_mb",
)


def _versions() -> dict[str, str]:
    """Versions of the libraries behind the result."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
