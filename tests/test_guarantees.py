"""What the program promises, tested on the demo slide and made-up ones: a clean clone without any data runs all of it.

`GUARANTEES` says which tests hold each promise; those of them that need more room are in the files named there.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import random
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import shapely
import skimage.data
import tifffile
from PIL import Image

from wsiseg.config import RunConfig, TilingConfig, from_mapping
from wsiseg.formats.geoparquet import read_geoparquet
from wsiseg.models.cards import file_hash
from wsiseg.models.registry import MODELS
from wsiseg.models.testing import DiscModel
from wsiseg.runs import plan as planning
from wsiseg.runs import scheduling
from wsiseg.runs.image import segment_image
from wsiseg.runs.slide import merge_run, segment_slide
from wsiseg.runtime.shards import Shard
from wsiseg.segmentation import batch_size, blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Cells

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "wsiseg").rglob("*.py"))
FILES = ("cells.parquet", "cells.geojson.gz", "bank.safetensors")

GUARANTEES = {
    "tiled equals un-tiled": (
        "tests/test_guarantees.py::test_tiled_equals_untiled",
        "tests/test_guarantees.py::test_the_order_of_blocks_does_not_show",
        "tests/test_guarantees.py::test_every_outline_is_accounted_for_and_no_two_cells_overlap",
        "tests/test_stitching.py::test_parts_do_not_show",
        "tests/faults/test_processes.py::test_a_worker_is_killed",
        "tests/faults/test_processes.py::test_five_shards_in_any_order_and_a_merge",
    ),
    "nothing is lost, nothing is faked": (
        "tests/test_guarantees.py::test_a_part_that_is_cut_short_is_made_again",
        "tests/test_cli_run.py::test_a_tile_that_cannot_be_read_is_listed",
        "tests/test_cli_run.py::test_damaged_pages_of_a_part_are_made_again",
        "tests/faults/test_processes.py::test_kill_9_at_random_moments",
        "tests/faults/test_surroundings.py::test_a_reader_that_fails_for_some_tiles",
    ),
    "memory is flat": (
        "tests/test_guarantees.py::test_memory_does_not_grow_with_the_slide",
        "tests/test_prefetch.py::test_no_more_than_the_limit_is_begun_before_it_is_asked_for",
        "tests/test_formats_streams.py::test_few_chunks_are_held_at_a_time",
        "tests/test_formats_streams.py::test_the_text_is_not_held",
        "tests/faults/test_surroundings.py::test_out_of_memory_halves_the_batch",
    ),
    "safe in an array": (
        "tests/test_guarantees.py::test_a_merge_may_be_repeated",
        "tests/test_guarantees.py::test_nothing_waits_for_an_answer",
        "tests/faults/test_claims.py::test_eight_processes_race_for_fifty_names_and_each_is_claimed_once",
        "tests/faults/test_dask.py::test_two_runs_at_once",
        "tests/faults/test_processes.py::test_nothing_is_written_elsewhere",
        "tests/faults/test_processes.py::test_two_runs_on_one_folder_share_the_work",
    ),
    "honest input errors": (
        "tests/test_guarantees.py::test_wrong_input_is_one_line_and_nothing_is_written",
        "tests/test_cli_run.py::test_seeds_that_cannot_be_used",
        "tests/test_cli_run.py::test_a_tile_that_cannot_be_read_is_listed",
    ),
    "offline": (
        "tests/test_guarantees.py::test_a_run_opens_no_connection",
        "tests/test_guarantees.py::test_shipped_weights_have_their_hash_licence_and_source",
        "tests/test_model_store.py::test_published_downloads",
        "tests/test_model_store.py::test_offline",
    ),
    "no code runs from data": (
        "tests/test_guarantees.py::test_no_module_unpickles_objects",
        "tests/test_torch_files.py::test_what_would_run_is_refused_and_not_run",
        "tests/test_checkpoints.py::test_malicious",
        "tests/test_checkpoints.py::test_pickles_by_hand",
    ),
}


def test_every_guarantee_has_tests_that_need_no_data() -> None:
    names = sorted({name for tests in GUARANTEES.values() for name in tests})
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not realdata",
            *names,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == set(names)


# --- tiled equals un-tiled --------------------------------------------------------------------------------------------------------


def share_identical(a: Cells, b: Cells, iou: float = 0.9) -> float:
    """Share of cells that have a twin of IoU > ``iou`` in the other set."""
    i, j = shapely.STRtree(b.polygons).query(a.polygons, predicate="intersects")
    shared = shapely.area(shapely.intersection(a.polygons[i], b.polygons[j]))
    good = shared / (shapely.area(a.polygons[i]) + shapely.area(b.polygons[j]) - shared) > iou
    return (len(np.unique(i[good])) + len(np.unique(j[good]))) / (len(a) + len(b))


def cells_of_demo_image(model: PromptableModel, tiling: TilingConfig) -> Cells:
    config = dataclasses.replace(RunConfig(), tiling=tiling)
    return segment_image(skimage.data.immunohistochemistry(), mpp=0.5, config=config, model=model)[0]


@pytest.fixture(scope="module")
def whole(model: PromptableModel) -> Cells:
    """256 um of tissue as one tile."""
    return cells_of_demo_image(model, TilingConfig(tile_um=300))


@pytest.mark.parametrize(("tile_um", "origin_um"), [(64, 0), (128, 41)])
def test_tiled_equals_untiled(whole: Cells, model: PromptableModel, tile_um: float, origin_um: float) -> None:
    """As tiles of 256 px, and with the grid moved: at most 0.5 % of cells differ."""
    assert len(whole) > 80
    tiled = cells_of_demo_image(model, TilingConfig(tile_um=tile_um, origin_um=origin_um))
    assert share_identical(whole, tiled) >= 0.995


@pytest.fixture(scope="module")
def config(demo: tuple[Path, Path]) -> RunConfig:
    """Sixteen blocks of one tile."""
    return from_mapping({"tiling": {"tile_um": 64, "block_tiles": 1}, "seeds": str(demo[1])}, "test")


@pytest.fixture(scope="module")
def finished(
    demo: tuple[Path, Path], config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """The folder of a run on the demo slide, and its manifest."""
    manifest = segment_slide(demo[0], config, tmp_path_factory.mktemp("finished"))
    return Path(manifest.folder), manifest


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_order_of_blocks_does_not_show(
    demo: tuple[Path, Path],
    config: RunConfig,
    finished: tuple[Path, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does which thread traces a tile, of the three that a GPU would have."""
    in_order = scheduling.map_blocks

    def shuffled(work, blocks, setup, **options):
        assert len(blocks) == 16
        return in_order(work, random.Random(3).sample(blocks, len(blocks)), setup, **options)

    monkeypatch.setattr(scheduling, "map_blocks", shuffled)
    monkeypatch.setattr(blocks, "tracers", lambda _: 3)
    manifest = segment_slide(demo[0], config, tmp_path)
    assert files_of(Path(manifest.folder)) == files_of(finished[0])


