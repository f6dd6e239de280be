"""SAM 2 and SAM 3 the fast way, against transformers' own forward on tiny random models of each class."""

from __future__ import annotations

import copy
import dataclasses
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from wsiseg.errors import WeightsError
from wsiseg.models.testing import tiny_hub_model
from wsiseg.models.transformers.folders import HALVES, IMAGENET, fit
from wsiseg.models.transformers.networks import library
from wsiseg.models.transformers.recipe import Recipe
from wsiseg.models.transformers.sam3 import FPN
from wsiseg.models.transformers.trunks import vit_features
from wsiseg.records import PromptExtras

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
tiny = lru_cache(tiny_hub_model)  #: a test that changes one takes a copy


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def recipe_of(model) -> Recipe:
    statistics = IMAGENET if model.config.model_type.startswith("sam2") else HALVES
    mean, sd = (tuple(255 * x for x in value) for value in statistics)
    return Recipe(config=model.config.to_dict(), pixel_mean=mean, pixel_sd=sd)


def ours(model, *, bf16: bool = False):
    """The model as wsiseg loads it, with the same weights."""
    network, tensors, _ = fit(recipe_of(model), model.state_dict(), Path("here"))
    network.compute_constants()
    network.load_state_dict({k: v.clone() for k, v in tensors.items()}, assign=True)
    return network.ready(CPU, bf16=bf16)


def tracker_of(model):
    """transformers' model for points with the weights of ``model``.

    Of a neck with four levels it adds the embedding for "no memory" to the coarsest, which its decoder never sees; ``Sam3VideoModel`` adds it to
    that of the image tokens. So the model here has three.
    """
    if model.config.model_type == "sam2":
        return model
    content = model.config.to_dict()
    content = content.get("tracker_config", content)
    content["vision_config"]["scale_factors"] = [4.0, 2.0, 1.0]
    tracker = library().Sam3TrackerModel(library().Sam3TrackerConfig.from_dict(content)).eval()
    state = {}
    for name, value in model.state_dict().items():
        plain = name.replace("detector_model.vision_encoder.backbone", "vision_encoder.backbone")
        plain = plain.replace("tracker_neck", "vision_encoder.neck").replace("tracker_model.", "")
        state[plain] = value
    tracker.load_state_dict({name: state[name] for name in tracker.state_dict()})
    return tracker


@pytest.fixture(scope="module", params=["sam2", "sam3_tracker", "sam3_video"])
def pair(request):
    """transformers' model for points, and ours."""
    model = tiny(request.param)
    return tracker_of(model), ours(model)


