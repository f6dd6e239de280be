"""Wrong input ends in one line, without a traceback and with nothing written."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

from wsiseg import __main__
from wsiseg.cli import main
from wsiseg.cli.imports import without_collection
from wsiseg.errors import ConfigError
from wsiseg.formats.geoparquet import read_geoparquet

if TYPE_CHECKING:
    from pathlib import Path


def wsiseg(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def complains(out: Path, sentence: str, *arguments: object, code: int = 1) -> None:
    """The command fails in one line that holds ``sentence``, and ``out`` does not come into being."""
    status, output = wsiseg(*arguments, "--out", out)
    assert status == code, output
    lines = [line for line in output.splitlines() if line.strip()]
    assert "Traceback" not in output
    assert sentence in lines[-1], output
    if code == 1:
        assert len(lines) == 1, output
    assert not out.exists()


def seeds_file(folder: Path, content: object) -> Path:
    path = folder / "seeds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def types(*points: tuple[float, float], name: str = "a", **more: object) -> dict[str, object]:
    return {"version": 1, "types": [{"name": name, "points": [list(p) for p in points]}], **more}


def test_the_demo_runs(tmp_path: Path) -> None:
    """README's main job: write the demo, run the command that it prints, get typed cells."""
    status, line = wsiseg("demo", tmp_path / "demo")
    assert status == 0
    command = line.split()
    assert command[0] == "wsiseg"
    status, output = wsiseg(*command[1:])
    assert status == 0, output
    manifest = json.loads((tmp_path / "demo/out/ihc/manifest.json").read_text())
    assert manifest["types"]["epithelium"] >= 10
    assert manifest["types"]["stroma"] >= 50
    again, _ = wsiseg("demo", tmp_path / "demo")
    assert again == 0


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent.svs", None, "absent.svs"),
        ("text.svs", b"this is not a slide\n" * 50, "text file, not a slide"),
        ("empty.svs", b"", "empty"),
    ],
)
def test_slides_that_are_none(name: str, content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    complains(tmp_path / "out", sentence, "run", path)


def test_truncated_slide(cmu: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.svs"
    path.write_bytes(cmu.read_bytes()[:300_000])
    complains(tmp_path / "out", "cut.svs", "run", path)


def test_slide_without_mpp(shared_data: Path, tmp_path: Path) -> None:
    complains(tmp_path / "out", "--mpp", "run", shared_data / "slides/TCGA-CR-7395-01A-01-TS1.svs")


def test_slide_too_coarse_for_cells(shared_data: Path, tmp_path: Path) -> None:
    complains(tmp_path / "out", "too coarse for cells", "run", shared_data / "slides/camelyon_overview_multiframe.dcm")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "empty"),
        ("{", "JSON"),
        ({"version": 1, "types": [{"name": "a", "points": [[10, 10]], "colour": "#fff"}]}, "colour"),
        (types((-5, 10)), "types[0].points[0]"),
        (types((5000, 10)), "512"),
        (
            {"version": 1, "types": [{"name": "a", "points": [[10, 10]]}, {"name": "A", "points": [[20, 20]]}]},
            "types[1]",
        ),
        (types((10, 10), slide="other.svs"), "other.svs"),
        (types((23, 335)), "on glass, no tissue within 4 um"),
        ({"version": 1, "types": []}, "types"),
    ],
    ids=[
        "empty",
        "not json",
        "unknown key",
        "negative",
        "outside",
        "duplicate names",
        "other slide",
        "glass",
        "no types",
    ],
)
def test_seeds_that_cannot_be_used(content: object, sentence: str, demo: tuple[Path, Path], tmp_path: Path) -> None:
    complains(tmp_path / "out", sentence, "run", demo[0], "--seeds", seeds_file(tmp_path, content))


