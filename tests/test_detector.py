"""SAM 3's detector against transformers' own forward and post-processing, on tiny random networks of its classes."""

from __future__ import annotations

import ast
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wsiseg.errors import WeightsError
from wsiseg.records import Concept, Embeddings

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.sam3")

from wsiseg.models.transformers.detector import Sam3Detector, read_tokenizer, roi_align  # noqa: E402

PHRASES = ["lymphocyte", "small round dark nucleus", "visual"]
SIDE = 112  #: 8 x 8 patches of 14 px


def tiny_sam3(scales=(4.0, 2.0, 1.0, 0.5), queries=20):
    """An untrained Sam3Model whose answers differ between queries and tiles."""
    trunk = transformers.Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        window_size=4,
        global_attn_indexes=[1],
        pretrain_image_size=56,
    )
    part = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.Sam3Config(
        vision_config=transformers.Sam3VisionConfig(
            backbone_config=trunk,
            fpn_hidden_size=32,
            scale_factors=list(scales),
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        ).to_dict(),
        text_config={
            "vocab_size": 120,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        geometry_encoder_config={**part, "num_layers": 2},
        detr_encoder_config={**part, "num_layers": 2},
        detr_decoder_config={**part, "num_layers": 2, "num_queries": queries},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Sam3Model(config).eval().requires_grad_(requires_grad=False)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Content of a tokenizer.json: CLIP's rules on an alphabet of letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters), "nu", "cl", "nucl"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nn u\nc l\nnu cl\n")
    return read_tokenizer(folder)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def sam3():
    return tiny_sam3()


@pytest.fixture
def detector(sam3, tokenizer):
    return Sam3Detector(sam3, tokenizer)


def relative(a, b):
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def images(count=1):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def padded(tokenizer, phrase):
    """The phrase as transformers' processor prepares it."""
    clip = transformers.CLIPTokenizer(tokenizer_object=None, **json_vocabulary(tokenizer))
    return clip(phrase, return_tensors="pt", padding="max_length", max_length=32)


def json_vocabulary(tokenizer):
    model = json.loads(tokenizer)["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def plain_roi_align(features, boxes, size):
    """RoIAlign sample by sample, as section 3 of the paper and torchvision's documentation have it."""
    channels, height, width = features.shape
    out = torch.zeros(len(boxes), channels, size, size)
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        w, h = max(x1 - x0, 1.0), max(y1 - y0, 1.0)
        nx, ny = max(math.ceil(w / size), 1), max(math.ceil(h / size), 1)
        for row in range(size):
            for column in range(size):
                for i in range(ny):
                    for j in range(nx):
                        y = y0 + row * h / size + (i + 0.5) * h / size / ny
                        x = x0 + column * w / size + (j + 0.5) * w / size / nx
                        if y < -1 or y > height or x < -1 or x > width:
                            continue
                        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                        top, left = int(y), int(x)
                        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
                        fy, fx = y - top, x - left
                        out[k, :, row, column] += (
                            (1 - fy) * ((1 - fx) * features[:, top, left] + fx * features[:, top, right])
                            + fy * ((1 - fx) * features[:, bottom, left] + fx * features[:, bottom, right])
                        ) / (nx * ny)
    return out


def test_boxes_are_pooled_as_torchvision_pools_them():
    features = torch.randn(5, 12, 9, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[1.2, 2.5, 3.1, 6.0], [0, 0, 9, 12], [-3, -2, 2, 4], [7.5, 10.5, 15, 20], [4, 4, 4, 4.0]])
    expected = plain_roi_align(features, boxes, 3)
    assert expected.abs().sum((1, 2, 3)).all()
    torch.testing.assert_close(roi_align(features, boxes, 3), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("phrase", PHRASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_phrase_is_answered_as_transformers_answers_it(sam3, tokenizer, phrase, dtype, limit):
    text = padded(tokenizer, phrase)
    expected = sam3(pixel_values=images(), **text)
    model = tiny_sam3().to(dtype)
    detector = Sam3Detector(model, tokenizer)
    levels = detector.levels(model.get_vision_features(images().to(dtype)).fpn_hidden_states)
    tokens = detector.encode_text(phrase)
    assert len(tokens) == int(text["attention_mask"].sum())
    answer = detector.answer(levels, tokens)
    every = torch.arange(len(answer.logits))
    for ours, theirs in (
        (answer.logits, expected.pred_logits[0]),
        (answer.presence, expected.presence_logits[0, 0]),
        (answer.boxes, expected.pred_boxes[0]),
        (detector.masks(levels, answer, every), expected.pred_masks[0]),
    ):
        assert relative(ours, theirs) < limit


EXAMPLES = torch.tensor([[0.3, 0.4, 0.1, 0.2], [0.7, 0.2, 0.05, 0.04], [0.5, 0.5, 0.9, 0.8]])
LABELS = torch.tensor([1, 0, 1])


@pytest.mark.parametrize("phrase", ["visual", "nucleus"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_examples_are_answered_as_transformers_answers_them(sam3, tokenizer, monkeypatch, phrase, dtype, limit):
    """Padded boxes, which transformers masks, are left out; without torchvision, whose pooling stands in here as its formula."""
    modeling_sam3 = importlib.import_module("transformers.models.sam3.modeling_sam3")
    ops = SimpleNamespace(roi_align=lambda x, boxes, size: plain_roi_align(x[0], boxes[0], size))
    monkeypatch.setattr(modeling_sam3, "torchvision", SimpleNamespace(ops=ops), raising=False)
    boxes, labels = torch.cat([EXAMPLES, torch.zeros(2, 4)]), torch.cat([LABELS, torch.tensor([-10, -10])])
    expected = sam3(
        pixel_values=images(), **padded(tokenizer, phrase), input_boxes=boxes[None], input_boxes_labels=labels[None]
    )
    model = tiny_sam3().to(dtype)
    detector = Sam3Detector(model, tokenizer)
    levels = detector.levels(model.get_vision_features(images().to(dtype)).fpn_hidden_states)
    tokens = detector.encode_boxes(levels, boxes, labels)
    assert len(tokens) == 4
    answer = detector.answer(levels, torch.cat([detector.encode_text(phrase), tokens]))
    every = torch.arange(len(answer.logits))
    for ours, theirs in (
        (answer.logits, expected.pred_logits[0]),
        (answer.presence, expected.presence_logits[0, 0]),
        (answer.boxes, expected.pred_boxes[0]),
        (detector.masks(levels, answer, every), expected.pred_masks[0]),
    ):
        assert relative(ours, theirs) < limit


def post_process():
    """transformers' post-processing: its module imports torchvision, the function itself does not need it."""
    folder = Path(importlib.import_module("transformers.models.sam3").__file__).parent
    tree = ast.parse((folder / "image_processing_sam3.py").read_text())
    name = "post_process_instance_segmentation"
    tree.body = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    scope = {"torch": torch}
    exec(compile(tree, name, "exec"), scope)
    return scope[name]


def embedded(model, detector, pixels):
    levels = detector.levels(model.get_vision_features(pixels).fpn_hidden_states)
    empty = torch.empty(0)
    return Embeddings(high=empty, low=empty, maps=None, extra={f"fpn{k}": level for k, level in enumerate(levels)})


def test_what_is_kept_is_what_transformers_keeps(sam3, detector, tokenizer):
    """Scores, boxes and masks of ``post_process_instance_segmentation``, of the second of two tiles; examples change the answer."""
    pixels = images(2)
    outputs = sam3(pixel_values=pixels[1:], **padded(tokenizer, "nucleus"))
    threshold = float((outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid()).median())
    (kept,) = post_process()(None, outputs, threshold, target_sizes=None)
    text = detector.encode_text("nucleus").numpy()
    found = detector.detect(embedded(sam3, detector, pixels), 1, Concept(text=text), threshold + 1e-6)
    assert 0 < len(found.scores) < 20
    torch.testing.assert_close(found.scores, kept["scores"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.boxes_px, kept["boxes"] * SIDE, rtol=1e-5, atol=1e-4)
    assert torch.equal((found.logits > 0).long(), kept["masks"])
    assert found.mask_stride_px == 3.5
    corners = torch.cat([EXAMPLES[:, :2] - EXAMPLES[:, 2:] / 2, EXAMPLES[:, :2] + EXAMPLES[:, 2:] / 2], 1) * SIDE
    shown = Concept(text=text, boxes_px=corners.numpy(), is_example=LABELS.numpy() == 1)
    other = detector.detect(embedded(sam3, detector, pixels), 1, shown, 0)
    levels = tuple(level[1:] for level in detector.levels(sam3.get_vision_features(pixels).fpn_hidden_states))
    tokens = torch.cat([detector.encode_text("nucleus"), detector.encode_boxes(levels, EXAMPLES, LABELS)])
    torch.testing.assert_close(other.scores, detector.answer(levels, tokens).scores, rtol=1e-5, atol=0)
    assert not torch.allclose(
        other.scores, detector.detect(embedded(sam3, detector, pixels), 1, Concept(text=text), 0).scores
    )


def test_a_tile_without_instances_costs_no_masks(sam3, detector, monkeypatch):
    monkeypatch.setattr(detector, "masks", lambda *_: pytest.fail("masks were made"))
    found = detector.detect(
        embedded(sam3, detector, images()), 0, Concept(text=detector.encode_text("nucleus").numpy()), 1.0
    )
    assert len(found.scores) == 0
    assert found.logits.shape == (0, 32, 32)


def test_a_neck_without_the_coarsest_level_is_seen_alike(tokenizer):
    """Some checkpoints have no level below the patches' grid; transformers drops the last level whatever it is."""
    whole, cut = tiny_sam3(), tiny_sam3()
    cut.load_state_dict(whole.state_dict())
    cut.vision_encoder.neck.fpn_layers = cut.vision_encoder.neck.fpn_layers[:3]
    cut.config.vision_config.scale_factors = [4.0, 2.0, 1.0]
    answers = []
    for model in (whole, cut):
        detector = Sam3Detector(model, tokenizer)
        levels = detector.levels(model.get_vision_features(images()).fpn_hidden_states)
        assert [level.shape[-1] for level in levels] == [32, 16, 8]
        answers.append(detector.answer(levels, detector.encode_text("nucleus")).logits)
    assert torch.equal(*answers)


def test_phrases_are_counted_with_their_ends(detector):
    assert detector.max_tokens == 32
    assert detector.count_tokens("nucl") == 5  # start, "nu", "c", "l</w>", end
    assert detector.count_tokens("word " * 300) > 300


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="no tokenizer, which phrases need"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="its tokenizer cannot be read") as raised:
        read_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_both_forms_of_a_tokenizer_are_one(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    assert json.loads(read_tokenizer(tmp_path)) == json.loads(tokenizer)
