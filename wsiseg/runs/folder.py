"""The folder of one slide's run: where it is, whether it may be used, its manifest.

::

    OUT/<slide-stem>/          a second slide of the same stem gets a suffix from its path
      manifest.json            config, versions, counts, timings, failures; created first (it is the claim on the folder) and replaced last
      parts/<row>-<column>.parquet
      cells.parquet  cells.geojson.gz
      bank.safetensors         of runs with clicks
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.errors import RunError
from wsiseg.formats import FILE_NAMES
from wsiseg.runs.manifest import Status
from wsiseg.runtime.atomic import PARTIAL_PATTERN, is_abandoned, partial_name, translate_os_errors, write_json
from wsiseg.runtime.paths import kind_of, normal, read_text, refusal, target

if TYPE_CHECKING:
    from collections.abc import Sequence

FINAL_FILES = ("bank.safetensors", *FILE_NAMES.values(), "cells.geojson.zip")  # the zip: GeoJSON of very many cells
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


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def manifest(self) -> Path:
        """``manifest.json``."""
        return self.path / "manifest.json"

    @property
    def bank(self) -> Path:
        """``bank.safetensors``."""
        return self.path / "bank.safetensors"

    @property
    def parts(self) -> Path:
        """Folder of the part files."""
        return self.path / "parts"

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest, or ``None`` when there is none of wsiseg's.

        Raises
        ------
        RunError
            There is one, and it cannot be read.
        """
        try:
            content = json.loads(read_text(self.manifest))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError as error:
            raise RunError(f"{self.manifest}: {refusal(error)}") from error
        shape = {"run_hash": str, "slide": dict, "config": dict}
        ours = isinstance(content, dict) and all(isinstance(content.get(k), type_) for k, type_ in shape.items())
        return content if ours else None

    def is_complete(self, run_hash: str, formats: Sequence[str]) -> bool:
        """Tell whether this very run is complete, with the files of these formats and no others."""
        manifest = self.read_manifest()
        if not manifest or manifest["run_hash"] != run_hash or manifest.get("status") != Status.COMPLETE:
            return False
        files = [str(name) for name in manifest.get("files", [])]
        made = {
            known
            for known, name in FILE_NAMES.items()
            if any(file.split(".")[:2] == name.split(".")[:2] for file in files)
        }
        return made == set(formats) and all((self.path / name).is_file() for name in files)

    def drop_old_files(self, files: list[str]) -> None:
        """Remove final files of an earlier run that are not among the names ``files``, and what killed processes left half-written here."""
        for name in FINAL_FILES:
            if name not in files:
                _remove(self.path / name)
        _remove_leftovers(self.path)

    def interrupt(self, run_hash: str) -> None:
        """Note that this run was stopped, if it has not come to its end; it is ``running`` again when it is resumed."""
        manifest = self.read_manifest()
        if manifest and manifest["run_hash"] == run_hash and manifest.get("status") == Status.RUNNING:
            self.write_manifest(manifest | {"status": Status.INTERRUPTED})

    def write_manifest(self, content: dict[str, Any]) -> None:
        """Replace the manifest, whole or not at all."""
        write_json(self.manifest, content)


def find_folder(out: Path, slide: str, name: str | None = None) -> RunFolder:
    """The folder of a slide below ``out``: ``name``, or the slide's stem, with a suffix when another slide holds that name."""
    plain, suffixed = _candidates(out, slide, name)
    manifest = plain.read_manifest()
    return suffixed if manifest and not _is_of(manifest, slide) else plain


def check_folder(folder: RunFolder, run_hash: str, *, overwrite: bool, retype: str = "") -> None:
    """Refuse a folder that holds another run, or anything that is not a run; changes nothing.

    Parameters
    ----------
    folder
        Folder from :func:`find_folder`.
    run_hash
        Digest of everything that decides the result.
    overwrite
        Accept both.
    retype
        A command that gives the cells in the folder the wanted types, when nothing else differs; named in the error.

    Raises
    ------
    RunError
        The message says what is in the folder and what to do.
    """
    try:
        found = kind_of(folder.path, RunError)
        if found in ("file", "special"):
            raise RunError(f"{folder.path}: is a file, a folder is needed; pass another --out")
        manifest = folder.read_manifest()
        if overwrite:
            return
        if manifest is None and found == "folder" and not _is_aborted_start(folder):
            raise RunError(
                f"{folder.path}: holds files but no manifest.json of wsiseg; pass another --out, or --overwrite to use it anyway"
            )
        if manifest and manifest["run_hash"] != run_hash:
            made, config = manifest.get("seeds") or "none", manifest["config"]
            if manifest.get("retyped"):
                raise RunError(
                    f"{folder.path}: was re-typed with `wsiseg type` ({made}); use that for other clicks, or pass --overwrite to run it again"
                )
            if retype:
                held = f"{folder.path}: holds the same cells with other clicks (seeds {made})"
                raise RunError(f"{held}; `{retype}` re-types them, or pass --overwrite")
            raise RunError(
                f"{folder.path}: holds a run with another configuration (model {config.get('model')}, method {config.get('method')}, seeds {made}); "
                "pass another --out, or --overwrite to replace it"
            )
    except OSError as error:
        raise error if isinstance(error, RunError) else _unwritable(folder.path, error) from error


