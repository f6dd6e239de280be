"""CPU work of a run outside the network: core-seconds per mm2 and stage, on one thread.

    python -m benchmarks.throughput [--side 4096] [--slide FILE]

Every tile of a slide at 0.25 um (synthetic: JPEG tiles that repeat a piece of real tissue) is read, its prompts are found, its masks traced, its
stains measured, and a part is written, one stage after the other, timed by the CPU time of this process; what the network does in between is not
counted. Reading is also timed with OpenSlide alone, and prompts with a distance transform of the whole map, in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from scipy import ndimage
from scipy.special import expit
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import write_results
from benchmarks.memory import write_slide
from wsiseg.config import MaskConfig, RunConfig
from wsiseg.formats.parts import write_part
from wsiseg.geometry import Lattice
from wsiseg.models import load_model, nuclei_compact
from wsiseg.records import Cells
from wsiseg.segmentation import transfer
from wsiseg.segmentation.colours import measure_colours
from wsiseg.segmentation.decoding import decode_tiles
from wsiseg.segmentation.tile import TileSegmenter
from wsiseg.slide import open_slide, read_region
from wsiseg.slide.openslide_reader import OpenSlideReader
from wsiseg.slide.tiling import plan_for_model
from wsiseg.slide.tissue import SearchArea

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wsiseg.config import ApgConfig


class CpuClock:
    """CPU seconds of this process by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[stage] += time.process_time() - started


def by_distance_transform(maps: np.ndarray, config: ApgConfig) -> int:
    """What finding prompts cost before: probabilities and depths of the whole map; returns the number of components."""
    f, c, b = expit(maps)
    seed = (f >= config.foreground) & (c < config.centre) & (b < config.boundary)
    components, count = ndimage.label(seed)
    depth = ndimage.distance_transform_edt(np.pad(seed, 1))[1:-1, 1:-1]
    y, x = np.nonzero(seed)
    np.lexsort((x, y, -depth[y, x], components[y, x]))
    return int(count)


def measure(slide: str, scratch: Path) -> tuple[CpuClock, dict[str, float]]:
    """CPU seconds of every stage on a slide, and counts."""
    torch.set_num_threads(1)
    clock, config = CpuClock(), RunConfig(method="apg", precision="fp32", device="cpu")
    model = load_model("nuclei-compact", "cpu")
    counts: dict[str, float] = defaultdict(float)
    for warm in (
        True,
        False,
    ):  # the first time loads libraries; then everything is opened anew, as what was read lately is kept
        clock.seconds.clear()
        counts.clear()
        with open_slide(slide, reader="openslide") as reader, open_slide(slide, reader="openslide") as alone:
            if not isinstance(alone, OpenSlideReader):
                raise TypeError(f"{slide}: not a slide of OpenSlide")
            alone._direct = None  # what this is compared with
            lattice, area = Lattice(reader.info.mpp, model.mpp), SearchArea(None, None)
            blocks = plan_for_model(reader.info, model, config.tiling, area.wanted)
            segmenter = TileSegmenter(model, config, lattice, area, None, name=slide)
            for block in blocks[:1] if warm else blocks:
                found = []
                for tile in block.tiles:
                    with clock("read, OpenSlide alone"):
                        read_region(alone, tile.outer, lattice)
                    with clock("read"):
                        pixels = read_region(reader, tile.outer, lattice)
                    (encoded,) = segmenter.encode([pixels])
                    maps = encoded.embeddings.maps
                    if maps is None:
                        raise TypeError("the model has no instance maps")
                    with clock("prompts, distance transform"):
                        by_distance_transform(maps[0].numpy(), config.apg)
                    with clock("prompts"):
                        points = segmenter.find_prompts(tile, encoded)
                    (masks,) = segmenter.decode([tile], [encoded], [points])
                    with clock("trace"):
                        cells, _ = segmenter.trace(tile, masks)
                    with clock("measure stains"):
                        cells = measure_colours(cells, pixels, tile.outer, lattice, reader.info.size_px0, "he")
                    found.append(cells)
                    counts["prompts"] += len(points)
                with clock("write"):
                    cells = Cells.concatenate(found, model.descriptor_size)
                    write_part(scratch / f"{block.name}.parquet", cells, "0", {}, [])
                counts["outlines"] += len(cells)
            width, height = reader.info.size_px0
            counts["mm2"] = width * height * reader.info.mpp**2 / 1e6
    return clock, dict(counts)


class Calls(TorchDispatchMode):
    """Counts the operations that an accelerator would be asked for; views of a tensor cost it nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(returned.alias_info for returned in func._schema.returns)
        return func(*args, **kwargs or {})


@torch.inference_mode()
def calls_rows(prompts: int = 300) -> list[dict[str, object]]:
    """Operations from the prompts of a tile to masks on the host; one tile after the other, and several together."""
    model, config = load_model("nuclei-compact", "cpu"), MaskConfig()
    rng, rows = np.random.default_rng(0), []
    for tiles in (1, 8, 32):
        embeddings = model.encode(torch.from_numpy(rng.integers(0, 255, (tiles, 3, 256, 256), np.uint8)))
        points = [rng.uniform(20, 236, (prompts, 2)).astype(np.float32) for _ in range(tiles)]
        together = dataclasses.replace(config, prompts_per_batch=config.prompts_per_batch * tiles)
        with Calls() as calls, as_on_an_accelerator(calls):
            decode_tiles(model, embeddings, range(tiles), points, together)
        rows.append({"tiles together": tiles, "prompts per tile": prompts, "calls per tile": calls.count / tiles})
    return rows


@contextmanager
def as_on_an_accelerator(calls: Calls) -> Iterator[None]:
    """Decode all prompts of a batch at once, and pack the logits for a copy; unpacking is the host's and not counted."""

    def packed(logits: torch.Tensor) -> torch.Tensor:
        small, before = transfer.pack(logits), calls.count
        logits = transfer.unpack(small)
        calls.count = before
        return logits

    with (
        mock.patch.object(transfer, "logits_to_host", packed),
        mock.patch.object(nuclei_compact, "CPU_PROMPTS", 1 << 30),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="of the synthetic slide, px")
    parser.add_argument("--slide", help="a slide instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slide = options.slide or f"{folder}/slide.tiff"
        if not options.slide:
            write_slide(Path(slide), options.side)
        clock, counts = measure(slide, Path(folder))
    mm2 = counts["mm2"]
    rows = [{"stage": stage, "core-seconds per mm2": spent / mm2} for stage, spent in clock.seconds.items()]
    what = Path(slide).name if options.slide else f"synthetic, {options.side} px"
    note = f"{what}: {mm2:.2f} mm2, {counts['prompts'] / mm2:.0f} prompts and {counts['outlines'] / mm2:.0f} outlines per mm2."
    tables = {"Core-seconds": rows, "Calls of the device": calls_rows()}
    write_results("throughput", tables, f"`python -m benchmarks.throughput`\n\n{note}")


if __name__ == "__main__":
    main()
