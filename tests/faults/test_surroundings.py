"""Disks that fill or refuse, slides that cannot be read, devices without memory, and slides of odd shapes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from wsiseg.config import from_mapping
from wsiseg.errors import RunError, SlideError
from wsiseg.formats.geojson import validate_geojson
from wsiseg.formats.geoparquet import read_geoparquet
from wsiseg.models.testing import DiscModel
from wsiseg.runs import plan as planning
from wsiseg.runs.slide import segment_slide
from wsiseg.slide.image_reader import ImageReader
from wsiseg.slide.openslide_reader import OpenSlideReader
from wsiseg.slide.tiffslide_reader import TiffSlideReader

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Run

SMALL = {"tiling": {"tile_um": 64, "block_tiles": 2}, "tissue": {"enabled": False}}


def in_a_small_file_system(script: str, run: Run, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which ``$RUN`` is the command and ``mnt`` a file system of its own in memory."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no file system of one's own")
    (tmp_path / "mnt").mkdir()
    command = " ".join(f"'{part}'" for part in run.command(Path("mnt/out")))
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", f"RUN=({command})\n{script}"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        env=run.environment,
        timeout=300,
    )


def test_a_disk_that_fills(run: Run, undisturbed: tuple[dict[str, bytes], dict, float], tmp_path: Path) -> None:
    """No room for all parts; with room the same command goes on, and ends with the same files."""
    script = """
    mount -t tmpfs -o size=180k none mnt || exit 9
    "${RUN[@]}"; echo "first $?"; ls -A mnt/out/ihc/parts | grep -c parquet; ls -A mnt/out/ihc mnt/out/ihc/parts | grep -E 'partial|claim'
    mount -o remount,size=50m mnt; "${RUN[@]}"; echo "second $?"; cp -r mnt/out kept
    """
    done = in_a_small_file_system(script, run, tmp_path)
    assert "first 1" in done.stdout, (done.stdout, done.stderr)
    assert "No space left on device); make room, or choose a folder you may write with --out" in done.stderr
    assert "Traceback" not in done.stderr
    assert 0 < int(done.stdout.splitlines()[1]) < 16
    assert done.stdout.splitlines()[2].startswith(str(Path("mnt/out/ihc"))), "half-written files or claims were left"
    assert {name: (tmp_path / "kept" / "ihc" / name).read_bytes() for name in undisturbed[0]} == undisturbed[0]


def test_permission_lost_on_the_way(
    run: Run, undisturbed: tuple[dict[str, bytes], dict, float], tmp_path: Path
) -> None:
    """The file system becomes read-only in the middle of the run."""
    script = """
    mount -t tmpfs -o size=50m none mnt || exit 9
    "${RUN[@]}" & until ls mnt/out/ihc/parts/*.parquet >/dev/null 2>&1; do sleep 0.05; done
    until mount -o remount,ro mnt 2>/dev/null; do :; done
    wait $!; echo "first $?"
    mount -o remount,rw mnt; "${RUN[@]}"; echo "second $?"; cp -r mnt/out kept
    """
    done = in_a_small_file_system(script, run, tmp_path)
    assert "first 1" in done.stdout, (done.stdout, done.stderr)
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert {name: (tmp_path / "kept" / "ihc" / name).read_bytes() for name in undisturbed[0]} == undisturbed[0]


def test_a_slide_that_ends_in_the_middle(cmu: Path, wsiseg: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Cut off: refused in one line. Cut off behind the last pixel of the slide, in its label image: the same cells."""
    whole = cmu.read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: len(whole) // 3])
    status, said = wsiseg("run", tmp_path / "cut.svs", "--out", tmp_path / "out", "--mpp", 0.5)
    assert status == 1
    assert said.count("\n") == 1
    assert "cut.svs" in said
    roi = tmp_path / "roi.json"
    roi.write_text(
        json.dumps(
            {"type": "Polygon", "coordinates": [[[1000, 1000], [1200, 1000], [1200, 1200], [1000, 1200], [1000, 1000]]]}
        )
    )
    (tmp_path / "label.svs").write_bytes(whole[: int(len(whole) * 0.7)])
    shutil.copy(cmu, tmp_path / "whole.svs")
    for name in ("label", "whole"):
        status, said = wsiseg(
            "run", tmp_path / f"{name}.svs", "--out", tmp_path / "out", "--mpp", 0.5, "--roi", roi, "--tile-size", 128
        )
        assert status == 0, said
    a, b = (read_geoparquet(tmp_path / "out" / name / "cells.parquet")[0] for name in ("label", "whole"))
    assert len(a) > 20
    assert [p.wkb for p in a.polygons] == [p.wkb for p in b.polygons]


@pytest.fixture
def discs(monkeypatch: pytest.MonkeyPatch) -> type[DiscModel]:
    """Discs in place of the network."""
    monkeypatch.setattr(planning, "load_model", lambda *_: DiscModel())
    return DiscModel


def write_image(path: Path, width: int, height: int, colour: tuple[int, int, int] = (200, 120, 180)) -> Path:
    image = np.full((height, width, 3), colour, np.uint8)
    image[::7] = np.array(colour) // 2
    Image.fromarray(image).save(path)
    return path


def test_a_reader_that_fails_for_some_tiles(
    demo: tuple[Path, Path], discs: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once: tried again. Always: listed; repaired, only that block is repeated."""
    config = from_mapping(SMALL | {"tiling": {"tile_um": 64, "block_tiles": 1}}, "test")
    whole = segment_slide(demo[0], config, tmp_path / "whole")
    kind = {"openslide": OpenSlideReader, "tiffslide": TiffSlideReader, "image": ImageReader}[whole.slide["reader"]]
    read, broken, hits = kind.read, [True], [0]

    def flaky(self, level, box):
        if box.x0 <= 300 < box.x1 and box.y0 <= 300 < box.y1:
            hits[0] += 1
            if broken[0] or hits[0] == 1:
                raise SlideError(f"{demo[0]}: pixels around (300, 300) cannot be decoded")
        return read(self, level, box)

    monkeypatch.setattr(kind, "read", flaky)
    manifest = segment_slide(demo[0], config, tmp_path / "holes")
    assert manifest.status == "incomplete"
    assert manifest.counts["tiles_failed"] == len(manifest.failures) > 0
    assert all("(300, 300)" in failure for failure in manifest.failures)
    broken[0], hits[0] = False, 0
    manifest = segment_slide(demo[0], config, tmp_path / "holes")
    assert manifest.status == "complete"
    assert 0 < manifest.counts["blocks_resumed"] < manifest.counts["blocks"]
    for name in ("cells.parquet", "cells.geojson.gz"):
        assert Path(manifest.folder, name).read_bytes() == Path(whole.folder, name).read_bytes()


class Cramped(DiscModel):
    """Has memory for some tiles and prompts at a time."""

    def __init__(self, tiles: int, prompts: int, error: Exception) -> None:
        super().__init__()
        self.room, self.error, self.refused = (tiles, prompts), error, 0

    def encode(self, images):
        self._fits(len(images), 0)
        return super().encode(images)

    def decode(self, embeddings, tile, points_xy, **options):
        self._fits(len(points_xy), 1)
        return super().decode(embeddings, tile, points_xy, **options)

    def _fits(self, count: int, what: int) -> None:
        if count > self.room[what]:
            self.refused += 1
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_batch(
    demo: tuple[Path, Path], discs: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    config = from_mapping(SMALL | {"batch_size": 4}, "test")
    whole = segment_slide(demo[0], config, tmp_path / "whole")
    model = Cramped(1, 8, error)
    monkeypatch.setattr(planning, "load_model", lambda *_: model)
    manifest = segment_slide(demo[0], config, tmp_path / "cramped")
    assert 0 < model.refused <= 8, "the batch is halved once and for all, not for each tile"
    assert manifest.status == "complete"
    assert Path(manifest.folder, "cells.parquet").read_bytes() == Path(whole.folder, "cells.parquet").read_bytes()


def test_out_of_memory_to_the_end(demo: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planning, "load_model", lambda *_: Cramped(0, 0, torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(
        RunError, match="out of memory with one tile and 8 prompts at a time; pass a smaller --tile-size"
    ):
        segment_slide(demo[0], from_mapping(SMALL, "test"), tmp_path)
    assert not list(tmp_path.rglob("*.claim"))


def test_other_errors_of_the_network_are_not_taken_for_memory(
    demo: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planning, "load_model", lambda *_: Cramped(0, 0, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        segment_slide(demo[0], from_mapping(SMALL, "test"), tmp_path)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 700), (900, 1), (3, 5), (40, 30), (257, 64)])
def test_tiny_and_thin_slides(wsiseg: Callable[..., tuple[int, str]], tmp_path: Path, width: int, height: int) -> None:
    """Through the real network: nothing falls over, and both files are whole."""
    slide = write_image(tmp_path / "thin.png", width, height)
    status, said = wsiseg("run", slide, "--mpp", 0.5, "--out", tmp_path / "out", "--no-tissue")
    assert status == 0, said
    assert validate_geojson(tmp_path / "out/thin/cells.geojson.gz") == []
    cells, _, note = read_geoparquet(tmp_path / "out/thin/cells.parquet")
    assert note["size_px0"] == [width, height]
    assert len(cells) <= width * height


def test_no_tissue_and_no_cells(wsiseg: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    for name, colour, more in (("blank", (255, 255, 255), ()), ("plain", (225, 170, 200), ("--no-tissue",))):
        Image.new("RGB", (600, 500), colour).save(tmp_path / f"{name}.png")
        status, said = wsiseg("run", tmp_path / f"{name}.png", "--mpp", 0.5, "--out", tmp_path / "out", *more)
        assert status == 0, said
        manifest = json.loads((tmp_path / "out" / name / "manifest.json").read_text())
        assert manifest["status"] == "complete"
        assert manifest["counts"]["cells"] == 0
        assert (manifest["counts"]["blocks"] == 0) == (name == "blank")
        assert validate_geojson(tmp_path / "out" / name / "cells.geojson.gz") == []
        assert len(read_geoparquet(tmp_path / "out" / name / "cells.parquet")[0]) == 0
        assert "0 cells" in said


def test_a_cell_larger_than_the_halo(wsiseg: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """A dark disc of 100 um, tiles of 64 um: no outline of it pretends to be whole, and it is counted."""
    y, x = np.mgrid[:800, :800]
    image = np.where(((x - 400) ** 2 + (y - 400) ** 2 < 100**2)[..., None], (70, 40, 120), (230, 190, 215)).astype(
        np.uint8
    )
    Image.fromarray(image).save(tmp_path / "giant.png")
    status, said = wsiseg(
        "run", tmp_path / "giant.png", "--mpp", 0.5, "--tile-size", 64, "--no-tissue", "--out", tmp_path / "out"
    )
    assert status == 0, said
    cells, _, _ = read_geoparquet(tmp_path / "out/giant/cells.parquet")
    manifest = json.loads((tmp_path / "out/giant/manifest.json").read_text())
    bounds = np.array([p.bounds for p in cells.polygons]).reshape(-1, 4)
    assert ((bounds[:, 2:] - bounds[:, :2]) * 0.5 <= 64 + 2 * 24 + 1).all(), (
        "no outline reaches beyond a tile and its halo"
    )
    assert manifest["counts"]["outlines"] >= len(cells)


def test_thirty_thousand_cells_in_one_tile(
    demo: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cells of 3 um in a square of 0.7 mm, all in one block: they are all kept, and stitching does not choke on them."""
    Image.fromarray(np.full((704, 704, 3), 150, np.uint8)).save(tmp_path / "crowd.tif")
    monkeypatch.setattr(planning, "load_model", lambda *_: DiscModel(spacing_px=16, radius_px=7))
    config = from_mapping({"mpp": 1.0, "tissue": {"enabled": False}, "tiling": {"tile_um": 704}}, "test")
    manifest = segment_slide(tmp_path / "crowd.tif", config, tmp_path / "out")
    assert manifest.counts["blocks"] == 1
    assert manifest.counts["tiles"] == 1
    assert manifest.counts["cells"] > 30_000
    assert manifest.counts["overlapped"] == 0


def test_a_hundred_thousand_outlines_on_top_of_each_other(tmp_path: Path) -> None:
    """The same place again and again, as a broken model would give: one cell stays, in seconds."""
    import shapely

    from wsiseg.config import StitchingConfig
    from wsiseg.records import Cells
    from wsiseg.stitching.stitch import stitch

    rng = np.random.default_rng(0)
    centres = np.repeat(rng.uniform(100, 9900, (2000, 2)), 50, axis=0) + rng.normal(0, 1, (100_000, 2))
    scores = rng.uniform(0.3, 1, 100_000).astype(np.float32)
    cells = Cells(
        polygons=shapely.buffer(shapely.points(centres), 20, quad_segs=4),
        points_xy=centres,
        scores=scores,
        descriptors=np.ones((100_000, 2), np.float16),
    )
    settled, counts = stitch([cells], (10_000, 10_000), 10, StitchingConfig(cluster_size=1000), descriptor_size=2)
    assert counts.outlines == 100_000
    assert 1500 < len(settled) <= 2100


def test_missing_seeds_are_found_before_it_starts(
    wsiseg: Callable[..., tuple[int, str]], demo: tuple[Path, Path], tmp_path: Path
) -> None:
    status, said = wsiseg("run", demo[0], "--seeds", tmp_path / "none.json", "--out", tmp_path / "out")
    assert status == 1
    assert "none.json" in said
    assert not (tmp_path / "out").exists()
