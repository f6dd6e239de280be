"""Reading slides: every kind of file opens or says why not, and every pixel lies where the frames say."""

from __future__ import annotations

import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from wsiseg.errors import ConfigError, SlideError
from wsiseg.geometry import Box, Lattice
from wsiseg.records import SlideInfo
from wsiseg.slide import open_slide, read_region, require_cellular, thumbnail
from wsiseg.slide.colour import Colours, plan_rgb
from wsiseg.slide.mpp import PixelSize, choose_mpp, from_ome_xml, from_tiff_tags
from wsiseg.slide.resample import best_level, whole_downsamples

# file -> the reader that opens it (None: none does), mpp (nan: the file has none), levels
EXPECTED = {
    "CMU-1-Small-Region.svs": ("openslide", 0.499, 1),
    "TCGA-CR-7395-01A-01-TS1.svs": ("openslide", math.nan, 2),
    "boxes_0.dcm": ("openslide", 0.499, 1),
    "boxes_1.dcm": ("openslide", 0.499, 1),
    "camelyon_overview_multiframe.dcm": ("openslide", 28.9685, 1),
    "highdicom_sm_50x50.dcm": ("openslide", 0.499, 1),
    "histolab_kidney_48_5_flat.tif": ("tiffslide", math.nan, 1),
    "openslide_python_boxes.tiff": ("tiffslide", math.nan, 4),  # OpenSlide could, but hides damage in deflate tiles
    "openslide_python_small_16x16.svs": ("openslide", 0.499, 1),
    "pathml_small_sm.dcm": (None, math.nan, 0),
    "pathml_small_vectra.qptiff": ("tiffslide", 0.4965, 1),
    "stritt_test3_DAPI.ndpi": ("openslide", 0.2282, 7),
}


@pytest.fixture(scope="session")
def slides_dir(shared_data):
    return shared_data / "slides"


@pytest.fixture(scope="session")
def texture():
    """Smooth colours whose four channels of position are all different: shifts and swaps show. (512, 768, 3) uint8."""
    y, x = np.mgrid[0:512, 0:768]
    waves = [
        128 + 60 * np.sin(x / 23) * np.cos(y / 31),
        150 + 50 * np.cos(x / 17 + y / 40),
        120 + 70 * np.sin((x + 2 * y) / 57),
    ]
    return np.stack(waves, axis=-1).round().astype(np.uint8)


def write_pyramid(path, pixels, *, levels=2, compression=None, mpp=0.25, tile=128, **options):
    """A tiled TIFF whose reductions are exact block means; the directories of all levels come first in no particular place."""
    per_cm = 10000 / mpp
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            k = 2**level
            height, width = pixels.shape[0] // k * k, pixels.shape[1] // k * k
            blocks = (
                pixels[:height, :width]
                .reshape(height // k, k, width // k, k, -1)
                .mean((1, 3))
                .round()
                .astype(pixels.dtype)
            )
            tiff.write(
                blocks,
                tile=(tile, tile),
                photometric="rgb",
                compression=compression,
                metadata=None,
                subfiletype=int(level > 0),
                resolution=(per_cm / k, per_cm / k),
                resolutionunit="CENTIMETER",
                **options,
            )
    return path


def page_layout(path, page=0):
    with tifffile.TiffFile(path) as tiff:
        return list(tiff.pages[page].dataoffsets), list(tiff.pages[page].databytecounts)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# ---------------------------------------------------------------------------------------------------------------- every file of the folder


@pytest.mark.parametrize("name", EXPECTED)
def test_each_real_slide_opens_with_its_reader_or_says_why_not(slides_dir, name):
    reader, mpp, levels = EXPECTED[name]
    if reader is None:
        with pytest.raises(SlideError, match=r"no reader can open") as error:
            open_slide(slides_dir / name, require_mpp=False)
        assert name in one_line(error)
        return
    with open_slide(slides_dir / name, require_mpp=False) as slide:
        info = slide.info
        assert (info.reader, len(info.level_sizes)) == (reader, levels)
        assert info.mpp == pytest.approx(mpp, abs=1e-4, nan_ok=True)
        assert (info.mpp_source == "none") == math.isnan(mpp)
        for level, (width, height) in enumerate(info.level_sizes):
            pixels = slide.read(level, Box(width // 2 - 8, height // 2 - 8, width // 2 + 8, height // 2 + 8))
            assert pixels.shape == (16, 16, 3)
            assert pixels.dtype == np.uint8
    if math.isnan(mpp):
        with pytest.raises(SlideError, match=r"no microns per pixel in the file.*pass --mpp") as error:
            open_slide(slides_dir / name)
        one_line(error)


def test_no_slide_of_the_folder_is_forgotten(slides_dir):
    assert {path.name for path in slides_dir.iterdir()} - {"SHA256SUMS"} == set(EXPECTED)


def test_openslide_and_tiffslide_agree(slides_dir):
    """Same scale; pixels differ by at most 2 grey levels (two JPEG decoders)."""
    path = slides_dir / "CMU-1-Small-Region.svs"
    with open_slide(path, reader="openslide") as first, open_slide(path, reader="tiffslide") as second:
        assert first.info.mpp == second.info.mpp == 0.499
        for box in (
            Box(0, 0, 300, 300),
            Box(1000, 1500, 1300, 1700),
            Box(2100, 2900, 2300, 3000),
            Box(-20, -20, 30, 30),
        ):
            a, b = first.read(0, box).astype(int), second.read(0, box).astype(int)
            assert np.abs(a - b).max() <= 2


def test_openslide_and_tiffslide_agree_on_a_level_of_uneven_size(slides_dir):
    """4443 / 2221 = 2.0005: the level is taken as a half, wherever it is read. OpenSlide interpolates by up to a quarter px there."""
    path = slides_dir / "TCGA-CR-7395-01A-01-TS1.svs"
    with open_slide(path, reader="openslide", mpp=1) as first, open_slide(path, reader="tiffslide", mpp=1) as second:
        assert first.info.downsamples == second.info.downsamples == (1.0, 2.0)
        box = Box(1400, 900, 1700, 1100)
        a, b = first.read(1, box), second.read(1, box)
        assert np.abs(a.astype(int) - b).mean() < 4
        assert np.array_equal(a[50:150, 100:250], first.read(1, Box(1500, 950, 1650, 1050)))


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_threads_share_a_reader(slides_dir, reader):
    boxes = [Box(x, y, x + 300, y + 300) for x in (-50, 700, 1900) for y in (0, 1300, 2700)]
    with open_slide(slides_dir / "CMU-1-Small-Region.svs", reader=reader) as slide:
        alone = [slide.read(0, box) for box in boxes]
    with open_slide(slides_dir / "CMU-1-Small-Region.svs", reader=reader) as slide, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda box: slide.read(0, box), boxes * 4))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 4, together, strict=True))