def test_every_outline_is_accounted_for_and_no_two_cells_overlap(finished: tuple[Path, dict[str, object]]) -> None:
    folder, manifest = finished
    counts, (cells, typing, _) = manifest.counts, read_geoparquet(folder / "cells.parquet")
    assert counts["outlines"] == counts["kept"] + counts["overlapped"] + counts["clusters"] + counts["too_small"]
    assert counts["cells"] == len(cells) == sum(typing.count().values())
    assert shapely.is_valid(cells.polygons).all()
    assert shapely.within(cells.polygons, shapely.box(0, 0, 512, 512)).all()
    i, j = shapely.STRtree(cells.polygons).query(cells.polygons, predicate="intersects")
    shared = shapely.area(shapely.intersection(cells.polygons[i[i < j]], cells.polygons[j[i < j]]))
    assert (shared < 0.05).all()


# --- nothing is lost, nothing is faked --------------------------------------------------------------------------------------------


def test_a_part_that_is_cut_short_is_made_again(
    demo: tuple[Path, Path], config: RunConfig, finished: tuple[Path, dict[str, object]]
) -> None:
    """Two of sixteen blocks are worked on, the others believed; the files are the same bytes."""
    folder, before = finished[0], files_of(finished[0])
    victims = sorted(folder.glob("parts/*.parquet"))[:2]
    victims[0].write_bytes(victims[0].read_bytes()[:-40])
    victims[1].write_bytes(b"")
    manifest = segment_slide(demo[0], config, folder.parent, overwrite=True)
    assert manifest.counts["blocks"] - manifest.counts["blocks_resumed"] == 2
    assert files_of(folder) == before