def claim_folder(
    out: Path, slide: str, manifest: dict[str, Any], *, name: str | None = None, overwrite: bool
) -> RunFolder:
    """Make the slide's folder this run's: two slides of one name that start at the same moment get two folders.

    Parameters
    ----------
    out, slide, name
        As for :func:`find_folder`.
    manifest
        Manifest of a starting run; creating it exclusively is the claim. That of the same run, started earlier, stays.
    overwrite
        Give up an earlier run with another configuration. Its finished parts are used again where they are the same.

    Raises
    ------
    RunError
        The folder holds another run or cannot be written.
    """
    for folder in _candidates(out, slide, name):
        previous = folder.read_manifest()
        if previous and not _is_of(previous, slide):
            continue
        check_folder(folder, manifest["run_hash"], overwrite=overwrite)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            same = previous is not None and previous["run_hash"] == manifest["run_hash"]
            exclusive = previous is None and not (overwrite and folder.manifest.exists())
            if not same and not _create(folder, manifest, exclusive=exclusive):
                continue  # another slide was quicker
            if same and previous is not None and previous.get("status") == Status.INTERRUPTED:
                folder.write_manifest(manifest)
            folder.parts.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.parts):
                pass
        except OSError as error:
            raise error if isinstance(error, RunError) else _unwritable(folder.path, error) from error
        if previous and previous["run_hash"] != manifest["run_hash"]:
            for old in FINAL_FILES:
                _remove(folder.path / old)
        return folder
    if name:
        raise RunError(
            f"{out / name}: holds the run of another slide; give another name in the list, or pass another --out"
        )
    raise RunError(f"{out}: two other slides already use the folder of {slide}; pass another --out")


def drop_stale_files(folder: RunFolder, names: set[str]) -> None:
    """Remove parts that no block of this run has, and what killed processes left half-written."""
    for path in folder.parts.glob("*.parquet"):
        if path.stem not in names:
            _remove(path)
    _remove_leftovers(folder.path)
    _remove_leftovers(folder.parts)


def _remove(path: Path) -> None:
    with translate_os_errors(path):
        path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written, files and folders."""
    for path in folder.glob(PARTIAL_PATTERN):
        with contextlib.suppress(OSError):  # another process may sweep as well
            if is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of the program and libraries behind the result."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _candidates(out: Path, slide: str, called: str | None) -> tuple[RunFolder, RunFolder]:
    if called:
        return RunFolder(out / normal(called)), RunFolder(out / normal(called))
    name = normal(Path(slide).name)
    for ending in (".ome.tiff", ".ome.tif"):
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    stem = (Path(name).stem if name == normal(Path(slide).name) else name) or "slide"
    return RunFolder(out / stem), RunFolder(
        out / f"{stem}-{hashlib.sha256(os.fsencode(target(slide))).hexdigest()[:6]}"
    )


def _is_of(manifest: dict[str, Any], slide: str) -> bool:
    """Tell whether a run is of this slide: the files behind the names are compared, since links move and names have two forms."""
    path = manifest["slide"].get("path")
    known = manifest["slide"].get("target")
    return path == slide or (known or (isinstance(path, str) and target(path))) == target(slide)


def _create(folder: RunFolder, manifest: dict[str, Any], *, exclusive: bool) -> bool:
    """Write the first manifest; ``False`` when ``exclusive`` and a run of another slide has come between."""
    if exclusive:
        draft = folder.path / partial_name("manifest")
        write_json(draft, manifest)
        try:
            folder.manifest.hardlink_to(draft)
        except FileExistsError:
            current = folder.read_manifest()
            if current and not _is_of(current, manifest["slide"]["path"]):
                return False
            check_folder(folder, manifest["run_hash"], overwrite=False)
        except OSError:  # a file system without hard links: the last writer wins, as before
            folder.write_manifest(manifest)
        finally:
            draft.unlink(missing_ok=True)
    else:
        folder.write_manifest(manifest)
    return True


def _is_aborted_start(folder: RunFolder) -> bool:
    """Tell whether a folder without manifest holds nothing but what a run killed at its very start leaves."""
    inside = [p for p in folder.path.rglob("*") if p != folder.parts]
    return all(p.name.startswith(".") and p.suffix == ".partial" for p in inside)


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written ({error.strerror}); pass --out with a folder that you may write to")
