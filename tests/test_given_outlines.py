"""Cells outlined by another program: kept as they are, described by the network, typed by clicks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import geopandas
import numpy as np
import pytest
import shapely
import torch
from PIL import Image
from skimage import data

from wsiseg.errors import ConfigError, FormatError
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.formats.given import GivenOutlines, points_inside, write_given
from wsiseg.formats.outlines import trace_labels
from wsiseg.geometry import Box, Lattice
from wsiseg.models.sam import SamModel
from wsiseg.models.sam.checkpoints import Architecture
from wsiseg.models.testing import random_sam
from wsiseg.records import SlideInfo, Tile
from wsiseg.runs.inputs import read_given
from wsiseg.segmentation.given import describe_outlines, to_tile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str]]

SIZE = (512, 512)  # of the demo's slide


@pytest.fixture(scope="module")
def found(demo: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, wsiseg: Cli) -> Path:
    """An ordinary run on the demo: its table stands for another program's."""
    out = tmp_path_factory.mktemp("found")
    assert wsiseg("run", demo[0], "--seeds", demo[1], "--out", out)[0] == 0
    return out / "ihc" / "cells.parquet"


def table(path: Path) -> geopandas.GeoDataFrame:
    """Rows by outline, wherever its first vertex is."""
    cells = geopandas.read_parquet(path)
    return cells.set_index(cells.geometry.normalize().to_wkb())


def cosines(a: geopandas.GeoDataFrame, b: geopandas.GeoDataFrame) -> np.ndarray:
    x, y = (np.stack(t.loc[a.index].descriptor.to_numpy()).astype(float) for t in (a, b))
    return (x * y).sum(1)


def test_outlines_are_kept_and_described_as_if_they_had_been_found(
    demo: tuple[Path, Path], found: Path, tmp_path: Path, wsiseg: Cli
) -> None:
    status, output = wsiseg("type", demo[0], "--outlines", found, "--seeds", demo[1], "--out", tmp_path)
    assert status == 0, output
    before, after = table(found), table(tmp_path / "ihc" / "cells.parquet")
    assert set(before.index) == set(after.index)
    assert len(before) == len(after) > 250
    assert (after.score == 1).all()
    assert np.median(cosines(before, after)) > 0.999
    same = before.cell_type.astype(str) == after.loc[before.index].cell_type.astype(str)
    assert same.mean() > 0.93  # those that were clipped lost a piece of their mask
    manifest = json.loads((tmp_path / "ihc" / "manifest.json").read_text())
    assert manifest["config"]["method"] == "outlines"
    assert manifest["counts"]["kept"] == manifest["counts"]["outlines"] == len(after)


def test_tiles_do_not_show(demo: tuple[Path, Path], found: Path, tmp_path: Path, wsiseg: Cli) -> None:
    for name, size in (("one", 256), ("many", 64)):
        arguments = ("run", demo[0], "--outlines", found, "--out", tmp_path / name, "--tile-size", size)
        assert wsiseg(*arguments)[0] == 0
    one, many = (table(tmp_path / name / "ihc" / "cells.parquet") for name in ("one", "many"))
    assert json.loads((tmp_path / "many" / "ihc" / "manifest.json").read_text())["counts"]["tiles"] > 9
    assert set(one.index) == set(many.index)
    assert one.id.tolist() == many.id.tolist()
    similar = cosines(one, many)
    assert np.median(similar) > 0.9999
    assert np.percentile(similar, 5) > 0.99


def test_shards_give_the_bytes_of_one_run(demo: tuple[Path, Path], found: Path, tmp_path: Path, wsiseg: Cli) -> None:
    common = ("run", demo[0], "--outlines", found, "--tile-size", 64, "--format", "parquet")
    assert wsiseg(*common, "--out", tmp_path / "whole")[0] == 0
    for shard in ("2/2", "1/2"):
        assert wsiseg(*common, "--out", tmp_path / "shards", "--shard", shard)[0] == 0
    assert wsiseg("merge", tmp_path / "shards" / "ihc")[0] == 0
    whole, merged = ((tmp_path / name / "ihc" / "cells.parquet").read_bytes() for name in ("whole", "shards"))
    assert whole == merged
    before = (tmp_path / "whole" / "ihc" / "manifest.json").read_bytes()
    status, output = wsiseg(*common, "--out", tmp_path / "whole")  # again: nothing to do
    assert status == 0, output
    assert (tmp_path / "whole" / "ihc" / "manifest.json").read_bytes() == before