@pytest.mark.parametrize("model_mpp", [0.25, 0.5, 0.7])
def test_a_region_does_not_depend_on_the_box(slides_dir, model_mpp):
    """One box of 512 px equals four of 256 px, to 1 grey level, also across the slide's edge.

    Pillow holds the window in 32-bit floats and rounds between its two passes: two roundings may coincide, in one value of 1e5.
    """
    with open_slide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        lattice = Lattice(slide.info.mpp, model_mpp)
        for x, y in ((600, 900), (-100, -100), lattice.model_size(slide.info.size_px0)):
            whole = read_region(slide, Box(x - 256, y - 256, x + 256, y + 256), lattice)
            for dx in (0, 256):
                for dy in (0, 256):
                    part = read_region(slide, Box(x - 256 + dx, y - 256 + dy, x + dx, y + dy), lattice)
                    difference = np.abs(whole[dy : dy + 256, dx : dx + 256].astype(int) - part)
                    assert (difference > 1).sum() <= 2
                    assert (difference > 0).mean() < 0.005
                    assert difference.max() <= 2


@pytest.mark.parametrize("part", [0.3, 0.9])
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "stritt_test3_DAPI.ndpi"])
def test_a_real_slide_cut_short_reads_true_pixels_or_fails(slides_dir, tmp_path, name, part):
    """Never blank pixels for lost ones: what can still be read equals the whole slide."""
    source = (slides_dir / name).read_bytes()
    (tmp_path / name).write_bytes(source[: int(len(source) * part)])
    try:
        cut = open_slide(tmp_path / name, mpp=0.5)
    except SlideError as error:
        assert name in str(error)  # noqa: PT017
        return
    with cut, open_slide(slides_dir / name, mpp=0.5, reader=cut.info.reader) as whole:
        width, height = whole.info.size_px0
        for x, y in ((0, 0), (width // 2, height // 2), (width - 200, height - 200)):
            box = Box(x, y, x + 200, y + 200)
            try:
                pixels = cut.read(0, box)
            except SlideError:
                continue
            assert np.array_equal(pixels, whole.read(0, box))


# ------------------------------------------------------------------------------------------------------------------------ wrong inputs


def test_a_missing_file():
    with pytest.raises(SlideError, match=r"nowhere\.svs: no such file"):
        open_slide("nowhere.svs")


def test_a_folder(tmp_path):
    with pytest.raises(SlideError, match="is a folder"):
        open_slide(tmp_path)


def test_an_empty_file(tmp_path):
    (tmp_path / "a.svs").touch()
    with pytest.raises(SlideError, match=r"a\.svs: the file is empty"):
        open_slide(tmp_path / "a.svs")


def test_a_text_file_named_svs(tmp_path):
    (tmp_path / "a.svs").write_text("this is not a slide\n" * 50)
    with pytest.raises(SlideError, match=r"a\.svs: this is a text file, not a slide") as error:
        open_slide(tmp_path / "a.svs")
    one_line(error)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", np.zeros((128, 128, 3), np.uint8))
    path.chmod(0)
    with pytest.raises(SlideError, match="no permission"):
        open_slide(path)


def test_no_permission_as_the_system_says_it(tmp_path, monkeypatch):
    (tmp_path / "a.svs").write_bytes(b"II*\0")

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SlideError, match=r"a\.svs: no permission to read it"):
        open_slide(tmp_path / "a.svs")


def test_an_unknown_remote_address():
    with pytest.raises(SlideError, match=r"memory://nowhere/a\.tif: no reader can open this address"):
        open_slide("memory://nowhere/a.tif")


@pytest.mark.parametrize("mpp", [0, -0.25, math.nan, math.inf, 1e-5, 1e5])
def test_mpp_that_cannot_be_meant(mpp):
    with pytest.raises(ConfigError, match=r"--mpp: .* is not allowed"):
        open_slide("nowhere.svs", mpp=mpp)


def test_an_unknown_reader():
    with pytest.raises(ConfigError, match="choose auto, openslide, tiffslide, image"):
        open_slide("nowhere.svs", reader="bioformats")


def test_a_png_cut_short(tmp_path, texture):
    Image.fromarray(texture).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideError, match="damaged or truncated") as error:
        open_slide(tmp_path / "a.png", mpp=0.5)
    one_line(error)


def test_a_plain_image_that_is_too_large(tmp_path):
    """A bomb ends in a sentence, not in memory."""
    Image.new("1", (20000, 20000)).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match="too large for a plain image"):
        open_slide(tmp_path / "a.png", mpp=0.5)


