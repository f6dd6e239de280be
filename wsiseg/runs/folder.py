"""The folder of one slide's run: where it is, whether it may be used, its manifest.

::

    OUT/<slide-stem>/          a second slide of the same stem gets a suffix from its path
      manifest.json            config, versions, counts, timings, failures; created first (it is the claim on the folder) and replaced last
      parts/<row>-<column>.parquet
      cells.parquet  cells.geojson.gz
      bank.safetensors         of runs with clicks
      report.html              made last, from all of these and the slide
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.config import DETECTING, RunConfig
from wsiseg.errors import ConfigError, RunError
from wsiseg.formats import FILE_NAMES, ZIP_NAME
from wsiseg.runs.manifest import FINISHED, Manifest, Status
from wsiseg.runtime.atomic import PARTIAL_PATTERN, is_abandoned, partial_name, translate_os_errors
from wsiseg.runtime.paths import kind_of, normal, readable, require_text, target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wsiseg.runs.inputs import RunInputs

REPORT_NAME = "report.html"
FINAL_FILES = ("bank.safetensors", REPORT_NAME, *FILE_NAMES.values(), ZIP_NAME)
_NAMED = 3  #: differing settings that are named in one message
_EXECUTION = {f.name for f in dataclasses.fields(RunConfig) if f.metadata.get("group") == "execution"}


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def manifest_path(self) -> Path:
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

    def manifest(self) -> Manifest | None:
        """Read the manifest; ``None`` when there is none of wsiseg's.

        Raises
        ------
        RunError
            There is one, and it cannot be read.
        """
        return Manifest.read(self.manifest_path)

    def is_complete(self, run_hash: str, formats: Sequence[str]) -> bool:
        """Tell whether this very run is complete, with the files of these formats and no others."""
        manifest = self.manifest()
        if manifest is None or manifest.run_hash != run_hash or manifest.status != Status.COMPLETE:
            return False
        # by the first two parts of a name: cells.geojson.gz may have become cells.geojson.zip
        made = {
            known
            for known, name in FILE_NAMES.items()
            if any(file.split(".")[:2] == name.split(".")[:2] for file in manifest.files)
        }
        return made == set(formats) and all((self.path / name).is_file() for name in manifest.files)

    def opened(self) -> Manifest:
        """The manifest of a run that is complete already."""
        manifest = self.manifest()
        if manifest is None:
            raise RunError(f"{self.manifest_path}: no longer exists; run the command again")
        return replace(manifest, already=True, folder=str(self.path))

    def drop_old_files(self, files: list[str]) -> None:
        """Remove final files of an earlier run that are not among the names ``files``, and what killed processes left half-written here."""
        for name in FINAL_FILES:
            if name not in files:
                _remove(self.path / name)
        _remove_leftovers(self.path)

    def interrupt(self, run_hash: str) -> None:
        """Note that this run was stopped, if it has not come to its end; it is ``running`` again when it is resumed."""
        manifest = self.manifest()
        if manifest and manifest.run_hash == run_hash and manifest.status == Status.RUNNING:
            replace(manifest, status=Status.INTERRUPTED).write(self.manifest_path)


def check_out(out: Path, name: str | None) -> None:
    """Refuse a folder of all runs that cannot be one.

    Raises
    ------
    RunError
        It cannot be read, or its name is not text.
    """
    with readable(out, RunError):
        require_text((out / (name or "")).absolute(), RunError)


def choose_folder(out: Path, inputs: RunInputs, *, name: str | None = None, overwrite: bool = False) -> RunFolder:
    """Find the folder of a run, and refuse one that holds anything else; changes nothing.

    Parameters
    ----------
    out, name
        Folder of all runs, and the name of this one's in it; that of the slide when absent.
    inputs
        Inputs of the run.
    overwrite
        Accept another run.

    Raises
    ------
    WsisegError
        The message says what is in the folder and what to do.
    """
    folder = find_folder(out, inputs.path, name)
    check_folder(
        folder,
        inputs.run_hash,
        overwrite=overwrite,
        retype=_retype_command(folder, inputs),
        config=dataclasses.asdict(inputs.config),
    )
    if inputs.config.bank is not None:
        refuse_own_bank(folder, Path(inputs.config.bank))
    return folder


def find_folder(out: Path, slide: str, name: str | None = None) -> RunFolder:
    """The folder of a slide below ``out``: ``name``, or the slide's stem, with a suffix when another slide holds that name."""
    plain, suffixed = _candidates(out, slide, name)
    manifest = plain.manifest()
    return suffixed if manifest and not _is_of(manifest, slide) else plain