def test_a_label_image_is_outlined_px_by_px() -> None:
    rng = np.random.default_rng(0)
    truth = rasterise(shapely.buffer(shapely.points(rng.uniform(0, 90, (60, 2))), 7), (80, 90)).astype(np.int64)
    truth[truth > 0] += 70_000_000  # of any size
    polygons = trace_labels(truth)
    values = np.unique(truth[truth > 0])
    assert [polygon.area for polygon in polygons] == [(truth == value).sum() for value in values]
    np.testing.assert_array_equal(np.r_[0, values][rasterise(polygons, truth.shape)], truth)
    assert trace_labels(np.full((3, 4), 9))[0].equals(shapely.box(0, 0, 4, 3))
    assert len(trace_labels(np.zeros((3, 4), int))) == 0


def test_label_images_and_geojson_are_typed_too(
    demo: tuple[Path, Path], found: Path, tmp_path: Path, wsiseg: Cli
) -> None:
    cells = geopandas.read_parquet(found)
    label = rasterise(cells.geometry.to_numpy(), SIZE[::-1])
    Image.fromarray(label.astype(np.uint16)).save(tmp_path / "label.png")
    for file in (tmp_path / "label.png", found.with_name("cells.geojson.gz")):
        out = tmp_path / file.stem
        status, output = wsiseg("type", demo[0], "--outlines", file, "--seeds", demo[1], "--out", out)
        assert status == 0, output
        made = geopandas.read_parquet(out / "ihc" / "cells.parquet")
        assert len(made) == pytest.approx(len(cells), abs=3)
        assert made.geometry.area.sum() == pytest.approx(cells.geometry.area.sum(), rel=0.02)
        at = cells.geometry.sindex.query(shapely.points(made[["prompt_x", "prompt_y"]].to_numpy()), predicate="within")
        same = made.cell_type.astype(str).to_numpy()[at[0]] == cells.cell_type.astype(str).to_numpy()[at[1]]
        assert same.mean() > 0.85


@pytest.mark.parametrize("kind", ["compact", "sam"])
def test_masks_from_elsewhere_have_the_descriptors_of_the_models_own(kind: str, model: object) -> None:
    if kind == "sam":
        tiny = Architecture(dim=32, depth=2, heads=2, global_blocks=(1,), window=4, grid=20, patch=16)
        model = SamModel(random_sam(tiny), None, mpp=0.5).ready(torch.device("cpu"), bf16=False)
    side = model.input_px or 512
    image = np.resize(data.immunohistochemistry(), (side, side, 3))
    with torch.inference_mode():
        embeddings = model.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
        points = torch.tensor([[100.0, 120.0], [150.5, 90.0], [20.0, 200.0]])
        masks = model.decode(embeddings, torch.zeros(3, dtype=torch.long), points)
        origin = model.window_origin(points)
        again = model.describe_masks(embeddings, torch.zeros(3, dtype=torch.long), origin, masks.logits)
    assert torch.equal(origin, masks.origin_xy)
    assert masks.logits.shape[-1] == model.window_size
    assert masks.mask_stride_px == model.mask_stride_px
    torch.testing.assert_close(again, masks.descriptors)


def test_an_outline_smaller_than_a_cell_of_the_window_is_described(model: object) -> None:
    image = np.ascontiguousarray(data.immunohistochemistry()[:256, :256])
    with torch.inference_mode():
        embeddings = model.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
    dot = np.array([shapely.box(101.2, 99.3, 101.4, 99.5)], object)
    (masks,) = describe_outlines(model, embeddings, 0, dot, points_inside(dot).astype(np.float32), 8)
    assert (masks.logits > 0).sum() == 1
    assert torch.isfinite(masks.descriptors.float()).all()
    assert np.linalg.norm(masks.descriptors.float()) == pytest.approx(1, abs=0.01)


def test_outlines_move_to_the_tile() -> None:
    tile = Tile(core=Box(64, 128, 128, 192), outer=Box(0, 64, 192, 256))
    (moved,) = to_tile(np.array([shapely.box(10, 100, 20, 110)], object), tile, Lattice(0.5, 0.25))
    assert moved.bounds == (20, 136, 40, 156)  # twice as many px per micron, less the corner (0, 64)


