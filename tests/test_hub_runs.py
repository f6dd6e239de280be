"""Whole runs with SAM 2 and SAM 3: tiny random models, imported from folders as anybody's, on the demo slide."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.data import immunohistochemistry

import wsiseg as package
from wsiseg.config import CopConfig, MaskConfig, RunConfig
from wsiseg.formats.geoparquet import read_table
from wsiseg.geometry import Box, Lattice
from wsiseg.models import load_model
from wsiseg.models.store import import_model
from wsiseg.models.testing import tiny_hub_model
from wsiseg.records import Seeds, SeedType, WindowMasks
from wsiseg.reference.chain_of_prompts import _painted, chain_image
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts.chain_of_prompts import farthest_point_recursion

transformers = pytest.importorskip("transformers")

FILES = ("cells.parquet", "cells.geojson.gz")
MPP = 0.8  # 16 tiles of SAM 3's 280 px, of which the middle counts
SETTINGS = {
    "stain": "ihc",
    "formats": ["parquet", "geojson"],
    "tiling": {"block_tiles": 1},
    "grid": {"spacing_um": 32, "min_quality": 0, "min_stability": 0},
    "masks": {"min_score": 0},
    "cop": {"click_min_score": 0, "click_reach_um": 100, "max_hops": 3},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """``sam2``, ``sam3`` (detector and tracker) and ``detector``, all imported."""
    folder = tmp_path_factory.mktemp("models")
    transformers.utils.logging.disable_progress_bar()
    for name, kind in (("sam2", "sam2_video"), ("sam3", "sam3_video"), ("detector", "sam3")):
        tiny_hub_model(kind).save_pretrained(folder / "hub" / name)
        import_model(folder / "hub" / name, name, mpp=MPP, folder=folder)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(autouse=True)
def my_models(store, monkeypatch):
    monkeypatch.setenv("WSISEG_MODELS", str(store))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums of small products round with the number of threads; workers have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def files_of(out: Path) -> dict[str, bytes]:
    return {name: (out / "ihc" / name).read_bytes() for name in FILES}


def command(demo, store: Path, out: Path, *more: object) -> list[str]:
    start = ("run", demo[0], "--config", store / "settings.json", "--no-progress", "--device", "cpu", "--out", out)
    return [str(x) for x in (*start, *more)]


@pytest.fixture(scope="module")
def finished(one_thread, store, demo, tmp_path_factory, wsiseg) -> Path:
    """A run of SAM 3's tracker from clicks, in one process."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSISEG_MODELS", str(store))
        code, output = wsiseg(*command(demo, store, out, "--model", "sam3", "--method", "cop", "--seeds", demo[1]))
    assert code == 0, output
    return out


def test_clicks_lead_to_cells_of_their_types(finished, store):
    manifest = json.loads((finished / "ihc" / "manifest.json").read_text())
    assert manifest["model"]["name"] == "sam3"
    assert manifest["config"]["method"] == "cop"
    assert manifest["counts"]["cells"] > 5
    assert sum(manifest["types"][name] for name in ("epithelium", "immune", "stroma")) > 0
    table = read_table(finished / "ihc" / "cells.parquet")
    assert table.descriptors.shape[1] == 32 + 11


@pytest.mark.parametrize("model", ["sam2", "sam3"])
def test_a_grid_of_points_finds_cells(store, demo, tmp_path, wsiseg, model):
    """Without clicks the method is ``amg``."""
    code, output = wsiseg(*command(demo, store, tmp_path / "a", "--model", model))
    assert code == 0, output
    manifest = json.loads((tmp_path / "a" / "ihc" / "manifest.json").read_text())
    assert manifest["config"]["method"] == "amg"
    assert manifest["counts"]["cells"] > 5


def test_masks_are_refined_by_boxes_and_neighbours_points(finished, store, demo, tmp_path, wsiseg):
    refined = tmp_path / "refined.json"
    refined.write_text(json.dumps({**SETTINGS, "refinement": {"enabled": True, "agree": 0}}))
    same = ("--model", "sam3", "--method", "cop", "--seeds", demo[1])
    code, output = wsiseg(*command(demo, store, tmp_path / "b", *same), "--config", refined)
    assert code == 0, output
    assert len(read_table(tmp_path / "b" / "ihc" / "cells.parquet")) > 5
    assert files_of(tmp_path / "b") != files_of(finished)


