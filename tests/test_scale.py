"""Scale and emptiness: a scale that cannot be meant is refused at once, one that looks wrong is said before the work and after it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

from wsiseg.config import RunConfig, TilingConfig, TissueConfig, check_mpp, from_mapping
from wsiseg.demo import write_demo
from wsiseg.errors import ConfigError, SlideError
from wsiseg.records import SlideInfo
from wsiseg.runs import slide as pipeline
from wsiseg.runs.inputs import read_inputs
from wsiseg.runs.plan import plan_run
from wsiseg.runs.plan_file import RunPlan
from wsiseg.runs.plausibility import DENSITY_MM2, MEDIAN_UM2, implausible
from wsiseg.runs.survey import survey
from wsiseg.segmentation.nuclear_scale import (
    CONTRADICTION,
    DIAMETER_UM,
    LADDER,
    Rung,
    ScaleEstimate,
    choose_scale,
    estimate_scale,
    scale_contradiction,
)
from wsiseg.slide import open_slide
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.stain import find_stain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("mpp", "said"),
    [
        (40, "40 looks like a magnification; 40x is about 0.25 microns per pixel: pass --mpp 0.25"),
        (20, "20 looks like a magnification; 20x is about 0.5 microns per pixel: pass --mpp 0.5"),
        (10, "pass --mpp 1"),
        (250, "250 looks like nanometres; that is 0.25 microns per pixel: pass --mpp 0.25"),
        (3, "too coarse for cells; allowed is 0.05 to 2 .* or pass --force-mpp"),
        (0.02, "too fine for cells"),
        (0, "not allowed"),
        (-0.25, "not allowed"),
        (math.nan, "not allowed"),
        (math.inf, "not allowed"),
    ],
)
def test_a_scale_without_cells_is_refused_with_the_one_that_was_meant(mpp: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_mpp(mpp)
    with pytest.raises(ConfigError, match=f"settings: mpp: .*{said}"):
        from_mapping({"mpp": mpp}, "settings")
    with pytest.raises(ConfigError, match=said):
        open_slide("nowhere.svs", mpp=mpp)


def test_a_forced_scale_is_taken() -> None:
    for mpp in (0.02, 3, 40):
        check_mpp(mpp, force=True)
        assert from_mapping({"mpp": mpp, "force_mpp": True}, "settings").mpp == mpp
    for mpp in (0, math.nan, 250, math.inf):
        with pytest.raises(ConfigError, match="not allowed"):
            check_mpp(mpp, force=True)
    for mpp in (None, 0.05, 0.25, 2):
        check_mpp(mpp)
    assert RunConfig(force_mpp=True).hash() == RunConfig().hash()


@pytest.mark.parametrize(
    "command", [("run", "a.svs"), ("info", "a.svs"), ("seeds", "check", "a.json"), ("run", "--slides", "list.csv")]
)
def test_a_magnification_ends_in_one_line_before_anything_is_loaded(command: tuple[str, ...], tmp_path: Path) -> None:
    """The slide does not even exist, and torch is not imported: it would take seconds."""
    (tmp_path / "list.csv").write_text("path,mpp\na.svs,40\n")
    scale = () if "--slides" in command else ("--mpp", "40")
    script = (
        "import sys\nfrom wsiseg.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command, *scale], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "40 looks like a magnification; 40x is about 0.25 microns per pixel" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["list.csv"]


def test_the_command_line_forces_a_scale_over_a_list_and_a_file(
    wsiseg: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), (243, 243, 243)).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,mpp\na.png,40\n")
    (tmp_path / "c.toml").write_text("mpp = 40\n")
    assert wsiseg("run", "--slides", tmp_path / "list.csv", "--out", tmp_path / "out", "--force-mpp")[0] == 0
    assert wsiseg("run", tmp_path / "a.png", "--config", tmp_path / "c.toml", "--out", tmp_path / "out2")[0] == 1
    assert (
        wsiseg("run", tmp_path / "a.png", "--config", tmp_path / "c.toml", "--out", tmp_path / "out2", "--force-mpp")[0]
        == 0
    )
    (tmp_path / "c.toml").write_text("mpp = 40\nforce_mpp = true\n")
    assert wsiseg("run", tmp_path / "a.png", "--config", tmp_path / "c.toml", "--out", tmp_path / "out3")[0] == 0


def test_doubts_are_said_before_the_work_and_once(
    demo: tuple[Path, Path], wsiseg: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    real = pipeline.segment_all

    def watched(*arguments: object, **options: object) -> None:
        assert said, "the work began before the doubts were said"
        real(*arguments, **options)

    monkeypatch.setattr(pipeline, "segment_all", watched)
    manifest = pipeline.segment_slide(demo[0], RunConfig(mpp=0.3), tmp_path / "a", on_warning=said.append)
    assert any("--mpp 0.3 replaces 0.5 microns per pixel" in warning for warning in said)
    assert tuple(said) == manifest.warnings[: len(said)]
    monkeypatch.undo()
    for arguments in ((), ("--overwrite",)):
        status, output = wsiseg("run", demo[0], "--mpp", 0.3, "--out", tmp_path / "b", *arguments)
        assert status == 0
        assert output.count("--mpp 0.3 replaces 0.5") == 1
    status, output = wsiseg("run", demo[0], "--mpp", 0.3, "--out", tmp_path / "b")
    assert output.count("--mpp 0.3 replaces 0.5") == 1, "a complete run repeats what is doubtful"


def sheet(mpp: float = 0.5, mm2: float = 1.0, tiles: int = 1, roi: str | None = None) -> RunPlan:
    info = SlideInfo(
        path="s.svs",
        reader="image",
        format="png",
        level_sizes=((100, 100),),
        downsamples=(1.0,),
        mpp=mpp,
        mpp_source="--mpp",
    )
    return RunPlan(info, RunConfig(roi=roi), None, {f"{k}": 1 for k in range(tiles)}, "", "", "", 1, mm2)


def test_what_no_tissue_has_is_said_with_the_likely_reason() -> None:
    def said(areas_um2: object, **more: object) -> tuple[str, ...]:
        facts = sheet(**more)  # type: ignore[arg-type]
        return implausible(np.asarray(areas_um2, float) / facts.info.mpp**2, facts)

    assert said(np.full(3000, 30.0)) == ()
    for median in MEDIAN_UM2:
        assert said(np.full(3000, median)) == ()
    assert said(np.full(int(DENSITY_MM2[0]), 30.0)) == ()
    (small,) = said(np.full(3000, 3.0))
    assert small.startswith("the median nuclear area is 3 um2, tissue has 9 to 100")
    assert "is the scale of 0.5 microns per pixel wrong by about 3.1x?" in small
    (large,) = said(np.full(3000, 450.0))
    assert "wrong by about 4x?" in large
    (sparse,) = said(np.full(5, 30.0))
    assert sparse.startswith(
        "only 5 cells per mm2 in 1 mm2 searched, tissue has 95 to 40,000: the scale is wrong (0.5 microns per pixel, --mpp)"
    )
    (dense,) = said(np.full(90_000, 30.0))
    assert dense.startswith("90,000 cells per mm2")
    assert said(np.full(3, 300.0), mm2=0.01) == (), "three cells in a small image say nothing"
    (none,) = said([])
    assert none.startswith(
        "no cell was found in 1 mm2 searched: the scale is wrong (0.5 microns per pixel, --mpp), the slide is blank, not H&E"
    )
    (blank,) = said([], tiles=0, mm2=0.0)
    assert blank.startswith("no tissue was found: the slide is blank, pale or transparent, not brightfield")
    (outside,) = said([], tiles=0, mm2=0.0, roi="r.geojson")
    assert "no tissue in the region of r.geojson" in outside


def test_a_blank_slide_and_one_without_cells_say_so(wsiseg: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """In the manifest and on stderr; the exit status stays 0, for nothing failed."""
    Image.new("RGB", (600, 600), (243, 243, 243)).save(tmp_path / "blank.png")
    Image.new("RGB", (600, 600), (230, 180, 205)).save(tmp_path / "pink.png")
    for name, sentence in (("blank", "no tissue was found"), ("pink", "no cell was found in 0.09 mm2 searched")):
        status, output = wsiseg("run", tmp_path / f"{name}.png", "--mpp", 0.5, "--out", tmp_path / "out")
        assert status == 0, output
        assert f"Warning: {sentence}" in output
        manifest = json.loads((tmp_path / f"out/{name}/manifest.json").read_text())
        assert sum(sentence in warning for warning in manifest["warnings"]) == 1


def rungs(true: float, count: int = 60, diameter: float = DIAMETER_UM) -> list[Rung]:
    """What an ideal network would find: nuclei that look larger the coarser they are taken to be, none where they look far too small or large."""
    out = []
    for mpp in LADDER:
        seen = diameter * mpp / true
        n = count if 0.5 < seen / DIAMETER_UM < 2.5 else 0
        out.append(Rung(mpp, np.full(n, math.pi / 4 * seen**2), np.full(n, 0.7)))
    return out


def test_the_ladder_finds_the_scale_of_usual_nuclei() -> None:
    for true in (0.22, 0.25, 0.35, 0.5, 0.7, 1.0):
        found = choose_scale(rungs(true))
        assert found is not None
        assert found.mpp == pytest.approx(true, rel=0.02)
        assert found.low < true < found.high
    assert choose_scale(rungs(0.5, count=3)) is None, "too few nuclei"
    assert choose_scale(rungs(0.09)) is None, "beyond the ladder"
    assert choose_scale([Rung(mpp, np.empty(0), np.empty(0)) for mpp in LADDER]) is None
    twice = choose_scale(rungs(0.5, diameter=2 * DIAMETER_UM))
    assert twice is not None
    assert twice.mpp == pytest.approx(0.25, rel=0.02)


def test_a_contradiction_is_a_factor_of_two_and_not_of_a_half() -> None:
    estimate = ScaleEstimate(0.5, 0.35, 0.7)
    assert scale_contradiction(0.35, estimate) == scale_contradiction(0.8, estimate) == ()
    (said,) = scale_contradiction(0.25, estimate)
    assert said.startswith(
        "0.25 microns per pixel contradicts the nuclei, which suggest about 0.5 (20x; between 0.35 and 0.7)"
    )
    assert said.endswith(": is the scale wrong by about 2x?")
    assert 1.4 < CONTRADICTION < 2


def test_the_demo_slides_nuclei_say_its_scale(demo: tuple[Path, Path], wsiseg: Callable[..., tuple[int, str]]) -> None:
    with open_slide(demo[0]) as reader:
        found = estimate_scale(find_stain(reader, "auto", RunConfig().tissue.overview_mpp).view(reader))
    assert found is not None
    assert found.mpp == pytest.approx(0.5, rel=0.25)  # 0.40 with these weights
    status, output = wsiseg("info", demo[0])
    assert status == 0
    assert f"mpp by nuclei  about {found.mpp:.2g} (20x; between" in output
    assert "contradicts" not in output
    status, output = wsiseg("info", demo[0], "--no-estimate")
    assert "mpp by nuclei" not in output
    for wrong in (0.1, 2):
        status, output = wsiseg("info", demo[0], "--mpp", wrong)
        # The stain is recognised at the stated scale, so that the view and with it the estimate differ a little.
        said = re.search(f"{wrong} microns per pixel contradicts the nuclei, which suggest about ([0-9.]+) ", output)
        assert said
        assert float(said[1]) == pytest.approx(0.5, rel=0.3)


def test_a_slide_without_scale_gets_a_suggestion(
    demo: tuple[Path, Path], wsiseg: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """The demo's pixels in a file that does not say their size."""
    with tifffile.TiffFile(demo[0]) as tiff:
        Image.fromarray(tiff.series[0].asarray()).save(tmp_path / "scan.png")
    status, output = wsiseg("run", tmp_path / "scan.png", "--out", tmp_path / "out")
    assert status == 1
    assert output.count("\n") == 1
    assert "scan.png: no microns per pixel in the file; its nuclei suggest about 0." in output
    assert "(20x; between" in output
    assert "pass --mpp 0." in output
    assert not (tmp_path / "out").exists()
    Image.new("RGB", (600, 600), (243, 243, 243)).save(tmp_path / "blank.png")
    status, output = wsiseg("run", tmp_path / "blank.png", "--out", tmp_path / "out")
    assert status == 1
    assert "no microns per pixel in the file, and too few nuclei to estimate it; pass --mpp" in output


