"""Stain: what is recognised, what the network is shown, and that H&E stays as it was."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import skimage.data
from scipy import ndimage

from wsiseg.config import RunConfig, from_mapping
from wsiseg.errors import ConfigError, SlideError
from wsiseg.geometry import Box
from wsiseg.runs.image import segment_image
from wsiseg.runs.inputs import read_inputs
from wsiseg.runs.plan_file import read_plan
from wsiseg.runs.slide import merge_run, segment_slide
from wsiseg.runs.survey import survey
from wsiseg.runtime.shards import Shard
from wsiseg.slide import open_slide
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.stain import AS_HE, SlideStain, compose, find_stain, render, separate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IHC = skimage.data.immunohistochemistry()
OVERVIEW = RunConfig().tissue.overview_mpp


def found(image: np.ndarray, mpp: float = 0.5) -> SlideStain:
    return find_stain(ArrayReader(np.ascontiguousarray(image), mpp), "auto", OVERVIEW)


def discs(count: int, seed: int = 0, side: int = 512, radius: float = 8.0) -> np.ndarray:
    """Amounts (side, side) from 0 to 1: round nuclei of 8 um at 0.5 um per px, apart from each other."""
    rng, y, x = np.random.default_rng(seed), *np.mgrid[:side, :side]
    amount = np.zeros((side, side))
    for cx, cy in rng.permutation(np.stack(np.mgrid[16:side:32, 16:side:32], -1).reshape(-1, 2))[:count]:
        amount = np.maximum(amount, np.hypot(x - cx, y - cy) < radius)
    return ndimage.gaussian_filter(amount, 1.0)


def stained(first: np.ndarray, second: np.ndarray, dye: tuple[float, float, float]) -> np.ndarray:
    """Haematoxylin and another dye on grey glass."""
    dyes = [np.array(d) / np.linalg.norm(d) for d in ((0.650, 0.704, 0.286), dye)]
    return np.rint(240 * 10 ** -(first[..., None] * dyes[0] + second[..., None] * dyes[1])).astype(np.uint8)


DAB, EOSIN = (0.268, 0.570, 0.776), (0.072, 0.990, 0.105)
NUCLEI, BROWN_NUCLEI = discs(120), discs(100, seed=1)
HE = stained(0.6 * NUCLEI, 0.25 + 0 * NUCLEI, EOSIN)
NUCLEAR = stained(0.5 * NUCLEI * (1 - BROWN_NUCLEI) + 0.02, BROWN_NUCLEI, DAB)


@pytest.mark.parametrize("y", [0, 256])
@pytest.mark.parametrize("x", [0, 256])
def test_the_picture_is_recognised_whole_and_in_quarters(x: int, y: int) -> None:
    assert found(IHC).name == "ihc"
    assert found(IHC[y : y + 256, x : x + 256]).name == "ihc"


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("H&E", HE),
        ("pale H&E", stained(0.3 * NUCLEI, 0.08 + 0 * NUCLEI, EOSIN)),
        ("haematoxylin alone", stained(0.5 * NUCLEI + 0.03, 0 * NUCLEI, DAB)),
        ("blank", np.full((300, 300, 3), 240, np.uint8)),
        ("dark", np.full((300, 300, 3), 5, np.uint8)),
    ],
)
def test_nothing_else_is_taken_for_it(name: str, image: np.ndarray) -> None:
    assert found(image).name == "he", name


def test_brown_pigment_among_eosin_is_not_a_marker() -> None:
    """A tenth of the tissue is as brown as DAB, the rest pink: melanin, iron."""
    image = HE.copy()
    image[:160, :160] = stained(0.02 + 0 * NUCLEI, 0.6 + 0 * NUCLEI, DAB)[:160, :160]
    stain = found(image)
    assert stain.brown is not None
    assert stain.brown > 0.05
    assert stain.name == "he"


def test_brown_nuclei_are_recognised_and_kept() -> None:
    stain = found(NUCLEAR)
    assert stain.name == "ihc-nuclear"
    as_nuclei, as_brown = (
        render(NUCLEAR, dataclasses.replace(stain, name=name)).astype(int) for name in ("ihc-nuclear", "ihc")
    )
    brown, glass = BROWN_NUCLEI > 0.9, (BROWN_NUCLEI < 0.01) & (NUCLEI < 0.01)
    assert as_nuclei[brown, 0].mean() < as_nuclei[glass, 0].mean() - 60, "red: what haematoxylin absorbs"
    assert as_brown[brown, 0].mean() > as_brown[glass, 0].mean() - 30, "the picture of another marker"


def test_two_dyes_are_told_apart() -> None:
    amounts = np.array([[0.0, 0.4, 0.3], [0.2, 0.0, 0.6]])
    dyes = np.array(((0.650, 0.704, 0.286), DAB))
    density = amounts.T[:, None] @ (dyes / np.linalg.norm(dyes, axis=1, keepdims=True))
    np.testing.assert_allclose(np.stack(separate(density.astype(np.float32)))[..., 0], amounts, atol=1e-5)
    assert all((part >= 0).all() for part in separate(np.random.default_rng(0).random((9, 9, 3)).astype(np.float32)))
    assert (compose(np.zeros((1, 1)), np.zeros((1, 1))) == 255).all()


def test_the_view_does_not_depend_on_the_box() -> None:
    stain = found(IHC)
    reader = stain.view(ArrayReader(IHC, 0.5))
    whole = reader.read(0, Box(0, 0, 512, 512))
    np.testing.assert_array_equal(reader.read(0, Box(100, 50, 300, 200)), whole[50:200, 100:300])
    np.testing.assert_array_equal(whole, render(IHC, stain))


def test_glass_is_judged_on_the_slide_itself() -> None:
    """Or a run would refuse other clicks than `wsiseg seeds check` does."""
    from wsiseg.seeds.glass import GlassFinder

    slide = ArrayReader(IHC, 0.5)
    finders = [GlassFinder(reader, RunConfig()) for reader in (slide, found(IHC).view(slide))]
    points = [(x + 0.5, y + 0.5) for x in range(0, 512, 32) for y in range(0, 512, 32)]
    faults = [[finder.fault(point) for point in points] for finder in finders]
    assert faults[0] == faults[1]
    assert any(faults[0])


def test_he_is_seen_as_it_is() -> None:
    reader = ArrayReader(HE, 0.5)
    assert found(HE).view(reader) is reader
    assert AS_HE.view(reader) is reader
    assert find_stain(reader, "he", OVERVIEW).source == "given"


def test_he_gives_the_same_cells_and_hashes_whether_given_or_recognised(model, tmp_path: Path) -> None:
    path = tmp_path / "he.tiff"
    write(path, HE)
    given, auto = (read_inputs(str(path), RunConfig(stain=s)) for s in ("he", "auto"))
    old = RunConfig(method="apg", precision=auto.config.precision).hash(typed=False, **facts(path, auto))
    assert given.run_hash == auto.run_hash == old, "that of versions that knew no other stain"
    ihc = read_inputs(str(path), RunConfig(stain="ihc"))
    assert len({auto.run_hash, ihc.run_hash}) == len({auto.parts_hash, ihc.parts_hash}) == 2
    for inputs in (given, auto, ihc):
        inputs.reader.close()
    cells = [segment_image(HE, mpp=0.5, config=RunConfig(stain=s), model=model)[0] for s in ("he", "auto")]
    assert len(cells[0])
    np.testing.assert_array_equal(cells[0].points_xy, cells[1].points_xy)


def facts(path: Path, inputs: object) -> dict[str, object]:
    """What the hash of a run holds beside its settings."""
    from wsiseg.runs.inputs import _slide_key

    info = inputs.info
    return {
        "slide": _slide_key(str(path)),
        "levels": info.level_sizes,
        "reader": info.reader,
        "mpp": info.mpp,
        "weights": inputs.weights,
        "roi": "",
        "seeds": "",
    }


def write(path: Path, image: np.ndarray) -> None:
    import tifffile

    tifffile.imwrite(
        path, image, tile=(256, 256), photometric="rgb", resolution=(2e4, 2e4), resolutionunit="CENTIMETER", metadata=None
    )  # fmt: skip


def test_more_nuclei_of_the_picture_are_found_than_as_he(model) -> None:
    """benchmarks/results/ihc_accuracy.md has recall and precision."""
    as_he, now = (len(segment_image(IHC, mpp=0.5, config=RunConfig(stain=s), model=model)[0]) for s in ("he", "auto"))
    assert now > 1.5 * as_he


def test_shards_share_what_was_found(demo: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan keeps the stain: the second shard sees the slide as the first did, and merge and manifest say so."""
    config = from_mapping({"tiling": {"tile_um": 64, "block_tiles": 1}}, "test")
    whole = segment_slide(str(demo[0]), config, tmp_path / "whole")
    assert whole.config["stain"] == "ihc"
    assert whole.slide["stain"].startswith("immunohistochemistry (recognised: 7")
    assert sum("pass --stain he if it is H&E" in warning for warning in whole.warnings) == 1
    segment_slide(str(demo[0]), config, tmp_path / "shards", shard=Shard(1, 2))
    plan = read_plan(tmp_path / "shards" / "ihc" / "parts")
    assert plan is not None
    assert plan.stain.name == "ihc"
    elsewhere = dataclasses.replace(plan.stain, white=(200.0, 255.0, 200.0))  # another decoder, say
    monkeypatch.setattr("wsiseg.runs.inputs.find_stain", lambda *_: elsewhere)
    segment_slide(str(demo[0]), config, tmp_path / "shards", shard=Shard(2, 2))
    merge_run(tmp_path / "shards" / "ihc")
    tables = [(tmp_path / name / "ihc" / "cells.parquet").read_bytes() for name in ("whole", "shards")]
    assert tables[0] == tables[1]


