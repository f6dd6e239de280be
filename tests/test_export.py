"""``wsiseg export``: every file is read back by the library that its users use, and has the cells, areas and types of the table."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile

from wsiseg.errors import ConfigError, RunError, SeedsError
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.export import EXPORTS
from wsiseg.export.vector import short_names
from wsiseg.export.write import export_run
from wsiseg.formats import geoparquet
from wsiseg.formats.geoparquet import write_geoparquet
from wsiseg.formats.seeds import check_seeds, read_seeds
from wsiseg.records import Cells, Provenance, SlideInfo, Typing
from wsiseg.runtime.atomic import write_json
from wsiseg.slide.mpp import PixelSize, choose_mpp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAMES = ("unassigned", "tumour", "immune cell")
MPP = 0.2528


def blobs(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Convex outlines anywhere on the slide, that may overlap."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, size, (count, 2))
    angle = np.sort(rng.uniform(0, 2 * np.pi, (count, 12)), 1)
    radius = rng.uniform(6, 14, (count, 1))
    xy = centres[:, None] + radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return shapely.polygons(np.clip(xy, 0, size))


def make_run(
    folder: Path,
    polygons: np.ndarray,
    size: tuple[int, int],
    *,
    bounds: list[int] | None = None,
    status: str = "complete",
) -> Path:
    """The folder of a finished run."""
    n = len(polygons)
    rng = np.random.default_rng(1)
    info = SlideInfo(
        path="a.svs", reader="openslide", format="aperio", level_sizes=(size,), downsamples=(1.0,), mpp=MPP, mpp_source="--mpp"
    )  # fmt: skip
    cells = Cells(
        polygons=polygons,
        points_xy=shapely.get_coordinates(shapely.centroid(polygons)).reshape(n, 2),
        scores=rng.random(n, np.float32),
        descriptors=rng.standard_normal((n, 3)).astype(np.float16),
    )
    typing = Typing(
        names=NAMES,
        colors=((128, 128, 128), (200, 0, 0), (0, 0, 255)),
        codes=rng.integers(0, 3, n, np.int32),
        scores=rng.random(n, np.float32),
        margins=rng.random(n, np.float32),
        prototypes=np.zeros(n, np.int32),
    )
    folder.mkdir(parents=True)
    write_geoparquet(
        folder / "cells.parquet",
        cells,
        typing,
        info,
        Provenance(tool="wsiseg", version="0", slide="a.svs", config_hash="0"),
    )
    slide = {"path": "a.svs", "size_px0": list(size), "mpp": MPP, "bounds": bounds}
    write_json(folder / "manifest.json", {"slide": slide, "config": {}, "run_hash": "0", "status": status})
    return folder


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geoparquet, "ROW_GROUP", 64)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    size = (1500, 2100)
    return make_run(tmp_path / "run", blobs(300, size), size)


def export(run: Path, *formats: str, **options: object) -> list[Path]:
    return [file for file, _ in export_run(run, formats, run / "export", **options)]


def table(run: Path) -> geopandas.GeoDataFrame:
    return geopandas.read_parquet(run / "cells.parquet")


def test_a_label_image_is_that_of_the_polygons_at_every_level(run: Path) -> None:
    (file,) = export(run, "labels")
    cells = table(run)
    truth = rasterise(cells.geometry.to_numpy(), (2100, 1500))
    with tifffile.TiffFile(file) as image:
        levels = [level.asarray() for level in image.series[0].levels]
        assert image.pages[0].tile == (512, 512)
        assert f'PhysicalSizeX="{MPP}"' in image.ome_metadata
    assert levels[0].dtype == np.uint32
    np.testing.assert_array_equal(levels[0], truth)
    assert [level.shape for level in levels] == [(2100, 1500), (1050, 750), (525, 375)]
    for k, level in enumerate(levels):
        np.testing.assert_array_equal(level, truth[:: 2**k, :: 2**k])


def test_a_label_image_at_another_scale_keeps_the_areas(run: Path) -> None:
    (file,) = export(run, "labels", mpp=0.5)
    image = tifffile.imread(file)
    assert image.shape == (round(2100 * MPP / 0.5), round(1500 * MPP / 0.5))
    truth = shapely.union_all(table(run).geometry.to_numpy()).area * MPP**2
    assert (image > 0).sum() * 0.25 == pytest.approx(truth, rel=0.01)


def test_an_image_of_types_names_its_values(run: Path) -> None:
    (file,) = export(run, "types")
    cells = table(run)
    with tifffile.TiffFile(file) as image:
        found, metadata = image.asarray(), tifffile.xml2dict(image.ome_metadata)
    named = metadata["OME"]["StructuredAnnotations"]["MapAnnotation"]["Value"]["M"]
    assert [(entry["K"], entry["value"]) for entry in named] == list(enumerate(("background", *NAMES)))
    labels = rasterise(cells.geometry.to_numpy(), found.shape)
    codes = np.r_[0, [NAMES.index(name) + 1 for name in cells.cell_type]]
    np.testing.assert_array_equal(found, codes[labels])


def test_the_density_of_all_squares_is_the_number_of_cells(run: Path) -> None:
    (file,) = export(run, "density", square_um=50.0)
    maps = tifffile.imread(file)
    cells = table(run)
    assert maps.shape == (4, 11, 8)
    side = 50 / MPP
    across, down = np.minimum(side, 1500 - side * np.arange(8)), np.minimum(side, 2100 - side * np.arange(11))
    area_mm2 = np.outer(down, across) * (MPP / 1000) ** 2
    counts = (maps * area_mm2).sum((1, 2))
    expected = [len(cells), *((cells.cell_type == name).sum() for name in NAMES)]
    np.testing.assert_allclose(counts, expected, rtol=1e-5)
    inside = (cells.x < side) & (cells.y < side)
    assert maps[0, 0, 0] * area_mm2[0, 0] == pytest.approx(inside.sum(), rel=1e-5)


@pytest.mark.parametrize(("name", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_hold_every_cell(run: Path, name: str, delimiter: str) -> None:
    duckdb = pytest.importorskip("duckdb")
    (file,) = export(run, name)
    cells = table(run)
    query = f"SELECT count(*), sum(area_um2), count(DISTINCT id) FROM read_csv('{file}', delim='{delimiter}')"
    count, area, different = duckdb.sql(query).fetchall()[0]
    assert (count, different) == (len(cells), len(cells))
    assert area == pytest.approx(cells.area_um2.astype(float).sum(), rel=1e-6)
    kinds = duckdb.sql(f"SELECT cell_type, count(*), avg(x_um) FROM read_csv('{file}', delim='{delimiter}') GROUP BY 1")
    for kind, number, x_um in kinds.fetchall():
        mine = cells[cells.cell_type == kind]
        assert number == len(mine)
        assert x_um == pytest.approx(mine.x.mean() * MPP, rel=1e-9)


def test_anndata_holds_descriptors_places_and_colours(run: Path) -> None:
    anndata = pytest.importorskip("anndata")
    (file,) = export(run, "h5ad")
    made, cells = anndata.read_h5ad(file), table(run)
    stored = np.stack(cells.descriptor.to_numpy()).astype(np.float32)
    np.testing.assert_array_equal(made.X, stored)
    assert made.obs_names.tolist() == cells.id.tolist()
    assert made.obs.cell_type.tolist() == cells.cell_type.tolist()
    np.testing.assert_allclose(made.obsm["spatial"], cells[["x", "y"]].to_numpy() * MPP)
    colours = dict(zip(made.obs.cell_type.cat.categories, made.uns["cell_type_colors"], strict=True))
    assert colours == {"unassigned": "#808080", "tumour": "#c80000", "immune cell": "#0000ff"}


@pytest.mark.filterwarnings("ignore")  # of spatialdata and what it needs
def test_spatialdata_joins_outlines_and_table(run: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    spatialdata = pytest.importorskip("spatialdata", reason="the extra `spatialdata` needs an environment of its own")
    (file,) = export(run, "spatialdata")
    made, cells = spatialdata.read_zarr(file), table(run)
    assert made["cells"].index.tolist() == made["table"].obs.cell_id.tolist() == cells.id.tolist()
    assert made["cells"].geometry.area.sum() == pytest.approx(cells.geometry.area.sum(), rel=1e-9)
    assert made["table"].obs.cell_type.tolist() == cells.cell_type.tolist()
    microns = spatialdata.transform(made["cells"], to_coordinate_system="microns")
    assert microns.geometry.area.sum() == pytest.approx(cells.area_um2.astype(float).sum(), rel=1e-6)
    outlines, annotated = spatialdata.join_spatialelement_table(
        sdata=made, spatial_element_names="cells", table_name="table"
    )
    assert len(outlines["cells"]) == annotated.n_obs == len(cells)
    assert wsiseg("export", run, "--format", "spatialdata")[0] == 1  # it exists
    status, output = wsiseg("export", run, "--format", "spatialdata", "--overwrite")
    assert status == 0
    assert f"{file}: 0." in output
    assert [path.name for path in file.parent.iterdir()] == ["cells.zarr"]


def test_an_export_that_is_not_installed_says_how(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("h5ad", "anndata"), ("spatialdata", "spatialdata")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            ConfigError,
            match=rf"--format {name}: {module} is not installed; in the checkout, pip install '\.\[{module}\]'",
        ):
            export(run, name)
    assert not list((run / "export").glob("*"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_is_read_by_pycocotools(run: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    (file,) = export(run, "coco")
    read, cells = coco.COCO(str(file)), table(run)
    assert sorted(read.anns) == list(range(1, len(cells) + 1))
    assert {kind["name"] for kind in read.loadCats(read.getCatIds())} == set(NAMES)
    assert sum(one["area"] for one in read.anns.values()) == pytest.approx(cells.geometry.area.sum(), rel=1e-5)
    first = read.anns[1]
    assert read.annToMask(first).sum() == pytest.approx(first["area"], rel=0.1)
    assert first["cell_id"] == cells.id[0]
    assert read.cats[first["category_id"]]["name"] == cells.cell_type[0]


@pytest.mark.parametrize(("name", "layer"), [("gpkg", "cells"), ("shp", None)])
def test_gis_files_hold_the_polygons(run: Path, name: str, layer: str | None) -> None:
    (file,) = export(run, name)
    found, cells = geopandas.read_file(file, layer=layer), table(run)
    assert len(found) == len(cells)
    assert found.geometry.area.sum() == pytest.approx(cells.geometry.area.sum(), rel=1e-9)
    assert found.cell_type.tolist() == cells.cell_type.tolist()
    assert found.id.tolist() == cells.id.tolist()
    assert {"x_um", "y_um"} <= set(found.columns)


def test_the_least_certain_cells_come_back_as_clicks(tmp_path: Path) -> None:
    """As points in QuPath's frame; those that somebody gives a class are clicks inside their cells."""
    size = (1500, 2100)
    run = make_run(tmp_path / "run", blobs(300, size), size, bounds=[100, 200, 1000, 1500])
    (file,) = export(run, "review")
    document, cells = json.loads(file.read_text()), table(run).set_index("id")
    features, least = document["features"], cells.sort_values("type_margin", kind="stable")[:50]
    names = [f"{one.cell_type}, margin {one.type_margin:.2f}" for one in least.itertuples()]
    assert [one["properties"]["name"] for one in features] == names
    assert len({one["id"] for one in features} - set(cells.index)) == 50  # QuPath has the cells under their ids
    with pytest.raises(SeedsError, match="the points have no class"):
        read_seeds(file)
    for one in features[:7]:
        one["properties"]["classification"] = {"name": "immune cell", "color": [0, 0, 255]}
    file.write_text(json.dumps(document))
    info = SlideInfo(
        path="a.svs", reader="openslide", format="mirax", level_sizes=(size,), downsamples=(1.0,), mpp=MPP,
        mpp_source="--mpp", bounds=(100, 200, 1000, 1500),
    )  # fmt: skip
    clicks = check_seeds(read_seeds(file), info)[0].types[0].points
    outlines = least.geometry[:7]
    assert all(shape.contains(shapely.Point(x, y)) for shape, (x, y) in zip(outlines, clicks, strict=True))


