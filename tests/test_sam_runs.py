"""Whole runs with models of the SAM family: a toy checkpoint, imported like anybody's, on real slides."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from shapely import Point
from skimage.data import immunohistochemistry

from wsiseg.config import CopConfig, GridConfig, MaskConfig, RunConfig, TilingConfig
from wsiseg.errors import ConfigError, WeightsError
from wsiseg.formats.geoparquet import read_table
from wsiseg.geometry import Box, Lattice
from wsiseg.models import load_model
from wsiseg.models.sam.instance_decoder import InstanceDecoder
from wsiseg.models.sam.model import SamModel
from wsiseg.models.store import import_model
from wsiseg.models.testing import VIT_TOY, disturb, random_sam
from wsiseg.records import Seeds, SeedType, WindowMasks
from wsiseg.reference.apg_v1 import ApgV1
from wsiseg.reference.chain_of_prompts import chain_image
from wsiseg.reference.micro_sam import ais_image, apg_image
from wsiseg.reference.score_ordered_merge import ScoreMerge
from wsiseg.runs.inputs import resolve
from wsiseg.seeds.bank import find_clicked
from wsiseg.segmentation.decoding import decode, decode_tiles, reaches_border
from wsiseg.segmentation.prompts.grid import grid_points
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.tiling import plan_blocks

if TYPE_CHECKING:
    from pathlib import Path


def spread_maps(decoder: InstanceDecoder, model: SamModel, image: np.ndarray, state: dict[str, torch.Tensor]) -> None:
    """Scale the last layer of ``state`` so that its maps have objects in this image: foreground often, seeds seldom."""
    with torch.inference_mode():
        maps = model.encode(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]).maps[0].flatten(1)
    scale = 2 / maps.std(1)
    state["out_conv.weight"] = state["out_conv.weight"] * scale[:, None, None, None]
    state["out_conv.bias"] = (state["out_conv.bias"] - maps.mean(1)) * scale + torch.tensor([1.0, 1.4, 1.4])


def blotches(decoder: torch.nn.Module) -> None:
    """Make a random mask decoder's masks blotches of some tokens, with logits of some units and predicted IoUs near 0.9, in place."""
    up = decoder.output_upscaling
    for convolution in (up[0], up[3]):  # all pixels of a token alike
        convolution.weight.copy_(convolution.weight.mean((2, 3), keepdim=True).expand_as(convolution.weight))
    up[3].weight[:, 0], up[3].bias[0] = 0, 1  # a constant channel, so that all logits can be shifted
    for mlp in decoder.output_hypernetworks_mlps:
        last = mlp.layers[-1]
        last.weight.mul_(120)
        last.bias.mul_(120)
        last.weight[0], last.bias[0] = 0, -0.3
    decoder.iou_prediction_head.layers[-1].bias.add_(0.9)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder with `toy` (points only) and `toy-maps` (with an instance decoder), both imported."""
    folder = tmp_path_factory.mktemp("models")
    sam = random_sam(VIT_TOY)
    blotches(sam["mask_decoder"])
    torch.manual_seed(0)
    decoder = InstanceDecoder(32).eval()
    disturb(decoder)
    state = {k: v.clone() for k, v in decoder.state_dict().items()}
    image = np.asarray(Image.fromarray(immunohistochemistry()).resize((1024, 1024)))
    spread_maps(decoder, SamModel(sam, decoder, mpp=0.25).ready(torch.device("cpu"), bf16=False), image, state)
    torch.save(sam.state_dict(), folder / "toy.pth")
    torch.save({"model_state": sam.state_dict(), "decoder_state": state}, folder / "toy-maps.pt")
    import_model(folder / "toy.pth", "toy", folder=folder, mpp=0.25)
    import_model(folder / "toy-maps.pt", "toy-maps", folder=folder, mpp=0.25)
    return folder


@pytest.fixture(autouse=True)
def my_models(store, monkeypatch):
    monkeypatch.setenv("WSISEG_MODELS", str(store))


def test_a_slide_runs_with_an_imported_checkpoint(wsiseg, tmp_path):
    """Two runs, and one of them in pieces: the same cells; the manifest says which model, and that it was asked for maps."""
    assert wsiseg("demo", tmp_path)[0] == 0
    (tmp_path / "all.toml").write_text('stain = "he"\n[masks]\nmin_score = 0\n')
    base = ("run", tmp_path / "ihc.tiff", "--model", "toy-maps", "--no-progress", "--config", tmp_path / "all.toml")
    code, output = wsiseg(*base, "--out", tmp_path / "a")
    assert code == 0, output
    manifest = json.loads((tmp_path / "a" / "ihc" / "manifest.json").read_text())
    assert manifest["model"]["name"] == "toy-maps"
    assert manifest["config"]["method"] == "apg"
    assert manifest["counts"]["prompts"] > 10
    assert manifest["counts"]["cells"] > 1
    assert read_table(tmp_path / "a" / "ihc" / "cells.parquet").descriptors.shape[1] == 267
    assert wsiseg(*base, "--out", tmp_path / "b")[0] == 0
    assert (tmp_path / "a" / "ihc" / "cells.parquet").read_bytes() == (
        tmp_path / "b" / "ihc" / "cells.parquet"
    ).read_bytes()


def test_a_run_can_be_typed_without_a_learned_space(wsiseg, tmp_path):
    assert wsiseg("demo", tmp_path)[0] == 0
    (tmp_path / "all.toml").write_text("[masks]\nmin_score = 0\n")
    settings = ("--config", tmp_path / "all.toml", "--no-progress")
    assert wsiseg("run", tmp_path / "ihc.tiff", "--model", "toy-maps", *settings, "--out", tmp_path / "a")[0] == 0
    table = read_table(tmp_path / "a" / "ihc" / "cells.parquet")
    inside = [p.representative_point() for p in table.take(np.arange(2)).polygons]
    types = [{"name": name, "points": [[p.x, p.y]]} for name, p in zip("ab", inside, strict=True)]
    (tmp_path / "s.json").write_text(json.dumps({"version": 1, "types": types}))
    code, output = wsiseg("type", tmp_path / "a" / "ihc", "--seeds", tmp_path / "s.json")
    assert code == 0, output
    counts = json.loads((tmp_path / "a" / "ihc" / "manifest.json").read_text())["types"]
    assert counts["a"] >= 1
    assert counts["b"] >= 1


def test_models_without_maps_take_a_grid(wsiseg, tmp_path):
    assert wsiseg("demo", tmp_path)[0] == 0
    settings = tmp_path / "grid.toml"
    settings.write_text("[grid]\nspacing_um = 40\nmin_quality = 0\nmin_stability = 0\n[masks]\nmin_score = 0\n")
    code, output = wsiseg(
        "run", tmp_path / "ihc.tiff", "--model", "toy", "--out", tmp_path / "a", "--config", settings, "--no-progress"
    )
    assert code == 0, output
    manifest = json.loads((tmp_path / "a" / "ihc" / "manifest.json").read_text())
    assert manifest["config"]["method"] == "amg"
    assert 20 <= manifest["counts"]["prompts"] <= 49  # 256 um at 40 um: 6.4 squared, less where there is no tissue


def test_clicks_lead_to_cells_in_a_model_without_maps(wsiseg, tmp_path):
    """Chain-of-Prompts as the only way in: the click's own cell is there, of its type."""
    assert wsiseg("demo", tmp_path)[0] == 0
    settings = tmp_path / "all.toml"
    settings.write_text("[masks]\nmin_score = 0\n[cop]\nclick_min_score = 0\nclick_reach_um = 100\nmax_hops = 3\n")
    command = (
        "run",
        tmp_path / "ihc.tiff",
        "--model",
        "toy",
        "--seeds",
        tmp_path / "s.json",
        "--config",
        settings,
        "--no-progress",
    )
    for x, y in itertools.product((100, 200, 300, 400), repeat=2):  # the toy's masks are blotches: some are empty
        (tmp_path / "s.json").write_text(json.dumps({"version": 1, "types": [{"name": "a", "points": [[x, y]]}]}))
        code, output = wsiseg(*command, "--out", tmp_path / "a", "--overwrite")
        if "the model finds no nucleus there" not in output:
            break
    assert code == 0, output
    manifest = json.loads((tmp_path / "a" / "ihc" / "manifest.json").read_text())
    assert manifest["config"]["method"] == "cop"
    assert manifest["types"]["a"] >= 1


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (
            "toy",
            ("--method", "apg"),
            "--method apg: toy has no instance decoder; use --method cop with --seeds, or --method amg, or another model",
        ),
        (
            "toy",
            ("--tile-size", "240"),
            "--tile-size, --halo: the model takes tiles of 256 um with a halo of 32 um or more on each side",
        ),
        (
            "toyy",
            (),
            "--model toyy: no such model and no such file; did you mean toy? models here: nuclei-compact, toy, toy-maps; see `wsiseg",
        ),
    ],
)
def test_wrong_requests_are_one_line(wsiseg, tmp_path, model, options, sentence):
    assert wsiseg("demo", tmp_path)[0] == 0
    code, output = wsiseg("run", tmp_path / "ihc.tiff", "--model", model, "--out", tmp_path / "a", *options)
    assert code == 1
    assert sentence in output
    assert "Traceback" not in output
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_is_to_be_imported_first(store):
    with pytest.raises(
        WeightsError, match=r"toy.pth: not a .safetensors file; a checkpoint is converted once, .*wsiseg models import"
    ):
        load_model(str(store / "toy.pth"))