def test_the_setting(wsiseg: Callable[..., tuple[int, str]], demo: tuple[Path, Path], tmp_path: Path) -> None:
    status, said = wsiseg("run", demo[0], "--stain", "giemsa", "--out", tmp_path)
    assert status == 2
    assert "'giemsa' is not one of 'auto', 'he', 'ihc', 'ihc-nuclear'" in said
    with pytest.raises(ConfigError, match=r"stain is 'IHC'; .*choose from auto, he, ihc, ihc-nuclear"):
        from_mapping({"stain": "IHC"}, "test")
    status, said = wsiseg("info", demo[0], "--no-estimate", "--json")
    facts = json.loads(said)
    assert (facts["stain"]["name"], facts["stain"]["source"]) == ("ihc", "recognised")
    assert 0.1 < facts["stain"]["brown"] < 1
    assert any("pass --stain he if it is H&E" in warning for warning in facts["warnings"])


def test_a_damaged_overview_is_left_to_those_who_need_it() -> None:
    class Broken(ArrayReader):
        def read(self, level: int, box: Box) -> np.ndarray:
            raise SlideError("image: pixels cannot be decoded")

    assert find_stain(Broken(IHC, 0.5), "auto", OVERVIEW) == AS_HE
    with pytest.raises(SlideError, match="cannot be decoded"):
        find_stain(Broken(IHC, 0.5), "ihc", OVERVIEW)


