"""The files that the page writes when it is told to: seeds.json and regions.geojson, in the folder of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsiseg.errors import SeedsError
from wsiseg.formats.regions import regions_geojson
from wsiseg.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.records import SlideInfo
    from wsiseg.viewer.session import PageState

SEEDS_NAME, REGIONS_NAME = "seeds.json", "regions.geojson"


def seeds_text(state: PageState, slide: str) -> str:
    """The content of seeds.json.

    Raises
    ------
    SeedsError
        Nothing is clicked.
    """
    text = state.text(slide)
    if not text:
        raise SeedsError("nothing is clicked yet; click one cell of each type first")
    return text


def regions_text(state: PageState, info: SlideInfo) -> str:
    """The drawn regions as GeoJSON for ``--roi`` and QuPath: relative to the slide's bounds, as QuPath counts.

    Raises
    ------
    SeedsError
        None is drawn.
    """
    if not state.regions:
        raise SeedsError("no region is drawn yet; draw one first")
    return regions_geojson(state.regions, info)


def save(folder: Path, state: PageState, slide: str, info: SlideInfo) -> list[str]:
    """Write seeds.json, and the regions if there are any; paths of the files written.

    Raises
    ------
    SeedsError
        There is nothing to write.
    """
    texts = {SEEDS_NAME: seeds_text(state, slide)} if state.text(slide) or not state.regions else {}
    if state.regions:
        texts[REGIONS_NAME] = regions_text(state, info)
    for name, text in texts.items():
        with atomic_path(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return [str(folder / name) for name in texts]
