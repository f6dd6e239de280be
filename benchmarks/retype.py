"""How long `wsiseg type` takes on a table of a million cells and five types, and how much memory.

    python -m benchmarks.retype [--cells 1000000]

The table is synthetic (outlines of 25 vertices on a lattice, descriptors around five means) and is made first, in another process. Then the
command runs twice, with and without the GeoJSON for QuPath; a third time with the rows of the table shuffled, and every cell must have the same
type.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import shapely

from benchmarks.common import write_results
from wsiseg.config import RunConfig
from wsiseg.formats.geoparquet import write_geoparquet
from wsiseg.models import find_weights, load_model
from wsiseg.models.cards import file_hash
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

SPACING = 40.0
TYPES = 5


def make(folder: Path, count: int) -> None:
    """A finished run without types, and five clicks for it."""
    rng = np.random.default_rng(0)
    side = int(count**0.5)
    xy = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * SPACING + SPACING / 2
    angle = np.linspace(0, 2 * np.pi, 26)[:-1]
    rings = xy[:, None] + (12 + rng.standard_normal((len(xy), 25, 1))) * np.stack([np.cos(angle), np.sin(angle)], -1)
    polygons = shapely.polygons(shapely.linearrings(np.concatenate([rings, rings[:, :1]], 1)))
    kinds = rng.integers(0, TYPES, len(xy))
    z = rng.standard_normal((TYPES, 75))[kinds] + 0.7 * rng.standard_normal((len(xy), 75))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    cells = Cells(
        polygons=polygons, points_xy=xy, scores=np.ones(len(xy), np.float32), descriptors=z.astype(np.float16)
    )
    size = int(side * SPACING)
    info = SlideInfo(
        path="table.svs",
        reader="openslide",
        format="aperio",
        level_sizes=((size, size),),
        downsamples=(1.0,),
        mpp=0.25,
        mpp_source="benchmark",
    )
    folder.mkdir(parents=True)
    write_geoparquet(
        folder / "cells.parquet",
        cells,
        Typing.untyped(len(xy)),
        info,
        Provenance(tool="wsiseg", version="0", slide="table.svs", config_hash="0"),
    )
    slide = {
        "path": "table.svs",
        "reader": "openslide",
        "format": "aperio",
        "size_px0": [size, size],
        "mpp": 0.25,
        "mpp_source": "x",
        "bounds": None,
    }
    model = {"name": "nuclei-compact", "sha256": file_hash(find_weights("nuclei-compact")[1])}
    manifest = {
        "status": "complete",
        "run_hash": "0",
        "parts_hash": "0",
        "slide": slide,
        "model": model,
        "seconds": {"total": 1.0},
        "warnings": [],
        "config": dataclasses.asdict(RunConfig(method="apg", precision="fp32")),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    types = [{"name": f"type {t}", "points": [xy[np.flatnonzero(kinds == t)[0]].tolist()]} for t in range(TYPES)]
    (folder.parent / "seeds.json").write_text(json.dumps({"version": 1, "types": types}))


def retype(folder: Path, formats: tuple[str, ...]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak GB of one `wsiseg type` in a process of its own."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["formats"] = formats
    (folder / "manifest.json").write_text(json.dumps(manifest))
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "wsiseg", "type", str(folder), "--seeds", str(folder.parent / "seeds.json")]
    )
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone
    assert status == 0
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.cells)
        return
    load_model("nuclei-compact", "cpu")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "table"
        subprocess.run([sys.executable, __file__, "--cells", str(options.cells), "--make", str(folder)], check=True)
        ids, types = [], []
        runs = (
            ("parquet", ("parquet",), False),
            ("parquet, rows shuffled", ("parquet",), True),
            ("both", ("geojson", "parquet"), False),
        )
        for what, formats, shuffled in runs:
            if shuffled:
                table = pq.read_table(folder / "cells.parquet")
                ids.append(table["id"].to_numpy())
                types.append(np.array(table["cell_type"].to_pylist()))
                pq.write_table(
                    table.take(np.random.default_rng(1).permutation(table.num_rows)),
                    folder / "cells.parquet",
                    row_group_size=20_000,
                )
            seconds, cpu, peak = retype(folder, formats)
            count = int(options.cells**0.5) ** 2
            rows.append(
                {"files": what, "cells": count, "types": TYPES, "seconds": seconds, "CPU seconds": cpu, "peak GB": peak}
            )
            if shuffled:
                table = pq.read_table(folder / "cells.parquet")
                order, back = np.argsort(ids[0]), np.argsort(table["id"].to_numpy())
                same = (types[0][order] == np.array(table["cell_type"].to_pylist())[back]).all()
                print("shuffled rows:", "the same types" if same else "OTHER TYPES")
                assert same
    write_results(
        "retype", rows, "`benchmarks/retype.py`: `wsiseg type` as a process, start and reading of the weights included."
    )


if __name__ == "__main__":
    main()
