"""Clicks on glass: found from a few pixels around each, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsiseg.geometry import Box, Lattice
from wsiseg.slide import read_region, thumbnail
from wsiseg.slide.tissue import glass_white, is_brightfield, is_glass

if TYPE_CHECKING:
    from wsiseg.config import RunConfig
    from wsiseg.records import Seeds
    from wsiseg.slide import SlideReader

_LOOK_MPP = 0.5  #: the thinnest nucleus is 4 px wide


def clicks_on_glass(reader: SlideReader, seeds: Seeds, config: RunConfig) -> tuple[str, ...]:
    """List the clicks that a run would refuse because there is no tissue.

    Parameters
    ----------
    reader
        The slide; its microns per pixel are known.
    seeds
        Checked against the slide, level-0 px.
    config
        ``cop.click_reach_um``: how far a click may miss its cell; ``tissue.overview_mpp``.

    Returns
    -------
    tuple[str, ...]
        A message per click. Empty on a dark background, where glass cannot be recognised. A click on tissue may still miss every nucleus, which
        `wsiseg seeds preview` shows.
    """
    overview, _ = thumbnail(reader, config.tissue.overview_mpp)
    if not is_brightfield(overview):
        return ()
    white, reach = glass_white(overview), config.cop.click_reach_um
    mpp = max(_LOOK_MPP, reader.info.mpp)
    lattice, half = Lattice(reader.info.mpp, mpp), int(np.ceil(reach / mpp)) + 2
    found = []
    for t, kind in enumerate(seeds.types):
        for name, points in (("points", kind.points), ("negative", kind.negative)):
            for i, point in enumerate(points):
                x, y = np.floor(lattice.to_model(np.array(point))).astype(int).tolist()
                if is_glass(read_region(reader, Box(x - half, y - half, x + half + 1, y + half + 1), lattice), white):
                    place = f"{seeds.source}: types[{t}].{name}[{i}] = [{point[0]:g}, {point[1]:g}]"
                    found.append(f"{place}: on glass, no tissue within {reach:g} um; click on a nucleus")
    return tuple(found)
