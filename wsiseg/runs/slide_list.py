"""``--slides list.csv``: many slides in one call, each with its own scale and clicks; a bad one does not stop the others.

    path,mpp,seeds,name          the first line names the columns; only path is needed
    a.svs,,a.seeds.json,
    scans/b.tif,0.25,,patient-7

Relative paths start at the folder of the list. ``name`` is the folder of the slide's run; without, it is called as the slide.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.config import check_mpp
from wsiseg.errors import ConfigError, InterruptedRunError, WsisegError
from wsiseg.formats.text_tables import TextTable, read_table, unknown_columns
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.text import read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from wsiseg.config import RunConfig
    from wsiseg.runtime.shards import Shard

logger = logging.getLogger(__name__)

COLUMNS = ("path", "mpp", "seeds", "name")
SUMMARY = ("slide", "status", "cells", "tiles", "tiles_failed", "seconds", "folder", "message")


@dataclass(frozen=True)
class Entry:
    """One slide of a list; ``None`` means the setting of the whole call."""

    path: str
    mpp: float | None = None
    seeds: str | None = None
    name: str | None = None


def read_list(path: Path, *, force_mpp: bool = False) -> list[Entry]:
    """Read a list of slides.

    Parameters
    ----------
    path
        CSV with comma, semicolon or tab, as spreadsheets write it (text_tables.py).
    force_mpp
        Accept scales at which no cell can be found.

    Raises
    ------
    ConfigError
        It cannot be read, or a line of it is wrong: the place, and what is allowed there.
    """
    place = f"--slides {path}"
    table = read_table(_text(path), place, ConfigError, known=COLUMNS, numbers=("mpp",))
    wrong = unknown_columns(table.columns, COLUMNS)
    if wrong or "path" not in table.columns:
        found = wrong or f"columns {', '.join(filter(None, table.columns))[:200]}; "
        raise ConfigError(
            f"{place}: line 1: {found}it must name columns from {', '.join(COLUMNS)}, each once, with path among them"
        )
    entries = [_entry(row, table, path, line, force_mpp=force_mpp) for line, row in table.rows]
    for what in ("path", "name"):
        given = [value for value in (getattr(e, what) for e in entries) if value]
        twice = [value for value in given if given.count(value) > 1]
        if twice:
            raise ConfigError(f"--slides {path}: {what} {twice[0][:300]} appears twice; each slide and each name once")
    if not entries:
        raise ConfigError(
            f"--slides {path}: lists no slides; write one line per slide below the line that names the columns"
        )
    return entries


def _text(path: Path) -> str:
    try:
        return read_text(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"--slides {error}; give a CSV file whose first line names the columns") from error


def _entry(row: dict[str, str], table: TextTable, path: Path, number: int, *, force_mpp: bool) -> Entry:
    place = f"--slides {path}: line {number}"
    if row.get(""):
        raise ConfigError(
            f"{place}: {row[''][:40]!r} is in a column without a header; name all columns in the first line"
        )
    if not row.get("path"):
        raise ConfigError(f"{place}: no path; give the path of a slide")
    name = row.get("name") or None
    if name and (Path(name).name != name or name.startswith(".") or name.endswith(".csv")):
        raise ConfigError(f"{place}: name {name[:100]!r} cannot be a folder's name; use letters, digits, '-' and '_'")
    mpp = None
    if row.get("mpp"):
        mpp = table.number(row["mpp"])
        if mpp is None:
            raise ConfigError(
                f"{place}: mpp {row['mpp'][:40]!r} is not a number; give microns per pixel, for example 0.25, or nothing"
            )
        check_mpp(mpp, force=force_mpp, where=f"{place}: mpp")
    return Entry(
        _from(path.parent, row["path"]), mpp, _from(path.parent, row["seeds"]) if row.get("seeds") else None, name
    )


def _from(folder: Path, path: str) -> str:
    return path if "://" in path else str(folder / path)


def segment_slides(
    entries: Sequence[Entry],
    config: RunConfig,
    out: Path,
    *,
    overwrite: bool = False,
    shard: Shard | None = None,
    progress: Callable[[str], Callable[[int, int, int], None]] | None = None,
    on_warning: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Segment slides one after the other; complete ones are skipped, so repeating the call repeats only what failed.

    Parameters
    ----------
    entries
        Entries from :func:`read_list`.
    config, out, overwrite, on_warning, stopped
        As for :func:`~wsiseg.runs.slide.segment_slide`.
    shard
        Work on this shard's slides only.
    progress
        Called with each slide; what it returns is told of the tiles.

    Yields
    ------
    dict
        Per slide the keys of ``SUMMARY`` and ``manifest`` (``None`` of a slide that failed). A table of them is written to ``out`` at the end, as
        ``summary.csv``, or ``summary-K-of-N.csv`` for a shard.
    """
    from wsiseg.runs.slide import segment_slide  # a list with a fault in it is refused before torch is loaded

    rows = []
    for entry in shard.of(entries) if shard else entries:
        mine = dataclasses.replace(
            config,
            mpp=entry.mpp or config.mpp,
            seeds=entry.seeds or config.seeds,
            bank=None if entry.seeds else config.bank,
        )
        row: dict[str, Any] = dict.fromkeys(SUMMARY, "") | {"slide": entry.path, "manifest": None}
        try:
            manifest = segment_slide(
                entry.path,
                mine,
                out,
                name=entry.name,
                overwrite=overwrite,
                stopped=stopped,
                on_warning=on_warning,
                on_progress=progress(entry.path) if progress else None,
            )
            row |= {key: manifest.counts[key] for key in ("cells", "tiles", "tiles_failed")}
            row |= {
                "status": manifest.status,
                "folder": manifest.folder,
                "seconds": manifest.seconds["total"],
                "manifest": manifest,
            }
            row["message"] = manifest.failures[0] if manifest.failures else ""
        except InterruptedRunError:
            raise
        except WsisegError as error:
            row |= {"status": "failed", "message": " ".join(str(error).split())}
        except Exception as error:
            row |= {
                "status": "failed",
                "message": f"{entry.path}: internal error, {type(error).__name__}: {' '.join(str(error).split())}",
            }
            logger.exception("%s: internal error", entry.path)
        facts = {k: row[k] for k in SUMMARY[:-1]} | {"reason": row["message"]}
        logger.info("%s: %s", entry.path, row["status"], extra={"event": "listed", "facts": facts})
        rows.append(row)
        yield row
    _write_summary(out / (f"summary-{shard.number}-of-{shard.count}.csv" if shard else "summary.csv"), rows)


def _write_summary(path: Path, rows: list[dict[str, Any]]) -> None:
    with (
        atomic_path(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, SUMMARY, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