def discs(mpp: float, side_um: float = 320.0) -> np.ndarray:
    """Violet discs of 6 um on pink, 2500 per mm2: what a synthetic slide has for nuclei."""
    rng = np.random.default_rng(0)
    scale, side = 4, round(side_um / mpp)
    image = Image.new("RGB", (side * scale, side * scale), (232, 190, 215))
    draw = ImageDraw.Draw(image)
    radius = 3.0 / mpp * scale
    for x, y in rng.uniform(0, side * scale, (int(2500 * (side_um / 1000) ** 2), 2)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(95, 60, 130))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_synthetic_nuclei_say_their_scale(mpp: float) -> None:
    found = estimate_scale(ArrayReader(discs(mpp), 1.0))
    assert found is not None
    assert found.mpp == pytest.approx(mpp, rel=0.3)


def test_blank_and_fluorescent_slides_give_no_estimate() -> None:
    blank = np.full((600, 600, 3), 243, np.uint8)
    started = time.perf_counter()
    assert estimate_scale(ArrayReader(blank, 1.0)) is None
    glow = 255 - discs(0.5)
    glow[glow < 130] = 5
    assert estimate_scale(ArrayReader(np.minimum(glow, 40), 1.0)) is None
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("name", "mpp", "within"),
    [("CMU-1-Small-Region.svs", 0.499, 0.15), ("TCGA-CR-7395-01A-01-TS1.svs", 1.0, 0.25)],
    ids=["CMU", "TCGA"],
)
def test_real_slides_say_their_scale(shared_data: Path, name: str, mpp: float, within: float) -> None:
    with open_slide(shared_data / "slides" / name, require_mpp=False) as reader:
        found = estimate_scale(reader)
    assert found is not None
    assert found.mpp == pytest.approx(mpp, rel=within)


