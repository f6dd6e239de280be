"""Tiles decoded without OpenSlide are the pixels that OpenSlide gives, and nothing else is read so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile

from wsiseg.geometry import Box
from wsiseg.slide import open_slide
from wsiseg.slide.openslide_reader import OpenSlideReader

if TYPE_CHECKING:
    from pathlib import Path


def write_pyramid(
    path: Path, size: tuple[int, int] = (700, 500), *, steps: tuple[int, ...] = (1, 4), **how: Any
) -> None:
    """A tiled TIFF of smooth colours and noise, by default of JPEG tiles with halved chroma; its sides are not multiples of a tile's."""
    rng = np.random.default_rng(0)
    width, height = size
    image = np.linspace(0, 200, width)[None, :, None] + rng.integers(0, 50, (height, width, 3))
    options = {
        "tile": (128, 128),
        "photometric": "ycbcr",
        "subsampling": (2, 2),
        "compression": "jpeg",
        "compressionargs": {"level": 80},
        "resolution": (20_000, 20_000),
        "resolutionunit": "CENTIMETER",
    } | how
    with tifffile.TiffWriter(path) as file:
        for step in steps:
            file.write(image[::step, ::step].astype(np.uint8), subfiletype=step > 1, **options)


def both(path: Path) -> tuple[OpenSlideReader, OpenSlideReader]:
    """The slide as it is read, and by OpenSlide alone."""
    direct, alone = (open_slide(str(path), mpp=0.5, reader="openslide") for _ in range(2))
    assert isinstance(direct, OpenSlideReader)
    assert isinstance(alone, OpenSlideReader)
    alone._direct = None
    return direct, alone


def assert_same(path: Path, direct_levels: list[int]) -> None:
    direct, alone = both(path)
    with direct, alone:
        assert (sorted(direct._direct._levels) if direct._direct else []) == direct_levels
        rng = np.random.default_rng(1)
        for level, (width, height) in enumerate(direct.info.level_sizes):
            boxes = [Box(-30, -20, width + 30, height + 20)]
            for _ in range(6):
                x, y = int(rng.integers(-50, width)), int(rng.integers(-50, height))
                boxes.append(Box(x, y, x + int(rng.integers(1, 300)), y + int(rng.integers(1, 300))))
            for box in boxes:
                np.testing.assert_array_equal(direct.read(level, box), alone.read(level, box))


@pytest.mark.parametrize(
    "how",
    [{}, {"photometric": "rgb", "subsampling": None}, {"subsampling": (2, 1)}, {"tile": (256, 64)}],
    ids=["halved chroma", "rgb", "half as wide", "oblong"],
)
def test_the_same_pixels(how: dict[str, Any], tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tiff", (1024, 512), **how)
    assert_same(tmp_path / "a.tiff", [0, 1])


def test_levels_between_whole_downsamples_are_left_to_openslide(tmp_path: Path) -> None:
    """700 x 500 px have a level of 234 x 167, with downsample 2.993."""
    write_pyramid(tmp_path / "a.tiff", steps=(1, 3))
    assert_same(tmp_path / "a.tiff", [0])


def test_other_compression_is_left_to_openslide(tmp_path: Path) -> None:
    write_pyramid(
        tmp_path / "lzw.tiff", (512, 256), photometric="rgb", subsampling=None, compression="lzw", compressionargs=None
    )
    assert_same(tmp_path / "lzw.tiff", [])


def test_an_absent_tile_leaves_its_file_to_openslide(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    write_pyramid(path, (512, 256), steps=(1,))
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = file.pages[0].tags["TileByteCounts"]
        counts.overwrite([0, *counts.value[1:]])
    assert_same(path, [])


def test_what_openslide_draws_otherwise_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two are compared when a slide is opened."""
    path = tmp_path / "a.tiff"
    write_pyramid(path, (512, 256), steps=(1,))
    drawn = OpenSlideReader._rgb
    monkeypatch.setattr(OpenSlideReader, "_rgb", lambda *arguments: drawn(*arguments) ^ 1)
    assert_same(path, [])


def test_a_tile_that_cannot_be_decoded_is_openslides_to_judge(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    write_pyramid(path, (512, 256), steps=(1,))
    direct, alone = both(path)
    with direct, alone:
        good = alone.read(0, Box(0, 0, 128, 128))
        assert direct._direct is not None
        direct._direct._pixels._levels[0].lengths[0][:] = 1 << 40  # beyond the end of the file
        np.testing.assert_array_equal(direct.read(0, Box(0, 0, 128, 128)), good)


def test_real_slides(shared_data: Path) -> None:
    """JPEG, and JPEG 2000 with a level of downsample 2.0003."""
    for name, levels in (("CMU-1-Small-Region.svs", [0]), ("TCGA-CR-7395-01A-01-TS1.svs", [0])):
        direct, alone = both(shared_data / "slides" / name)
        with direct, alone:
            assert direct._direct is not None
            assert sorted(direct._direct._levels) == levels
            for box in (Box(-50, 700, 900, 1300), Box(1900, 2500, 2300, 3000)):
                np.testing.assert_array_equal(direct.read(0, box), alone.read(0, box))
