"""How quick the click page is on a million cells, and how much memory it takes: in a browser, as somebody sees it.

    python -m benchmarks.view [--cells 1000000] [--side 60000]

The slide is a JPEG pyramid of tiles that repeat the demo's picture; nuclei 40 px apart (benchmarks/export.py) with descriptors around five means.
`wsiseg view` runs as a process of its own, Chromium without a window beside it. Opening: until the address is printed. First picture: until all
tiles and cells of the first view are drawn. Pans move the view by up to half its size, where some 3000 cells are outlined: until tiles and
outlines of the new view are drawn, before clicks and with clicks that are not applied, when the cells that come into view are typed.
Retyping, one click a second: from the click to the view drawn with its new types; and of that, the question of the types alone. Tiles per
second: over four connections, of level 0, each once from the disk, then again. Memory: the peak of the server's process, once as the page needs
it and once after Apply; of the page, the heap of its scripts, as the browser's own tools say, and the memory of its process: resident, and
without files and shared memory.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tifffile
from PIL import Image
from skimage import data

from benchmarks.common import write_results
from benchmarks.export import AlongCurve
from benchmarks.writing import SPACING, Nuclei
from wsiseg.config import RunConfig
from wsiseg.formats.geoparquet import write_geoparquet
from wsiseg.measurements import measure
from wsiseg.models import find_weights
from wsiseg.models.cards import file_hash
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from collections.abc import Iterator

MPP, TILE, LEVELS = 0.25, 512, (1, 4, 16, 64)
TYPES = 5
ROUNDS = 15


@dataclass(frozen=True)
class TypedNuclei:
    """The nuclei with descriptors around the mean of one of ``TYPES`` kinds, by columns of the lattice and chance."""

    nuclei: AlongCurve
    descriptor_size: int = 75
    measurement_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.nuclei)

    @property
    def total_bounds(self) -> tuple[float, float, float, float]:
        return self.nuclei.total_bounds

    def chunks(self, rows: int) -> Iterator[Cells]:
        means = np.random.default_rng(0).standard_normal((TYPES, self.descriptor_size))
        for number, cells in enumerate(self.nuclei.chunks(rows)):
            rng = np.random.default_rng(number)
            kinds = np.where(
                rng.random(len(cells)) < 0.7, cells.points_xy[:, 0] // 4000 % TYPES, rng.integers(0, TYPES, len(cells))
            )
            z = means[kinds.astype(int)] + 0.7 * rng.standard_normal((len(cells), self.descriptor_size))
            z /= np.linalg.norm(z, axis=1, keepdims=True)
            yield Cells(
                polygons=cells.polygons,
                points_xy=cells.points_xy,
                scores=cells.scores,
                descriptors=z.astype(np.float16),
            )


def write_slide(path: Path, side: int) -> None:
    """A pyramid of JPEG tiles, each level with one tile again and again."""
    picture = Image.fromarray(data.immunohistochemistry())
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level, downsample in enumerate(LEVELS):
            small = picture.resize((TILE // downsample,) * 2) if downsample > 1 else picture
            tile = Image.fromarray(np.tile(np.asarray(small), (downsample, downsample, 1)))
            encoded = _jpeg(tile)
            across = -(-side // downsample)
            count = (-(-across // TILE)) ** 2
            file.write(
                (encoded for _ in range(count)),
                shape=(across, across, 3),
                dtype="uint8",
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                resolution=(1e4 / MPP / downsample,) * 2,
                resolutionunit="centimeter",
                subfiletype=1 if level else 0,
                metadata=None,
            )


def _jpeg(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, subsampling="4:2:0")
    return buffer.getvalue()


def write_run(folder: Path, slide: Path, count: int, side: int) -> None:
    """A finished run of the nuclei, without types."""
    info = SlideInfo(
        path=str(slide), reader="openslide", format="generic-tiff", level_sizes=((side, side),), downsamples=(1.0,), mpp=MPP, mpp_source="x"
    )  # fmt: skip
    cells, typing = TypedNuclei(AlongCurve(Nuclei(count))), Typing.untyped(count)
    provenance = Provenance(tool="wsiseg", version="0", slide=slide.name, config_hash="0")
    folder.mkdir()
    write_geoparquet(
        folder / "cells.parquet", measure(cells, typing, MPP) if count <= 20_000 else cells, typing, info, provenance
    )
    about = {"path": str(slide), "reader": "openslide", "format": "generic-tiff", "size_px0": [side, side]}
    manifest = {
        "status": "complete",
        "run_hash": "0",
        "parts_hash": "0",
        "slide": about | {"mpp": MPP, "mpp_source": "x", "bounds": None, "searched_mm2": 1.0},
        "model": {"name": "nuclei-compact", "sha256": file_hash(find_weights("nuclei-compact")[1])},
        "seconds": {"total": 1.0},
        "config": asdict(RunConfig(method="apg", precision="fp32", formats=("parquet",))),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def peak_mb(pid: int, name: str = "VmHWM") -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[1]) / 1024) if found else 0


def tiles_per_second(port: int, token: str, tiles: list[tuple[int, int]]) -> float:
    """Of level 0, over four connections that stay open."""

    def fetch(mine: list[tuple[int, int]]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for column, row in mine:
            connection.request("GET", f"/{token}/tile/0/{column}/{row}")
            answer = connection.getresponse()
            assert answer.status == 200
            answer.read()
        connection.close()

    started = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, [tiles[k::4] for k in range(4)]))
    return len(tiles) / (time.perf_counter() - started)


DRAWN = "wsiseg.viewer.world.getItemAt(0)?.getFullyLoaded() && wsiseg.overlay.settled"
UNTIL_DRAWN = f"""async (act) => {{
  const started = performance.now();
  await act();
  await new Promise((done) => {{
    const look = () => ({DRAWN}) ? requestAnimationFrame(() => requestAnimationFrame(done)) : setTimeout(look, 2);
    requestAnimationFrame(look);
  }});
  return performance.now() - started;
}}"""


CLICK = """async () => {
  const o = wsiseg.overlay, v = o.boxInView(), inside = [];
  for (const s of o.squares.values()) {
    for (let c = 0; c < s.rows.length; c += 1) {
      const [x0, y0, x1, y1] = s.boxes.subarray(4 * c, 4 * c + 4);
      if (x0 > v.x0 && x1 < v.x1 && y0 > v.y0 && y1 < v.y1) inside.push([(x0 + x1) / 2, (y0 + y1) / 2]);
    }
  }
  const point = inside[NUMBER % inside.length], type = wsiseg.state().types[TYPE].name;
  if (!await wsiseg.change({ kind: 'click', type, point })) throw new Error('refused');
}"""


def timed(page: object, act: str) -> float:
    """Milliseconds until what ``act``, a JavaScript function, asks for is drawn."""
    return float(page.evaluate(f"() => ({UNTIL_DRAWN})({act})"))  # type: ignore[attr-defined]


def rested(page: object, act: str) -> float:
    """The same after a rest, in which the page fetches what lies around the view."""
    page.wait_for_timeout(2000)  # type: ignore[attr-defined]
    return timed(page, act)


def in_browser(address: str, side: int, pid: int) -> list[dict[str, object]]:
    from playwright.sync_api import sync_playwright

    chromium = next(
        found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))
    )
    rows: list[dict[str, object]] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        started = time.perf_counter()
        page.goto(address)
        while not page.evaluate(f"globalThis.wsiseg && document.documentElement.dataset.ready && {DRAWN}"):
            time.sleep(0.01)
        rows.append({"what": "first picture", "s": time.perf_counter() - started})
        middle = 40_000 / 2 / side
        page.evaluate(
            f"() => {{ const v = wsiseg.viewer.viewport; v.zoomTo({side / 2600}, null, true); "
            f"v.panTo(new OpenSeadragon.Point({middle}, {middle}), true); }}"
        )
        page.wait_for_timeout(2000)
        pan = (
            "() => { const v = wsiseg.viewer.viewport, b = v.getBounds(); v.panBy(new OpenSeadragon.Point((Math.random() - 0.5) * b.width, "
            "(Math.random() - 0.5) * b.height), true); }"
        )
        rows.append(spread("pan, at once after another", [timed(page, pan) for _ in range(ROUNDS)]))
        rows[-1]["cells"] = page.evaluate("wsiseg.overlay.counts.counts.reduce((a, b) => a + b)")
        rows.append(spread("pan, after a rest of 2 s", [rested(page, pan) for _ in range(ROUNDS)]))
        clicks, types = [], []
        for k in range(ROUNDS):
            page.wait_for_timeout(1000)  # as somebody clicks
            clicks.append(timed(page, CLICK.replace("NUMBER", str(37 * k + 5)).replace("TYPE", str(k % 3))))
            types.append(float(page.evaluate("wsiseg.overlay.lastRetype")))
        rows.append(spread("click, until the view is retyped", clicks))
        rows.append(spread("of that, the types of the view", types))
        page.wait_for_timeout(2000)
        rows.append(
            spread("pan, after a rest of 2 s, with clicks not applied", [rested(page, pan) for _ in range(ROUNDS)])
        )
        started = time.perf_counter()
        page.evaluate("fetch('counts').then((a) => a.json())")
        rows.append({"what": "counts of the slide, estimated", "s": time.perf_counter() - started})
        page.evaluate("wsiseg.viewer.viewport.goHome(true)")
        page.wait_for_timeout(3000)
        rows.append({"what": "server, peak memory", "MB": peak_mb(pid)})
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
        rows.append({"what": "page, heap of scripts", "MB": round(metrics["JSHeapUsedSize"] / 2**20)})
        browser_session = browser.new_browser_cdp_session()
        processes = browser_session.send("SystemInfo.getProcessInfo")["processInfo"]
        renderers = [p["id"] for p in processes if p["type"] == "renderer"]
        largest = max(renderers, key=lambda process: peak_mb(process, "VmRSS"))
        rows.append({"what": "page, resident memory of its process", "MB": peak_mb(largest, "VmRSS")})
        rows.append(
            {"what": "page, its own memory, as the browser's task manager counts", "MB": peak_mb(largest, "RssAnon")}
        )
        started = time.perf_counter()
        page.click("#apply")
        while not page.evaluate("wsiseg.state().applied && !wsiseg.state().applying"):
            time.sleep(0.2)
        rows.append({"what": "Apply, until the page shows the applied types", "s": time.perf_counter() - started})
        rows.append({"what": "server, peak memory with Apply", "MB": peak_mb(pid)})
        browser.close()
    return rows


def spread(what: str, times_ms: list[float]) -> dict[str, object]:
    ordered = sorted(times_ms)
    return {
        "what": what,
        "median ms": round(statistics.median(ordered)),
        "9 of 10 ms": round(ordered[int(0.9 * (len(ordered) - 1))]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--side", type=int, default=60_000)
    parser.add_argument("--scratch", type=Path, help="Keep the slide and the run here, and use those that are there.")
    parser.add_argument("--name", default="view")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        slide, run = scratch / "slide.tiff", scratch / "run"
        scratch.mkdir(exist_ok=True)
        if not slide.exists():
            write_slide(slide, options.side)
        if not run.exists():
            write_run(run, slide, options.cells, options.side)
        (run / "view.json").unlink(missing_ok=True)
        started = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, "-m", "wsiseg", "view", str(run), "--no-browser"], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        rows: list[dict[str, object]] = [{"what": "opening", "s": time.perf_counter() - started}]
        try:
            port, token = re.findall(r":(\d+)/([^/]+)/", address)[0]
            rng = np.random.default_rng(0)
            tiles = [(int(x), int(y)) for x, y in rng.integers(0, options.side // TILE, (400, 2))]
            tiles = list(dict.fromkeys(tiles))
            rows.append({"what": "tiles from the disk", "per s": round(tiles_per_second(int(port), token, tiles))})
            rows.append({"what": "tiles from the cache", "per s": round(tiles_per_second(int(port), token, tiles))})
            rows += in_browser(address, options.side, server.pid)
        finally:
            server.terminate()
            server.wait()
    keys = ("what", "s", "median ms", "9 of 10 ms", "per s", "MB", "cells")
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    for row in rows:
        print(row)
    write_results(
        options.name,
        rows,
        f"`benchmarks/view.py`: {options.cells} nuclei {SPACING:g} px apart, JPEG slide of {options.side} x {options.side} px, "
        f"window of 1440 x 900 px; load of the machine {before:.0f} at the beginning, {os.getloadavg()[0]:.0f} at the end, {os.cpu_count()} cores.",
    )


if __name__ == "__main__":
    main()