def test_a_review_needs_types(run: Path) -> None:
    held = pq.read_table(run / "cells.parquet")
    note = json.loads(held.schema.metadata[b"wsiseg"])
    note["types"] = note["types"][:1]
    metadata = held.schema.metadata | {b"wsiseg": json.dumps(note).encode()}
    pq.write_table(held.replace_schema_metadata(metadata), run / "cells.parquet")
    with pytest.raises(ConfigError, match="no types; --format review needs a run with types"):
        export(run, "review")


@pytest.mark.filterwarnings("ignore")  # of the libraries that read
def test_every_file_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count, sum of areas and cells per type, by the library that its users use; on pixels that are not square areas are theirs."""
    duckdb, anndata = pytest.importorskip("duckdb"), pytest.importorskip("anndata")
    coco = pytest.importorskip("pycocotools.coco")
    sides = (0.2528, 0.2611)
    monkeypatch.setattr(sys.modules[__name__], "MPP", choose_mpp(PixelSize(*sides, "file"), None, None).mpp)
    size = (3000, 3000)
    grid = [(x, y) for x in range(20, 2980, 60) for y in range(20, 2980, 60)]  # apart, for the label image
    outlines = shapely.transform(blobs(len(grid), (60, 60)), lambda xy: xy * 0.5 + np.repeat(grid, 13, axis=0))
    run = make_run(tmp_path / "run", outlines, size)
    labels, csv, h5ad, instances, gpkg, shp = export(run, "labels", "csv", "h5ad", "coco", "gpkg", "shp")
    kinds = table(run).cell_type.astype(str).value_counts().to_dict()
    area = float(shapely.area(outlines).sum()) * sides[0] * sides[1]

    def told_by(file: str) -> tuple[int, float, dict[str, int]]:
        of = duckdb.sql(f"SELECT cell_type, count(*), sum(area_um2::double) FROM {file} GROUP BY 1").fetchall()
        return sum(n for _, n, _ in of), sum(a for *_, a in of), {str(kind): n for kind, n, _ in of}

    read = coco.COCO(str(instances))
    names = [read.cats[one["category_id"]]["name"] for one in read.anns.values()]
    told = {
        "parquet": told_by(f"'{run / 'cells.parquet'}'"),
        "csv": told_by(f"read_csv('{csv}')"),
        "coco": (len(names), sum(one["area"] for one in read.anns.values()) * MPP**2, dict(Counter(names))),
    }
    frames = {"gpkg": geopandas.read_file(gpkg), "shp": geopandas.read_file(shp), "h5ad": anndata.read_h5ad(h5ad).obs}
    for name, frame in frames.items():
        told[name] = (
            len(frame),
            frame.area_um2.astype(float).sum(),
            frame.cell_type.astype(str).value_counts().to_dict(),
        )
    for name, (count, sum_um2, by_type) in told.items():
        assert count == len(grid), name
        assert sum_um2 == pytest.approx(area, rel=1e-6), name
        assert by_type == kinds, name
    image = tifffile.imread(labels)
    assert len(np.unique(image)) - 1 == len(grid)
    assert (image > 0).sum() * MPP**2 == pytest.approx(area, rel=0.01)  # px, not outlines


def test_short_names_differ() -> None:
    assert short_names([f"measurement_{k}" for k in range(12)])["measurement_11"] == "measure_11"
    assert len(set(short_names([f"measurement_{k}" for k in range(12)]).values())) == 12


def test_a_region_limits_cells_and_cuts_images(tmp_path: Path) -> None:
    size = (1500, 2100)
    run = make_run(tmp_path / "run", blobs(300, size), size, bounds=[100, 200, 1000, 1500])
    region = tmp_path / "roi.geojson"  # relative to the bounds, as QuPath draws it
    region.write_text(json.dumps(shapely.geometry.mapping(shapely.box(300, 400, 700, 900))))
    files = export(run, "labels", "coco", "csv", roi=region)
    cells = table(run)
    inside = shapely.box(400, 600, 800, 1100)
    wanted = shapely.contains_xy(inside, cells.x, cells.y)
    with tifffile.TiffFile(files[0]) as image:
        labels = image.asarray()
        assert f'PositionX="{400 * MPP}"' in image.ome_metadata
    truth = np.zeros((2100, 1500), np.int64)
    rows = np.flatnonzero(wanted)
    painted = rasterise(cells.geometry.to_numpy()[rows], truth.shape)
    np.testing.assert_array_equal(labels, np.r_[0, rows + 1][painted][600:1100, 400:800])
    coco = json.loads(files[1].read_text())
    assert coco["images"][0] == {"id": 1, "file_name": "a.svs", "width": 400, "height": 500, "offset": [400, 600]}
    assert [one["id"] for one in coco["annotations"]] == (rows + 1).tolist()
    assert coco["annotations"][0]["bbox"][0] == pytest.approx(cells.geometry.bounds.minx[rows[0]] - 400, abs=1e-3)
    assert len(files[2].read_text().splitlines()) == 1 + wanted.sum()


def test_the_same_cells_give_the_same_images(run: Path) -> None:
    before = [file.read_bytes() for file in export(run, "labels", "types", "density")]
    assert before == [file.read_bytes() for file in export(run, "labels", "types", "density", overwrite=True)]


def test_tables_of_earlier_versions_are_exported(run: Path) -> None:
    file = run / "cells.parquet"
    held = pq.read_table(file)
    names = ["type" if name == "cell_type" else name for name in held.column_names]
    pq.write_table(held.rename_columns(names).replace_schema_metadata(held.schema.metadata), file, row_group_size=64)
    (made,) = export(run, "csv")
    assert made.read_text().splitlines()[0].split(",")[1] == '"cell_type"'
    (image,) = export(run, "types")
    assert set(np.unique(tifffile.imread(image))) == {0, 1, 2, 3}


def test_a_run_without_cells_is_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", np.empty(0, object), (700, 300))
    files = export(run, *(name for name in EXPORTS if name not in {"h5ad", "spatialdata"}))
    assert json.loads((run / "export" / "review.geojson").read_text())["features"] == []
    assert not tifffile.imread(files[0]).any()
    assert tifffile.imread(files[2]).sum() == 0
    assert files[3].read_text().startswith('"id","cell_type"')
    assert json.loads((run / "export" / "coco.json").read_text())["annotations"] == []
    assert len(geopandas.read_file(run / "export" / "cells.gpkg")) == 0
    pytest.importorskip("anndata")
    with pytest.raises(ConfigError, match="no cell to export"):
        export(run, "h5ad")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "label"], "--format: unknown format 'label'; did you mean 'labels'? allowed are labels, types"),
        (["--format", ","], "--format: no format given; allowed are labels"),
        (["--format", "labels", "--mpp", "0"], "--mpp: found 0; 0.05 to 100 microns are allowed"),
        (["--format", "density", "--square", "nan"], "--square: found nan; 1 to 10000 microns are allowed"),
        (["--format", "labels", "--roi", "none.geojson"], "none.geojson"),
    ],
)
def test_wrong_options_are_one_line(
    run: Path, wsiseg: Callable[..., tuple[int, str]], arguments: list[str], said: str
) -> None:
    status, output = wsiseg("export", run, *arguments)
    assert status == 1
    assert said in output
    assert len(output.splitlines()) == 1
    assert not (run / "export").exists()


def test_only_finished_runs_with_a_table_are_exported(tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    size = (100, 100)
    broken = make_run(tmp_path / "interrupted", blobs(3, size), size, status="interrupted")
    with pytest.raises(RunError, match="the run is interrupted, not finished"):
        export(broken, "csv")
    bare = make_run(tmp_path / "bare", blobs(3, size), size)
    (bare / "cells.parquet").unlink()
    with pytest.raises(RunError, match=r"no cells\.parquet in it; run the same command with --format geojson,parquet"):
        export(bare, "csv")
    with pytest.raises(RunError, match=r"no manifest\.json of wsiseg in it"):
        export(tmp_path, "csv")
    good = make_run(tmp_path / "good", blobs(3, size), size)
    status, output = wsiseg("export", good, bare, "--format", "csv", "--out", tmp_path / "out")
    assert status == 3  # one of two
    assert (tmp_path / "out" / "good" / "cells.csv").is_file()
    assert "bare: no cells.parquet" in output


def test_files_are_not_overwritten_unasked(run: Path) -> None:
    (file,) = export(run, "csv")
    before = file.read_bytes()
    with pytest.raises(RunError, match=r"cells\.csv: exists; pass --overwrite to replace it, or another --out"):
        export(run, "labels", "csv")
    assert file.read_bytes() == before
    assert not (run / "export" / "labels.ome.tif").exists()