def test_a_click_where_no_nucleus_is_found_counts(demo: tuple[Path, Path], tmp_path: Path) -> None:
    """With a threshold that no mask reaches, every click is doubtful: it is said, and the mask decoded from it is a cell of its type."""
    (tmp_path / "strict.toml").write_text("[cop]\nclick_min_score = 1\n[masks]\nmin_score = 1\n")
    x, y = json.loads(demo[1].read_text())["types"][0]["points"][0]
    file = seeds_file(tmp_path, types((x, y)))
    out = tmp_path / "out" / demo[0].stem
    status, output = wsiseg(
        "run", demo[0], "--seeds", file, "--config", tmp_path / "strict.toml", "--out", tmp_path / "out"
    )
    assert status == 0, output
    doubt = f"{file}: types[0].points[0] = [{x:g}, {y:g}]: the model finds no nucleus there; the mask decoded there (score 0."
    assert output.count(f"Warning: {doubt}") == 1
    cells, typing, _ = read_geoparquet(out / "cells.parquet")
    assert [typing.names[code] for code in typing.codes] == ["a"]
    assert np.hypot(*(cells.points_xy[0] - (x, y))) < 0.01
    assert sum(doubt in warning for warning in json.loads((out / "manifest.json").read_text())["warnings"]) == 1


def test_a_click_on_which_nothing_can_be_outlined_types_by_its_surroundings(demo: tuple[Path, Path]) -> None:
    from wsiseg.config import CopConfig, MaskConfig, RunConfig
    from wsiseg.geometry import Lattice
    from wsiseg.models import load_model
    from wsiseg.records import Seeds, SeedType
    from wsiseg.seeds.bank import build_bank
    from wsiseg.slide import open_slide

    point = tuple(json.loads(demo[1].read_text())["types"][0]["points"][0])
    strict = RunConfig(cop=CopConfig(click_min_score=1.0), masks=MaskConfig(min_area_um2=5000.0))
    said: list[str] = []
    model = load_model("nuclei-compact", "cpu")
    with open_slide(demo[0]) as reader:
        seeds = Seeds((SeedType("a", (1, 2, 3), (point,), (point,)),), "s.json")
        lattice = Lattice(reader.info.mpp, model.mpp)
        bank = build_bank(reader, model, seeds, lattice, strict, chains=False, on_warning=said.append)
    assert ["its surroundings are used for typing, and no cell is outlined" in sentence for sentence in said] == [
        True,
        True,
    ]
    assert [sentence.partition(" = ")[0] for sentence in said] == [
        "s.json: types[0].points[0]",
        "s.json: types[0].negative[0]",
    ]
    assert len(bank.cells) == 0
    np.testing.assert_allclose(np.linalg.norm(bank.types[0].clicked, axis=1), 1, atol=1e-2)


def test_types_without_a_click_and_with(demo: tuple[Path, Path], tmp_path: Path) -> None:
    """By `run` and by `type`, the same; clicks take the place of the classes that they cover."""
    run = tmp_path / "out" / demo[0].stem
    own = "the types are the model's own (lymphocyte, tumour or epithelial, stromal), without a click"

    def types() -> tuple[str, ...]:
        _, typing, _ = read_geoparquet(run / "cells.parquet")
        return tuple(typing.names[code] for code in typing.codes)

    status, output = wsiseg("run", demo[0], "--known-types", "--out", tmp_path / "out")
    assert status == 0, output
    assert output.count(f"Warning: {own}") == 1
    first = types()
    assert {"lymphocyte", "stromal"} <= set(first) <= {"lymphocyte", "tumour or epithelial", "stromal", "unassigned"}
    assert not (run / "bank.safetensors").exists()
    status, output = wsiseg("type", run, "--seeds", demo[1])
    assert status == 0, output
    assert set(types()) <= {"epithelium", "immune", "stroma", "unassigned"}
    assert (run / "bank.safetensors").exists()
    status, output = wsiseg("type", run, "--known-types")
    assert status == 0, output
    assert own in output
    assert types() == first
    assert not (run / "bank.safetensors").exists()