def test_a_checkpoint_with_other_tensors_names_them(store, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(store / "toy.safetensors")
    with safe_open(store / "toy.safetensors", framework="pt") as file:
        metadata = file.metadata()
    del tensors["sam.mask_decoder.iou_token.weight"]
    tensors["sam.mask_decoder.more"] = torch.zeros(1)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(
        WeightsError,
        match=r"1 missing \(first: sam.mask_decoder.iou_token.weight\), 1 unexpected \(first: sam.mask_decoder.more\)",
    ):
        load_model(str(tmp_path / "x.safetensors"))


@pytest.fixture(scope="module")
def toy(store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSISEG_MODELS", str(store))
        return load_model("toy-maps", "cpu")


@pytest.fixture(scope="module")
def encoded(toy):
    image = np.asarray(Image.fromarray(immunohistochemistry()).resize((1024, 1024)))
    with torch.inference_mode():
        return toy.encode(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])


def test_masks_that_reach_their_window_are_asked_for_again(toy, encoded):
    """Every answer is either inside its window or on the whole tile, and each prompt has exactly one."""
    points = np.random.default_rng(0).uniform(0, 1024, (40, 2)).astype(np.float32)
    batches = list(decode(toy, encoded, 0, points, MaskConfig(min_score=0.0, prompts_per_batch=16)))
    crops, whole = [b for b in batches if not b.full_tile], [b for b in batches if b.full_tile]
    assert sum(len(b.predicted_iou) for b in crops)
    assert sum(len(b.predicted_iou) for b in whole)
    for batch in crops:
        assert batch.logits.shape[1:] == (64, 64)
        assert not reaches_border(batch).any()
    for batch in whole:
        assert batch.logits.shape[1:] == (256, 256)
    seen = np.concatenate([b.points_xy.numpy() for b in batches])
    assert sorted(map(tuple, seen)) == sorted(map(tuple, points))


def test_prompts_of_several_tiles_together(toy):
    """Each tile's masks are its own, those on their windows as well as those on the whole tile, in the order of one tile alone."""
    image = np.asarray(Image.fromarray(immunohistochemistry()).resize((1024, 1024)))
    with torch.inference_mode():
        both = toy.encode(torch.from_numpy(np.stack([image, image[:, ::-1]])).permute(0, 3, 1, 2))
    rng = np.random.default_rng(0)
    points = [rng.uniform(0, 1024, (n, 2)).astype(np.float32) for n in (20, 9)]
    config = MaskConfig(min_score=0.0, prompts_per_batch=64)
    for tile, found in enumerate(decode_tiles(toy, both, (0, 1), points, config)):
        expected = list(decode(toy, both, tile, points[tile], config))
        assert {b.full_tile for b in found} == {False, True}
        for whole in (False, True):
            a, b = (WindowMasks.concatenate([m for m in masks if m.full_tile == whole]) for masks in (expected, found))
            assert torch.equal(a.points_xy, b.points_xy)
            torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)


