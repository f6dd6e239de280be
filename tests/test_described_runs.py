"""Whole runs with phrases and with examples, by a tiny random SAM 3 that was imported from a folder: they show the plumbing, not accuracy."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Sam3VideoModel"):
    pytest.skip("transformers without SAM 3", allow_module_level=True)

SIDE, MODEL = 336, "tiny-sam3"
TRACKER_SHIFT = 1.5  #: makes its masks small
SETTINGS = """
stain = "he"
[detection]
crowded = 1.0
min_score = 0.05
min_lead = 0.0
[masks]
min_score = 0.0
[cop]
highest_floor = 0.0
[tiling]
block_tiles = 1
"""


def configuration():
    """Of detector and tracker: everything that SAM 3 has, small."""
    width, grid = 32, SIDE // 14
    part = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 48}
    text = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "projection_dim": 16, "num_hidden_layers": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    trunk = {
        "model_type": "sam3_vit_model",
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
        "window_size": 4,
        "global_attn_indexes": [1],
        "pretrain_image_size": 56,
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": trunk,
        "fpn_hidden_size": width,
        "backbone_feature_sizes": [[up * grid, up * grid] for up in (4, 2, 1)],
    }
    detector = {
        "model_type": "sam3",
        "vision_config": vision,
        "text_config": {
            **text,
            **ends,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "model_type": "clip_text_model",
        },
        "geometry_encoder_config": {**part, "num_layers": 1},
        "detr_encoder_config": {**part, "num_layers": 1},
        "detr_decoder_config": {**part, "num_layers": 2, "num_queries": 60},
        "mask_decoder_config": {"hidden_size": width, "num_attention_heads": 4},
    }
    tracker = {
        "model_type": "sam3_tracker_video",
        "image_size": SIDE,
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": width, "image_size": SIDE, "patch_size": 14},
        "mask_decoder_config": {
            "hidden_size": width,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
        "memory_attention_hidden_size": width,
        "memory_attention_feed_forward_hidden_size": 64,
        "memory_attention_num_layers": 1,
        "memory_attention_rope_feat_sizes": [grid, grid],
        "memory_encoder_hidden_size": width,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": width,
        "memory_fuser_embed_dim": width,
        "memory_fuser_intermediate_dim": 64,
    }
    return transformers.Sam3VideoConfig.from_dict(
        {"model_type": "sam3_video", "detector_config": detector, "tracker_config": tracker}
    )


def make_folder(folder):
    """Random weights, changed so that queries differ, scores spread, and masks are small spots."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        model = transformers.Sam3VideoModel(configuration()).eval()
        detector = model.detector_model
        for name, value in model.named_parameters():
            strength = 0.15 if "detector_model.detr_decoder" in name or "mask_decoder" in name else 0.05
            value.add_(strength * torch.randn_like(value))
        decoder, head = detector.detr_decoder, detector.mask_decoder
        decoder.query_embed.weight.normal_(0, 2)
        decoder.reference_points.weight[:, :2].normal_(0, 1)
        decoder.reference_points.weight[:, 2:].normal_(-2, 0.2)
        decoder.presence_head.layer3.bias += 3
        decoder.box_head.layer3.weight *= 0.1
        detector.dot_product_scoring.query_proj.weight *= 20
        # one number of the queries is always 1, so that a bias of the pixels moves the masks' threshold
        last = head.mask_embedder.layers[-1]
        last.weight[0], last.bias[0] = 0, 1
        seen = detector.get_vision_features(torch.randn(1, 3, SIDE, SIDE))
        tokens = torch.tensor([[0, 5, 9, 40, 1]])
        masks = detector(vision_embeds=seen, input_ids=tokens, attention_mask=torch.ones_like(tokens)).pred_masks
        head.instance_projection.bias[0] -= masks.flatten().quantile(0.9)
        # and one of the pixels that the tracker's masks are made of
        points = model.tracker_model.mask_decoder
        for layer in (points.upscale_conv2, points.conv_s0):
            layer.weight[(slice(None), 0) if layer is points.upscale_conv2 else 0], layer.bias[0] = 0, 0
        points.upscale_conv2.bias[0] = 3
        for network in points.output_hypernetworks_mlps:
            network.proj_out.weight *= 30
            network.proj_out.bias *= 30
            network.proj_out.weight[0], network.proj_out.bias[0] = 0, -TRACKER_SHIFT
        model.save_pretrained(folder)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters), "nu", "cl", "nucl"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nn u\nc l\nnu cl\n")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models with that one in it, as ``wsiseg models import`` leaves it."""
    from wsiseg.models.store import import_model

    folder, store = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("models")
    make_folder(folder)
    import_model(folder, MODEL, mpp=1.0, folder=store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSISEG_MODELS", str(store))
        yield store


@pytest.fixture(scope="module")
def command(models, demo, tmp_path_factory):
    """The demo's slide in nine blocks of a tile each: how its types are given -> the arguments of a run."""
    settings = tmp_path_factory.mktemp("settings") / "settings.toml"
    settings.write_text(SETTINGS)
    slide, seeds = demo
    kinds = {
        "text": ["--text", "lymphocyte", "--text", "small round dark nucleus"],
        "exemplar": ["--method", "exemplar", "--seeds", seeds],
    }
    return lambda kind, out: [
        "run",
        slide,
        *kinds[kind],
        "--model",
        MODEL,
        "--config",
        settings,
        "--quiet",
        "--out",
        out,
    ]


@pytest.fixture(scope="module")
def whole(wsiseg, command, tmp_path_factory):
    """Undisturbed runs of one process: kind -> folder."""
    folders = {}
    for kind in ("text", "exemplar"):
        out = tmp_path_factory.mktemp(kind)
        assert wsiseg(*command(kind, out)) == (0, "")
        folders[kind] = out / "ihc"
    return folders


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("cells.parquet", "cells.geojson.gz")}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_cells_have_the_types_that_were_described(whole):
    table = pq.read_table(whole["text"] / "cells.parquet")
    types = Counter(table["cell_type"].to_pylist())
    names = {"lymphocyte", "small round dark nucleus"}
    assert min(types[name] for name in names) > 1
    assert set(types) <= {*names, "unassigned"}
    scores, margins = (np.array(table[name].to_pylist()) for name in ("type_score", "type_margin"))
    assert (scores >= 0.05).all()
    assert (margins <= scores).all()
    assert np.allclose(scores, table["score"].to_pylist())  # the better type is the outline's own
    said = manifest(whole["text"])
    assert said["config"]["method"] == "text"
    assert said["seeds"] == "--text"
    assert said["typing"]["types"]["lymphocyte"]["text"] == ["lymphocyte"]
    assert [w for w in said["warnings"] if "mean mSA of 0.33" in w]
    assert said["counts"]["tiles"] == 9


