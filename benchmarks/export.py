"""Seconds, memory and size of every export of one large run.

    python -m benchmarks.export [--cells 300000 1000000] [--formats labels types density csv coco gpkg shp h5ad]

Synthetic nuclei as in benchmarks/writing.py, 40 px apart on a slide of 60,000 x 60,000 px, in blocks of 10 x 10 along a Z curve, as a run orders
its cells. Each export is a process of its own, `wsiseg export`; "peak MB" is its largest resident memory, and the row "nothing" is
`wsiseg --help` in the same way.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.common import write_results
from benchmarks.writing import DESCRIPTOR, PROVENANCE, SPACING, Nuclei, typing_of
from wsiseg.export import EXPORTS
from wsiseg.formats.geoparquet import write_geoparquet
from wsiseg.records import SlideInfo
from wsiseg.runtime.atomic import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wsiseg.records import Cells

SIDE = 60_000
INFO = SlideInfo(
    path="table.svs", reader="openslide", format="aperio", level_sizes=((SIDE, SIDE),), downsamples=(1.0,), mpp=0.25, mpp_source="benchmark"
)  # fmt: skip


@dataclass(frozen=True)
class AlongCurve:
    """The nuclei in the order of a Z curve of blocks."""

    nuclei: Nuclei

    def __len__(self) -> int:
        return len(self.nuclei)

    @property
    def descriptor_size(self) -> int:
        return DESCRIPTOR

    @property
    def measurement_names(self) -> tuple[str, ...]:
        return ()

    @property
    def total_bounds(self) -> tuple[float, float, float, float]:
        return self.nuclei.total_bounds

    def chunks(self, rows: int) -> Iterator[Cells]:
        blocks = np.arange(len(self) // 100)
        across = int((len(self) / 100) ** 0.5) + 1
        order = np.argsort([_interleaved(int(b % across), int(b // across)) for b in blocks])
        cells = (order[:, None] * 100 + np.arange(100)).ravel()
        for start in range(0, len(cells), rows):
            yield self.nuclei.at(cells[start : start + rows])


def _interleaved(x: int, y: int) -> int:
    return sum(((x >> k & 1) << 2 * k) | ((y >> k & 1) << 2 * k + 1) for k in range(16))


def write_run(folder: Path, count: int) -> None:
    """A finished run with nothing but its table."""
    cells = AlongCurve(Nuclei(count))
    write_geoparquet(folder / "cells.parquet", cells, typing_of(count), INFO, PROVENANCE)
    slide = {"path": INFO.path, "size_px0": [SIDE, SIDE], "mpp": INFO.mpp, "bounds": None}
    write_json(folder / "manifest.json", {"slide": slide, "config": {}, "run_hash": "0", "status": "complete"})


def measured(*arguments: str) -> tuple[float, float]:
    """Seconds and peak MB of a `wsiseg` command."""
    started = time.perf_counter()
    process = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "wsiseg", *arguments])
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"wsiseg {' '.join(arguments)}: status {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[300_000, 1_000_000])
    parser.add_argument(
        "--formats", nargs="+", default=[name for name in EXPORTS if name != "spatialdata"], choices=list(EXPORTS)
    )
    parser.add_argument("--name", default="export")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        seconds, peak = measured("--help")
        rows.append({"cells": 0, "format": "nothing", "seconds": seconds, "peak MB": round(peak), "MB": 0.0})
        for count in options.cells:
            run = Path(scratch) / str(count)
            run.mkdir()
            write_run(run, count)
            for name in options.formats:
                seconds, peak = measured("export", str(run), "--format", name)
                file = run / "export" / EXPORTS[name].file
                rows.append(
                    {
                        "cells": count,
                        "format": name,
                        "seconds": seconds,
                        "peak MB": round(peak),
                        "MB": sum(one.stat().st_size for one in (file, *file.rglob("*"))) / 1e6,
                    }
                )
                print(rows[-1], flush=True)
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    write_results(
        options.name,
        rows,
        f"`benchmarks/export.py`: nuclei {SPACING:g} px apart, slide of {SIDE} x {SIDE} px at 0.25 um per px.",
    )


if __name__ == "__main__":
    main()