def test_several_answers_to_a_grid_point_come_together(toy, encoded):
    points = np.random.default_rng(1).uniform(0, 1024, (10, 2)).astype(np.float32)
    free = GridConfig(min_quality=0.0, min_stability=0.0)
    batches = list(decode(toy, encoded, 0, points, MaskConfig(min_score=0.0), grid=free))
    seen, counts = np.unique(np.concatenate([b.points_xy.numpy() for b in batches]), axis=0, return_counts=True)
    assert len(seen) == 10
    assert counts.tolist() == [3] * 10
    strict = GridConfig(min_quality=1.0, min_stability=1.0)
    assert (
        sum(len(b.predicted_iou) for b in decode(toy, encoded, 0, points, MaskConfig(min_score=0.0), grid=strict)) == 0
    )


def test_grid_is_one_grid_over_the_slide():
    whole = grid_points(Box(0, 0, 640, 480), 33.0)
    parts = [grid_points(Box(x, y, x + 160, y + 160), 33.0) for y in range(0, 480, 160) for x in range(0, 640, 160)]
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, whole))
    assert len(whole) == 19 * 15  # centres at 16.5, 49.5, ... below 640 and 480


def test_tiles_are_the_models_input(toy):
    blocks = plan_blocks(
        (3000, 2000),
        Lattice(0.25, 0.25),
        TilingConfig(),
        stride_px=16,
        reach_px=toy.reach_px,
        input_px=toy.input_px,
        wanted=lambda *_: True,
    )
    tiles = [t for b in blocks for t in b.tiles]
    assert {(t.outer.width, t.outer.height) for t in tiles} == {(1024, 1024)}
    assert {t.core.x0 - t.outer.x0 for t in tiles} == {128}
    for um in (100.0, 66.0, 70.0, 34.0):
        smaller = TilingConfig(tile_um=um)
        tile = plan_blocks(
            (500, 500), Lattice(0.25, 0.25), smaller, stride_px=16, reach_px=128, input_px=1024, wanted=lambda *_: True
        )[0].tiles[0]
        assert tile.outer.width == 1024
        assert um * 4 <= tile.core.width < um * 4 + 32
        assert tile.core.x0 % 16 == tile.outer.x0 % 16 == 0


