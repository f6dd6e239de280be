"""The main job on real slides: tiled equals un-tiled, readers agree, processes agree, nothing is lost to kill -9."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import geopandas
import numpy as np
import pytest
import shapely

from wsiseg.config import RunConfig, TilingConfig, from_mapping
from wsiseg.formats.geojson import validate_geojson
from wsiseg.formats.geoparquet import read_geoparquet
from wsiseg.runs.image import segment_image
from wsiseg.runs.slide import segment_slide

if TYPE_CHECKING:
    from wsiseg.records import Cells

FILES = ("cells.parquet", "cells.geojson.gz", "bank.safetensors")


def share_identical(a: Cells, b: Cells, iou: float = 0.9) -> float:
    """Share of cells that have a twin of IoU > ``iou`` in the other set."""
    i, j = shapely.STRtree(b.polygons).query(a.polygons, predicate="intersects")
    shared = shapely.area(shapely.intersection(a.polygons[i], b.polygons[j]))
    good = shared / (shapely.area(a.polygons[i]) + shapely.area(b.polygons[j]) - shared) > iou
    return (len(np.unique(i[good])) + len(np.unique(j[good]))) / (len(a) + len(b))


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the slide as a region of interest, dense in nuclei."""
    path = tmp_path_factory.mktemp("roi") / "roi.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(shapely.box(750, 750, 1450, 1600))))
    return path


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clicks made from looking at the slide: a keratinocyte of the epidermis and an inflammatory cell of the dermis."""
    path = tmp_path_factory.mktemp("seeds") / "seeds.json"
    types = [{"name": "epithelium", "points": [[1190, 991]]}, {"name": "inflammatory", "points": [[1075, 1164]]}]
    path.write_text(json.dumps({"version": 1, "slide": "CMU-1-Small-Region.svs", "types": types}))
    return path


@pytest.fixture(scope="module")
def config(region: Path, seeds: Path) -> RunConfig:
    """Small tiles and blocks, so that a short run has many of both."""
    return from_mapping({"tiling": {"tile_um": 128, "block_tiles": 1}, "roi": str(region), "seeds": str(seeds)}, "test")


@pytest.fixture(scope="module")
def reference(cmu: Path, config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("reference")
    manifest = segment_slide(str(cmu), config, out)
    return Path(manifest.folder), manifest


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_outputs_hold_what_they_promise(reference: tuple[Path, dict[str, object]]) -> None:
    """Valid polygons inside the slide and the region, typed, nearly free of overlaps; both files tell the same cells."""
    folder, manifest = reference
    table = geopandas.read_parquet(folder / "cells.parquet")
    assert len(table) == manifest.counts["cells"] > 400
    assert table.geometry.is_valid.all()
    assert (table.geometry.geom_type == "Polygon").all()
    left, top, right, bottom = table.total_bounds
    assert left >= 0
    assert top >= 0
    assert right <= 2220
    assert bottom <= 2967
    i, j = shapely.STRtree(table.geometry).query(table.geometry, predicate="intersects")
    shared = shapely.area(shapely.intersection(table.geometry.values[i[i < j]], table.geometry.values[j[i < j]]))
    assert (shared < 0.05).all()
    assert set(table["cell_type"].unique()) <= {"unassigned", "epithelium", "inflammatory"}
    assert (table["cell_type"] == "epithelium").sum() > 50
    assert (table["cell_type"] == "inflammatory").sum() > 50
    assert validate_geojson(folder / "cells.geojson.gz") == []
    import gzip

    features = json.loads(gzip.decompress((folder / "cells.geojson.gz").read_bytes()))["features"]
    assert [f["id"] for f in features] == table["id"].tolist()


def test_manifest_accounts_for_every_outline(reference: tuple[Path, dict[str, object]]) -> None:
    _, manifest = reference
    counts = manifest.counts
    assert counts["outlines"] == counts["kept"] + counts["overlapped"] + counts["clusters"] + counts["too_small"]
    assert sum(manifest.types.values()) == counts["cells"]
    assert manifest.status == "complete"
    assert {"read", "encode", "prompt", "decode", "vectorise", "stitch", "write"} <= set(manifest.seconds)
    assert manifest.peak_ram_mb > 100
    assert manifest.slide["mpp_source"] == "openslide.mpp-x/-y"


def test_clicked_cells_have_their_type(reference: tuple[Path, dict[str, object]]) -> None:
    cells, typing, _ = read_geoparquet(reference[0] / "cells.parquet")
    for name, point in (("epithelium", (1190, 991)), ("inflammatory", (1075, 1164))):
        row = int(shapely.distance(cells.polygons, shapely.Point(point)).argmin())
        assert typing.names[typing.codes[row]] == name


def test_same_cells_through_tiffslide(
    cmu: Path, config: RunConfig, reference: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    manifest = segment_slide(str(cmu), dataclasses.replace(config, reader="tiffslide"), tmp_path)
    assert manifest.slide["reader"] == "tiffslide"
    a, b = (read_geoparquet(folder / "cells.parquet") for folder in (reference[0], Path(manifest.folder)))
    assert share_identical(a[0], b[0]) >= 0.995
    assert manifest.types == pytest.approx(reference[1].types, rel=0.02)


def test_processes_give_the_same_bytes(
    cmu: Path, config: RunConfig, reference: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    """Two Dask processes finish blocks in any order; the files do not show it."""
    manifest = segment_slide(str(cmu), dataclasses.replace(config, workers=2), tmp_path)
    assert files_of(Path(manifest.folder)) == files_of(reference[0])


def cells_of(crop: np.ndarray, model: object, tiling: TilingConfig) -> Cells:
    config = dataclasses.replace(RunConfig(), tiling=tiling)
    return segment_image(crop, mpp=0.499, config=config, model=model)[0]


@pytest.fixture(scope="module")
def untiled(cmu_crop: np.ndarray, model: object) -> Cells:
    """350 um of tissue as one tile."""
    return cells_of(cmu_crop, model, TilingConfig(tile_um=400))


@pytest.mark.parametrize(("tile_um", "origin_um"), [(64, 0), (128, 41), (256, 100)])
def test_tiled_equals_untiled(
    cmu_crop: np.ndarray, model: object, untiled: Cells, tile_um: float, origin_um: float
) -> None:
    """As tiles of 256, 512 and 1024 px, and with the grid moved: at most 0.5 % of the cells differ."""
    assert len(untiled) > 300
    tiling = TilingConfig(tile_um=tile_um, origin_um=origin_um)
    assert share_identical(untiled, cells_of(cmu_crop, model, tiling)) >= 0.995


def test_shuffled_blocks_give_the_same_bytes(
    cmu: Path,
    config: RunConfig,
    reference: tuple[Path, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wsiseg.runs import scheduling

    in_order = scheduling.map_blocks

    def shuffled(work, blocks, setup, **options):
        return in_order(work, random.Random(3).sample(blocks, len(blocks)), setup, **options)

    monkeypatch.setattr(scheduling, "map_blocks", shuffled)
    manifest = segment_slide(str(cmu), config, tmp_path)
    assert files_of(Path(manifest.folder)) == files_of(reference[0])


def test_kill_9_loses_nothing(
    cmu: Path, region: Path, seeds: Path, reference: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    """Killed three times in the middle, the same command ends with the same bytes and does not repeat finished parts."""
    settings = tmp_path / "settings.json"
    settings.write_text(
        json.dumps({"tiling": {"tile_um": 128, "block_tiles": 1}, "roi": str(region), "seeds": str(seeds)})
    )
    command = [
        sys.executable,
        "-m",
        "wsiseg",
        "run",
        str(cmu),
        "--config",
        str(settings),
        "--out",
        str(tmp_path / "out"),
    ]
    folder = tmp_path / "out" / "CMU-1-Small-Region"
    finished: dict[str, int] = {}
    for goal in (2, 5, 8):
        process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(folder.glob("parts/*.parquet"))) >= goal:
                break
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        assert len(list(folder.glob("parts/*.parquet"))) >= goal, f"fewer than {goal} parts after 180 s"
        for part in folder.glob("parts/*.parquet"):
            assert finished.setdefault(part.name, part.stat().st_mtime_ns) == part.stat().st_mtime_ns, (
                f"{part.name} was written twice"
            )
        assert not (folder / "cells.parquet").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    assert files_of(folder) == files_of(reference[0])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["blocks_resumed"] >= 8
    for name, written in finished.items():
        assert (folder / "parts" / name).stat().st_mtime_ns == written
    assert not [
        p
        for p in folder.rglob("*")
        if p.is_file() and p.suffix not in (".parquet", ".json", ".gz", ".html", ".safetensors", ".cells")
    ], "leftovers"


def test_a_broken_part_is_made_again(cmu: Path, config: RunConfig, reference: tuple[Path, dict[str, object]]) -> None:
    """A part that is truncated or empty is not believed."""
    folder = reference[0]
    before = files_of(folder)
    victims = sorted(folder.glob("parts/*.parquet"))[:2]
    victims[0].write_bytes(victims[0].read_bytes()[:-40])
    victims[1].write_bytes(b"")
    manifest = segment_slide(str(cmu), config, folder.parent, overwrite=True)
    assert manifest.counts["blocks"] - manifest.counts["blocks_resumed"] == 2
    assert files_of(folder) == before


def test_new_seeds_reuse_the_parts(
    cmu: Path, config: RunConfig, seeds: Path, reference: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    """Under APG a second click costs seconds: types are settled after the parts."""
    folder = reference[0]
    more = json.loads(seeds.read_text())
    more["types"][0]["points"].append([1158, 995])
    second = tmp_path / "more.json"
    second.write_text(json.dumps(more))
    kept = files_of(folder)
    manifest = segment_slide(str(cmu), dataclasses.replace(config, seeds=str(second)), folder.parent, overwrite=True)
    assert manifest.counts["blocks_resumed"] == manifest.counts["blocks"]
    manifest = segment_slide(str(cmu), config, folder.parent, overwrite=True)
    assert files_of(folder) == kept


def test_chain_of_prompts_on_the_slide(
    cmu: Path, config: RunConfig, reference: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    """--method cop decodes only what resembles the clicks: a subset of APG's prompts, each typed or left unassigned."""
    manifest = segment_slide(str(cmu), dataclasses.replace(config, method="cop"), tmp_path)
    assert 0.2 * reference[1].counts["prompts"] < manifest.counts["prompts"] <= reference[1].counts["prompts"]
    assert manifest.types["epithelium"] > 30
    assert manifest.types["inflammatory"] > 30


def test_image_with_the_papers_own_localisation(cmu_crop: np.ndarray, model: object) -> None:
    """Components of the similarity map instead of instance maps: fewer, but real cells."""
    from wsiseg.records import Seeds, SeedType

    clicks = Seeds((SeedType("a", (1, 2, 3), ((390.0, 191.0),)), SeedType("b", (3, 2, 1), ((275.0, 364.0),))), "test")
    config = from_mapping({"method": "cop", "cop": {"localise": "components"}}, "test")
    cells, typing = segment_image(cmu_crop, mpp=0.499, seeds=clicks, config=config, model=model)
    assert len(cells) > 50
    assert set(np.unique(typing.codes)) <= {0, 1, 2}
