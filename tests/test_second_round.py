"""The second round on masks of which the answer is known: a stand-in model that returns what it is told to."""

from __future__ import annotations

import numpy as np
import torch

from wsiseg.config import MaskConfig, RefinementConfig
from wsiseg.records import Embeddings, PromptExtras, WindowMasks
from wsiseg.segmentation.refinement import refine_masks

SIDE, CELL = 64, 2  # windows of 128 px


def disc(radius: float) -> torch.Tensor:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return torch.tensor(radius - np.hypot(x - 32, y - 32), dtype=torch.float32)


def batch(radii: list[float], points: list[tuple[float, float]], *, full_tile: bool = False) -> WindowMasks:
    xy = torch.tensor(points, dtype=torch.float32)
    n = len(radii)
    return WindowMasks(
        logits=torch.stack([disc(r) for r in radii]),
        origin_xy=(xy - SIDE * CELL / 2).long(),
        mask_stride_px=CELL,
        predicted_iou=torch.linspace(0.9, 0.8, n),
        stability=torch.ones(n),
        descriptors=torch.zeros(n, 3).half(),
        points_xy=xy,
        full_tile=full_tile,
    )


class Told:
    """Answers every prompt with a disc of its radius, and remembers what it was asked."""

    device = torch.device("cpu")
    prompts_multiple = 4

    def __init__(self, radius: dict[float, float], *, box_replaces_point: bool = False) -> None:
        self.radius, self.box_replaces_point = radius, box_replaces_point
        self.asked: list[PromptExtras] = []

    def decode(
        self, embeddings: object, tile: torch.Tensor, points_xy: torch.Tensor, *, extras: PromptExtras
    ) -> WindowMasks:
        assert len(tile) == len(points_xy) == len(extras.boxes)
        assert len(points_xy) % 4 == 0
        self.asked.append(extras)
        found = batch([self.radius[x] for x in points_xy[:, 0].tolist()], [tuple(p) for p in points_xy.tolist()])
        return WindowMasks(
            logits=found.logits,
            origin_xy=found.origin_xy,
            mask_stride_px=CELL,
            predicted_iou=torch.full((len(tile),), 0.5),
            stability=found.stability,
            descriptors=found.descriptors + 1,
            points_xy=points_xy,
        )


def areas(batches: list[WindowMasks]) -> list[float]:
    return [float((logit > 0).sum()) for b in batches for logit in b.logits]


def again(model: Told, batches: list[WindowMasks], **settings: float) -> list[WindowMasks]:
    nothing = Embeddings(high=torch.empty(0), low=torch.empty(0), maps=None, extra={})
    config = RefinementConfig(enabled=True, **settings)  # type: ignore[arg-type]
    return refine_masks(model, nothing, 512, batches, MaskConfig(prompts_per_batch=8), config)  # type: ignore[arg-type]


def test_a_mask_that_agrees_is_taken_with_all_it_says():
    first = [batch([10, 10], [(100, 100), (300, 100)])]
    out = again(Told({100: 11, 300: 9.5}), first)
    assert areas(out) == areas([batch([11, 9.5], [(100, 100), (300, 100)])])
    assert out[0].predicted_iou.tolist() == [0.5, 0.5]
    assert (out[0].descriptors == 1).all()


def test_another_instance_is_not_taken():
    """IoU of discs of 10 and 14 cells: 0.51; of 10 and 6: 0.36."""
    first = [batch([10, 10], [(100, 100), (300, 100)])]
    out = again(Told({100: 14, 300: 6}), first)
    assert areas(out) == areas(first)
    np.testing.assert_allclose(out[0].predicted_iou.tolist(), [0.9, 0.8], rtol=1e-6)
    assert areas(again(Told({100: 14, 300: 6}), first, agree=0.3)) == areas([batch([14, 6], [(100, 100), (300, 100)])])


def test_a_mask_that_grows_over_its_neighbour_is_not_taken():
    first = [batch([20, 20], [(200, 200), (282, 200)])]  # 41 cells apart: one between them
    out = again(Told({200: 23.5, 282: 20}), first, max_overlap=0.0)
    assert areas(out) == areas(first)
    out = again(Told({200: 20.8, 282: 20}), first, max_overlap=0.0)
    assert areas(out)[0] > areas(first)[0]


def test_the_prompt_is_box_point_and_neighbours():
    points = [(100.0, 100.0), (200.0, 100.0), (300.0, 100.0), (400.0, 400.0)]
    model = Told({x: 10 for x, _ in points})
    again(model, [batch([10] * 4, points)], neighbours=2)
    extras = model.asked[0]
    assert extras.boxes[0].tolist() == [80, 80, 120, 120]  # a disc of 10 cells of 2 px
    assert sorted(extras.points_xy[0].tolist()) == [[200, 100], [300, 100]]
    assert (extras.labels == 0).all()
    sam = Told({x: 10 for x, _ in points}, box_replaces_point=True)
    again(sam, [batch([10] * 4, points)], neighbours=2)
    assert sam.asked[0].points_xy[0, 0].tolist() == [100, 100]
    assert sam.asked[0].labels[0].tolist() == [1, 0, 0]


def test_a_duplicate_is_no_neighbour_and_stays_as_it_is():
    first = [batch([10, 10], [(100, 100), (102, 100)])]
    model = Told({100: 11, 102: 11})
    out = again(model, first)
    assert len(model.asked[0].boxes) == 4  # one prompt, filled up
    assert model.asked[0].points_xy.shape[1] == 0
    assert areas(out)[0] > areas(out)[1] == areas(first)[1]


def test_a_prompt_is_not_its_own_negative():
    """Two answers to one point, one inside the other, and both kept."""
    first = [batch([4, 30], [(100, 100), (100, 100)])]
    model = Told({100: 10})
    again(model, first)
    assert model.asked[0].points_xy.shape[1] == 0


def test_batches_keep_their_masks_and_order():
    first = [
        batch([10, 10, 10], [(100, 100), (200, 100), (300, 100)]),
        batch([12], [(64, 64)], full_tile=True),
        batch([10], [(400, 300)]),
    ]
    out = again(Told({100: 11, 200: 10, 300: 11, 400: 11}), first)
    assert [len(b.predicted_iou) for b in out] == [3, 1, 1]
    assert out[1] is first[1]
    grown = [a > b for a, b in zip(areas(out), areas(first), strict=True)]
    assert grown == [True, False, True, False, True]


def test_nothing_to_ask():
    empty = batch([10], [(100, 100)]).take(torch.zeros(1, dtype=torch.bool))
    model = Told({})
    assert again(model, [empty]) == [empty]
    assert again(model, []) == []
    assert model.asked == []