def test_sam_2_takes_clicks_too(store, demo, tmp_path, wsiseg):
    """At one place after the other: a random network's mask may be empty where the click is, or another one lies over it."""
    for x, y in itertools.product((200, 100, 300, 400), repeat=2):
        types = [{"name": "a", "points": [[x, y]]}]
        (tmp_path / "s.json").write_text(json.dumps({"version": 1, "types": types}))
        code, output = wsiseg(
            *command(demo, store, tmp_path / "a", "--model", "sam2", "--seeds", tmp_path / "s.json", "--overwrite")
        )
        assert code == 0, output
        manifest = json.loads((tmp_path / "a" / "ihc" / "manifest.json").read_text())
        if manifest["types"]["a"]:
            break
    assert manifest["config"]["method"] == "cop"
    assert manifest["types"]["a"] >= 1


def test_blocks_of_other_sizes_give_the_same_cells(finished, store, demo, tmp_path, wsiseg):
    settings = tmp_path / "other.json"
    settings.write_text(json.dumps({**SETTINGS, "tiling": {"block_tiles": 3}}))
    code, output = wsiseg(
        *command(demo, store, tmp_path / "a", "--model", "sam3", "--method", "cop", "--seeds", demo[1]),
        "--config",
        settings,
    )
    assert code == 0, output
    ours, other = (read_table(x / "ihc" / "cells.parquet") for x in (finished, tmp_path / "a"))
    assert len(ours) == len(other)
    assert np.array_equal(ours.descriptors, other.descriptors)


def test_three_shards_give_the_same_bytes(finished, store, demo, tmp_path, wsiseg):
    same = ("--model", "sam3", "--method", "cop", "--seeds", demo[1])
    for k in (3, 1, 2):
        code, output = wsiseg(*command(demo, store, tmp_path, *same, "--shard", f"{k}/3"))
        assert code == 0, output
    code, output = wsiseg("merge", tmp_path / "ihc")
    assert code == 0, output
    assert files_of(tmp_path) == files_of(finished)