def test_method_auto_is_what_the_model_can_do():
    clicks = Seeds((SeedType("a", (200, 0, 0), ((60.0, 60.0),)),), "here")
    phrases = Seeds((SeedType("a", (200, 0, 0), text=("lymphocyte",)),), "here")
    assert resolve(RunConfig(), "m", maps=True, seeds=clicks).method == "apg"
    assert resolve(RunConfig(), "m", maps=False, seeds=clicks).method == "cop"
    assert resolve(RunConfig(), "m", maps=False).method == "amg"
    assert resolve(RunConfig(), "m", maps=False, prompts=("text",), seeds=phrases).method == "text"
    with pytest.raises(ConfigError, match="has no instance decoder"):
        resolve(RunConfig(method="apg"), "m", maps=False, seeds=clicks)


def test_published_forms_run_on_any_shape(toy):
    """Parity with micro-sam's program is shown where that is installed (docs/models.md); here: shapes, frames, and that prompts give objects."""
    image = immunohistochemistry()[:200, :300]
    loose = ScoreMerge(score_threshold=0.0)
    boxes = ApgV1(refine_with_box=True, min_size=10)
    for labels in (
        ais_image(image, toy),
        apg_image(image, toy),
        apg_image(image, toy, boxes),
        apg_image(image, toy, merge=loose),
    ):
        assert labels.shape == (200, 300)
        assert labels.dtype == np.int32
        assert set(np.unique(labels)) == set(range(labels.max() + 1))
    for wrong in (load_model("toy", "cpu"), load_model("nuclei-compact", "cpu")):
        with pytest.raises(ConfigError, match="no instance decoder"):
            apg_image(image, wrong)
    for bad in (image[..., 0], image / 255, np.dstack([image, image[..., :1]])):
        with pytest.raises(ConfigError, match="it must be uint8 RGB"):
            ais_image(bad, toy)


def test_chain_of_prompts_on_one_image_without_maps(store):
    """The published form with the kind of model it was made for."""
    image = immunohistochemistry()
    seeds = Seeds((SeedType("a", (200, 0, 0), ((60.0, 60.0),)),), "here")
    labels, types, points = chain_image(image[:128, :128], mpp=0.5, seeds=seeds, model=load_model("toy", "cpu"))
    assert labels.shape == (256, 256)
    assert len(types) == len(points) == labels.max()
    with pytest.raises(ConfigError, match="more than its input of 1024 px"):
        chain_image(np.tile(image, (2, 2, 1)), mpp=0.5, seeds=seeds, model=load_model("toy", "cpu"))


def test_a_click_inside_a_large_cell_is_that_cell(toy, monkeypatch):
    """Its mask comes last, being asked for again; a small neighbour's comes first."""
    y, x = np.mgrid[:256, :256] * 4 + 2.0

    def told(embeddings, tile, points_xy, *, extras=None, multimask=False, full_tile=False):
        found = real(embeddings, tile, points_xy, full_tile=full_tile)
        radius = [140.0 if p[0] == 520 else 10.0 for p in points_xy.tolist()]
        logits = [r - np.hypot(x - p[0], y - p[1]) for r, p in zip(radius, points_xy.tolist(), strict=True)]
        side = found.logits.shape[-1]
        cut = [
            a[v // 4 : v // 4 + side, u // 4 : u // 4 + side]
            for a, (u, v) in zip(logits, found.origin_xy.tolist(), strict=True)
        ]
        return dataclasses.replace(
            found, logits=torch.tensor(np.stack(cut), dtype=torch.float32), stability=torch.ones(len(radius))
        )

    real = toy.decode
    monkeypatch.setattr(toy, "decode", told)
    monkeypatch.setattr("wsiseg.seeds.bank.apg_points", lambda *_: np.array([[700.0, 520.0]], np.float32))
    image = np.full((1024, 1024, 3), 200, np.uint8)
    click = (520.0, 520.0)
    config = dataclasses.replace(RunConfig(), cop=CopConfig(click_min_score=0.0, click_reach_um=30.0))
    cell = find_clicked(ArrayReader(image, 0.25), toy, click, Lattice(0.25, 0.25), config, "click").cell
    assert cell.polygons[0].area > 50_000
    assert cell.polygons[0].contains(Point(click))