def test_a_model_without_types_of_its_own_is_refused_for_them() -> None:
    from wsiseg.runs.inputs import require_known_types

    with pytest.raises(ConfigError, match="--known-types: vit_b knows no types by itself; leave the option out"):
        require_known_types("vit_b", None)


def test_other_wrong_options(demo: tuple[Path, Path], tmp_path: Path) -> None:
    out, slide = tmp_path / "out", demo[0]
    complains(out, "No such file", "run", slide, "--seeds", tmp_path / "absent.json")
    complains(out, "mpp: 0 is not allowed", "run", slide, "--mpp", 0)
    complains(out, "no such model", "run", slide, "--model", "sam9")
    complains(out, "not a device", "run", slide, "--device", "gpu7")
    complains(out, "tile_um is 3", "run", slide, "--tile-size", 3)
    complains(out, "unknown format 'shp'; allowed are geojson, parquet", "run", slide, "--format", "shp")
    complains(out, "needs clicks", "run", slide, "--method", "cop")
    complains(out, "'magic' is not one of", "run", slide, "--method", "magic", code=2)
    complains(out, "No such option", "run", slide, "--sedes", "x", code=2)
    broken = tmp_path / "w.safetensors"
    broken.write_bytes(b"garbage")
    complains(out, "not a readable safetensors file", "run", slide, "--model", broken)