def test_kill_9_and_two_workers_give_the_same_bytes(finished, store, demo, tmp_path, wsiseg):
    """Killed after some blocks, then the same command with two workers."""
    line = command(demo, store, tmp_path, "--model", "sam3", "--method", "cop", "--seeds", demo[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WSISEG_MODELS": str(store),
        "PYTHONPATH": str(Path(package.__file__).parents[1]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "wsiseg", *line], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and len(list(tmp_path.glob("ihc/parts/*.parquet"))) < 3:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was finished before it was killed"
    made = len(list(tmp_path.glob("ihc/parts/*.parquet")))
    assert 0 < made < 16
    code, output = wsiseg(*line, "--workers", "2")
    assert code == 0, output
    assert files_of(tmp_path) == files_of(finished)
    assert json.loads((tmp_path / "ihc" / "manifest.json").read_text())["counts"]["blocks_resumed"] == made


@pytest.mark.parametrize("method", ["amg", "cop"])
def test_points_for_a_model_without_a_tracker_are_refused(store, demo, tmp_path, wsiseg, method):
    clicks = ("--seeds", demo[1]) if method == "cop" else ()
    code, output = wsiseg(*command(demo, store, tmp_path / "a", "--model", "detector", "--method", method, *clicks))
    assert code == 1
    assert f"Error: --method {method}: detector takes no points; import the whole model of its authors" in output
    assert not (tmp_path / "a").exists()


def test_a_real_slide_runs(store, cmu, tmp_path, wsiseg, monkeypatch):
    """CMU-1, tissue and glass, at the coarsest scale that is allowed: about a hundred tiles."""
    monkeypatch.setenv("WSISEG_MODELS", str(tmp_path))
    import_model(store / "hub" / "sam3", "coarse", mpp=2.0, folder=tmp_path)
    settings = tmp_path / "settings.json"
    settings.write_text(
        json.dumps({**SETTINGS, "stain": "he", "grid": {"spacing_um": 60, "min_quality": 0, "min_stability": 0}})
    )
    line = (
        "run",
        cmu,
        "--model",
        "coarse",
        "--config",
        settings,
        "--no-progress",
        "--device",
        "cpu",
        "--out",
        tmp_path / "a",
    )
    code, output = wsiseg(*line)
    assert code == 0, output
    manifest = json.loads((tmp_path / "a" / cmu.stem / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["counts"]["cells"] > 20


# On one image


@pytest.mark.parametrize("name", ["sam2", "sam3"])
def test_chain_of_prompts_as_published_runs_on_the_models_levels(store, name):
    """The paper's form on F_h and F_l as the paper has them: level 0 and level 2 of the pyramid, for SAM 3 the detector's."""
    model = load_model(name, "cpu")
    image = np.ascontiguousarray(immunohistochemistry()[: model.input_px, : model.input_px])
    config = dataclasses.replace(RunConfig(), stain="he", cop=CopConfig(min_component_um2=20, max_hops=4))
    reference = tiny_hub_model({"sam2": "sam2_video", "sam3": "sam3_video"}[name])
    encoder = reference.vision_encoder if name == "sam2" else reference.detector_model.vision_encoder
    mean, sd = (x.cpu() for x in (model.pixel_mean, model.pixel_sd))
    with torch.inference_mode():
        pixels = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] - mean) / sd
        levels = encoder(pixels).fpn_hidden_states
    high, low = (torch.nn.functional.normalize(levels[k], dim=1)[0].numpy() for k in (0, 2))
    stride = model.input_px / high.shape[2]
    cop = dataclasses.replace(config.cop, gate="product", localise="components")
    for click in itertools.product((45.0, 101.0, 200.0, 250.0), repeat=2):  # one that leads somewhere
        chain = farthest_point_recursion((click[0] / stride, click[1] / stride), high, low, stride * MPP, cop) * stride
        seeds = Seeds(types=(SeedType(name="a", color="#ff0000", points=(click,)),), source="here")
        labels, types, points = chain_image(image, mpp=MPP, seeds=seeds, like="paper", config=config, model=model)
        if len(chain) > 1 and len(types):
            break
    assert len(chain) > 1
    assert labels.shape == (model.input_px, model.input_px)
    assert len(types) == len(points) == labels.max() > 0
    wanted = {tuple(p) for p in np.vstack([click, chain]).astype(np.float32).astype(float).round(2)}
    assert {tuple(p) for p in points.round(2)} <= wanted


def disc(stride: float) -> WindowMasks:
    """A disc of radius 40 px around (130, 110) of the tile, on cells of ``stride`` px in a window that begins at (28, 14)."""
    at = (torch.arange(64) + 0.5) * stride
    away = ((at + 14 - 110)[:, None] ** 2 + (at + 28 - 130) ** 2).sqrt()
    one = torch.ones(1)
    return WindowMasks(
        logits=(40 - away)[None],
        origin_xy=torch.tensor([[28, 14]]),
        mask_stride_px=stride,
        predicted_iou=one,
        stability=one,
        descriptors=torch.ones(1, 4) / 2,
        points_xy=torch.tensor([[130.0, 110.0]]),
    )


@pytest.mark.parametrize("stride", [3.5, 4.0])
def test_outlines_of_masks_whose_cells_are_not_whole_pixels(stride):
    """SAM 3's logits lie 3.5 px apart."""
    cells, _ = trace(disc(stride), Box(1000, 2000, 1280, 2280), Lattice(0.5, 0.5), MaskConfig())
    (polygon,) = cells.polygons
    assert (polygon.centroid.x, polygon.centroid.y) == pytest.approx((1130, 2110), abs=0.1)
    assert polygon.area == pytest.approx(np.pi * 40**2, rel=0.01)


def test_a_mask_is_painted_on_whole_pixels():
    (inside,) = _painted(disc(3.5))
    assert inside.shape == (224, 224)
    y, x = np.nonzero(inside)
    assert (x.mean() + 0.5 + 28, y.mean() + 0.5 + 14) == pytest.approx((130, 110), abs=0.5)
    assert inside.sum() == pytest.approx(np.pi * 40**2, rel=0.03)
