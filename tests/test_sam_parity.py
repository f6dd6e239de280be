"""SAM's networks, the fast way, against segment_anything's own forward and transformers' on the same random weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsiseg.models.sam import encoder as sam_encoder
from wsiseg.models.sam.checkpoints import Architecture
from wsiseg.models.sam.decoder import CROP, UP, PointDecoder
from wsiseg.models.sam.model import PIXEL_MEAN, PIXEL_SD, SamModel
from wsiseg.models.testing import VIT_B, VIT_H, VIT_L, VIT_TOY, random_sam
from wsiseg.records import PromptExtras

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def smaller(architecture: Architecture, grid: int) -> Architecture:
    return Architecture(
        dim=architecture.dim,
        depth=architecture.depth,
        heads=architecture.heads,
        global_blocks=architecture.global_blocks,
        window=architecture.window,
        grid=grid,
        patch=16,
    )


@pytest.mark.parametrize(
    ("architecture", "grid"),
    [(VIT_B, 64), (VIT_L, 20), (VIT_H, 20), (VIT_TOY, 64), (VIT_TOY, 28)],
    ids=["B", "L", "H", "toy", "toy, no padding"],
)
def test_image_embedding_is_the_references(architecture, grid):
    encoder = random_sam(smaller(architecture, grid))["image_encoder"]
    image = torch.randn(1, 3, grid * 16, grid * 16, generator=torch.Generator().manual_seed(0))
    assert relative(sam_encoder.encode(encoder, image), encoder(image)) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(14, 14), (8, 5), (16, 24)])
def test_attention_as_on_a_gpu_is_that_of_the_cpu(height, width):
    """Relative positions as further numbers of queries and keys, against the logits written out."""
    torch.manual_seed(height)
    tokens, d = height * width, 20
    q, k, v = (torch.randn(3, tokens, d) for _ in range(3))
    to_rows, to_columns = torch.randn(3, tokens, height), torch.randn(3, tokens, width)
    arguments = (q * d**-0.5, k, v, to_rows, to_columns)
    fused, plain = sam_encoder._fused_attention(*arguments), sam_encoder._chunked_attention(*arguments)
    assert torch.allclose(fused, plain, atol=1e-5)
    without = sam_encoder._fused_attention(*arguments[:3], torch.zeros_like(to_rows), torch.zeros_like(to_columns))
    assert not torch.allclose(fused, without, atol=1e-2)


def test_image_embeddings_of_a_batch_do_not_mix():
    encoder = random_sam(smaller(VIT_TOY, 20))["image_encoder"]
    images = torch.randn(3, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    together = sam_encoder.encode(encoder, images)
    for one, image in zip(together, images, strict=True):
        assert relative(one[None], encoder(image[None])) < 1e-5


def test_positions_are_no_part_of_the_agreement_by_being_zero():
    """The parity above would hold without relative positions if they were zero, as SAM starts them."""
    encoder = random_sam(smaller(VIT_TOY, 20))["image_encoder"]
    image = torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    before = sam_encoder.encode(encoder, image)
    for block in encoder.blocks:
        block.attn.rel_pos_h.zero_()
    assert relative(sam_encoder.encode(encoder, image), before) > 1e-3


def test_bf16_embedding_is_within_its_precision():
    encoder = random_sam(smaller(VIT_B, 28))["image_encoder"]
    image = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    wanted = encoder(image)
    got = sam_encoder.encode(copy.deepcopy(encoder).bfloat16(), image.bfloat16()).float()
    assert float((got - wanted).norm() / wanted.norm()) < 2e-2


@pytest.fixture(scope="module")
def sam():
    return random_sam(VIT_TOY)


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(2, 256, 64, 64, generator=torch.Generator().manual_seed(1))


def reference(sam, embedding, points=None, boxes=None, *, multimask=False):
    """SAM's own decoder on one image; points (N, K, 2) and labels in its frame."""
    sparse, dense = sam["prompt_encoder"](points=points, boxes=boxes, masks=None)
    return sam["mask_decoder"](
        image_embeddings=embedding,
        image_pe=sam["prompt_encoder"].get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )


