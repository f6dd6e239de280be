"""Seconds and memory of everything that people open of one large run: its files, its report, its row of a cohort's table.

    python -m benchmarks.outputs [--cells 300000 1000000]

Nuclei as in benchmarks/export.py. "files" measures the cells and writes GeoJSON (zipped in pieces) and GeoParquet, as the end of a run does; the
report has the pictures of a slide of 60,000 x 60,000 px, of which most is blank; each is a process of its own, "peak MB" its largest resident
memory. Label images and the other exports are in export.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks.common import write_results
from benchmarks.export import INFO, SIDE, AlongCurve, measured
from benchmarks.scale import apart, write_sparse
from benchmarks.writing import PROVENANCE, Nuclei, typing_of
from wsiseg.formats import ZIP_NAME
from wsiseg.formats.geojson import write_geojson
from wsiseg.formats.geoparquet import write_geoparquet
from wsiseg.measurements import measure
from wsiseg.runs.manifest import Manifest


def write_files(folder: Path, count: int, slide: Path) -> dict[str, object]:
    """Seconds to measure the cells and to write their files; then the manifest of such a run is made."""
    started = time.perf_counter()
    typing = typing_of(count)
    cells = measure(AlongCurve(Nuclei(count)), typing, INFO.mpp)
    write_geojson(folder / ZIP_NAME, cells, typing, INFO, PROVENANCE)
    write_geoparquet(folder / "cells.parquet", cells, typing, INFO, PROVENANCE)
    seconds = time.perf_counter() - started
    facts = {"path": str(slide), "reader": "auto", "format": "tiff", "size_px0": [SIDE, SIDE], "mpp": INFO.mpp}
    Manifest(
        slide=facts | {"mpp_source": "--mpp", "bounds": None, "searched_mm2": (SIDE * INFO.mpp / 1000) ** 2},
        config={},
        run_hash="0",
        status="complete",
        counts={"cells": count, "tiles": 3481, "tiles_failed": 0},
        tiles={"side_px0": 1024.0, "origin_px0": [0.0, 0.0], "block_tiles": 4},
        seconds={"total": 1.0},
    ).write(folder / "manifest.json")
    return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[300_000, 1_000_000])
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        slide = Path(scratch) / "slide.tiff"
        write_sparse(slide, SIDE, 0.1)
        for count in options.cells:
            run = Path(scratch) / str(count)
            run.mkdir()
            found = apart(write_files, run, count, slide)
            size = sum((run / name).stat().st_size for name in (ZIP_NAME, "cells.parquet")) / 1e6
            rows.append({"cells": count, "what": "files", **found, "MB": size})
            for what in ("report", "summarise"):
                seconds, peak = measured(what, str(run))
                made = (run / "report.html").stat().st_size / 1e6 if what == "report" else ""
                rows.append({"cells": count, "what": what, "seconds": seconds, "peak MB": peak, "MB": made})
            print(*rows[-3:], sep="\n", flush=True)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    write_results("outputs", rows, f"`benchmarks/outputs.py`, {os.cpu_count()} cores; load average at its end {load}.")


if __name__ == "__main__":
    main()