def test_the_he_slide_is_not_taken_for_it(cmu: Path) -> None:
    with open_slide(cmu) as reader:
        assert find_stain(reader, "auto", OVERVIEW).name == "he"
    assert survey(str(cmu), estimate=False).lines()["stain"][0].startswith("haematoxylin and eosin (recognised")


def test_no_labelled_he_image_is_taken_for_it(shared_data: Path) -> None:
    from PIL import Image

    paths = [p for p in sorted(shared_data.glob("*/*/*/image/*")) if p.suffix in (".png", ".webp")]
    taken = []
    for path in paths[::7]:
        image = np.asarray(Image.open(path).convert("RGB"))
        if found(image, 0.25).name != "he":
            taken.append(path.name)
    assert len(paths) > 900
    assert taken == []


def test_the_view_of_a_pixel_does_not_depend_on_what_is_read_with_it() -> None:
    """Tiles, shards and workers with other numbers of threads see the same."""
    image = skimage.data.immunohistochemistry()
    stain = SlideStain("ihc", (240.0, 240.0, 240.0), source="given")
    whole = render(image, stain)
    for rows, columns in (
        (slice(3, 90), slice(7, 501)),
        (slice(200, 201), slice(0, 13)),
        (slice(0, 512), slice(255, 256)),
    ):
        np.testing.assert_array_equal(render(np.ascontiguousarray(image[rows, columns]), stain), whole[rows, columns])