def fast(sam, embedding, tile, points, corner, masks, kind=torch.float32):
    decoder = PointDecoder(sam["mask_decoder"].to(kind), sam["prompt_encoder"].get_dense_pe().to(kind))
    tokens, _ = sam["prompt_encoder"](points=points, boxes=None, masks=None)
    shared = decoder.share(embedding.to(kind), sam["prompt_encoder"].no_mask_embed.weight[0].to(kind))
    return decoder(shared, tile, tokens.to(kind), corner, masks)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("count", [1, 7])
def test_logits_and_quality_are_the_references(sam, embedding, multimask, count):
    points = (torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(2)) * 1024, torch.ones(count, 1))
    wanted, quality = reference(sam, embedding[:1], points, multimask=multimask)
    answers = slice(1, None) if multimask else slice(0, 1)
    got, said = fast(sam, embedding[:1], torch.zeros(count, dtype=torch.long), points, None, answers)
    assert got.shape == wanted.shape
    assert relative(got, wanted) < 1e-5
    assert relative(said, quality) < 1e-5


def test_prompts_of_two_tiles_in_one_call_are_those_of_each(sam, embedding):
    points = torch.rand(9, 1, 2, generator=torch.Generator().manual_seed(3)) * 1024
    tile = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    got, quality = fast(sam, embedding, tile, (points, torch.ones(9, 1)), None, slice(0, 1))
    for b in (0, 1):
        rows = tile == b
        wanted, said = reference(sam, embedding[b : b + 1], (points[rows], torch.ones(int(rows.sum()), 1)))
        assert relative(got[rows], wanted) < 1e-5
        assert relative(quality[rows], said) < 1e-5


def test_a_crop_holds_the_references_logits(sam, embedding):
    points = torch.rand(6, 1, 2, generator=torch.Generator().manual_seed(4)) * 1024
    corner = torch.tensor([[0, 0], [48, 48], [13, 40], [5, 7], [48, 0], [20, 20]])
    wanted, _ = reference(sam, embedding[:1], (points, torch.ones(6, 1)))
    got, _ = fast(sam, embedding[:1], torch.zeros(6, dtype=torch.long), (points, torch.ones(6, 1)), corner, slice(0, 1))
    for crop, (x, y), whole in zip(got, corner * UP, wanted, strict=True):
        side = CROP * UP
        assert relative(crop, whole[:, y : y + side, x : x + side]) < 1e-5


def test_bf16_logits_are_within_their_precision(sam, embedding):
    points = (torch.rand(5, 1, 2, generator=torch.Generator().manual_seed(2)) * 1024, torch.ones(5, 1))
    wanted, quality = reference(sam, embedding[:1], points)
    half = torch.nn.ModuleDict({k: copy.deepcopy(v) for k, v in sam.items()})
    got, said = fast(half, embedding[:1], torch.zeros(5, dtype=torch.long), points, None, slice(0, 1), torch.bfloat16)
    assert float((got.float() - wanted).norm() / wanted.norm()) < 2e-2
    assert float((said.float() - quality).norm() / quality.norm()) < 2e-2


@pytest.fixture(scope="module")
def model():
    return SamModel(random_sam(VIT_TOY), None, mpp=0.25).ready(torch.device("cpu"), bf16=False)


