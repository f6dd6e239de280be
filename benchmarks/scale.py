"""A million cells, a slide of 100,000 px, and what the pipeline adds to its model: time and memory.

    python -m benchmarks.scale [stitching merge overhead flat sparse] [--cells 1000000]

Each row is a process of its own; peaks are what the kernel says of it.
- stitching: overlaps of synthetic nuclei, 15 % of them found twice, against plain loops over an R-tree. Same kept set, or it fails.
- merge: parts made by a generator (25 vertices, 75 numbers, blocks of 1 mm2, three clicked types), then `wsiseg merge` and the validator.
- overhead: `segment_slide` on a JPEG pyramid, reading and writing included, against nothing but the model's calls on the same tiles; by turns.
- flat: peak memory of a run of 100 tiles and of 1024.
- sparse: a pyramid of 100,000 x 100,000 px, most of it absent, tissue all over; resident memory while it runs, stitching and writing included.
Discs are `wsiseg.models.testing.DiscModel`: it sleeps as long as a GPU would work, so that all the rest is seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely
import tifffile
import torch

from benchmarks.common import write_results
from benchmarks.memory import patch, write_slide
from wsiseg.config import RunConfig, StitchingConfig, from_mapping
from wsiseg.formats.geojson import validate_geojson
from wsiseg.formats.parts import write_part
from wsiseg.models import find_weights, load_model
from wsiseg.models.cards import file_hash
from wsiseg.models.testing import DiscModel
from wsiseg.records import Bank, Cells, SlideInfo, TypePrototypes
from wsiseg.runs import plan as planning
from wsiseg.runs.inputs import read_inputs
from wsiseg.runs.plan import plan_run
from wsiseg.runs.plan_file import RunPlan, write_plan
from wsiseg.runs.slide import merge_run, segment_slide
from wsiseg.segmentation.blocks import BLOCK_COUNTS
from wsiseg.slide import read_region
from wsiseg.stitching.outline_store import OutlineStore
from wsiseg.stitching.overlaps import find_pairs, refine_areas
from wsiseg.stitching.resolve import resolve_overlaps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 4096  #: px: 16 tiles of 256 um at 0.25
PER_BLOCK = 6000  #: a nucleus every 13 um: dense tissue
SIZE = 75  #: of a descriptor of nuclei-compact


def nuclei(count: int, side: float, seed: int) -> Cells:
    """Noisy nuclei on a jittered grid over a square, 15 % of them twice."""
    rng = np.random.default_rng(seed)
    once = int(count * 0.85)
    per = int(np.ceil(np.sqrt(once)))
    step = side / per
    centres = (
        np.stack(np.unravel_index(np.arange(once), (per, per)), 1)[:, ::-1] * step
        + step / 2
        + rng.normal(0, step / 12, (once, 2))
    )
    centres = np.concatenate(
        [centres, centres[rng.choice(once, count - once, replace=False)] + rng.normal(0, 2, (count - once, 2))]
    )
    angle = np.linspace(0, 2 * np.pi, 26)[:-1]
    radius = rng.uniform(13, 22, (count, 1)) * min(step / 45, 1) * (1 + rng.normal(0, 0.05, (count, 25)))
    xy = centres[:, None] + np.stack([radius * np.cos(angle), radius * np.sin(angle)], 2)
    polygons = shapely.convex_hull(shapely.polygons(np.round(xy * 64) / 64))
    kind = rng.choice(3, count, p=[0.5, 0.3, 0.2])
    numbers = (rng.normal(0, 0.05, (count, SIZE)) + np.eye(3, SIZE)[kind]).astype(np.float16)
    return Cells(
        polygons=polygons, points_xy=centres, scores=rng.uniform(0.3, 1, count).astype(np.float32), descriptors=numbers
    )


def write_parts(folder: Path, cells: int) -> RunPlan:
    """The parts of a run, block by block, and its sheet."""
    columns = int(np.ceil(np.sqrt(cells / PER_BLOCK)))
    blocks = -(-cells // PER_BLOCK)
    names = {f"{k // columns:04d}-{k % columns:04d}": 16 for k in range(blocks)}
    for k, name in enumerate(names):
        count = min(PER_BLOCK, cells - k * PER_BLOCK)
        part = nuclei(count, BLOCK, k)
        corner = np.array([k % columns, k // columns], float) * BLOCK
        part = Cells(
            polygons=shapely.transform(part.polygons, lambda xy, c=corner: xy + c),
            points_xy=part.points_xy + corner,
            scores=part.scores,
            descriptors=part.descriptors,
        )
        write_part(
            folder / "parts" / f"{name}.parquet",
            part,
            "parts",
            dict.fromkeys(BLOCK_COUNTS, 0) | {"tiles": 16, "outlines": count},
        )
    clicked = nuclei(3, 300, 0)
    clicked = dataclasses.replace(clicked, descriptors=np.eye(3, SIZE, dtype=np.float16))
    types = tuple(
        TypePrototypes(
            name="abc"[k],
            color=((200, 0, 0), (0, 200, 0), (0, 0, 200))[k],
            clicks=clicked.points_xy[k : k + 1],
            clicked=np.eye(3, SIZE, dtype=np.float32)[k : k + 1],
            negative=np.empty((0, SIZE), np.float32),
        )
        for k in range(3)
    )
    bank = Bank(types, clicked)
    side = columns * BLOCK
    info = SlideInfo(
        path="million.svs",
        reader="openslide",
        format="aperio",
        level_sizes=((side, side),),
        downsamples=(1.0,),
        mpp=0.25,
        mpp_source="openslide.mpp-x/-y",
    )
    config = dataclasses.replace(RunConfig(), method="apg", precision="fp32")
    sheet = RunPlan(
        info, config, bank, names, "run", "parts", file_hash(find_weights(config.model)[1]), SIZE, (side * 0.25e-3) ** 2
    )
    write_plan(folder / "parts", sheet)
    return sheet


def apart(work: Callable[..., dict[str, object]], *arguments: object) -> dict[str, object]:
    """``work`` in a process of its own, with its peak memory."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, work, arguments))
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