def check_folder(
    folder: RunFolder, run_hash: str, *, overwrite: bool, retype: str = "", config: Mapping[str, Any] | None = None
) -> None:
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
    config
        Settings of the run, to name those that differ.

    Raises
    ------
    RunError
        The message says what is in the folder and what to do.
    """
    try:
        found = kind_of(folder.path, RunError)
        if found in ("file", "special"):
            raise RunError(f"{folder.path}: is a file, a folder is needed; pass another --out")
        manifest = folder.manifest()
        if overwrite:
            return
        if manifest is None and found == "folder" and not _is_aborted_start(folder):
            raise RunError(
                f"{folder.path}: holds files but no manifest.json of wsiseg; pass another --out, or --overwrite to use it anyway"
            )
        if manifest and manifest.run_hash != run_hash:
            made = manifest.seeds or "none"
            if manifest.retyped:
                raise RunError(
                    f"{folder.path}: was re-typed with `wsiseg type` ({made}); use that for other clicks, or pass --overwrite to run it again"
                )
            if retype:
                held = (
                    f"{folder.path}: holds the same cells, typed by other clicks or an earlier version (seeds {made})"
                )
                raise RunError(f"{held}; `{retype}` re-types them, or pass --overwrite")
            raise RunError(
                f"{folder.path}: holds a run with another configuration ({_what_differs(manifest, config or {})}); "
                "pass another --out, or --overwrite to replace it"
            )
    except OSError as error:
        raise error if isinstance(error, RunError) else _unwritable(folder.path, error) from error


def claim_folder(out: Path, manifest: Manifest, *, name: str | None = None, overwrite: bool) -> RunFolder:
    """Make the slide's folder this run's: two slides of one name that start at the same moment get two folders.

    Parameters
    ----------
    out, name
        As for :func:`find_folder`.
    manifest
        Manifest of a starting run on a slide; creating it exclusively is the claim. That of the same run, started earlier, stays.
    overwrite
        Give up an earlier run with another configuration. Its finished parts are used again where they are the same.

    Raises
    ------
    RunError
        The folder holds another run or cannot be written.
    """
    slide = manifest.slide["path"]
    for folder in _candidates(out, slide, name):
        previous = folder.manifest()
        if previous and not _is_of(previous, slide):
            continue
        check_folder(folder, manifest.run_hash, overwrite=overwrite, config=manifest.config)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            same = previous is not None and previous.run_hash == manifest.run_hash
            exclusive = previous is None and not (overwrite and folder.manifest_path.exists())
            if not same and not _create(folder, manifest, exclusive=exclusive):
                continue  # another slide was quicker
            if same and previous is not None and previous.status == Status.INTERRUPTED:
                manifest.write(folder.manifest_path)
            folder.parts.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.parts):
                pass
        except OSError as error:
            raise error if isinstance(error, RunError) else _unwritable(folder.path, error) from error
        if previous and previous.run_hash != manifest.run_hash:
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


def _is_of(manifest: Manifest, slide: str) -> bool:
    """Tell whether a run is of this slide: the files behind the names are compared, since links move and names have two forms."""
    path = manifest.slide.get("path")
    known = manifest.slide.get("target")
    return path == slide or (known or (isinstance(path, str) and target(path))) == target(slide)


def _create(folder: RunFolder, manifest: Manifest, *, exclusive: bool) -> bool:
    """Write the first manifest; ``False`` when ``exclusive`` and a run of another slide has come between."""
    if exclusive:
        draft = folder.path / partial_name("manifest")
        manifest.write(draft)
        try:
            folder.manifest_path.hardlink_to(draft)
        except FileExistsError:
            current = folder.manifest()
            if current and not _is_of(current, manifest.slide["path"]):
                return False
            check_folder(folder, manifest.run_hash, overwrite=False, config=manifest.config)
        except OSError:  # a file system without hard links: the last writer wins, as before
            manifest.write(folder.manifest_path)
        finally:
            draft.unlink(missing_ok=True)
    else:
        manifest.write(folder.manifest_path)
    return True


def _what_differs(manifest: Manifest, config: Mapping[str, Any]) -> str:
    """Name the settings in which the run of a folder differs from ``config``; when they are equal, what else may."""
    held, wanted = flat_settings(manifest.config), flat_settings(config)
    keys = [k for k in wanted if k in held and held[k] != wanted[k] and k.partition(".")[0] not in _EXECUTION]
    if not keys:
        return "the same settings, but another scale, seeds file, region, slide file, weights or version of wsiseg"
    told = [f"{k} {_value(held[k])} there, {_value(wanted[k])} here" for k in keys[:_NAMED]]
    return "; ".join(told) + (f"; {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name; tuples as the lists of a file."""
    flat = dict[str, Any]()
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _value(value: object) -> str:
    return "none" if value is None else str(value)[:60]


def _is_aborted_start(folder: RunFolder) -> bool:
    """Tell whether a folder without manifest holds nothing but what a run killed at its very start leaves."""
    inside = [p for p in folder.path.rglob("*") if p != folder.parts]
    return all(p.name.startswith(".") and p.suffix == ".partial" for p in inside)


def _retype_command(folder: RunFolder, inputs: RunInputs) -> str:
    """Command that retypes the folder, when it holds the same cells and only the clicks differ; else empty."""
    manifest, config = folder.manifest(), inputs.config
    if manifest is None or manifest.status not in FINISHED or manifest.parts_hash != inputs.parts_hash:
        return ""
    same = {"stitching": dataclasses.asdict(config.stitching), "typing": dataclasses.asdict(config.typing)}
    made: dict[str, dict[str, Any]] = {
        key: manifest.config.get(key) or {} for key in same
    }  # an earlier version knew fewer settings
    if any(made[key].get(name, value) != value for key, values in same.items() for name, value in values.items()):
        return ""
    if config.method in {"cop", *DETECTING} or (config.seeds is None and config.bank is None):
        return ""
    clicks = ("--seeds", config.seeds) if config.seeds is not None else ("--bank", str(config.bank))
    return shlex.join(["wsiseg", "type", str(folder.path), *clicks])


def refuse_own_bank(folder: RunFolder, bank: Path) -> None:
    """The bank of a run must not type that run: its own clicks would be lost.

    Raises
    ------
    ConfigError
        The bank lies in the folder.
    """
    if target(str(bank)) == target(str(folder.bank)):
        raise ConfigError(
            f"--bank {bank}: is the bank of {folder.path} itself, which would be lost; leave that run out, or pass another --out"
        )


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written ({error.strerror}); pass --out with a folder that you may write to")