@pytest.fixture(scope="module")
def tile():
    return torch.randint(0, 256, (1, 3, 1024, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def whole_path(sam, tile):
    """The image embedding in SamPredictor's words."""
    mean, sd = (torch.tensor(v).view(-1, 1, 1) for v in (PIXEL_MEAN, PIXEL_SD))
    return sam["image_encoder"]((tile - mean) / sd)


def test_masks_of_a_tile_are_predict_torchs(model, tile):
    """Pixels, points and labels in; upsampled masks compared pixel by pixel: 99.9 % and more are equal."""
    embeddings = model.encode(tile)
    points = torch.rand(12, 2, generator=torch.Generator().manual_seed(6)) * 1024
    got = model.decode(embeddings, torch.zeros(12, dtype=torch.long), points, full_tile=True)
    # An index i of SamPredictor is the middle of pixel i, so i = x - 0.5 in the corner frame.
    wanted, quality = reference(model.sam, whole_path(model.sam, tile), (points[:, None] - 0.5, torch.ones(12, 1)))
    assert relative(got.logits[:, None], wanted) < 1e-4
    assert relative(got.predicted_iou, quality[:, 0].clamp(0, 1)) < 1e-4
    masks, reference_masks = (
        F.interpolate(x, (1024, 1024), mode="bilinear", align_corners=False) > 0 for x in (got.logits[:, None], wanted)
    )
    assert float((masks == reference_masks).float().mean()) >= 0.999


def test_windows_lie_where_their_origin_says(model, tile):
    embeddings = model.encode(tile)
    points = torch.tensor([[3.0, 5.0], [512.0, 511.0], [1020.0, 600.0], [130.0, 1023.9]])
    which = torch.zeros(4, dtype=torch.long)
    crops, whole = (model.decode(embeddings, which, points, full_tile=w) for w in (False, True))
    for crop, full, (x, y), point in zip(
        crops.logits, whole.logits, crops.origin_xy.tolist(), points.tolist(), strict=True
    ):
        assert relative(crop, full[y // 4 : y // 4 + 64, x // 4 : x // 4 + 64]) < 1e-5
        assert 0 <= x <= 1024 - 256
        assert 0 <= y <= 1024 - 256
        assert x <= point[0] <= x + 256
        assert y <= point[1] <= y + 256
    assert crops.descriptors.shape == (4, model.descriptor_size)
    assert torch.allclose(crops.descriptors.norm(dim=1), torch.ones(4), atol=1e-3)


def test_boxes_and_further_points_are_sams(model, tile):
    """Prompts of three kinds in one call: a point, a point with a negative one, a box with a negative point."""
    embeddings = model.encode(tile)
    image = whole_path(model.sam, tile)
    own = torch.tensor([[200.0, 300.0], [600.0, 500.0], [700.0, 200.0], [400.0, 400.0]])
    more = torch.tensor([[[0.0, 0.0]], [[640.0, 500.0]], [[760.0, 210.0]], [[410.0, 420.0]]])
    labels = torch.tensor([[-1.0], [0.0], [0.0], [1.0]])
    box = torch.tensor([670.0, 180.0, 740.0, 230.0])
    boxes = torch.full((4, 4), torch.nan)
    boxes[2] = box
    got = model.decode(
        embeddings, torch.zeros(4, dtype=torch.long), own, extras=PromptExtras(more, labels, boxes), full_tile=True
    ).logits
    wanted = [
        reference(model.sam, image, (own[:1, None] - 0.5, torch.ones(1, 1))),
        reference(model.sam, image, (torch.stack([own[1], more[1, 0]])[None] - 0.5, torch.tensor([[1.0, 0.0]]))),
        reference(model.sam, image, (more[2:3] - 0.5, torch.zeros(1, 1)), box[None] - 0.5),
        reference(model.sam, image, (torch.stack([own[3], more[3, 0]])[None] - 0.5, torch.ones(1, 2))),
    ]
    for mask, (logits, _) in zip(got, wanted, strict=True):
        assert relative(mask, logits[0, 0]) < 1e-4


def test_three_answers_come_prompt_by_prompt(model, tile):
    embeddings = model.encode(tile)
    points = torch.tensor([[300.0, 300.0], [700.0, 650.0]])
    got = model.decode(embeddings, torch.zeros(2, dtype=torch.long), points, multimask=True, full_tile=True)
    wanted, _ = reference(
        model.sam, whole_path(model.sam, tile), (points[:, None] - 0.5, torch.ones(2, 1)), multimask=True
    )
    assert relative(got.logits, wanted.flatten(0, 1)) < 1e-4
    assert got.points_xy.tolist() == points.repeat_interleave(3, 0).tolist()


def test_transformers_agrees():
    """A second witness, with an implementation of its own."""
    transformers = pytest.importorskip("transformers")
    architecture = smaller(VIT_TOY, 20)
    sam = random_sam(architecture)
    vision = transformers.SamVisionConfig(
        hidden_size=48,
        output_channels=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=320,
        patch_size=16,
        mlp_dim=192,
        window_size=14,
        global_attn_indexes=[1],
    )
    prompts = transformers.SamPromptEncoderConfig(image_size=320, image_embedding_size=20)
    other = transformers.SamModel(
        transformers.SamConfig(
            vision_config=vision,
            prompt_encoder_config=prompts,
            mask_decoder_config=transformers.SamMaskDecoderConfig(layer_norm_eps=1e-5),
        )
    ).eval()
    missing = other.load_state_dict(_their_names(sam.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert all("shared" in k or "mask_embed" in k for k in missing.missing_keys), missing.missing_keys
    image = torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    mine = sam_encoder.encode(sam["image_encoder"], image)
    theirs = other.get_image_embeddings(image)
    assert relative(mine, getattr(theirs, "last_hidden_state", theirs)) < 1e-4
    points = torch.rand(3, 1, 2, generator=torch.Generator().manual_seed(2)) * 320
    got, quality = fast(sam, mine, torch.zeros(3, dtype=torch.long), (points, torch.ones(3, 1)), None, slice(0, 1))
    answer = other(
        image_embeddings=mine,
        input_points=points[None],
        input_labels=torch.ones(1, 3, 1, dtype=torch.long),
        multimask_output=False,
    )
    assert relative(got, answer.pred_masks[0]) < 1e-4
    assert relative(quality, answer.iou_scores[0]) < 1e-4


def _their_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """segment_anything's keys in transformers' words."""
    out = {}
    for key, value in state.items():
        name = (
            key.replace("image_encoder.", "vision_encoder.")
            .replace("patch_embed.proj", "patch_embed.projection")
            .replace("blocks.", "layers.")
        )
        name = name.replace("norm_final_attn", "layer_norm_final_attn")
        for i in range(1, 5):
            name = name.replace(f".norm{i}.", f".layer_norm{i}.")
        for i, new in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2")):
            name = name.replace(f"neck.{i}.", f"neck.{new}.")
        name = name.replace("prompt_encoder.point_embeddings", "prompt_encoder.point_embed")
        for i, new in ((0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3")):
            name = name.replace(f"mask_downscaling.{i}.", f"mask_embed.{new}.")
        name = name.replace(
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
            "prompt_encoder.shared_embedding.positional_embedding",
        )
        for i, new in ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2")):
            name = name.replace(f"output_upscaling.{i}.", f"{new}.")
        if "hypernetworks" in name or "iou_prediction_head" in name:
            for i, new in ((0, "proj_in"), (1, "layers.0"), (2, "proj_out")):
                name = (
                    name.replace(f".layers.{i}.", f".{new}.")
                    if f".layers.{i}." in name and ".proj" not in name
                    else name
                )
        out[name] = value
        if name.endswith("shared_embedding.positional_embedding"):
            out["shared_image_embedding.positional_embedding"] = value
    return out


def test_the_tile_is_stretched_as_micro_sam_does(tile):
    plain = random_sam(VIT_TOY)
    dim = (tile // 4 + 60).clamp(0, 255)
    stretched = SamModel(plain, None, mpp=0.25, normalise="tile-minmax").ready(torch.device("cpu"), bf16=False)
    x = dim[0].numpy().astype(np.float32)
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    wanted = ((x - low) / (high - low + 1e-7) * 255).astype(np.uint8)
    assert (
        relative(stretched.encode(dim).low, F.normalize(whole_path(plain, torch.from_numpy(wanted)[None]), dim=1))
        < 1e-4
    )
