"""The pictures of docs/pictures that are made by code, from the demo slide alone: `python docs/figures.py`.

Needs matplotlib, and for start-report.jpg the dependency group `browser` with a Chromium. How the two prompt methods work is drawn from what they
compute, with the packaged network.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.special import expit

import wsiseg
from wsiseg.config import RunConfig
from wsiseg.demo import write_demo
from wsiseg.geometry import Box, Lattice
from wsiseg.models import load_model
from wsiseg.segmentation.prompts.apg import apg_points
from wsiseg.segmentation.prompts.chain_of_prompts import cosine_map, farthest_point_recursion, resize_unit
from wsiseg.slide import open_slide, read_region
from wsiseg.slide.stain import SlideStain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from wsiseg.records import Embeddings

PICTURES = Path(__file__).parent / "pictures"
CROP = Box(300, 400, 812, 912)  #: model px: 128 um of glands, stroma and lymphocytes
CLICK = (271.0, 271.0)  #: on a lymphocyte, level-0 px
GREEN, ORANGE = "#00a050", "#ff7f0e"


class Demo:
    """The demo slide, typed, and what the network makes of it."""

    def __init__(self, folder: Path) -> None:
        self.slide, seeds = write_demo(folder)
        self.run = wsiseg.segment_slide(self.slide, seeds=seeds, stain="ihc", out=folder / "out")
        self.model = load_model("nuclei-compact", "cpu")
        with open_slide(self.slide) as reader:
            self.mpp = reader.info.mpp
            self.lattice = Lattice(self.mpp, self.model.mpp)
            size = round(512 * self.mpp / self.model.mpp)
            self.pixels = read_region(reader, Box(0, 0, size, size), self.lattice)
            self.shown = read_region(SlideStain("ihc").view(reader), Box(0, 0, size, size), self.lattice)
        with torch.inference_mode():
            image = torch.from_numpy(self.shown.copy()).permute(2, 0, 1)[None]
            self.embeddings: Embeddings = self.model.encode(image)

    def polygons(self) -> list[tuple[NDArray[np.float64], Any]]:
        """Outlines in model px, and the colour of each."""
        cells = self.run.cells()
        colors = [tuple(c / 255 for c in color) for color in cells.typing.colors]
        rings = [np.asarray(polygon.exterior.coords) / self.lattice.scale for polygon in cells.polygons]
        return [(ring, colors[code]) for ring, code in zip(rings, cells.typing.codes.tolist(), strict=True)]


def panel(ax: Axes, image: NDArray[Any], title: str, **how: object) -> None:
    """An image over the whole demo, seen through the crop."""
    size = 512 * 2
    ax.imshow(image, extent=(0, size, size, 0), interpolation="nearest", **how)
    ax.set(xlim=(CROP.x0, CROP.x1), ylim=(CROP.y1, CROP.y0), xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)


def start_cells(demo: Demo) -> None:
    """The slide beside its typed cells."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
    for ax in axes:
        ax.imshow(demo.pixels)
        ax.set(xticks=[], yticks=[], autoscale_on=False)
    for ring, color in demo.polygons():
        axes[1].plot(*ring.T, color=color, linewidth=1)
    cells = demo.run.cells()
    for name, color in zip(cells.typing.names, cells.typing.colors, strict=True):
        axes[1].plot([], color=[c / 255 for c in color], label=f"{name}: {cells.count()[name]}")
    axes[1].legend(loc="lower right", fontsize=8)
    figure.savefig(PICTURES / "start-cells.jpg", dpi=110, pil_kwargs={"quality": 80})