# --- memory is flat ---------------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 and of 128 tiles, the pixels of the same few are held at a time."""
    read, alive, most = blocks.read_region, 0, 0
    lock = threading.Lock()

    def gone() -> None:
        nonlocal alive
        with lock:
            alive -= 1

    def counted(*arguments, **options):
        nonlocal alive, most
        pixels = read(*arguments, **options)
        with lock:
            alive += 1
            most = max(most, alive)
        weakref.finalize(pixels, gone)
        return pixels

    monkeypatch.setattr(blocks, "read_region", counted)
    monkeypatch.setattr(planning, "load_model", lambda *_: DiscModel(spacing_px=64, radius_px=12))
    monkeypatch.setattr(batch_size, "READ_BYTES", 4 * 128 * 128 * 3)
    config = from_mapping({"mpp": 1.0, "tissue": {"enabled": False}, "tiling": {"tile_um": 128}}, "test")
    for height, tiles in ((512, 16), (4096, 128)):
        path = tmp_path / f"{height}.tif"
        tifffile.imwrite(path, np.full((height, 512, 3), 150, np.uint8), tile=(256, 256), compression="deflate")
        assert segment_slide(path, config, tmp_path / "out").counts["tiles"] == tiles
        assert 0 < most <= 14


# --- safe in an array -------------------------------------------------------------------------------------------------------------


def test_a_merge_may_be_repeated(
    demo: tuple[Path, Path], config: RunConfig, finished: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    """Two shards, merged twice: both times the files of a run in one piece."""
    for number in (2, 1):
        record = segment_slide(demo[0], config, tmp_path, shard=Shard(number, 2))
        assert record.status == "shard"
    for _ in range(2):
        merge_run(Path(record.folder))
        assert files_of(Path(record.folder)) == files_of(finished[0])


def test_nothing_waits_for_an_answer() -> None:
    """No module reads the terminal: a job has none."""
    asking = {"input", "prompt", "confirm", "pause", "getchar", "getpass"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
                assert name not in asking, f"{path}:{node.lineno}"


# --- honest input errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slide", "options", "status", "words"),
    [
        ("cut.tiff", (), 1, ("cut.tiff",)),
        ("scan.png", (), 1, ("scan.png", "no microns per pixel", "--mpp")),
        ("scan.png", ("--mpp", 30), 1, ("30", "--force-mpp")),
        ("ihc.tiff", ("--seeds", "nowhere.json"), 1, ("nowhere.json",)),
        ("ihc.tiff", ("--method", "guess"), 2, ("--method", "guess", "apg")),
        ("ihc.tiff", ("--model", "nuclei-compakt"), 1, ("nuclei-compakt", "did you mean")),
    ],
    ids=["cut short", "no scale", "too coarse", "no seeds", "no such method", "no such model"],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    demo: tuple[Path, Path],
    wsiseg: Callable[..., tuple[int, str]],
    tmp_path: Path,
    slide: str,
    options: tuple[object, ...],
    status: int,
    words: tuple[str, ...],
) -> None:
    """What was found and what to do; status 1 for data, 2 for usage."""
    whole = demo[0].read_bytes()
    (tmp_path / "ihc.tiff").write_bytes(whole)
    (tmp_path / "cut.tiff").write_bytes(whole[: len(whole) // 3])
    Image.fromarray(np.full((300, 300, 3), 200, np.uint8)).save(tmp_path / "scan.png")
    found, output = wsiseg("run", tmp_path / slide, *options, "--out", tmp_path / "out")
    message = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert found == status
    assert len(message) == 1
    assert output.rstrip().endswith(message[0])
    assert [word for word in words if word not in message[0]] == []
    assert not (tmp_path / "out").exists()


# --- offline ----------------------------------------------------------------------------------------------------------------------


def test_a_run_opens_no_connection(
    demo: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wsiseg: Callable[..., tuple[int, str]]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refused)
    status, output = wsiseg("run", demo[0], "--seeds", demo[1], "--out", tmp_path)
    assert status == 0, output
    assert json.loads((tmp_path / "ihc/manifest.json").read_text())["status"] == "complete"


def test_shipped_weights_have_their_hash_licence_and_source() -> None:
    assert MODELS
    for card in MODELS.values():
        assert file_hash(card.weights) == card.sha256
        assert card.licence
        assert card.source


# --- no code runs from data -------------------------------------------------------------------------------------------------------


def test_no_module_unpickles_objects() -> None:
    """Pickle is imported by the reader of checkpoints alone, which builds tensors and stand-ins; torch.load takes weights only."""
    with_pickle = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                if {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"} & set(names):
                    with_pickle.append(path.relative_to(ROOT / "wsiseg").as_posix())
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert said.get("weights_only" if "torch" in ast.unparse(node.func) else "allow_pickle") != (
                    "False" if "torch" in ast.unparse(node.func) else "True"
                ), f"{path}:{node.lineno}"
                assert "torch" not in ast.unparse(node.func) or said.get("weights_only") == "True"
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", None) not in ("eval", "exec"), f"{path}:{node.lineno}"
    assert with_pickle == ["models/sam/torch_files.py"]