# ----------------------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
@pytest.mark.parametrize("compression", ["jpeg", "lzw", "zlib"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_damaged_tile_fails_where_it_is_and_nowhere_else(tmp_path, texture, reader, compression, kept):
    """Also after the failure, and for other threads: OpenSlide's handle dies of its first error."""
    path = write_pyramid(tmp_path / "a.tif", texture, compression=compression)
    offsets, lengths = page_layout(path)
    data = bytearray(path.read_bytes())
    good = int(lengths[7] * kept)
    data[offsets[7] + good : offsets[7] + lengths[7]] = bytes(lengths[7] - good)  # column 1, row 1 of 6 columns
    path.write_bytes(data)
    if (reader, compression, kept) == ("openslide", "zlib", 0.5):
        with open_slide(path) as slide:  # libtiff would repeat grey in silence: not OpenSlide's by default
            assert slide.info.reader == "tiffslide"
        return
    with open_slide(path, reader=reader) as slide:
        good_box, bad_box = Box(300, 300, 400, 400), Box(130, 130, 140, 240)
        before = slide.read(0, good_box)
        with pytest.raises(SlideError, match=r"a\.tif: cannot read level 0, x 130 to 140, y 130 to 240 px") as error:
            slide.read(0, bad_box)
        one_line(error)
        assert np.array_equal(slide.read(0, good_box), before)

        def attempt(box):
            try:
                return slide.read(0, box)
            except SlideError:
                return None

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(attempt, [bad_box, good_box] * 10))
        assert all(result is None for result in results[::2])
        assert all(np.array_equal(result, before) for result in results[1::2])


@pytest.mark.parametrize("compression", ["jpeg", None])
def test_a_pyramid_cut_short_says_so_and_fails_where_tiles_are_lost(tmp_path, texture, compression):
    path = write_pyramid(tmp_path / "a.tif", texture, compression=compression, levels=1)
    offsets, lengths = page_layout(path)
    data = path.read_bytes()
    path.write_bytes(data[: offsets[-1] + lengths[-1] // 2])
    with open_slide(path, mpp=0.25) as slide:
        width, height = slide.info.size_px0
        assert np.abs(slide.read(0, Box(0, 0, 200, 200)).astype(int) - texture[:200, :200]).mean() < 3
        with pytest.raises(SlideError, match=r"cannot read level 0, x 700 to 768, y 450 to 512"):
            slide.read(0, Box(width - 68, height - 62, width, height))
        if slide.info.reader == "tiffslide":
            assert any("truncated: 1 tiles" in note for note in slide.info.warnings)


def test_a_tile_marked_as_absent_is_white(tmp_path, texture):
    """Sparse TIFF: length 0 is background, not an error and not black."""
    path = write_pyramid(tmp_path / "a.tif", texture, levels=1, compression="lzw")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite([0 if i == 7 else count for i, count in enumerate(tag.value)])
        tag = tiff.pages[0].tags["TileOffsets"]
        tag.overwrite([0 if i == 7 else offset for i, offset in enumerate(tag.value)])
    for reader in ("openslide", "tiffslide"):
        with open_slide(path, reader=reader) as slide:
            assert (slide.read(0, Box(130, 130, 250, 250)) == 255).all()
            assert np.array_equal(slide.read(0, Box(0, 0, 128, 128)), texture[:128, :128])


# ------------------------------------------------------------------------------------------------------------------- pixels and frames


@pytest.fixture(params=["openslide", "tiffslide"])
def pyramid(request, tmp_path, texture):
    path = write_pyramid(tmp_path / "a.tif", texture, levels=3, compression="lzw")
    with open_slide(path, reader=request.param) as slide:
        yield slide


def test_read_returns_the_pixels_of_the_level(pyramid, texture):
    assert pyramid.info.downsamples == (1, 2, 4)
    assert pyramid.info.mpp == pytest.approx(0.25, rel=1e-5)
    assert np.array_equal(pyramid.read(0, Box(100, 50, 400, 300)), texture[50:300, 100:400])
    half = texture.reshape(256, 2, 384, 2, 3).mean((1, 3)).round()
    assert np.array_equal(pyramid.read(1, Box(30, 40, 300, 200)), half[40:200, 30:300])


def test_outside_of_the_slide_is_white(pyramid, texture):
    pixels = pyramid.read(0, Box(-10, -20, 30, 40))
    assert (pixels[:20] == 255).all()
    assert (pixels[:, :10] == 255).all()
    assert np.array_equal(pixels[20:, 10:], texture[:40, :30])
    assert (pyramid.read(0, Box(5000, 5000, 5010, 5020)) == 255).all()
    assert pyramid.read(0, Box(760, 500, 780, 520)).shape == (20, 20, 3)
    region = read_region(pyramid, Box(-40, -40, 40, 40), Lattice(0.25, 0.6))
    assert (region[:40] == 255).all()
    assert (region[:, :40] == 255).all()
    assert (region[40:, 40:] != 255).any(axis=2).all()
    assert (read_region(pyramid, Box(9000, 0, 9010, 10), Lattice(0.25, 0.6)) == 255).all()


def test_equal_scale_returns_pixels_untouched(pyramid, texture):
    lattice = Lattice(pyramid.info.mpp, pyramid.info.mpp)
    assert np.array_equal(read_region(pyramid, Box(64, 64, 320, 320), lattice), texture[64:320, 64:320])


class Ramp:
    """A slide of any size whose red is x / 8 and green y / 8 level-0 px at the centre of each pixel, computed, with levels 1, 2, 4."""

    def __init__(self, size=2000, levels=3):
        sizes = tuple((size >> k, size >> k) for k in range(levels))
        self.info = SlideInfo(
            path="ramp",
            reader="fake",
            format="fake",
            level_sizes=sizes,
            downsamples=whole_downsamples(sizes),
            mpp=0.25,
            mpp_source="fake",
        )
        self.largest = 0

    def read(self, level, box):
        k = self.info.downsamples[level]
        self.largest = max(self.largest, box.width * box.height)
        pixels = np.zeros((box.height, box.width, 3), np.uint8)
        pixels[..., 0] = ((np.arange(box.x0, box.x1) + 0.5) * k / 8).clip(0, 255).round()
        pixels[..., 1] = ((np.arange(box.y0, box.y1) + 0.5) * k / 8).clip(0, 255).round()[:, None]
        return pixels


@pytest.mark.parametrize("scale", [0.4, 0.8, 1.3, 2, 2.9, 3.96, 5.5, 11])
def test_regions_are_not_shifted(scale):
    """Model px i covers [i, i+1) * scale: a ramp keeps its value at the centre, to the rounding of grey levels (8 px each)."""
    slide = Ramp()
    box = Box(int(300 / scale), int(500 / scale), int(300 / scale) + 90, int(500 / scale) + 70)
    region = read_region(slide, box, Lattice(0.25, 0.25 * scale)).astype(float)
    x = (np.arange(box.x0, box.x1) + 0.5) * scale
    y = (np.arange(box.y0, box.y1) + 0.5) * scale
    assert np.abs(region[..., 0] - x / 8).max() <= 1.01
    assert abs((region[..., 0] - x / 8).mean()) < 0.06  # 0.5 px of level 0
    assert np.abs(region[..., 1] - y[:, None] / 8).max() <= 1.01
    assert abs((region[..., 1] - y[:, None] / 8).mean()) < 0.06


def test_shrinking_averages(tmp_path):
    """A checkerboard of single px becomes mid grey, not black or white; total brightness is kept on noise."""
    y, x = np.mgrid[0:256, 0:256]
    board = np.repeat((((x + y) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)
    path = write_pyramid(tmp_path / "a.tif", board, levels=1, compression="lzw")
    with open_slide(path) as slide:
        region = read_region(slide, Box(4, 4, 60, 60), Lattice(slide.info.mpp, 4 * slide.info.mpp))
        assert np.abs(region.astype(int) - 127).max() <= 1
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    with open_slide(tmp_path / "b.png", mpp=0.25) as slide:
        region = read_region(slide, Box(0, 0, 64, 64), Lattice(0.25, 1.0))
        assert region.mean() == pytest.approx(noise.mean(), abs=0.7)


def test_large_reads_go_in_pieces_and_join_exactly():
    slide = Ramp(9600, levels=1)
    overview, scale = thumbnail(slide, 8.0)
    assert (overview.shape, scale) == ((300, 300, 3), 32)
    assert slide.largest <= 16e6
    part = read_region(slide, Box(10, 10, 60, 60), Lattice(0.25, 8.0))
    assert np.abs(overview[10:60, 10:60].astype(int) - part).max() <= 1


def test_thumbnail_covers_the_slide_and_is_never_finer_than_it(pyramid):
    overview, scale = thumbnail(pyramid, 1.0)
    assert overview.shape == (128, 192, 3)
    assert scale == pytest.approx(4)
    overview, scale = thumbnail(pyramid, 0.1)
    assert (overview.shape, scale) == ((512, 768, 3), 1)


def test_best_level():
    assert [best_level((1, 2, 4, 16), scale) for scale in (0.5, 1, 1.99, 3.9, 4, 40)] == [0, 0, 1, 1, 2, 3]


def test_downsamples_are_whole_where_sizes_allow():
    assert whole_downsamples(((4443, 3567), (2221, 1783))) == (1, 2)
    assert whole_downsamples(((100001, 80003), (25000, 20000), (6250, 5000))) == (1, 4, 16)
    assert whole_downsamples(((1000, 1000), (400, 400))) == (1, 2.5)
    assert whole_downsamples(((3000, 3000), (1000, 1000))) == (1, 3)


def test_remote_paths(texture, tmp_path):
    import fsspec

    path = write_pyramid(tmp_path / "a.tif", texture, compression="jpeg", levels=2)
    with fsspec.open("memory://bucket/a.tif", "wb") as file:
        file.write(path.read_bytes())
    with open_slide("memory://bucket/a.tif") as slide, open_slide(path, reader="tiffslide") as local:
        assert slide.info.reader == "tiffslide"
        assert np.array_equal(slide.read(1, Box(10, 10, 200, 200)), local.read(1, Box(10, 10, 200, 200)))


# --------------------------------------------------------------------------------------------------------------------- kinds of images


def test_plain_images(tmp_path, texture):
    Image.fromarray(texture).save(tmp_path / "rgb.png", dpi=(300, 300))
    with pytest.raises(SlideError, match=r"rgb\.png: no microns per pixel in the file; pass --mpp"):
        open_slide(tmp_path / "rgb.png")
    with open_slide(tmp_path / "rgb.png", mpp=0.5) as slide:
        assert (slide.info.reader, slide.info.format, slide.info.mpp, slide.info.mpp_source) == (
            "image",
            "png",
            0.5,
            "--mpp",
        )
        assert np.array_equal(slide.read(0, Box(5, 6, 105, 106)), texture[6:106, 5:105])
    Image.fromarray(texture).save(tmp_path / "rgb.jpg", quality=95)
    with open_slide(tmp_path / "rgb.jpg", mpp=0.5) as slide:
        assert np.abs(slide.read(0, Box(0, 0, 768, 512)).astype(int) - texture).mean() < 3


def test_grey_opaque_palette_and_deep_images(tmp_path, texture):
    grey = texture[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    with open_slide(tmp_path / "grey.png", mpp=0.5) as slide:
        assert np.array_equal(slide.read(0, Box(0, 0, 768, 512)), np.repeat(grey[..., None], 3, axis=2))
        assert any("greyscale" in note for note in slide.info.warnings)
    rgba = np.dstack([texture, np.full(grey.shape, 255, np.uint8)])
    rgba[:100, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    with open_slide(tmp_path / "rgba.png", mpp=0.5) as slide:
        assert (slide.read(0, Box(0, 0, 768, 100)) == 255).all()
        assert np.array_equal(slide.read(0, Box(0, 100, 768, 512)), texture[100:])
        assert any("opacity" in note for note in slide.info.warnings)
    Image.fromarray(texture).quantize(16).save(tmp_path / "palette.png")
    with open_slide(tmp_path / "palette.png", mpp=0.5) as slide:
        assert np.abs(slide.read(0, Box(0, 0, 768, 512)).astype(int) - texture).mean() < 30
    deep = grey.astype(np.uint16) * 16  # 12 bits in 16
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with open_slide(tmp_path / "deep.png", mpp=0.5) as slide:
        assert np.abs(slide.read(0, Box(0, 0, 768, 512))[..., 1].astype(int) - grey).max() <= 1
        assert any("12 bits" in note for note in slide.info.warnings)


@pytest.mark.parametrize("tile", [(128, 128), None])
def test_tiff_of_other_number_types_and_channels(tmp_path, texture, tile):
    options = {"tile": tile, "resolution": (40000, 40000), "resolutionunit": "CENTIMETER", "metadata": None}
    deep = texture.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb", **options)
    with open_slide(tmp_path / "deep.tif", reader="tiffslide") as slide:
        assert np.abs(slide.read(0, Box(0, 0, 768, 512)).astype(int) - texture).max() <= 1
    five = np.moveaxis(np.concatenate([texture, texture[..., :2]], axis=2), 2, 0)
    tifffile.imwrite(
        tmp_path / "five.ome.tif",
        five,
        photometric="minisblack",
        tile=tile,
        metadata={"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
    )
    for reader in ("auto", "image"):
        with open_slide(tmp_path / "five.ome.tif", reader=reader) as slide:
            assert (slide.info.mpp, slide.info.mpp_source) == (0.5, "OME-XML PhysicalSizeX")
            assert any("5 channels" in note for note in slide.info.warnings)
            assert np.array_equal(slide.read(0, Box(100, 100, 200, 200)), texture[100:200, 100:200])
    stack = np.stack([texture, texture[::-1]])
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="rgb", tile=tile, metadata={"axes": "ZYXS"})
    with open_slide(tmp_path / "stack.tif", mpp=0.5, reader="image") as slide:
        assert any("first plane" in note for note in slide.info.warnings)
        assert np.array_equal(slide.read(0, Box(100, 100, 200, 200)), texture[100:200, 100:200])


def test_ome_tiff_pyramid_keeps_its_levels_and_scale(tmp_path, texture):
    """OpenSlide sees neither sub-directories nor OME-XML: TiffSlide must get these files."""
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path) as tiff:
        options = {"tile": (128, 128), "photometric": "rgb", "compression": "jpeg"}
        tiff.write(
            texture,
            subifds=1,
            metadata={
                "axes": "YXS",
                "PhysicalSizeX": 250,
                "PhysicalSizeXUnit": "nm",
                "PhysicalSizeY": 250,
                "PhysicalSizeYUnit": "nm",
            },
            **options,
        )
        tiff.write(texture[::2, ::2], subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.info.reader == "tiffslide"
        assert slide.info.downsamples == (1, 2)
        assert (slide.info.mpp, slide.info.mpp_source) == (0.25, "OME-XML PhysicalSizeX")


def test_conversion_to_rgb():
    convert, notes = plan_rgb(np.array([[[-1.0], [3.0]]], np.float32))
    assert convert(np.array([[[-1.0], [1.0], [np.nan]]], np.float32))[0, :, 0].tolist() == [0, 128, 64]
    assert len(notes) == 2
    convert, _ = plan_rgb(np.zeros((1, 1, 1), np.uint8), Colours(inverted=True))
    assert convert(np.array([[[255], [0]]], np.uint8))[0, :, 0].tolist() == [0, 255]
    convert, _ = plan_rgb(np.zeros((1, 1, 2), np.uint8))
    assert convert(np.array([[[7, 9]]], np.uint8)).tolist() == [[[7, 9, 0]]]


# --------------------------------------------------------------------------------------------------------------- pixels from the wild


def written(path, pixels, **options):
    """A TIFF of 0.25 um per px."""
    tifffile.imwrite(path, pixels, metadata=None, resolution=(40000, 40000), resolutionunit="CENTIMETER", **options)
    return path


@pytest.mark.parametrize("tile", [(128, 128), None])
@pytest.mark.parametrize("kind", ["int8", "uint32", "int32", "float64", "float16"])
def test_rare_number_types(tmp_path, texture, tile, kind):
    """Nothing of them is OpenSlide's, which shows them wrong: low values are black, the largest is white (or 255, or 1, where that is natural)."""
    base = texture.copy()
    base[0, 0] = 255
    if kind == "int8":
        base = base // 2 * 2 + 1  # 127 of int8 is white
        pixels = (base // 2).astype(np.int8)
    else:
        pixels = (base / 255).astype(kind) if kind.startswith("float") else base.astype(kind)
    path = written(tmp_path / "a.tif", pixels, photometric="rgb", tile=tile)
    with open_slide(path) as slide:
        found = slide.read(0, Box(0, 0, 768, 512)).astype(int)
        expected = pixels.astype(int) if kind == "int8" else base  # integers up to 255 are taken as they are
        assert np.abs(found - expected).mean() < 1
        assert any("8 bits" in note for note in slide.info.warnings)


def test_bright_spots_that_a_coarse_level_has_lost_decide_the_depth(tmp_path):
    """12 bits whose coarsest level holds values below 256 only: not 8 bits."""
    finest = np.full((1024, 1024, 3), 100, np.uint16)
    finest[::64, ::64] = 4000
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for level, pixels in ((1, finest), (32, finest[1::32, 1::32])):
            tiff.write(
                pixels,
                photometric="rgb",
                tile=(128, 128),
                metadata=None,
                subfiletype=int(level > 1),
                resolution=(40000 / level, 40000 / level),
                resolutionunit="CENTIMETER",
            )
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.read(0, Box(64, 64, 66, 66))[..., 0].tolist() == [[249, 6], [6, 6]]


@pytest.mark.parametrize("tile", [(128, 128), None])
@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("reader", ["auto", "image"])
def test_an_opacity_that_is_zero_everywhere_is_ignored(tmp_path, texture, tile, extra, reader):
    pixels = np.dstack([texture, np.zeros(texture.shape[:2], np.uint8)])
    path = written(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=[extra], tile=tile)
    with open_slide(path, reader=reader) as slide:
        assert np.array_equal(slide.read(0, Box(0, 0, 768, 512)), texture)
        told = "left out" if extra == "unspecified" else "opacity is 0 everywhere"
        assert any(told in note for note in slide.info.warnings)


def test_an_opacity_of_zero_in_png_and_ome_tiff(tmp_path, texture):
    pixels = np.dstack([texture, np.zeros(texture.shape[:2], np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = {
        "photometric": "rgb",
        "extrasamples": ["unassalpha"],
        "tile": (128, 128),
        "metadata": {"axes": "YXS", "PhysicalSizeX": 0.5},
    }
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, **options)
    for name in ("a.png", "a.ome.tif"):
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert np.array_equal(slide.read(0, Box(0, 0, 768, 512)), texture)
            assert any("opacity is 0 everywhere" in note for note in slide.info.warnings)


def whole(slide, level=0):
    return slide.read(level, Box(0, 0, *slide.info.level_sizes[level])).astype(int)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt", "tiff_lzw"])
def test_black_and_white(tmp_path, texture, compression):
    """Fax decoders return bytes for bits."""
    bits = texture[..., 0] > 128
    Image.fromarray(bits).save(tmp_path / "a.tif", compression=compression)
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        assert np.array_equal(whole(slide)[..., 0], bits * 255)


def test_a_small_opaque_part_is_enough_for_the_opacity_to_count(tmp_path):
    """One tile of 1024 is opaque; the rest is white glass, not black."""
    rgba = np.zeros((2048, 2048, 4), np.uint8)
    rgba[1000:1030, 1000:1030] = (100, 50, 120, 255)
    with open_slide(
        written(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64))
    ) as slide:
        assert slide.read(0, Box(0, 0, 8, 8)).min() == 255
        assert slide.read(0, Box(1010, 1010, 1011, 1011)).tolist() == [[[100, 50, 120]]]


def test_the_padding_of_tiles_does_not_decide_the_scale(tmp_path, texture):
    """10 bits in 16 with garbage beyond the image."""
    path = written(tmp_path / "a.tif", texture[:100, :100].astype(np.uint16) * 4, photometric="rgb", tile=(64, 64))
    offsets, lengths = page_layout(path)
    data = bytearray(path.read_bytes())
    last = np.frombuffer(data, np.uint16, lengths[-1] // 2, offsets[-1]).reshape(64, 64, 3).copy()
    last[40:] = 65535
    data[offsets[-1] : offsets[-1] + lengths[-1]] = last.tobytes()
    path.write_bytes(data)
    with open_slide(path) as slide:
        assert np.abs(whole(slide) - texture[:100, :100]).max() <= 1


def test_levels_of_different_colours_are_each_converted_as_they_say(tmp_path, texture):
    grey = texture[..., 0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        options = {"tile": (64, 64), "metadata": None, "resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
        tiff.write(255 - grey, photometric="miniswhite", **options)
        tiff.write(grey[::2, ::2], photometric="minisblack", subfiletype=1, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert np.array_equal(whole(slide)[..., 0], grey)
        assert np.array_equal(whole(slide, 1)[..., 0], grey[::2, ::2])


def test_deep_colour_png(tmp_path, texture):
    """12 bits in 16; Pillow would keep the upper 8 of the 16."""
    import imagecodecs

    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(texture.astype(np.uint16) * 16))
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        assert np.abs(whole(slide) - texture).max() <= 1


def test_floats_that_overshoot_one_a_little(tmp_path, texture):
    path = written(tmp_path / "a.tif", (texture / 255 * 1.001).astype(np.float32), photometric="rgb", tile=(128, 128))
    with open_slide(path) as slide:
        assert np.abs(whole(slide) - texture).max() <= 1


def test_a_larger_picture_that_is_not_read_is_said(tmp_path, texture):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(texture[::4, ::4], photometric="rgb", tile=(64, 64), metadata=None)
        tiff.write(texture, photometric="rgb", tile=(64, 64), metadata=None)
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        assert slide.info.size_px0 == (192, 128)
        assert any("a larger one, 768 x 512 px, is not" in note for note in slide.info.warnings)


def test_a_strip_that_holds_the_slide_is_converted_in_bands(tmp_path, monkeypatch, texture):
    import wsiseg.slide.colour as colour

    path = written(tmp_path / "a.tif", texture.astype(np.uint16) * 257, photometric="rgb", rowsperstrip=512)
    monkeypatch.setattr(colour, "BAND_PX", 768 * 10)
    with open_slide(path) as slide:
        assert np.array_equal(whole(slide), texture)


def without_tag(path, code):
    """Give a tag of the first directory a private number, so that no reader finds it."""
    data = bytearray(path.read_bytes())
    start = int.from_bytes(data[4:8], "little")
    for n in range(int.from_bytes(data[start : start + 2], "little")):
        at = start + 2 + 12 * n
        if int.from_bytes(data[at : at + 2], "little") == code:
            data[at : at + 2] = (65000).to_bytes(2, "little")
    path.write_bytes(data)


def test_three_samples_without_a_photometric_tag_are_rgb(tmp_path, texture):
    """tifffile assumes inverted grey."""
    path = written(tmp_path / "a.tif", texture, photometric="rgb", rowsperstrip=64)
    without_tag(path, 262)
    with open_slide(path, reader="image") as slide:
        assert np.array_equal(whole(slide), texture)


@pytest.mark.parametrize("extra", ["unspecified", "unassalpha"])
def test_grey_with_one_more_sample_is_grey(tmp_path, texture, extra):
    pixels = np.dstack([texture[..., 0], np.full(texture.shape[:2], 255, np.uint8)])
    path = written(
        tmp_path / "a.tif",
        pixels,
        photometric="minisblack",
        planarconfig="contig",
        extrasamples=[extra],
        tile=(128, 128),
    )
    with open_slide(path) as slide:
        assert np.array_equal(whole(slide), np.repeat(texture[..., :1], 3, axis=2))


def test_an_unset_opacity_in_a_scanner_format_is_ignored(tmp_path, texture):
    """Aperio's description: OpenSlide would blend everything over white."""
    pixels = np.dstack([texture, np.zeros(texture.shape[:2], np.uint8)])
    description = "Aperio Image Library v1\r\n768x512 [0,0 768x512] (128x128) |AppMag = 20|MPP = 0.5"
    options = {
        "photometric": "rgb",
        "extrasamples": ["unassalpha"],
        "tile": (128, 128),
        "metadata": None,
        "description": description,
    }
    tifffile.imwrite(tmp_path / "a.svs", pixels, **options)
    with open_slide(tmp_path / "a.svs", mpp=0.5) as slide:
        assert np.array_equal(whole(slide), texture)
        assert any("opacity is 0 everywhere" in note for note in slide.info.warnings)


def test_a_palette_of_one_bit(tmp_path, texture):
    image = Image.fromarray((texture[..., 0] > 128).astype(np.uint8), mode="P")
    image.putpalette([200, 100, 50, 10, 20, 30])
    image.save(tmp_path / "a.tif", bits=1)
    expected = np.where(texture[..., :1] > 128, [10, 20, 30], [200, 100, 50])
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        assert np.array_equal(whole(slide), expected)


def test_premultiplied_colours_are_not_multiplied_again(tmp_path, texture):
    """Associated alpha: a half-transparent dark px over white is grey, not darker than it was."""
    opacity = np.full((512, 768, 1), 128, np.uint8)
    stored = np.concatenate([(texture * (128 / 255)).round().astype(np.uint8), opacity], axis=2)
    path = written(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"], tile=(128, 128))
    with open_slide(path) as slide:
        expected = texture * (128 / 255) + 127
        assert np.abs(slide.read(0, Box(0, 0, 768, 512)) - expected).max() <= 2


def test_subsampled_chroma_inside_jpeg(tmp_path, texture):
    path = written(
        tmp_path / "a.tif", texture, photometric="rgb", compression="jpeg", subsampling=(2, 2), tile=(128, 128)
    )
    for reader in ("openslide", "tiffslide", "image"):
        with open_slide(path, reader=reader) as slide:
            assert np.abs(slide.read(0, Box(0, 0, 768, 512)).astype(int) - texture).mean() < 3


def test_planes_stored_apart_are_read_tile_by_tile(tmp_path, texture, monkeypatch):
    """A pyramid of them keeps its levels, and no read decodes more than the tiles of its box."""
    planes = np.moveaxis(texture, -1, 0)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for level in (1, 2):
            tiff.write(
                planes[:, ::level, ::level],
                photometric="rgb",
                planarconfig="separate",
                tile=(64, 64),
                metadata=None,
                subfiletype=int(level > 1),
                resolution=(40000 / level, 40000 / level),
                resolutionunit="CENTIMETER",
            )
    decoded = []
    original = tifffile.FileHandle.read
    monkeypatch.setattr(tifffile.FileHandle, "read", lambda self, size=-1: decoded.append(size) or original(self, size))
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.info.downsamples == (1, 2)
        assert slide.info.mpp == pytest.approx(0.25, rel=1e-4)
        decoded.clear()
        assert np.array_equal(slide.read(0, Box(130, 70, 180, 120)), texture[70:120, 130:180])
        assert len(decoded) == 3  # one tile of each plane
        assert np.array_equal(slide.read(1, Box(0, 0, 100, 100)), texture[::2, ::2][:100, :100])


@pytest.mark.parametrize("ome", [False, True])
def test_a_stack_names_its_plane(tmp_path, texture, ome):
    """Also one that is tiled, of which OpenSlide would make levels of one size."""
    stack = np.stack([texture, 255 - texture, texture // 2])
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    tifffile.imwrite(path, stack, photometric="rgb", tile=(128, 128), metadata={"axes": "ZYXS"} if ome else None)
    with open_slide(path, mpp=0.5) as slide:
        assert len(slide.info.level_sizes) == 1
        assert any(re.search(r"first plane is used \([ZI] 1 of 3\)", note) for note in slide.info.warnings)
        assert np.array_equal(slide.read(0, Box(0, 0, 768, 512)), texture)


def test_a_stack_of_channels_in_time(tmp_path, texture):
    planes = np.moveaxis(texture, -1, 0)
    stack = np.stack([np.stack([planes, 255 - planes]), np.stack([planes // 2, planes // 3])])  # T, Z, C, Y, X
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path,
        stack,
        photometric="minisblack",
        tile=(128, 128),
        metadata={"axes": "TZCYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
    )
    with open_slide(path) as slide:
        assert slide.info.mpp == 0.5
        assert any("T 1 of 2, Z 1 of 2" in note for note in slide.info.warnings)
        assert np.array_equal(slide.read(0, Box(0, 0, 768, 512)), texture)


@pytest.mark.parametrize("kind", ["CMYK", "P", "LAB"])
def test_the_scale_of_other_colour_models_is_kept(tmp_path, texture, kind):
    """0.25 um in the resolution tags; Pillow, which converts the colours, does not tell it."""
    image = Image.fromarray(texture)
    if kind == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = image.convert(kind)
    image.save(tmp_path / "a.tif", resolution=101600, resolution_unit="inch", compression="tiff_lzw")
    expected = np.asarray(image.convert("RGB")).astype(int)
    for reader in ("auto", "image"):
        with open_slide(tmp_path / "a.tif", reader=reader) as slide:
            assert slide.info.mpp == pytest.approx(0.25, rel=1e-3)
            assert np.abs(slide.read(0, Box(0, 0, 768, 512)) - expected).mean() < 2


@pytest.mark.parametrize("tile", [(128, 128), None])
@pytest.mark.parametrize(
    ("unit", "per_unit"),
    [("micron", 4), ("micrometer", 4), ("\\u00B5m", 4), ("mm", 4000), ("nm", 0.004), ("\\u00C5", 0.0004)],
)
def test_the_unit_of_imagej(tmp_path, texture, tile, unit, per_unit):
    options = {
        "resolution": (per_unit, per_unit),
        "resolutionunit": "NONE",
        "description": f"ImageJ=1.54f\nunit={unit}",
    }
    tifffile.imwrite(tmp_path / "a.tif", texture, photometric="rgb", metadata=None, tile=tile, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.info.mpp == pytest.approx(0.25, rel=1e-3)
        assert slide.info.mpp_source == "ImageJ resolution"


def test_a_reader_that_cannot_decode_gives_way_and_is_not_blamed_on_the_file(tmp_path, texture):
    """libtiff refuses raw tiles of 48 px that are sound, after OpenSlide has opened the file."""
    path = written(tmp_path / "a.tif", texture[:176, :176], photometric="rgb", tile=(48, 48))
    with open_slide(path) as slide:
        assert slide.info.reader == "tiffslide"
        assert np.array_equal(slide.read(0, Box(0, 0, 176, 176)), texture[:176, :176])
    with open_slide(path, reader="openslide") as slide:
        with pytest.raises(
            SlideError, match=r"openslide cannot read .*, but tiffslide can; pass --reader tiffslide"
        ) as error:
            slide.read(0, Box(0, 0, 50, 50))
        assert "damaged" not in one_line(error)
    written(path, texture.astype(np.float32) / 255, photometric="rgb", tile=(128, 128))
    with pytest.raises(SlideError, match="OpenSlide would misread 32-bit samples of type float32"):
        open_slide(path, reader="openslide")


def test_what_is_not_supported_is_named(tmp_path, texture):
    with tifffile.TiffWriter(tmp_path / "cfa.tif") as tiff:
        pattern = [(33421, 3, 2, (2, 2), True), (33422, 1, 4, b"\0\1\1\2", True)]
        tiff.write(texture[..., 0], photometric="cfa", metadata=None, tile=(128, 128), extratags=pattern)
    with pytest.raises(SlideError, match="its colours are stored as CFA") as error:
        open_slide(tmp_path / "cfa.tif", mpp=0.5)
    one_line(error)
    written(tmp_path / "int.tif", np.zeros((256, 256, 4), np.int16), photometric="separated", tile=(128, 128))
    with pytest.raises(SlideError, match="its colours are CMYK in int16 values; unsigned integers are supported"):
        open_slide(tmp_path / "int.tif")
    path = written(tmp_path / "codec.tif", texture, photometric="rgb", tile=(128, 128), compression="lzw")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(34676)  # SGI log
    with pytest.raises(SlideError, match="stored in a way that is not supported") as error:
        open_slide(path)
    assert "damaged" not in one_line(error)


def test_exif_orientation_of_a_photograph_is_ignored_with_a_warning(tmp_path, texture):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(texture).save(tmp_path / "a.png", exif=exif)
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        assert np.array_equal(slide.read(0, Box(0, 0, 768, 512)), texture)
        assert any("orientation tag (6) is ignored" in note for note in slide.info.warnings)


# ------------------------------------------------------------------------------------------------------------------- microns per pixel


def test_resolution_tags():
    assert from_tiff_tags({"XResolution": (40000, 1), "YResolution": (40000, 1), "ResolutionUnit": 3})[0] == PixelSize(
        0.25, 0.25, "TIFF XResolution"
    )
    assert from_tiff_tags({"XResolution": (40000, 1), "YResolution": (40000, 1), "ResolutionUnit": 1}) == (None, ())
    assert from_tiff_tags({"XResolution": (0, 1), "YResolution": (0, 1)}) == (None, ())
    assert from_tiff_tags({}) == (None, ())
    for dpi in (72, 96, 300, 600, 1200):
        found, notes = from_tiff_tags({"XResolution": (dpi, 1), "YResolution": (dpi, 1), "ResolutionUnit": 2})
        assert found is None
        assert f"{dpi} dpi" in notes[0]
    tags = {"XResolution": (2, 1), "YResolution": (2, 1), "ResolutionUnit": 1}
    assert from_tiff_tags(tags, {"unit": "micron"})[0] == PixelSize(0.5, 0.5, "ImageJ resolution")


def test_ome_xml():
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image><Pixels SizeX="9" SizeY="9" PhysicalSizeX="9" PhysicalSizeY="9"/></Image>'
        '<Image><Pixels SizeX="20" SizeY="10" PhysicalSizeX="0.00025" PhysicalSizeXUnit="mm" PhysicalSizeY="0.26"/></Image></OME>'
    )
    found = from_ome_xml(xml, (20, 10))
    assert found is not None
    assert (found.x, found.y) == (pytest.approx(0.25), 0.26)
    assert from_ome_xml(xml, (5, 5)) is None
    assert from_ome_xml("<OME broken", (20, 10)) is None
    assert from_ome_xml(xml.replace('"mm"', '"pixel"'), (20, 10)) is None


def test_doubts_about_the_scale_are_said():
    def notes(x, y=None, override=None, objective=None):
        return " | ".join(choose_mpp(PixelSize(x, y or x, "file"), override, objective)[2])

    assert notes(0.25, objective=40) == ""
    assert notes(0.25, override=0.26) == ""
    assert notes(0.25, 0.2501) == ""
    assert "--mpp 0.5 replaces 0.25 microns per pixel of the file (file)" in notes(0.25, override=0.5)
    assert "contradicts the 20x objective" in notes(0.25, objective=20)
    assert "too coarse for cells" in notes(4)
    assert "too fine for cells" in notes(0.01)
    assert "pixels are not square: 0.25 x 0.26" in notes(0.25, 0.26)
    assert "far from square: 0.25 x 0.3" in notes(0.25, 0.3)
    assert choose_mpp(PixelSize(0.2, 0.8, "file"), None, None)[0] == pytest.approx(0.4)


def test_require_cellular():
    def info(mpp, source="file", notes=(), not_square=""):
        return SlideInfo(
            path="a.svs",
            reader="x",
            format="x",
            level_sizes=((9, 9),),
            downsamples=(1.0,),
            mpp=mpp,
            mpp_source=source,
            bounds=None,
            warnings=tuple(notes),
            not_square=not_square,
        )

    require_cellular(info(0.25))
    require_cellular(info(5, "--mpp"))
    for mpp in (3, 0.01):
        with pytest.raises(SlideError, match=re.escape(f"a.svs: {mpp} microns per pixel (file) is too")):
            require_cellular(info(mpp))
    with pytest.raises(SlideError, match="pass --mpp"):
        require_cellular(info(math.nan, "none"))
    with pytest.raises(SlideError, match="far from square"):
        require_cellular(info(*choose_mpp(PixelSize(0.25, 0.3, "file"), None, None)))
    require_cellular(info(*choose_mpp(PixelSize(0.25, 0.3, "file"), 0.25, None)))
    require_cellular(info(0.25, notes=["pixels are far from square"]))  # what a warning says decides nothing


def test_too_coarse_a_slide_is_shown_but_not_run(slides_dir):
    with open_slide(slides_dir / "camelyon_overview_multiframe.dcm") as slide:
        assert any("too coarse for cells" in note for note in slide.info.warnings)
        with pytest.raises(SlideError, match=r"28\.97 microns per pixel"):
            require_cellular(slide.info)
