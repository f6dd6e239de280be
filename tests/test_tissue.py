"""Tissue: nothing stained is missed, blank glass stays empty."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from wsiseg.config import TissueConfig
from wsiseg.slide.tissue import TissueMask, find_tissue

CONFIG = TissueConfig()  # 8 um per px, margin 4 px
STAIN = (200, 120, 180)
PALE = (232, 212, 226)  # thin stroma


@pytest.fixture
def slides_dir(shared_data):
    return shared_data / "slides"


def glass(height=200, width=300, level=240, noise=2.0):
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(level, noise, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("level", [255, 240, 225, 205])
def test_blank_glass_is_empty(level):
    found = find_tissue(glass(level=level), 32, CONFIG)
    assert not found.mask.any()
    assert found.brightfield
    assert found.warnings == ()
    assert found.area_um2(0.25) == 0


def test_uneven_light_is_no_tissue():
    slide = glass().astype(int) - np.linspace(0, 25, 300).astype(int)[None, :, None]
    assert not find_tissue(slide.clip(0, 255).astype(np.uint8), 32, CONFIG).mask.any()


@pytest.mark.parametrize("colour", [STAIN, PALE, (120, 90, 160)])
def test_tissue_is_found_with_a_margin(colour):
    slide = glass()
    slide[50:100, 80:160] = colour
    mask = find_tissue(slide, 32, CONFIG).mask
    assert mask[47:103, 84:156].all()
    assert mask[54:96, 77:163].all()
    assert not mask[:40].any()
    assert not mask[:, 175:].any()


def test_pale_tissue_is_kept_beside_dark():
    """Otsu alone would draw the line between the two."""
    slide = glass()
    slide[20:100, 20:120] = (110, 60, 140)
    slide[120:180, 150:280] = PALE
    mask = find_tissue(slide, 32, CONFIG).mask
    assert mask[20:100, 20:120].all()
    assert mask[120:180, 150:280].all()


def test_an_image_full_of_tissue_is_all_tissue():
    rng = np.random.default_rng(0)
    slide = np.clip(rng.normal(STAIN, 25, (31, 31, 3)), 0, 255).astype(np.uint8)
    assert find_tissue(slide, 32, CONFIG).mask.all()


def test_a_small_field_is_searched_whole_unless_blank():
    """Fat, whose thin walls are all there is, and its nuclei are not cut out of a field of view."""
    field = glass(60, 60)
    assert not find_tissue(field, 32, CONFIG).mask.any()
    field[30, :] = STAIN
    assert find_tissue(field, 32, CONFIG).mask.all()


def test_specks_go_and_small_holes_close():
    slide = glass()
    slide[10:14, 10:14] = STAIN  # 1024 um2
    slide[60:160, 100:220] = STAIN
    slide[100:112, 150:162] = 240  # a lumen of 96 um
    mask = find_tissue(slide, 32, CONFIG).mask
    assert not mask[:40, :40].any()
    assert mask[60:160, 100:220].all()


def test_large_holes_stay_open():
    slide = glass()
    slide[20:180, 40:240] = STAIN
    slide[60:140, 90:190] = 240
    assert not find_tissue(slide, 32, CONFIG).mask[75:125, 105:175].any()


def test_black_padding_is_no_tissue():
    slide = glass()
    slide[:, :60] = 0
    slide[50:100, 120:200] = STAIN
    found = find_tissue(slide, 32, CONFIG)
    assert found.brightfield
    assert not found.mask[:, :100].any()
    assert found.mask[50:100, 120:200].all()


def test_fluorescence_is_recognised_and_found():
    slide = np.full((200, 300, 3), 3, np.uint8)
    slide[50:150, 100:200, 2] = 25  # dim stroma
    slide[80:120, 120:160, 2] = 200
    found = find_tissue(slide, 32, CONFIG)
    assert not found.brightfield
    assert "does not look like brightfield H&E" in found.warnings[0]
    assert found.mask[50:150, 100:200].all()
    assert not found.mask[:, :80].any()


def test_black_slide_is_empty():
    assert not find_tissue(np.zeros((50, 50, 3), np.uint8), 32, CONFIG).mask.any()


def test_margin_and_sizes_are_microns():
    slide = glass()
    slide[60:140, 100:200] = STAIN
    assert find_tissue(slide, 32, CONFIG, mpp=0.5).mask.sum() < find_tissue(slide, 32, CONFIG).mask.sum()
    assert np.array_equal(find_tissue(slide, 32, CONFIG, mpp=0.25).mask, find_tissue(slide, 32, CONFIG).mask)


def test_covers_and_area():
    mask = np.zeros((10, 20), bool)
    mask[4, 7] = True
    found = TissueMask(mask=mask, scale=32.0, brightfield=True, warnings=())
    assert found.covers(7 * 32, 4 * 32, 7 * 32 + 1, 4 * 32 + 1)
    assert found.covers(-1000, -1000, 1000, 1000)
    assert not found.covers(8 * 32, 4 * 32, 9 * 32, 5 * 32)
    assert not found.covers(0, 0, 7 * 32, 320)
    assert not found.covers(5000, 5000, 6000, 6000)
    assert not found.covers(-100, -100, -10, -10)
    assert found.area_um2(0.25) == 64


@pytest.mark.parametrize(
    ("name", "mpp", "brightfield", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", None, True, 0.45, 0.55),
        ("TCGA-CR-7395-01A-01-TS1.svs", 1.0, True, 0.63, 0.72),
        ("histolab_kidney_48_5_flat.tif", 8.0, True, 0.001, 0.01),
        ("camelyon_overview_multiframe.dcm", None, True, 0.24, 0.31),
        ("stritt_test3_DAPI.ndpi", None, False, 0.8, 0.95),
        ("pathml_small_vectra.qptiff", None, False, 0.99, 1.01),  # below a square millimetre: whole,
    ],
)
def test_real_slides(slides_dir, name, mpp, brightfield, low, high):
    """Shares of the slide, from masks that were looked at."""
    from wsiseg.slide import open_slide, thumbnail

    with open_slide(slides_dir / name, mpp=mpp, force_mpp=True) as slide:
        overview, scale = thumbnail(slide, CONFIG.overview_mpp)
        found = find_tissue(overview, scale, CONFIG, mpp=slide.info.mpp)
    assert found.brightfield == brightfield
    assert low < found.mask.mean() < high
    assert math.isclose(found.scale, scale)


def test_a_mask_travels_packed() -> None:
    """To workers, through a scheduler: a slide of 100,000 px has 10 million mask px."""
    y, x = np.mgrid[:3125, :3125]
    mask = TissueMask(
        mask=np.hypot(x - 1500, y - 1200) + 60 * np.sin(x / 40) < 1000,
        scale=32.0,
        brightfield=True,
        warnings=("a warning",),
    )
    sent = pickle.dumps(mask)
    assert len(sent) < 100_000
    back = pickle.loads(sent)
    np.testing.assert_array_equal(back.mask, mask.mask)
    assert (back.scale, back.brightfield, back.warnings) == (mask.scale, mask.brightfield, mask.warnings)