def test_clicks_become_examples_on_every_tile(whole):
    said = manifest(whole["exemplar"])
    assert sum(said["types"][name] > 0 for name in ("epithelium", "immune", "stroma")) >= 2
    assert said["counts"]["prompts"] > 9  # places that were decoded to choose from
    assert not [w for w in said["warnings"] if "mean mSA" in w]
    assert (whole["exemplar"] / "bank.safetensors").exists()


def test_phrases_are_encoded_once_and_tiles_too(wsiseg, command, models, tmp_path, monkeypatch):
    from wsiseg.models.transformers.detector import Sam3Detector
    from wsiseg.models.transformers.sam3 import Sam3

    calls = Counter()
    for owner, name in ((Sam3Detector, "encode_text"), (Sam3Detector, "answer"), (Sam3, "encode")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, plain=plain, name=name: (calls.update([name]), plain(*a))[1])
    assert wsiseg(*command("text", tmp_path))[0] == 0
    assert calls == {"encode_text": 2, "answer": 18, "encode": 9}


@pytest.mark.parametrize("kind", ["text", "exemplar"])
def test_a_killed_run_goes_on_to_the_same_bytes(wsiseg, command, whole, kind, tmp_path):
    arguments = command(kind, tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "wsiseg", *map(str, arguments)], stdout=subprocess.DEVNULL)
    parts = tmp_path / "ihc/parts"
    while not list(parts.glob("0*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*.parquet")}
    assert 0 < len(done) < 9
    assert wsiseg(*arguments)[0] == 0
    assert files(tmp_path / "ihc") == files(whole[kind])
    assert all((parts / name).stat().st_mtime_ns == then for name, then in done.items())


def test_three_shards_give_the_same_bytes(wsiseg, command, whole, tmp_path):
    for shard in ("2/3", "1/3", "3/3"):
        assert wsiseg(*command("exemplar", tmp_path), "--shard", shard)[0] == 0
    assert wsiseg("merge", tmp_path / "ihc")[0] == 0
    assert files(tmp_path / "ihc") == files(whole["exemplar"])


def test_two_workers_give_the_same_bytes(wsiseg, command, whole, tmp_path):
    assert wsiseg(*command("text", tmp_path), "--workers", 2)[0] == 0
    assert files(tmp_path / "ihc") == files(whole["text"])


def test_described_cells_can_be_typed_by_clicks(wsiseg, whole, demo, tmp_path):
    """Found by phrases, then typed by descriptors; cells that were found by examples of their own clicks are not."""
    for kind, folder in whole.items():
        shutil.copytree(folder, tmp_path / kind)
    table = pq.read_table(whole["text"] / "cells.parquet")
    place = [round(float(table[axis][0].as_py()), 1) for axis in ("x", "y")]
    clicks = tmp_path / "clicks.json"
    clicks.write_text(json.dumps({"version": 1, "types": [{"name": "a", "points": [place]}]}))
    status, output = wsiseg("type", tmp_path / "text", "--seeds", clicks)
    assert status == 0, output
    assert set(manifest(tmp_path / "text")["types"]) == {"unassigned", "a"}
    status, output = wsiseg("type", tmp_path / "exemplar", "--seeds", clicks)
    assert status == 1
    assert "has only cells that looked like its own clicks (--method exemplar)" in output


def test_without_transformers_the_run_ends_in_one_line(wsiseg, command, tmp_path, monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else plain(name, *a)
    )
    status, output = wsiseg(*command("text", tmp_path / "out"))
    assert status == 1
    assert output.count("\n") == 1
    assert (
        "SAM 2.1 and SAM 3 need the package transformers; install it, in the checkout: pip install '.[transformers]'"
        in output
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("phrase", "message"),
    [
        ("w" * 200, "the phrase has 202 tokens with its ends; the model reads 32; shorten it"),
        (" ".join(["abcd"] * 29), "the phrase has 118 tokens with its ends; the model reads 32; shorten it"),
    ],
)
def test_a_phrase_of_too_many_tokens_ends_in_one_line(wsiseg, command, demo, tmp_path, phrase, message):
    arguments = command("text", tmp_path / "out")
    arguments[arguments.index("lymphocyte")] = phrase
    status, output = wsiseg(*arguments)
    assert status == 1
    assert output.count("\n") == 1
    assert f"--text: types[0].text[0]: {message}" in output
    assert not (tmp_path / "out").exists()