def test_every_outline_belongs_to_one_box(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    polygons = shapely.buffer(shapely.points(rng.uniform(0, 1000, (3000, 2))), 5)
    write_given(tmp_path, polygons, points_inside(polygons))
    given, seen = GivenOutlines(tmp_path), 0
    for x in range(-250, 1250, 250):
        for y in range(-250, 1250, 250):
            inside, points = given.within(x, y, x + 250, y + 250)
            assert ((points >= (x, y)) & (points < (x + 250, y + 250))).all()
            assert shapely.contains_xy(inside, points).all()
            seen += len(inside)
    assert seen == 3000
    crescent = shapely.box(0, 0, 10, 10) - shapely.box(2, -1, 11, 9)
    assert crescent.contains(shapely.Point(points_inside(np.array([crescent], object))[0]))


def info(bounds: tuple[int, int, int, int] | None = None) -> SlideInfo:
    return SlideInfo(
        path="a.svs", reader="openslide", format="mirax", level_sizes=((1000, 800),), downsamples=(1.0,), mpp=0.5, mpp_source="--mpp",
        bounds=bounds,
    )  # fmt: skip


def geojson(path: Path, *shapes: shapely.Geometry) -> Path:
    features = [{"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(shape)} for shape in shapes]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_geojson_is_relative_to_the_bounds_as_in_qupath(tmp_path: Path) -> None:
    file = geojson(tmp_path / "a.geojson", shapely.box(10, 10, 20, 20))
    (polygon,), warnings = read_given(file, info(bounds=(300, 200, 500, 500)))
    assert polygon.bounds == (310, 210, 320, 220)
    assert warnings == []


def test_what_is_changed_or_left_out_is_said(tmp_path: Path) -> None:
    holed = shapely.box(0, 0, 20, 20) - shapely.box(5, 5, 15, 15)
    two = shapely.MultiPolygon([shapely.box(100, 0, 120, 20), shapely.box(130, 0, 135, 5)])
    file = geojson(tmp_path / "a.geojson", holed, two, shapely.box(2000, 0, 2010, 10))
    polygons, warnings = read_given(file, info())
    assert [polygon.area for polygon in polygons] == [400, 400]
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "1 outline of several parts; the largest part of each was taken",
        "1 outline with holes, which were filled",
        "1 of 3 outlines have their centre outside the slide and were left out",
    ]


def test_wrong_outlines_are_refused_in_one_line(tmp_path: Path) -> None:
    points = tmp_path / "points.csv"
    points.write_text("x,y\n1,2\n")
    with pytest.raises(FormatError, match=r"points\.csv: points, no outlines; pass GeoJSON or GeoParquet"):
        read_given(points, info())
    Image.fromarray(np.ones((10, 20), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(FormatError, match="a label image of 20 x 10 px, the slide has 1000 x 800; make it at level 0"):
        read_given(tmp_path / "small.png", info())
    far = geojson(tmp_path / "far.geojson", shapely.box(5000, 0, 5010, 10))
    with pytest.raises(FormatError, match="none of its 1 outline has its centre on the slide, which has 1000 x 800 px"):
        read_given(far, info())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["type", "SLIDE", "--outlines", "CELLS"], "types come from --seeds FILE, --bank FILE or --known-types"),
        (["type", "RUN", "--seeds", "SEEDS", "--mpp", "0.25"], "only with --outlines; a finished run has its own"),
        (
            ["type", "SLIDE", "SLIDE", "--outlines", "CELLS", "--known-types"],
            "--outlines: belong to one slide; pass one",
        ),
        (
            ["type", "SLIDE", "--outlines", "none.geojson", "--known-types", "--out", "OUT"],
            "none.geojson: no such file",
        ),
        (["run", "SLIDE", "--outlines", "CELLS", "--method", "apg"], "so --method apg has no meaning; leave it out"),
        (["run", "SLIDE", "--outlines", "CELLS", "--seeds", "SEEDS"], "pass the clicks to wsiseg type"),
        (
            ["run", "SLIDE", "--method", "outlines"],
            "needs a file of outlined cells; use wsiseg type SLIDE --outlines FILE",
        ),
    ],
)
def test_wrong_options_are_one_line(
    demo: tuple[Path, Path], found: Path, tmp_path: Path, wsiseg: Cli, arguments: list[str], said: str
) -> None:
    names = {"SLIDE": demo[0], "SEEDS": demo[1], "CELLS": found, "RUN": found.parent, "OUT": tmp_path / "out"}
    status, output = wsiseg(*(names.get(argument, argument) for argument in arguments))
    assert status in (1, 2)
    assert said in output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_image_in_memory_has_no_given_outlines() -> None:
    import wsiseg

    with pytest.raises(ConfigError, match="--method outlines: needs a file"):
        wsiseg.segment_image(data.immunohistochemistry()[:64, :64], mpp=0.5, method="outlines")