def tiles(network, count: int = 2) -> torch.Tensor:
    shape = (count, 3, network.input_px, network.input_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def theirs(network, images: torch.Tensor) -> torch.Tensor:
    """Pixels as transformers' processors make them: 0 to 1, then standardised; the size is right already."""
    mean, sd = (torch.tensor(v).view(-1, 1, 1) / 255 for v in (network.recipe.pixel_mean, network.recipe.pixel_sd))
    return (images / 255 - mean) / sd


def points_of(network, count: int, seed: int = 6) -> torch.Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * network.input_px


# The encoders


@pytest.mark.parametrize("tokens", [400, 10**6], ids=["strips", "whole"])
@pytest.mark.parametrize("kind", ["sam2", "sam3_tracker"])
def test_the_pyramid_is_the_librarys(kind, tokens, monkeypatch):
    monkeypatch.setattr("wsiseg.models.transformers.trunks._TOKENS", tokens)
    model = tiny(kind)
    network = ours(model)
    x = theirs(network, tiles(network))
    levels = network.pyramid(x) if kind == "sam2" else network.tracker_pyramid(vit_features(network.trunk, x))
    wanted = model.vision_encoder(x).fpn_hidden_states[:3]
    assert [level.shape[-1] for level in levels] == [80, 40, 20]
    for level, other in zip(levels, wanted, strict=True):
        assert relative(level, other) < 1e-5


def test_features_of_two_scales_are_those_that_chain_of_prompts_takes():
    """SAM 2: levels 0 and 2 of the raw pyramid. SAM 3: those of the detector's neck, which are kept for the detector too."""
    for kind in ("sam2", "sam3_video", "sam3", "sam3_tracker"):
        model = tiny(kind)
        network = ours(model)
        images = tiles(network)
        found = network.encode(images)
        encoder = model.detector_model.vision_encoder if kind == "sam3_video" else model.vision_encoder
        wanted = encoder(theirs(network, images)).fpn_hidden_states
        assert relative(found.high, F.normalize(wanted[0], dim=1)) < 1e-5
        assert relative(found.low, F.normalize(wanted[2], dim=1)) < 1e-5
        assert found.maps is None
        kept = [found.extra[name] for name in FPN if name in found.extra]
        assert len(kept) == (3 if kind in {"sam3", "sam3_video"} else 0)
        for level, other in zip(kept, wanted, strict=False):
            assert relative(level, other) < 1e-5


def test_no_memory_is_added_where_the_video_model_adds_it():
    """``Sam3VideoModel`` leaves the coarsest level out first, so that the embedding goes to the level of the image tokens."""
    model = tiny("sam3_video")
    network = ours(model)
    images = tiles(network, 1)
    seen = model.detector_model.vision_encoder(theirs(network, images))
    flat = model.get_vision_features_for_tracker(seen)[0]
    tracker = model.tracker_model
    embedding = flat[-1].permute(1, 0, 2) + tracker.no_memory_embedding + tracker.prompt_encoder.no_mask_embed.weight
    assert relative(network.encode(images).extra["keys"], embedding) < 1e-5
    assert tracker.no_memory_embedding.abs().max() > 0.1


def test_detector_and_tracker_share_one_pass_of_the_trunk():
    network = ours(copy.deepcopy(tiny("sam3_video")))
    passes = []
    network.trunk.embeddings.register_forward_hook(lambda *_: passes.append(1))
    found = network.encode(tiles(network, 1))
    assert {"fpn0", "keys"} <= found.extra.keys()
    assert len(passes) == 1


def test_a_tile_of_a_batch_is_that_tile_alone(pair):
    _, network = pair
    images = tiles(network, 3)
    together = network.encode(images)
    for k in range(3):
        alone = network.encode(images[k : k + 1])
        for name in ("high", "low"):
            assert relative(getattr(together, name)[k : k + 1], getattr(alone, name)) < 1e-5


@pytest.mark.parametrize("levels", [3, 4])
def test_a_pyramid_with_another_level_gives_the_same(levels):
    """A checkpoint may keep the coarsest level, or not have it: levels are known by their size."""
    usual = ours(tiny("sam2"))
    model = tiny("sam2", levels=levels)
    images = tiles(usual, 1)
    wanted, found = usual.encode(images), ours(model).encode(images)
    for name in ("keys", "fine", "middle"):
        assert torch.equal(found.extra[name], wanted.extra[name])


def test_a_neck_without_the_coarsest_level_gives_the_same():
    model = tiny("sam3_tracker")
    usual, network = ours(model), copy.deepcopy(model)
    network.config.vision_config.scale_factors = [4.0, 2.0, 1.0]
    del network.vision_encoder.neck.fpn_layers[3]
    images = tiles(usual, 1)
    wanted, found = usual.encode(images), ours(network).encode(images)
    assert all(torch.equal(found.extra[name], wanted.extra[name]) for name in ("keys", "fine", "middle"))


# The decoders


@pytest.mark.parametrize("multimask", [True, False], ids=["three", "single"])
def test_masks_of_points_are_the_librarys(pair, multimask):
    """Pixels and points in; logits and predicted IoU of the whole tile, for the three masks and by the rule for the single one."""
    reference, network = pair
    images, points = tiles(network), points_of(network, 24)
    embeddings = network.encode(images)
    got = network.decode(embeddings, torch.ones(24, dtype=torch.long), points, multimask=multimask, full_tile=True)
    wanted = reference(
        pixel_values=theirs(network, images[1:]), input_points=points[None, :, None] - 0.5, multimask_output=multimask
    )
    assert relative(got.logits, wanted.pred_masks[0].flatten(0, 1)) < 1e-5
    assert relative(got.predicted_iou, wanted.iou_scores.flatten()) < 1e-5


def test_the_rule_for_the_single_mask_is_the_librarys_both_ways(pair, monkeypatch):
    """With a threshold in the middle of the prompts' stabilities: some keep the single mask, others get the best of three."""
    reference, network = pair
    points, images = points_of(network, 24), tiles(network, 1)
    given = {"pixel_values": theirs(network, images), "input_points": points[None, :, None] - 0.5}
    decoder = reference.mask_decoder
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "dynamic_multimask_via_stability", False)
        single = reference(**given, multimask_output=False).pred_masks[0, :, 0]
    stability = decoder._get_stability_scores(single).unique()
    threshold = float(stability[len(stability) // 2 - 1 : len(stability) // 2 + 1].mean())
    for each in (decoder, network.points.own):
        monkeypatch.setattr(each, "dynamic_multimask_stability_thresh", threshold)
    wanted = reference(**given, multimask_output=False)
    kept = (wanted.pred_masks[0, :, 0] == single).flatten(1).all(1)
    assert 0 < int(kept.sum()) < len(kept)
    got = network.decode(network.encode(images), torch.zeros(24, dtype=torch.long), points, full_tile=True)
    assert relative(got.logits, wanted.pred_masks[0, :, 0]) < 1e-5
    assert relative(got.predicted_iou, wanted.iou_scores[0, :, 0]) < 1e-5


def test_masks_upsampled_as_the_library_does_have_the_same_pixels(pair):
    """``post_process_masks`` of the processors: bilinear to the image's size, inside where > 0. (The processors need torchvision.)"""
    reference, network = pair
    images, points = tiles(network, 1), points_of(network, 12)
    got = network.decode(network.encode(images), torch.zeros(12, dtype=torch.long), points, full_tile=True).logits
    wanted = reference(
        pixel_values=theirs(network, images), input_points=points[None, :, None] - 0.5, multimask_output=False
    ).pred_masks[0, :, 0]
    size = (network.input_px, network.input_px)
    ours_, theirs_ = (F.interpolate(x[:, None], size, mode="bilinear", align_corners=False) > 0 for x in (got, wanted))
    assert float((ours_ == theirs_).float().mean()) >= 0.9999


def test_windows_hold_the_logits_of_the_whole_tile(pair):
    _, network = pair
    px = float(network.input_px)
    points = torch.tensor([[3.0, 5.0], [px / 2, px / 2 - 1], [px - 4, 0.6 * px], [0.13 * px, px - 0.1]])
    embeddings, which = network.encode(tiles(network, 1)), torch.zeros(4, dtype=torch.long)
    crops, whole = (network.decode(embeddings, which, points, multimask=True, full_tile=w) for w in (False, True))
    side, stride = crops.logits.shape[-1], network.mask_stride_px
    assert side == 64
    for crop, full, origin, point in zip(crops.logits, whole.logits, crops.origin_xy, crops.points_xy, strict=True):
        x, y = (origin / stride).long().tolist()
        assert relative(crop, full[y : y + side, x : x + side]) < 1e-5
        assert ((point >= origin) & (point <= origin + side * stride)).all()
    assert crops.descriptors.shape == (12, network.descriptor_size)
    assert torch.allclose(crops.descriptors.norm(dim=1), torch.ones(12), atol=1e-3)


def test_in_a_window_the_rule_counts_the_windows_logits(pair, monkeypatch):
    """The departure: stability is that of what is kept of the mask."""
    _, network = pair
    own, points = network.points.own, points_of(network, 24)
    embeddings, which = network.encode(tiles(network, 1)), torch.zeros(24, dtype=torch.long)
    three = network.decode(embeddings, which, points, multimask=True)
    with monkeypatch.context() as patch:
        patch.setattr(own, "dynamic_multimask_via_stability", False)
        single = network.decode(embeddings, which, points)
    inner, outer = ((single.logits > d).sum((1, 2)) for d in (0.05, -0.05))
    stability = inner / outer
    values = stability.unique()
    monkeypatch.setattr(own, "dynamic_multimask_stability_thresh", float(values[len(values) // 2 - 1 :][:2].mean()))
    kept = stability >= own.dynamic_multimask_stability_thresh
    assert 0 < int(kept.sum()) < len(kept)
    best = three.predicted_iou.view(24, 3).argmax(1)
    other = three.logits.view(24, 3, *three.logits.shape[1:])[torch.arange(24), best]
    got = network.decode(embeddings, which, points)
    assert torch.equal(got.logits, torch.where(kept[:, None, None], single.logits, other))
    assert torch.equal(got.predicted_iou[kept], single.predicted_iou[kept])


def test_boxes_and_further_points_are_the_librarys(pair):
    """Prompts of four kinds in one call: a point, one with a negative one, a box with a negative point, two points."""
    reference, network = pair
    s = network.input_px / 1000
    images = tiles(network, 1)
    own = torch.tensor([[200.0, 300.0], [600.0, 500.0], [700.0, 200.0], [400.0, 400.0]]) * s
    more = torch.tensor([[[0.0, 0.0]], [[640.0, 500.0]], [[760.0, 210.0]], [[410.0, 420.0]]]) * s
    labels = torch.tensor([[-1.0], [0.0], [0.0], [1.0]])
    boxes = torch.full((4, 4), torch.nan)
    boxes[2] = torch.tensor([670.0, 180.0, 740.0, 230.0]) * s
    got = network.decode(
        network.encode(images),
        torch.zeros(4, dtype=torch.long),
        own,
        extras=PromptExtras(more, labels, boxes),
        full_tile=True,
    )
    asked = (
        {"input_points": own[0], "input_labels": [1]},
        {"input_points": torch.stack([own[1], more[1, 0]]), "input_labels": [1, 0]},
        {"input_points": more[2, 0], "input_labels": [0], "input_boxes": boxes[2]},
        {"input_points": torch.stack([own[3], more[3, 0]]), "input_labels": [1, 1]},
    )
    for k, prompt in enumerate(asked):
        given = {"input_points": prompt["input_points"].view(1, 1, -1, 2) - 0.5}
        given["input_labels"] = torch.tensor(prompt["input_labels"]).view(1, 1, -1)
        if "input_boxes" in prompt:
            given["input_boxes"] = prompt["input_boxes"].view(1, 1, 4) - 0.5
        wanted = reference(pixel_values=theirs(network, images), multimask_output=False, **given)
        assert relative(got.logits[k], wanted.pred_masks[0, 0, 0]) < 1e-5
        assert relative(got.predicted_iou[k], wanted.iou_scores[0, 0, 0]) < 1e-5


def test_a_box_alone_is_the_librarys(pair):
    reference, network = pair
    images = tiles(network, 1)
    box = torch.tensor([[0.2, 0.3, 0.4, 0.45]]) * network.input_px
    extras = PromptExtras(torch.zeros(1, 0, 2), torch.zeros(1, 0), box)
    centre = (box[:, :2] + box[:, 2:]) / 2
    got = network.decode(
        network.encode(images), torch.zeros(1, dtype=torch.long), centre, extras=extras, multimask=True, full_tile=True
    )
    wanted = reference(pixel_values=theirs(network, images), input_boxes=box[None] - 0.5, multimask_output=True)
    assert relative(got.logits, wanted.pred_masks[0, 0]) < 1e-5


@pytest.mark.parametrize("kind", ["sam2", "sam3_video"])
def test_bf16_is_within_its_precision(kind):
    """Relative to the norm; the three masks, since a rule with a threshold may decide otherwise in another precision."""
    model = tiny(kind)
    full, half = ours(model), ours(model, bf16=True)
    images, points, which = tiles(full, 1), points_of(full, 8), torch.zeros(8, dtype=torch.long)
    found = [(n.encode(images), n) for n in (full, half)]
    masks = [n.decode(e, which, points, multimask=True, full_tile=True) for e, n in found]
    for name in ("high", "low"):
        wanted, got = (getattr(e, name).float() for e, _ in found)
        assert float((got - wanted).norm() / wanted.norm()) < 2e-2
    for name in ("logits", "predicted_iou"):
        wanted, got = (getattr(m, name).float() for m in masks)
        assert float((got - wanted).norm() / wanted.norm()) < 2e-2


def test_in_bf16_positions_keep_their_precision():
    network = ours(tiny("sam3_video"), bf16=True)
    assert {value.dtype for name, value in network.trunk.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert {value.dtype for value in network.trunk.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in network.tracker_model.prompt_encoder.parameters()} == {torch.float32}


# Made without memory


@pytest.mark.parametrize("kind", ["sam3", "sam3_tracker"])
def test_what_no_checkpoint_holds_is_computed(kind):
    """Rotary frequencies and positions, as in a model that is built the usual way."""
    model = tiny(kind)
    built = dict(ours(model).named_buffers())
    wanted = {n: b for n, b in model.named_buffers() if "inv_freq" in n or "position_ids" in n}
    assert wanted
    for name, value in wanted.items():
        mine = f"detector_model.{name}" if kind == "sam3" else name.replace("vision_encoder.backbone", "backbone")
        assert torch.equal(built[mine], value), name


_HIERA = {  # the released configurations of SAM 2.1: width, heads, blocks, global blocks, background, windows; millions of weights as published
    "T": (96, 1, [1, 2, 7, 2], [5, 7, 9], 7, [8, 4, 14, 7], 38.9),
    "S": (96, 1, [1, 2, 11, 2], [7, 10, 13], 7, [8, 4, 14, 7], 46.0),
    "B+": (112, 2, [2, 3, 16, 3], [12, 16, 20], 14, [8, 4, 14, 7], 80.8),
    "L": (144, 2, [2, 6, 36, 4], [23, 33, 43], 7, [8, 4, 16, 8], 224.4),
}


def hiera(size: str):
    width, heads, blocks, whole, background, windows, _ = _HIERA[size]
    widths = [width * 2**k for k in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "num_attention_heads": heads,
        "blocks_per_stage": blocks,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads * 2**k for k in range(4)],
        "global_attention_blocks": whole,
        "window_positional_embedding_background_size": [background, background],
        "window_size_per_stage": windows,
    }
    vision = {"model_type": "sam2_vision_model", "backbone_config": backbone, "backbone_channel_list": widths[::-1]}
    return transformers.Sam2VideoConfig.from_dict({"vision_config": vision, "enable_occlusion_spatial_embedding": True})


@pytest.mark.parametrize("size", _HIERA)
def test_the_released_sam_2_1_fits_in_name_and_shape(size):
    """All tensors of ``Sam2VideoModel``, as the hub has it, are taken or are for video; and it has as many weights as published."""
    config = hiera(size)
    with torch.device("meta"):
        model = transformers.Sam2VideoModel(config)
    tensors = model.state_dict()
    network, named, left_out = fit(recipe_of(model), tensors, Path("here"))
    assert len(named) + len(left_out) == len(tensors)
    assert network.architecture(config.to_dict()) == f"SAM 2.1, Hiera-{size}"
    assert (network.input_px, network.patch, network.mask_stride_px, network.descriptor_size) == (1024, 16, 4, 267)
    weights = sum(value.numel() for value in model.parameters()) / 1e6
    assert weights == pytest.approx(_HIERA[size][-1], rel=5e-3)


@pytest.mark.parametrize("name", ["Sam3VideoModel", "Sam3Model", "Sam3TrackerModel", "Sam3TrackerVideoModel"])
def test_sam_3_fits_in_name_and_shape(name):
    config = getattr(transformers, name.replace("Model", "Config"))()
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    tensors = model.state_dict()
    network, named, left_out = fit(recipe_of(model), tensors, Path("here"))
    assert len(named) + len(left_out) == len(tensors)
    assert bool(left_out) == ("Video" in name)
    assert (network.input_px, network.patch, network.mask_stride_px, network.descriptor_size) == (1008, 14, 3.5, 267)
    takes = (
        *(("points", "boxes") if name != "Sam3Model" else ()),
        *(("text", "exemplars") if "Tracker" not in name else ()),
    )
    assert network.prompts == takes


def test_a_network_for_another_input_than_its_tokens_is_refused():
    """A pyramid whose levels are not the decoder's is found before a slide is."""
    model = tiny("sam2")
    recipe = recipe_of(model)
    wrong = {**recipe.config, "prompt_encoder_config": {**recipe.config["prompt_encoder_config"], "patch_size": 20}}
    with pytest.raises(WeightsError, match=r"here: the feature pyramid has levels of 80 x 80, .* none of 64 x 64"):
        fit(dataclasses.replace(recipe, config=wrong), model.state_dict(), Path("here"))


def test_a_tracker_for_another_grid_is_refused():
    model = tiny("sam3_tracker")
    recipe = recipe_of(model)
    wrong = {**recipe.config, "prompt_encoder_config": {**recipe.config["prompt_encoder_config"], "image_size": 560}}
    with pytest.raises(
        WeightsError, match=r"here: its prompts are placed on 40 x 40 image tokens, and the encoder makes 20 x 20"
    ):
        fit(dataclasses.replace(recipe, config=wrong), model.state_dict(), Path("here"))


def test_both_necks_are_as_the_detectors_part_says():
    """As in ``Sam3VideoModel``: the tracker's part may say nothing about the levels, or something else."""
    model = tiny("sam3_video")
    recipe = recipe_of(model)
    tracker = recipe.config["tracker_config"]
    other = {**tracker, "vision_config": {**tracker["vision_config"], "scale_factors": [4.0, 2.0, 1.0]}}
    config = {**recipe.config, "tracker_config": other}
    _, named, _ = fit(dataclasses.replace(recipe, config=config), model.state_dict(), Path("here"))
    assert "tracker_neck.fpn_layers.3.proj1.weight" in named