def how_apg(demo: Demo) -> None:
    """Three maps, the inner parts of the nuclei, a prompt in each, the outlines decoded from them."""
    maps = demo.embeddings.maps[0].float().numpy()
    stride, config = demo.shown.shape[0] // maps.shape[-1], RunConfig().apg
    points = apg_points(maps, stride, demo.model.mpp, config)
    foreground, centre, border = expit(maps)
    inner = (foreground >= config.foreground) & (centre < config.centre) & (border < config.boundary)
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.3), layout="constrained")
    panel(axes[0, 0], demo.pixels, "slide")
    panel(axes[0, 1], foreground, "nucleus?", cmap="Blues", vmin=0, vmax=1)
    panel(axes[0, 2], centre, "distance to the centre", cmap="Blues", vmin=0, vmax=1)
    panel(axes[1, 0], border, "distance to the border", cmap="Blues", vmin=0, vmax=1)
    panel(axes[1, 1], inner, "all three: inner parts, one prompt each", cmap="Greys", vmin=0, vmax=2)
    axes[1, 1].plot(*points.T, "+", color=ORANGE, markersize=6, markeredgewidth=1.5)
    panel(axes[1, 2], demo.pixels, "a mask from each prompt")
    for ring, _ in demo.polygons():
        axes[1, 2].plot(*ring.T, color=GREEN, linewidth=1)
    figure.savefig(PICTURES / "how-apg.jpg", dpi=100, pil_kwargs={"quality": 80})


def how_cop(demo: Demo) -> None:
    """One click, what resembles it in fine and in coarse features, the places found hop by hop."""
    high, fine = demo.embeddings.high[0].float().numpy(), demo.embeddings.high.shape[-1]
    stride, config = demo.shown.shape[0] // fine, RunConfig().cop
    cells = [slice(edge // stride, end // stride) for edge, end in ((CROP.y0, CROP.y1), (CROP.x0, CROP.x1))]
    low = resize_unit(demo.embeddings.low[0].float().numpy(), high.shape[1:])[:, cells[0], cells[1]]
    high = high[:, cells[0], cells[1]]
    click = (np.array(CLICK) / demo.lattice.scale - (CROP.x0, CROP.y0)) / stride
    column, row = click.astype(int)
    reached = farthest_point_recursion((click[0], click[1]), high, low, stride * demo.model.mpp, config)
    near = cosine_map(high[None, :, row, column], high)
    far = cosine_map(low[None, :, row, column], low)
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
    panel(axes[0], demo.pixels, "one click")
    axes[0].plot(*(click * stride + (CROP.x0, CROP.y0)), "+", color=ORANGE, markersize=14, markeredgewidth=2.5)
    for ax, image, title in ((axes[1], near, "like it, fine features"), (axes[2], far, "like it, coarse features")):
        ax.imshow(image, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=9)
    panel(axes[3], demo.pixels, f"{len(reached)} places reached, in order")
    for number, (x, y) in enumerate(reached * stride + (CROP.x0, CROP.y0), 1):
        axes[3].text(x, y, str(number), color="black", fontsize=7, ha="center", va="center",
                     bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": ORANGE})  # fmt: skip
    figure.savefig(PICTURES / "how-cop.jpg", dpi=100, pil_kwargs={"quality": 80})


def start_report(demo: Demo) -> None:
    """The upper part of the report, as a browser shows it."""
    from playwright.sync_api import sync_playwright

    from wsiseg.report.page import write_report

    page_file, _ = write_report(Path(demo.run.path))
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 760})
        page.goto(page_file.resolve().as_uri())
        page.screenshot(path=PICTURES / "start-report.jpg", type="jpeg", quality=75)
        page.evaluate("document.getElementById('examples').scrollIntoView()")
        page.screenshot(path=PICTURES / "start-examples.jpg", type="jpeg", quality=75)
        browser.close()


FIGURES = {"cells": start_cells, "apg": how_apg, "cop": how_cop, "report": start_report}


def main(names: list[str]) -> None:
    """Draw the named figures, or all."""
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(Path(folder))
        for name in names or FIGURES:
            FIGURES[name](demo)


if __name__ == "__main__":
    main(sys.argv[1:])