def test_folders_that_cannot_be_used(demo: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, output = wsiseg("run", demo[0], "--out", tmp_path / "file")
    assert status == 1
    assert "--out" in output
    status, output = wsiseg("run", demo[0], "--out", "/proc/wsiseg")
    assert status == 1
    assert "cannot be written" in output
    (tmp_path / "out/ihc").mkdir(parents=True)
    (tmp_path / "out/ihc/notes.txt").write_text("mine")
    status, output = wsiseg("run", demo[0], "--out", tmp_path / "out")
    assert status == 1
    assert "holds files but no manifest.json of wsiseg" in output
    assert [p.name for p in (tmp_path / "out/ihc").iterdir()] == ["notes.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(demo: tuple[Path, Path], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    status, output = wsiseg("run", demo[0], "--out", locked)
    assert status == 1
    assert "cannot be written (Permission denied)" in output


def test_another_configuration_is_not_replaced_unasked(demo: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert wsiseg("run", demo[0], "--out", out)[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    status, output = wsiseg("run", demo[0], "--out", out, "--tile-size", 64)
    assert status == 1
    assert "--overwrite" in output
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert wsiseg("run", demo[0], "--out", out, "--tile-size", 64, "--overwrite")[0] == 0
    manifest = out / "ihc" / "manifest.json"
    status, output = wsiseg(
        "run", demo[0], "--out", out, "--config", manifest
    )  # the manifest's own configuration is the same run
    assert status == 0
    assert "already complete" in output
    (out / "ihc" / "cells.parquet").unlink()
    assert wsiseg("run", demo[0], "--out", out, "--config", manifest)[0] == 0
    assert json.loads(manifest.read_text())["counts"]["blocks_resumed"] == 1


def test_two_slides_of_one_name_and_one_bad_slide(demo: tuple[Path, Path], tmp_path: Path) -> None:
    twin = tmp_path / "elsewhere" / "ihc.tiff"
    twin.parent.mkdir()
    twin.write_bytes(demo[0].read_bytes())
    status, output = wsiseg("run", demo[0], tmp_path / "absent.svs", twin, "--out", tmp_path / "out")
    assert status == 3
    assert "absent.svs" in output
    folders = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert len(folders) == 2
    assert folders[0] == "ihc"
    assert folders[1].startswith("ihc-")


def test_a_run_killed_at_its_very_start_goes_on(demo: tuple[Path, Path], tmp_path: Path) -> None:
    """Only an empty parts folder and a half-written file are there: no reason to refuse."""
    (tmp_path / "out/ihc/parts").mkdir(parents=True)
    (tmp_path / "out/ihc/.manifest.json.host.1.ab.partial").write_text("{")
    status, output = wsiseg("run", demo[0], "--out", tmp_path / "out")
    assert status == 0, output


def test_a_foreign_manifest_is_not_ours(demo: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out/ihc").mkdir(parents=True)
    (tmp_path / "out/ihc/manifest.json").write_text('{"slide": "x"}')
    status, output = wsiseg("run", demo[0], "--out", tmp_path / "out")
    assert status == 1
    assert "no manifest.json of wsiseg" in output


def test_damaged_pages_of_a_part_are_made_again(demo: tuple[Path, Path], tmp_path: Path) -> None:
    """The footer is whole, the pages are not."""
    assert wsiseg("run", demo[0], "--out", tmp_path / "out")[0] == 0
    (part,) = (tmp_path / "out/ihc/parts").glob("*.parquet")
    good = part.read_bytes()
    middle = len(good) // 3
    part.write_bytes(good[:middle] + bytes(b ^ 255 for b in good[middle : middle + 64]) + good[middle + 64 :])
    (tmp_path / "out/ihc/cells.parquet").unlink()  # else there is nothing to do
    status, output = wsiseg("run", demo[0], "--out", tmp_path / "out")
    assert status == 0, output
    assert part.read_bytes() == good


def test_two_types_may_not_click_one_cell(demo: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(demo[1].read_text())
    x, y = content["types"][1]["points"][0]
    content["types"][0]["points"].append([x + 1, y + 1])
    last = len(content["types"][0]["points"]) - 1
    complains(
        tmp_path / "out",
        f"hits the same cell as types[0].points[{last}], of another type",
        "run",
        demo[0],
        "--seeds",
        seeds_file(tmp_path, content),
    )


def test_a_blank_slide_gives_empty_files(tmp_path: Path) -> None:
    import geopandas
    import numpy as np
    from PIL import Image

    from wsiseg.formats.geojson import validate_geojson

    Image.fromarray(np.full((600, 600, 3), 243, np.uint8)).save(tmp_path / "blank.png")
    status, output = wsiseg("run", tmp_path / "blank.png", "--mpp", 0.5, "--out", tmp_path / "out")
    assert status == 0, output
    assert len(geopandas.read_parquet(tmp_path / "out/blank/cells.parquet")) == 0
    assert validate_geojson(tmp_path / "out/blank/cells.geojson.gz") == []


def test_a_tile_that_cannot_be_read_is_listed(
    demo: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 3 and a sentence; the same command reads just the missing block again and then gives the undisturbed bytes."""
    from wsiseg.errors import SlideError
    from wsiseg.segmentation import blocks as segmenting

    arguments = ("run", demo[0], "--tile-size", 64, "--no-tissue")
    assert wsiseg(*arguments, "--out", tmp_path / "good")[0] == 0
    real = segmenting.read_region

    def failing(reader, box, lattice):
        if box.x0 < 0 and box.y0 < 0:
            raise SlideError("slide: a tile is damaged")
        return real(reader, box, lattice)

    monkeypatch.setattr(segmenting, "read_region", failing)
    status, output = wsiseg(*arguments, "--out", tmp_path / "holes")
    assert status == 3
    assert "Missing: slide: a tile is damaged" in output
    assert "1 of 16 tiles is missing" in output
    tiles = json.loads((tmp_path / "holes/ihc/manifest.json").read_text())["tiles"]
    assert tiles == {
        "block_tiles": 4, "failed_px0": [[0, 0]], "missing_blocks": [], "origin_px0": [0, 0], "side_px0": 128
    }  # fmt: skip
    assert "missing tiles are orange" in (tmp_path / "holes/ihc/report.html").read_text()
    monkeypatch.undo()
    assert wsiseg(*arguments, "--out", tmp_path / "holes")[0] == 0
    assert "missing tiles are orange" not in (tmp_path / "holes/ihc/report.html").read_text()
    for name in ("cells.parquet", "cells.geojson.gz"):
        assert (tmp_path / "holes/ihc" / name).read_bytes() == (tmp_path / "good/ihc" / name).read_bytes()


def test_doctor_tells_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full temporary folder and a torch that cannot be loaded are lines with a remedy; the checks after them still run."""

    def full(_folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("wsiseg.demo.write_demo", full)
    monkeypatch.setitem(sys.modules, "torch", None)
    status, output = wsiseg("doctor")
    assert status == 1
    lines = output.splitlines()
    assert next(line for line in lines if line.startswith("FAIL  temporary folder")).endswith("No space left on device")
    assert any("make room in it" in line for line in lines)
    assert any(line.startswith("FAIL  GPU") and "torch" in line for line in lines)
    assert any(line.startswith("ok    disk") for line in lines)


def test_info_and_seeds_check_and_doctor(demo: tuple[Path, Path]) -> None:
    status, output = wsiseg("info", demo[0])
    assert status == 0
    assert "512 x 512 px" in output
    assert "0.5 um" in output
    status, output = wsiseg("info", demo[0], "--json")
    facts = json.loads(output)
    assert facts["size_px"] == [512, 512]
    assert facts["levels"][1] == {"width_px": 256, "height_px": 256, "downsample": 2.0}
    assert facts["mpp"] == 0.5
    assert facts["mpp_by_nuclei"]["low"] <= facts["mpp_by_nuclei"]["mpp"] <= facts["mpp_by_nuclei"]["high"]
    assert facts["tissue_mm2"] == pytest.approx(512 * 512 * 0.25 / 1e6)
    assert facts["tiles"] >= 1
    status, output = wsiseg("seeds", "check", demo[1], "--slide", demo[0])
    assert status == 0
    assert "epithelium: 4 clicks" in output
    status, output = wsiseg("doctor")
    assert status == 0, output
    assert "model nuclei-compact" in output


def test_quiet_in_a_pipe(demo: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing but the result on stdout, nothing on stderr, no bar."""
    command = [sys.executable, "-m", "wsiseg", "run", str(demo[0]), "--stain", "ihc", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    first, *rest = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'out' / 'ihc'}: ")
    assert all(line.startswith("  ") for line in rest)  # the summary
    assert done.stdout.isprintable() or not set(done.stdout) & {"\r", "\x1b"}


@pytest.mark.parametrize(("ending", "status", "last"), [("sys.exit(3)", 3, ""), ("1 / 0", 1, "taken apart\n")])
def test_a_process_ends_by_its_handlers_and_without_taking_its_modules_apart(
    ending: str, status: int, last: str
) -> None:
    """What was registered to be done at the end is done and all output is out; only after a fault of ours Python ends as it always does."""
    script = f"""
import atexit, sys
from wsiseg import __main__, cli

class Loud:
    def __del__(self):
        sys.__stdout__.write("taken apart\\n")

loud = Loud()

def main():
    atexit.register(print, "handler")
    print("output", end=" ")
    {ending}

cli.main = main
__main__.run()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "output handler\n" + last)


def test_garbage_is_collected_again_after_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an import raises; and nothing changes where torch is there already, or garbage was not collected before."""
    frozen = gc.get_freeze_count()
    monkeypatch.setitem(sys.modules, "torch", sys)
    with without_collection():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with contextlib.suppress(ImportError), without_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        gc.disable()
        with without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_that_wait_sleep_soon_unless_somebody_chose_otherwise(chosen: dict[str, str]) -> None:
    script = """
import os
from wsiseg import __main__, cli

cli.main = lambda: print({k: v for k, v in os.environ.items() if k in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")})
__main__.run()
"""
    rest = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=rest | chosen)
    assert done.stdout.strip() == str(chosen or {"GOMP_SPINCOUNT": __main__.SPINS})
