"""How fast cells become files, how much memory that takes, and how much of a file a viewer's window touches.

    python -m benchmarks.writing [--cells 100000] [--rounds 8] [--streams 100000 300000 1000000]

Synthetic nuclei on a lattice of 40 px, outlines of 25 vertices with 1 px of noise along the radius, descriptors of 75 numbers, three types, four
measurements. Seconds are wall time of the fastest round; in every round all writers take turns with the same cells. `GeoDataFrame.to_json` gets the
same properties and ids, and its text is written to a file too. "noise in x and y": 7 % of the outlines cross themselves and are repaired. Streams
come from a generator, each in a process of its own; "extra MB" is the peak of resident memory over what was there before writing began (the
types were, 16 bytes per cell), and the generator's own 4 us per cell are in its seconds. Compression runs beside the text on a second core; where
seconds are not below CPU seconds, that core was busy with other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geopandas
import numpy as np
import pyarrow.parquet as pq
import shapely

from benchmarks.common import write_results
from wsiseg.formats.geojson import validate_geojson, write_geojson
from wsiseg.formats.geoparquet import CORNERS, write_geoparquet
from wsiseg.formats.ids import cell_ids
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SPACING, VERTICES, DESCRIPTOR = 40.0, 25, 75
INFO = SlideInfo(
    path="table.svs",
    reader="openslide",
    format="aperio",
    level_sizes=((200_000, 200_000),),
    downsamples=(1.0,),
    mpp=0.25,
    mpp_source="benchmark",
)
PROVENANCE = Provenance(tool="wsiseg", version="0", slide="table.svs", config_hash="0")


@dataclass(frozen=True)
class Nuclei:
    """A source of cells that are made when asked for: blocks of 10 x 10 nuclei side by side in rows of blocks, so that neighbours stay together."""

    count: int
    free: bool = False  #: noise in x and y instead of along the radius
    descriptor_size: int = DESCRIPTOR

    def __len__(self) -> int:
        return self.count

    @property
    def total_bounds(self) -> tuple[float, float, float, float]:
        side = SPACING * 10 * (int((self.count / 100) ** 0.5) + 1)
        return 0.0, 0.0, side, side

    def chunks(self, rows: int) -> Iterator[Cells]:
        for start in range(0, self.count, rows):
            yield self.at(np.arange(start, min(start + rows, self.count)))

    def at(self, k: np.ndarray) -> Cells:
        rng = np.random.default_rng(int(k[0]))
        across = int((self.count / 100) ** 0.5) + 1
        block, place = np.divmod(k, 100)
        xy = (np.stack([block % across * 10 + place % 10, block // across * 10 + place // 10], 1) + 0.5) * SPACING
        angle = np.arange(VERTICES) * 2 * np.pi / VERTICES
        circle = np.stack([np.cos(angle), np.sin(angle)], -1)
        if self.free:
            outlines = xy[:, None] + 12 * circle + rng.standard_normal((len(k), VERTICES, 2))
        else:
            outlines = xy[:, None] + (12 + rng.standard_normal((len(k), VERTICES, 1))) * circle
        descriptors = rng.standard_normal((len(k), DESCRIPTOR), np.float32).astype(np.float16)
        return Cells(
            polygons=shapely.polygons(outlines),
            points_xy=xy,
            scores=rng.random(len(k), np.float32),
            descriptors=descriptors,
        )


def typing_of(count: int) -> Typing:
    rng = np.random.default_rng(0)
    names, colors = ("unassigned", "tumour", "lymphocyte"), ((128, 128, 128), (200, 0, 0), (0, 80, 200))
    scores, margins = rng.random(count, np.float32), rng.random(count, np.float32)
    return Typing(
        names=names,
        colors=colors,
        codes=rng.integers(0, 3, count, np.int32),
        scores=scores,
        margins=margins,
        prototypes=np.zeros(count, np.int32),
    )


def frame_of(cells: Cells, typing: Typing) -> geopandas.GeoDataFrame:
    """The properties that :func:`write_geojson` writes."""
    kinds = [{"name": name, "color": list(color)} for name, color in zip(typing.names, typing.colors, strict=True)]
    columns = {
        "Nucleus: Area µm^2": np.round(shapely.area(cells.polygons) * INFO.mpp**2, 3),
        "Detection probability": np.round(cells.scores.astype(float), 4),
        "Type score": np.round(typing.scores.astype(float), 4),
        "Type margin": np.round(typing.margins.astype(float), 4),
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return geopandas.GeoDataFrame(
        {
            "objectType": "detection",
            "classification": [kinds[code] for code in typing.codes],
            "measurements": [dict(zip(columns, row, strict=True)) for row in rows],
        },
        geometry=cells.polygons,
        index=cell_ids(PROVENANCE.slide, cells),
    )


def speed(folder: Path, count: int, rounds: int) -> list[dict[str, object]]:
    """All writers in turn, on the same cells in memory."""
    cells, typing = Nuclei(count).at(np.arange(count)), typing_of(count)
    crossing = Nuclei(count, free=True).at(np.arange(count))
    frame = frame_of(cells, typing)
    writers: dict[str, tuple[str, Callable[[Path], object]]] = {
        "GeoDataFrame.to_json": ("reference.geojson", lambda path: path.write_text(frame.to_json(), "utf-8")),
        "cells.geojson": ("cells.geojson", lambda path: write_geojson(path, cells, typing, INFO, PROVENANCE)),
        "cells.geojson.gz": ("cells.geojson.gz", lambda path: write_geojson(path, cells, typing, INFO, PROVENANCE)),
        "cells.geojson.zip": ("cells.geojson.zip", lambda path: write_geojson(path, cells, typing, INFO, PROVENANCE)),
        "cells.geojson, noise in x and y": (
            "free.geojson",
            lambda path: write_geojson(path, crossing, typing, INFO, PROVENANCE),
        ),
        "cells.parquet": ("cells.parquet", lambda path: write_geoparquet(path, cells, typing, INFO, PROVENANCE)),
    }
    seconds: dict[str, list[float]] = {what: [] for what in writers}
    cpu: dict[str, list[float]] = {what: [] for what in writers}
    for _ in range(rounds):
        for what, (name, write) in writers.items():
            started, busy = time.perf_counter(), time.process_time()
            write(folder / name)
            seconds[what].append(time.perf_counter() - started)
            cpu[what].append(time.process_time() - busy)
    best = {what: min(found) for what, found in seconds.items()}
    reference = best[next(iter(writers))]
    return [
        {
            "file": what,
            "cells": count,
            "seconds": best[what],
            "CPU seconds": min(cpu[what]),
            "cells per second": round(count / best[what]),
            "bytes per cell": round((folder / name).stat().st_size / count),
            "times to_json": reference / best[what],
        }
        for what, (name, _) in writers.items()
    ]


def stream(path: Path, count: int) -> dict[str, Any]:
    """One file written from a generator, in this process."""
    typing = typing_of(count)
    write = write_geoparquet if path.suffix == ".parquet" else write_geojson
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, started = _status("VmRSS"), time.perf_counter()
    written = write(path, Nuclei(count), typing, INFO, PROVENANCE) or path
    seconds, extra = time.perf_counter() - started, _status("VmHWM") - before
    return {
        "file": written.name,
        "cells": count,
        "extra MB": extra / 1024,
        "seconds": seconds,
        "cells per second": round(count / seconds),
    }


def _status(key: str) -> int:
    """KB."""
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )


def windows(path: Path) -> list[dict[str, object]]:
    """A window of 1,000 px in the middle of the file of :func:`speed`."""
    footer = pq.read_metadata(path)
    names = [footer.schema.column(k).path for k in range(footer.num_columns)]
    boxes = []
    for group in range(footer.num_row_groups):
        left, top, right, bottom = (
            footer.row_group(group).column(names.index(f"bbox.{corner}")).statistics for corner in CORNERS
        )
        boxes.append((left.min, top.min, right.max, bottom.max))
    middle = float(np.max(boxes)) / 2
    window = (middle, middle, middle + 1000, middle + 1000)
    whole, part = [], []
    for _ in range(5):
        started = time.perf_counter()
        everything = geopandas.read_parquet(path)
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        found = geopandas.read_parquet(path, bbox=window)
        part.append(time.perf_counter() - started)
    inside = everything[shapely.intersects(shapely.box(*window), shapely.envelope(everything.geometry.to_numpy()))]
    assert found["id"].tolist() == inside["id"].tolist()
    touched = shapely.intersects(shapely.box(*window), shapely.box(*np.transpose(boxes)))
    return [
        {
            "cells": len(everything),
            "in the window": len(found),
            "row groups": len(boxes),
            "touched": int(touched.sum()),
            "whole file, ms": 1e3 * statistics.median(whole),
            "window, ms": 1e3 * statistics.median(part),
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--streams", type=int, nargs="*", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--stream", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        print(json.dumps(stream(Path(options.stream[0]), int(options.stream[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        streams = []
        for count in options.streams:
            for name in ("cells.geojson.gz", "cells.parquet"):
                done = subprocess.run(
                    [sys.executable, __file__, "--stream", folder / name, str(count)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                streams.append(json.loads(done.stdout))
        fast = speed(folder, options.cells, options.rounds)
        for name in ("cells.geojson", "cells.geojson.gz", "cells.geojson.zip", "free.geojson"):
            assert not validate_geojson(folder / name)
        found = windows(folder / "cells.parquet")
    write_results(
        "writing", {"Speed": fast, "Streamed": streams, "A window": found}, __doc__.split("\n\n", 2)[2].strip()
    )


if __name__ == "__main__":
    main()
