"""The folder of one slide's run: where it is, whether it may be used, its manifest.

::

    OUT/<slide-stem>/          a second slide of the same stem gets a suffix from its path
      manifest.json            config, versions, counts, timings, failures; written first (status "running") and last
      parts/<row>-<column>.parquet
      cells.parquet  cells.geojson.gz
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from wsiseg.errors import RunError
from wsiseg.formats.atomic import write_json

FINAL_FILES = ("cells.parquet", "cells.geojson.gz", "cells.geojson.zip")
_LIBRARIES = ("torch", "numpy", "scipy", "shapely", "scikit-image", "openslide-python", "tiffslide", "pyarrow", "geopandas", "distributed")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def manifest(self) -> Path:
        """``manifest.json``."""
        return self.path / "manifest.json"

    @property
    def parts(self) -> Path:
        """Folder of the part files."""
        return self.path / "parts"

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest, or ``None`` when there is none that can be read."""
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def keep_only(self, files: list[str]) -> None:
        """Remove final files of an earlier finish that are not among ``files``."""
        for name in FINAL_FILES:
            if name not in files:
                (self.path / name).unlink(missing_ok=True)

    def write_manifest(self, content: dict[str, Any]) -> None:
        """Replace the manifest, whole or not at all."""
        write_json(self.manifest, content)


def find_folder(out: Path, slide: str) -> RunFolder:
    """The folder of a slide below ``out``: its stem, with a suffix when another slide holds that name."""
    stem = Path(slide).name
    stem = stem[: -len(".ome.tiff")] if stem.lower().endswith(".ome.tiff") else Path(slide).stem
    folder = RunFolder(out / (stem or "slide"))
    manifest = folder.read_manifest()
    if manifest and manifest.get("slide", {}).get("path") not in (None, slide):
        folder = RunFolder(out / f"{stem}-{hashlib.sha256(slide.encode()).hexdigest()[:6]}")
    return folder


def claim_folder(folder: RunFolder, run_hash: str, *, overwrite: bool) -> None:
    """Make the folder ready for this run, or refuse; nothing is deleted unless ``overwrite``.

    Parameters
    ----------
    folder
        Of :func:`find_folder`.
    run_hash
        Digest of everything that decides the result.
    overwrite
        Give up an earlier run with another configuration. Its finished parts are used again where they are the same.

    Raises
    ------
    RunError
        The folder holds another run, or something that is not a run, or cannot be written.
    """
    manifest = folder.read_manifest()
    if folder.path.exists() and not folder.path.is_dir():
        raise RunError(f"{folder.path}: is a file, a folder is needed; pass another --out")
    if manifest is None and folder.path.is_dir() and any(folder.path.iterdir()) and not overwrite:
        raise RunError(f"{folder.path}: holds files but no readable manifest.json; pass another --out, or --overwrite to use it all the same")
    if manifest and manifest.get("run_hash") != run_hash and not overwrite:
        raise RunError(f"{folder.path}: holds a run of {_difference(manifest)}; pass another --out, or --overwrite to replace it")
    try:
        folder.parts.mkdir(parents=True, exist_ok=True)
        probe = folder.parts / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{folder.path}: cannot be written ({error.strerror}); pass --out with a folder that you may write to") from error
    if overwrite and (manifest is None or manifest.get("run_hash") != run_hash):
        folder.keep_only([])


def drop_stale_parts(folder: RunFolder, names: set[str]) -> None:
    """Remove parts that no block of this run has, and leftovers of interrupted writes."""
    for path in folder.parts.iterdir():
        if path.stem not in names or path.suffix != ".parquet":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of what takes part in the result."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _difference(manifest: dict[str, Any]) -> str:
    made = manifest.get("config", {})
    return f"another configuration (model {made.get('model', '?')}, method {made.get('method', '?')}, seeds {manifest.get('seeds') or 'none'})"