def _answer(send, work: Callable[..., dict[str, object]], arguments: tuple[object, ...]) -> None:
    found = work(*arguments)
    send.send(found | {"peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def merge(folder: Path) -> dict[str, object]:
    manifest = merge_run(folder)
    seconds, counts = manifest.seconds, manifest.counts
    started = time.perf_counter()
    files = [folder / name for name in manifest.files if "geojson" in name]
    assert [problem for file in files for problem in validate_geojson(file)] == []
    return {
        "outlines": counts["outlines"],
        "cells": counts["cells"],
        "clipped": counts["clipped"],
        **{f"{k} s": seconds[k] for k in ("stitch", "type", "measure", "write")},
        "validate s": time.perf_counter() - started,
    }


def idle() -> dict[str, object]:
    """A process that has imported everything."""
    return {}


def plain_loops(cells: Cells, config: StitchingConfig) -> np.ndarray:
    """The same rules, one outline after the other: bool per row."""
    rank = np.lexsort((cells.points_xy[:, 0], cells.points_xy[:, 1], -cells.scores))
    polygons = cells.polygons[rank]
    area, tree = shapely.area(polygons), shapely.STRtree(polygons)
    shared: list[list[tuple[int, float]]] = [[] for _ in polygons]
    holds = np.zeros(len(polygons), int)
    for i, polygon in enumerate(polygons):
        for j in tree.query(polygon, predicate="intersects"):
            if j < i:
                both = polygon.intersection(polygons[j]).area
                if both > 0:
                    shared[i].append((j, both))
                    holds[j] += both >= config.contained * area[i] and area[i] < area[j]
                    holds[i] += both >= config.contained * area[j] and area[j] < area[i]
    kept = np.zeros(len(polygons), bool)
    for i, found in enumerate(shared):
        mine = [(j, both) for j, both in found if kept[j]]
        nested = any(both >= config.nested * min(area[i], area[j]) for j, both in mine)
        kept[i] = (
            holds[i] < config.cluster_size
            and not nested
            and sum(both for _, both in mine) <= config.max_overlap * area[i]
        )
    back = np.empty(len(rank), bool)
    back[rank] = kept
    return back


def stitching(count: int, folder: Path) -> dict[str, object]:
    """Pairs and choice, from parts on disk, against plain loops on the same outlines in memory."""
    side = BLOCK * np.sqrt(count / PER_BLOCK)
    cells, config = nuclei(count, side, 0), StitchingConfig()
    key = (cells.points_xy // BLOCK).astype(int) @ (1, 1000)
    order = np.argsort(key, kind="stable")
    files = []
    for k in np.unique(key):
        files.append(folder / f"{k}.parquet")
        write_part(files[-1], cells.take(key == k), "", {})
    times = []
    for _ in range(5):
        started = time.perf_counter()
        outlines = OutlineStore(files, (10**6, 10**6), SIZE)
        pairs = refine_areas(outlines, find_pairs(outlines, config), config)
        kept, _ = resolve_overlaps(outlines.numbers.areas, pairs, config)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    expected = plain_loops(cells, config)[order]
    loops = time.perf_counter() - started
    assert (kept == expected).all()
    median = float(np.median(times))
    return {
        "outlines": count,
        "pairs": len(pairs.low),
        "kept": int(kept.sum()),
        "s": median,
        "plain loops s": loops,
        "ratio": loops / median,
    }


def discs(tile_seconds: float) -> Callable[..., DiscModel]:
    return lambda *_: DiscModel(tile_seconds, tile_seconds / 1000)


def overhead(slide: Path, name: str, tiles: int, rounds: int) -> dict[str, object]:
    """Wall time of the pipeline over that of the model's own calls; the first round warms up."""
    config = from_mapping({"mpp": 0.25, "tissue": {"enabled": False}}, "benchmark")
    model = load_model("nuclei-compact", "cpu") if name == "nuclei-compact" else discs(float(name.split()[1]))()
    planning.load_model = lambda *_: model
    ratios, bare_s, pipe_s = [], [], []
    for k in range(rounds + 1):
        with tempfile.TemporaryDirectory() as out:
            plan = plan_run(read_inputs(str(slide), config), Path(out))
            mine = [tile for block in plan.blocks for tile in block.tiles]
            assert len(mine) == tiles
            with plan.context.reader:
                pixels = [read_region(plan.context.reader, tile.outer, plan.context.spec.lattice) for tile in mine[:32]]
            bare = bare_calls(plan.context, mine, pixels)
            started = time.perf_counter()
            manifest = segment_slide(slide, config, out)
            whole = time.perf_counter() - started
        if k:
            ratios.append(whole / bare)
            bare_s.append(bare)
            pipe_s.append(whole)
    medians = [float(np.median(x)) for x in (bare_s, pipe_s, ratios)]
    return {
        "model": name,
        "tiles": tiles,
        "cells": manifest.counts["cells"],
        "bare s": medians[0],
        "pipeline s": medians[1],
        "ratio": medians[2],
        "model share of tile time": manifest.model_share,
    }


@torch.inference_mode()
def bare_calls(context: planning.WorkerContext, tiles: list, pixels: list[np.ndarray]) -> float:
    """Seconds of encode and decode alone, with the prompts that the run has; pixels go round."""
    from wsiseg.segmentation.decoding import decode
    from wsiseg.segmentation.prompts import find_points

    seconds = 0.0
    for k, tile in enumerate(tiles):
        x = torch.from_numpy(pixels[k % len(pixels)]).permute(2, 0, 1)[None]
        started = time.perf_counter()
        embeddings = context.model.encode(x)
        seconds += time.perf_counter() - started
        corner = np.array([tile.outer.x0, tile.outer.y0])
        points = find_points(embeddings, tile.outer.width, context.model.mpp, context.spec.config, None)
        points = points[tile.core.contains(points + corner)]
        started = time.perf_counter()
        for _ in decode(context.model, embeddings, 0, points, context.spec.config.masks):
            pass
        seconds += time.perf_counter() - started
    return seconds


def resident() -> float:
    """MB now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def flat(slide: Path) -> dict[str, object]:
    """A run of a whole slide."""
    planning.load_model = discs(0.002)
    with tempfile.TemporaryDirectory() as out:
        counts = segment_slide(slide, from_mapping({"mpp": 0.25, "tissue": {"enabled": False}}, "benchmark"), out)[
            "counts"
        ]
    return {"tiles": counts["tiles"], "cells": counts["cells"]}


def write_sparse(path: Path, side: int, share: float) -> None:
    """A pyramid most of whose tiles are absent; islands of real tissue are spread over it."""
    source, tile = patch(), 256
    islands = np.random.default_rng(0).random((-(-side // 4096), -(-side // 4096))) < share
    islands[0, 0] = True  # tifffile wants the first tile to be one
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for k, step in enumerate((1, 4, 16, 64)):
            times = max(tile // (1024 // step), 1)
            level = np.tile(source[::step, ::step], (times, times, 1))
            size = -(-side // step)
            count, per = -(-size // tile), len(level) // tile

            def tiles(
                level: np.ndarray = level, count: int = count, per: int = per, step: int = step
            ) -> Iterator[np.ndarray | None]:
                for row in range(count):
                    for column in range(count):
                        rows, columns = (
                            (n * tile * step // 4096, ((n + 1) * tile * step - 1) // 4096 + 1) for n in (row, column)
                        )
                        if islands[rows[0] : rows[1], columns[0] : columns[1]].any():
                            yield level[row % per * tile :, column % per * tile :][:tile, :tile]
                        else:
                            yield None

            file.write(
                tiles(),
                shape=(size, size, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 90},
                subfiletype=bool(k),
                resolution=(40_000 / step, 40_000 / step),
                resolutionunit="CENTIMETER",
            )


def sparse(slide: Path, model: str) -> dict[str, object]:
    """Resident memory at shares of the run, averaged over 2 % of its tiles, and its largest while files are written."""
    if model == "discs":
        planning.load_model = discs(0.002)
    seen: list[tuple[float, float]] = []
    over = threading.Event()
    done = [0.0]

    def watch() -> None:
        while not over.wait(0.02):
            seen.append((done[0], resident()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as out:
        manifest = segment_slide(
            slide,
            from_mapping({"mpp": 0.25}, "benchmark"),
            out,
            on_progress=lambda n, total, _: done.__setitem__(0, n / total),
        )
    over.set()
    watcher.join()
    at, mb = np.array(seen).T
    shares = {f"MB at {p} %": float(np.max(mb[(at >= p / 100 - 0.05) & (at <= p / 100) & (at > 0)])) for p in (10, 50)}
    during, after = mb[(at > 0) & (at < 1)], mb[at >= 1]
    return {
        "model": model,
        "tiles": manifest.counts["tiles"],
        "cells": manifest.counts["cells"],
        **shares,
        "MB at 100 %": float(np.max(mb[(at >= 0.95) & (at < 1)], initial=0) or during[-1]),
        "MB while stitching and writing": float(after.max()),
        "s": manifest.seconds["total"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["stitching", "merge", "overhead", "flat", "sparse"])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--sparse-model", nargs="*", default=["discs"])
    options = parser.parse_args()
    tables: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for what in options.what:
            if what == "stitching":
                (folder / "cut").mkdir()
                tables[what] = [apart(stitching, 100_000, folder / "cut")]
            elif what == "merge":
                (folder / "million" / "parts").mkdir(parents=True)
                write_parts(folder / "million", options.cells)
                tables[what] = [
                    {"what": "imports alone"} | apart(idle),
                    {"what": "merge"} | apart(merge, folder / "million"),
                ]
                tables[what] = [{k: row.get(k, "") for k in tables[what][1]} for row in tables[what]]
            elif what == "overhead":
                write_slide(folder / "slide.tiff", 8192)
                tables[what] = [
                    apart(overhead, folder / "slide.tiff", f"discs, {seconds} s per tile", 64, 2)
                    for seconds in (0.2, 0.05)
                ]
                write_slide(folder / "small.tiff", 6144)
                tables[what].append(apart(overhead, folder / "small.tiff", "nuclei-compact", 36, 2))
            elif what == "flat":
                for side in (10, 32):
                    write_slide(folder / f"{side}.tiff", side * 1024)
                tables[what] = [apart(flat, folder / f"{side}.tiff") for side in (10, 32)]
            elif what == "sparse":
                write_sparse(folder / "sparse.tiff", 100_000, 0.1)
                tables[what] = [apart(sparse, folder / "sparse.tiff", model) for model in options.sparse_model]
            write_results(
                "scale", tables, __doc__.split("\n\n", 2)[2].strip()
            )  # as they come: it takes a quarter of an hour


if __name__ == "__main__":
    main()