def test_a_real_slide_without_scale_is_refused_with_a_suggestion(
    shared_data: Path, wsiseg: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, output = wsiseg("run", shared_data / "slides/TCGA-CR-7395-01A-01-TS1.svs", "--out", tmp_path / "out")
    assert status == 1
    assert "its nuclei suggest about" in output
    assert "(10x; between" in output


def test_a_slide_too_coarse_for_cells_says_so_once(shared_data: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    status, output = wsiseg("info", shared_data / "slides/camelyon_overview_multiframe.dcm")
    assert status == 0
    assert output.count("too coarse for cells") == 1


def test_a_missing_scale_is_a_slide_error(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (243, 243, 243)).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match="no microns per pixel"):
        pipeline.segment_slide(tmp_path / "a.png", RunConfig(), tmp_path / "out")


def clicks(folder: Path, *points: tuple[float, float], **more: object) -> Path:
    path = folder / "clicks.json"
    path.write_text(json.dumps({"version": 1, "types": [{"name": "a", "points": [list(p) for p in points], **more}]}))
    return path


def half_glass(folder: Path) -> Path:
    """Tissue on the left, glass on the right, at 0.5 um per px."""
    image = np.full((600, 1200, 3), 243, np.uint8)
    image[:, :600] = discs(0.5, 300.0)
    path = folder / "half.tiff"
    tifffile.imwrite(
        path,
        image,
        photometric="rgb",
        tile=(256, 256),
        resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    return path


def test_seeds_check_finds_clicks_on_glass(wsiseg: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """What `run` would refuse is refused here, without a model; tissue within a click's reach is enough, whatever it is."""
    slide = half_glass(tmp_path)
    status, output = wsiseg("seeds", "check", clicks(tmp_path, (300, 300), (605, 300)), "--slide", slide)
    assert status == 0, output
    assert "a: 2 clicks" in output
    status, output = wsiseg(
        "seeds", "check", clicks(tmp_path, (300, 300), (900, 300), negative=[[1000, 10]]), "--slide", slide
    )
    assert status == 1
    assert "Warning: " in output
    assert "types[0].negative[0] = [1000, 10]: on glass, no tissue within 4 um" in output
    assert "types[0].points[1] = [900, 300]: on glass" in output.splitlines()[-1]
    assert "points[0]" not in output
    status, output = wsiseg("run", slide, "--seeds", clicks(tmp_path, (900, 300)), "--out", tmp_path / "out")
    assert status == 1
    assert "types[0].points[0] = [900, 300]: on glass, no tissue within 4 um" in output
    Image.new("RGB", (64, 64), (243, 243, 243)).save(tmp_path / "a.png")
    status, output = wsiseg("seeds", "check", clicks(tmp_path, (30, 30)), "--slide", tmp_path / "a.png")
    assert status == 0
    assert "Warning: the slide has no microns per pixel, so clicks on glass are not found; pass --mpp" in output


def test_other_clicks_on_the_same_cells_name_the_command_for_that(
    demo: tuple[Path, Path], wsiseg: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    slide, seeds = demo
    assert wsiseg("run", slide, "--out", tmp_path / "out")[0] == 0
    status, output = wsiseg("run", slide, "--seeds", seeds, "--out", tmp_path / "out")
    assert status == 1
    assert output.count("\n") == 1
    command = f"wsiseg type {tmp_path / 'out' / 'ihc'} --seeds {seeds}"
    assert f"`{command}`" in output
    assert "--overwrite" in output
    assert wsiseg(*command.split()[1:])[0] == 0
    status, output = wsiseg("run", slide, "--seeds", seeds, "--out", tmp_path / "out", "--tile-size", 64)
    assert status == 1
    assert f"`{command}`" not in output, "other tiles are other parts: typing again is not enough"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sam-vit-b", "not downloaded yet; fetch it once with `wsiseg models download sam-vit-b`"),
        ("vit-b-histopathology", "`wsiseg models download vit-b-histopathology`"),
        ("nuclei-compct", "did you mean nuclei-compact? "),
        ("sam_vit_b", "did you mean sam-vit-b? "),
        ("resnet", "no such model"),
    ],
)
def test_a_model_that_is_not_here_is_helped_with(
    name: str,
    said: str,
    demo: tuple[Path, Path],
    wsiseg: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WSISEG_MODELS", str(tmp_path / "models"))
    for arguments in (("run", demo[0], "--model", name, "--out", tmp_path / "out"), ("models", "show", name)):
        status, output = wsiseg(*arguments)
        assert status == 1
        assert said in output
        assert ("did you mean" in output) == ("did you mean" in said)


def test_an_error_of_a_list_is_printed_once(
    demo: tuple[Path, Path], wsiseg: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text(f"path\n{demo[0]}\nabsent.svs\n")
    status, output = wsiseg("run", "--slides", tmp_path / "list.csv", "--out", tmp_path / "out")
    assert status == 3
    assert output.count("no such file") == 1
    assert "no such file" in (tmp_path / "out/summary.csv").read_text()


def test_numbers_in_sentences_agree_with_their_nouns(
    demo: tuple[Path, Path], wsiseg: Callable[..., tuple[int, str]]
) -> None:
    output = wsiseg("info", demo[0], "--no-estimate")[1]
    assert "in 1 block\n" in output


def test_info_counts_the_tiles_that_a_run_plans(tmp_path: Path) -> None:
    """A tile of 30.1 um is 121 px, and 128 on the model's stride: 81 tiles or 64 on this slide."""
    slide, _ = write_demo(tmp_path / "demo")
    config = RunConfig(tiling=TilingConfig(tile_um=30.1), tissue=TissueConfig(enabled=False))
    facts = survey(str(slide), estimate=False, config=config)
    prepared = plan_run(read_inputs(str(slide), config), tmp_path / "parts")
    prepared.context.reader.close()
    planned = sum(prepared.plan.tiles.values())
    assert (facts.tiles, facts.tile_um) == (planned, 32)
    assert facts.lines()["tiles"][0].startswith(f"{planned} of 32 um, in ")
