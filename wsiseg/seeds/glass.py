"""Clicks on glass: found from a few pixels around each, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsiseg.geometry import Box, Lattice
from wsiseg.slide import read_region, thumbnail
from wsiseg.slide.stain import as_scanned
from wsiseg.slide.tissue import glass_white, is_brightfield, is_glass

if TYPE_CHECKING:
    from wsiseg.config import RunConfig
    from wsiseg.records import Seeds
    from wsiseg.slide import SlideReader

_LOOK_MPP = 0.5  #: the thinnest nucleus is 4 px wide


class GlassFinder:
    """Tells tissue from glass around places of a slide; on a dark background, where glass cannot be recognised, nothing is glass.

    Parameters
    ----------
    reader
        The slide; its microns per pixel are known.
    config
        ``cop.click_reach_um``: how far a click may miss its cell; ``tissue.overview_mpp``.
    """

    def __init__(self, reader: SlideReader, config: RunConfig) -> None:
        reader = as_scanned(reader)
        overview, _ = thumbnail(reader, config.tissue.overview_mpp)
        self._reader, self._reach_um = reader, config.cop.click_reach_um
        self._white = glass_white(overview) if is_brightfield(overview) else None
        mpp = max(_LOOK_MPP, reader.info.mpp)
        self._lattice, self._half = Lattice(reader.info.mpp, mpp), int(np.ceil(self._reach_um / mpp)) + 2

    def fault(self, point: tuple[float, float]) -> str:
        """Why a click (level-0 px) is refused: no tissue within its reach; empty when there is some."""
        if self._white is None:
            return ""
        x, y = np.floor(self._lattice.to_model(np.array(point))).astype(int).tolist()
        box = Box(x - self._half, y - self._half, x + self._half + 1, y + self._half + 1)
        if not is_glass(read_region(self._reader, box, self._lattice), self._white):
            return ""
        return f"on glass, no tissue within {self._reach_um:g} um; click on a nucleus"


def clicks_on_glass(reader: SlideReader, seeds: Seeds, config: RunConfig) -> tuple[str, ...]:
    """List the clicks that a run would refuse because there is no tissue.

    Parameters
    ----------
    reader, config
        As for :class:`GlassFinder`.
    seeds
        Checked against the slide, level-0 px.

    Returns
    -------
    tuple[str, ...]
        A message per click. A click on tissue may still miss every nucleus, which `wsiseg seeds preview` shows.
    """
    glass = GlassFinder(reader, config)
    found = []
    for t, kind in enumerate(seeds.types):
        for name, points in (("points", kind.points), ("negative", kind.negative)):
            for i, point in enumerate(points):
                fault = glass.fault(point)
                if fault:
                    found.append(f"{seeds.source}: types[{t}].{name}[{i}] = [{point[0]:g}, {point[1]:g}]: {fault}")
    return tuple(found)
