"""Pictures of a report: the slide, maps of density, and crops of single cells. Pixels in memory; nothing is written."""

from __future__ import annotations

import base64
import io
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely
from PIL import Image

from wsiseg.errors import ConfigError, SlideError
from wsiseg.formats.geoparquet import polygons_at
from wsiseg.geometry import Box, Lattice
from wsiseg.slide import open_slide, read_region
from wsiseg.slide.resample import thumbnail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from wsiseg.report.summary import FinishedRun
    from wsiseg.slide import SlideReader

OVERVIEW_PX = 1000  #: longest side
MAP_BINS = 150  #: along the longest side of a density map ..
MAP_BIN_UM = 50.0  #: .. of at least this side: finer ones hold few cells
CROP_UM = 32.0  #: a nucleus and its neighbours
CROP_PX = 160
JPEG_QUALITY = 80
#: Single hue from light to dark: its order survives any colour blindness, and print.
_RAMP = np.array([(247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)], float)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as a ``data:`` address, and its size in px."""

    data: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class DensityMap:
    """A map of the cells per mm2, on squares of ``bin_um``; ``highest`` is that of the darkest."""

    picture: Picture
    bin_um: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A cell in its surroundings.

    Attributes
    ----------
    row
        Of the table.
    picture
        ``CROP_PX`` squared.
    outline
        ``x,y x,y ...``, px of the picture.
    """

    row: int
    picture: Picture
    outline: str


@contextmanager
def opened_slide(run: FinishedRun, slide: Path | None) -> Iterator[SlideReader]:
    """Open the slide of a run.

    Parameters
    ----------
    run
        The run; its manifest says where the slide was.
    slide
        Where it is now; ``None``: where it was.

    Raises
    ------
    SlideError
        It is not there, or not the run's slide.
    """
    known, config = run.manifest.slide, run.manifest.config
    places = [str(slide)] if slide is not None else [str(known.get("target") or known["path"]), str(known["path"])]
    place = next((p for p in places if "://" in p or Path(p).exists()), places[0])
    try:
        reader = open_slide(
            place, mpp=run.info.mpp, force_mpp=bool(config.get("force_mpp", False)), reader=run.info.reader
        )
    except ConfigError as error:
        raise SlideError(f"{place}: {error}") from error
    with reader:
        if reader.info.size_px0 != run.info.size_px0:
            sizes = [f"{w} x {h}" for w, h in (reader.info.size_px0, run.info.size_px0)]
            raise SlideError(f"{place}: has {sizes[0]} px, the run's slide {sizes[1]}; pass the right one with --slide")
        yield reader


def overview(reader: SlideReader) -> Picture:
    """The whole slide, at most ``OVERVIEW_PX`` wide or high."""
    longest = max(reader.info.size_px0)
    pixels, _ = thumbnail(reader, reader.info.mpp * max(longest / OVERVIEW_PX, 1))
    return _jpeg(pixels)


def density_map(xy_px: NDArray[np.float64], size_px0: tuple[int, int], mpp: float) -> DensityMap:
    """Count cells on squares.

    Parameters
    ----------
    xy_px
        Centroids (n, 2), level-0 px.
    size_px0, mpp
        The slide.
    """
    bin_um = max(max(size_px0) * mpp / MAP_BINS, MAP_BIN_UM)
    columns, rows = (max(int(np.ceil(side * mpp / bin_um)), 1) for side in size_px0)
    x, y = np.floor(xy_px.T * mpp / bin_um).astype(np.intp)
    at = np.clip(y, 0, rows - 1) * columns + np.clip(x, 0, columns - 1)
    counts = np.bincount(at, minlength=rows * columns).reshape(rows, columns)
    highest = int(counts.max(initial=0))
    image = Image.fromarray(shades(counts / max(highest, 1)))
    return DensityMap(picture=png(image), bin_um=bin_um, highest=highest / (bin_um / 1000) ** 2)


def crops(reader: SlideReader, run: FinishedRun, rows: NDArray[np.intp]) -> dict[int, Crop]:
    """Crops around the cells at ``rows`` of the table, by row; a place that cannot be read has none."""
    lattice = Lattice(reader.info.mpp, CROP_UM / CROP_PX)
    polygons = polygons_at(run.table, rows)
    centres = lattice.to_model(shapely.get_coordinates(shapely.centroid(polygons)))
    found = {}
    for row, polygon, centre in zip(rows.tolist(), polygons, centres, strict=True):
        left, top = (round(c - CROP_PX / 2) for c in centre)
        try:
            pixels = read_region(reader, Box(left, top, left + CROP_PX, top + CROP_PX), lattice)
        except SlideError:
            continue
        outline = lattice.to_model(shapely.get_coordinates(polygon.exterior)[:-1]) - (left, top)
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline.tolist())
        found[row] = Crop(row=row, picture=_jpeg(pixels), outline=text)
    return found


def shades(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours (..., 3) of shares from 0, light, to 1, dark."""
    stops = np.linspace(0, 1, len(_RAMP))
    pixels = np.stack([np.interp(shares, stops, _RAMP[:, channel]) for channel in range(3)], axis=-1)
    return pixels.round().astype(np.uint8)


def png(image: Image.Image) -> Picture:
    """A picture of few colours, small."""
    return _encoded(image.quantize(64), "PNG")


def _jpeg(pixels: NDArray[np.uint8]) -> Picture:
    return _encoded(Image.fromarray(pixels), "JPEG", quality=JPEG_QUALITY)


def _encoded(image: Image.Image, kind: str, **options: int) -> Picture:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(data=f"data:image/{kind.lower()};base64,{data}", width=image.width, height=image.height)
