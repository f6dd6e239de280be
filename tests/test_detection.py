"""Methods text and exemplar with a detector whose answers are known: dark and red spots on a plain ground."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import shapely
import torch
import torch.nn.functional as F
from scipy import ndimage

from wsiseg.celltypes.described import assign_described
from wsiseg.config import DetectionConfig, MaskConfig, RunConfig, TilingConfig, TypingConfig
from wsiseg.geometry import Box, Lattice
from wsiseg.records import (
    Cells,
    DescribedType,
    Detections,
    Embeddings,
    Examples,
    Seeds,
    SeedType,
    TypePrototypes,
    WindowMasks,
)
from wsiseg.runs.image import segment_image
from wsiseg.seeds.bank import build_bank
from wsiseg.segmentation.competition import compete
from wsiseg.segmentation.detection import Detector
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts.exemplars import choose, find_examples, likely_places, relative_lead
from wsiseg.slide.array_reader import ArrayReader

SIDE, STRIDE, CELL = 512, 16, 4
COLOURS = {"dark": (60, 40, 120), "red": (250, 40, 20)}
GROUND = (240, 230, 240)


def coverage(image, colour):
    """Share of each cell (h, w) that has a colour, between the ground and it."""
    small = F.avg_pool2d(image.float()[None], CELL)[0].numpy()
    away = np.abs(small - np.reshape(colour, (3, 1, 1))).mean(0)
    return 1 - away / max(np.abs(np.subtract(GROUND, colour)).mean(), 1)


class SpotDetector:
    """Finds the spots of the colour that a phrase names or that the first example box holds, the largest first, as many as it has queries."""

    reads_text, max_tokens, max_instances = True, 32, 200

    def __init__(self):
        self.passes, self.fields, self.encoded = 0, [], []

    def count_tokens(self, phrase):
        return len(phrase.split()) + 2

    def encode_text(self, phrase):
        self.encoded.append(phrase)
        wanted = [colour for name, colour in COLOURS.items() if name in phrase]
        return torch.tensor(wanted or [(-1, -1, -1)], dtype=torch.float32)

    def detect(self, embeddings, tile, concept, min_score):
        self.passes += 1
        image = embeddings.extra["pixels"][tile].float()
        colour = np.asarray(concept.text[0], np.float32)
        if len(concept.boxes_px):
            x, y = concept.boxes_px[concept.is_example][0].reshape(2, 2).mean(0).astype(int)
            colour = image[:, y, x].numpy()
        cover = coverage(image, colour)
        labels, count = ndimage.label((cover > 0.5) & (np.max(colour) >= 0))
        sizes = np.bincount(labels.ravel())
        kept = [k for k in range(1, count + 1) if sizes[k] >= 3][: self.max_instances]
        self.fields.append(len(kept))
        around = ndimage.grey_dilation(labels, 3)[None] == np.array(kept, int)[:, None, None]
        logits = torch.from_numpy(np.where(around, (cover - 0.5) * 8, -4))
        scores = torch.tensor(ndimage.mean(cover, labels, kept) if kept else [])
        places = ndimage.find_objects(labels)
        where = [places[k - 1] for k in kept]
        good = scores >= min_score
        places = ndimage.find_objects(labels)
        where = [places[k - 1] for k in kept]
        boxes = [[c.start, r.start, c.stop, r.stop] for r, c in where]
        return Detections(
            scores=scores[good].float(),
            boxes_px=torch.tensor(boxes, dtype=torch.float32).view(-1, 4)[good] * CELL,
            logits=logits[good].float(),
            mask_stride_px=CELL,
        )


class SpotModel:
    """A promptable model with that detector; its features are the colours, its masks those of the spot under a point."""

    mpp, stride_px, reach_px, input_px, has_maps, supports_full_tile = 0.25, STRIDE, 64, SIDE, False, False
    box_replaces_point, prompts_multiple, descriptor_size, types = True, 1, 3, None
    device, mask_stride_px = torch.device("cpu"), float(CELL)
    prompts = ("points", "boxes", "text", "exemplars")

    def __init__(self):
        self.detector, self.trunk = SpotDetector(), 0

    def encode(self, images):
        self.trunk += 1
        colours = images.float() - 128
        high, low = (F.normalize(F.avg_pool2d(colours, k), dim=1) for k in (CELL, STRIDE))
        return Embeddings(high=high, low=low, maps=None, extra={"pixels": images})

    def describe(self, embeddings, batch_index, corner, logits):
        hard = F.avg_pool2d((logits > 0).float()[:, None], STRIDE // CELL)
        side = hard.shape[-1]
        out = []
        for k, (x, y) in enumerate(corner.tolist()):
            out.append((embeddings.low[batch_index[k], :, y : y + side, x : x + side] * hard[k]).sum((1, 2)))
        return F.normalize(torch.stack(out), dim=1)

    def decode(self, embeddings, batch_index, points_xy, *, extras=None, multimask=False, full_tile=False):
        masks, corners, image = [], [], embeddings.extra["pixels"][int(batch_index[0])].float()
        for x, y in points_xy.long().clamp(0, SIDE - 1).tolist():
            cover = coverage(image, image[:, y, x].numpy())
            labels, _ = ndimage.label(cover > 0.5)
            own = ndimage.binary_dilation(labels == labels[y // CELL, x // CELL])
            column, row = (min(max(v // CELL // 4 * 4 - 16, 0), SIDE // CELL - 32) for v in (x, y))
            mask = torch.from_numpy(np.where(own, (cover - 0.5) * 8, -4))
            masks.append(mask[row : row + 32, column : column + 32])
            corners.append([column, row])
        logits, corner = torch.stack(masks).float(), torch.tensor(corners)
        sure = (logits[:, [0, -1], :].amax((1, 2)) < 0).float() * 0.9
        return WindowMasks(
            logits=logits,
            origin_xy=corner * CELL,
            mask_stride_px=CELL,
            predicted_iou=sure,
            stability=torch.ones_like(sure),
            descriptors=self.describe(embeddings, batch_index, corner // 4, logits),
            points_xy=points_xy,
        )


def picture(spots, size=SIDE):
    """An image (size, size, 3) with spots (x, y, radius, colour)."""
    image = np.full((size, size, 3), GROUND, np.uint8)
    y, x = np.mgrid[:size, :size] + 0.5
    for cx, cy, radius, colour in spots:
        image[(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = COLOURS[colour]
    return image


def grid(count, colour="dark", size=SIDE, radius=8.0):
    """As many spots as asked for, in rows, all inside."""
    side = int(np.ceil(np.sqrt(count)))
    step = size / side
    return [((k % side + 0.5) * step, (k // side + 0.5) * step, radius, colour) for k in range(count)]


def text_run(image, *phrases, model=None, **settings):
    model = model or SpotModel()
    config = RunConfig(method="text", text=phrases, stain="he", **settings)
    cells, typing = segment_image(image, mpp=0.25, config=config, model=model)
    return model, cells, typing


def matched(cells, spots):
    """How many spots have one cell of about their area at their centre."""
    found = 0
    for x, y, radius, _ in spots:
        near = [p for p in cells.polygons if p.centroid.distance(shapely.Point(x, y)) < 2]
        found += len(near) == 1 and 0.75 < near[0].area / (np.pi * radius**2) < 1.25
    return found


def one_tile(image, types, core=None, examples=None, model=None, **thresholds):
    """The outlines of one tile, all of it its core unless told otherwise."""
    model = model or SpotModel()
    config = DetectionConfig(**thresholds)
    embeddings = model.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
    masks = Detector(model, types, config).find(image, core or Box(0, 0, SIDE, SIDE), embeddings, 0, examples)
    traced = [trace(m, Box(0, 0, SIDE, SIDE), Lattice(0.25, 0.25), MaskConfig())[0] for m in masks]
    return compete(Cells.concatenate(traced, model.descriptor_size), config.same_cell)


def described(model, *names):
    return [
        DescribedType(name=name, color=(0, 0, 0), phrases=(name,), tokens=(model.detector.encode_text(name).numpy(),))
        for name in names
    ]


@pytest.mark.parametrize(("count", "queries", "passes"), [(1, 200, 1), (150, 200, 1), (350, 200, 5), (350, 80, 21)])
def test_all_instances_of_a_crowded_tile_are_found(count, queries, passes):
    """More than the detector has queries: the tile is searched in quarters, and those in quarters of their own."""
    model, spots = SpotModel(), grid(count)
    model.detector.max_instances = queries
    cells = one_tile(picture(spots), described(model, "dark"), model=model, smallest_field_um=40)
    assert matched(cells, spots) == count == len(cells)
    assert model.detector.passes == model.trunk == passes
    assert max(model.detector.fields) <= queries


def test_a_field_without_room_for_many_is_not_searched_in_quarters():
    model = SpotModel()
    one_tile(picture(grid(350)), described(model, "dark"), model=model, smallest_field_um=81)
    assert model.detector.passes == 1  # a quarter would be 80 um


class PlacedModel(SpotModel):
    """Its coarse features say where they are."""

    def encode(self, images):
        encoded = super().encode(images)
        turn = torch.arange(SIDE // STRIDE) * (3 / (SIDE // STRIDE))
        place = torch.stack(
            [
                turn.cos()[None].expand(len(turn), -1),
                turn.cos()[:, None].expand(-1, len(turn)),
                turn.sin()[None] * turn.sin()[:, None],
            ]
        )
        return dataclasses.replace(encoded, low=F.normalize(place, dim=0)[None])


def test_cells_of_quarters_are_described_as_those_of_the_whole_tile():
    """Descriptors come from the features of the tile at the cell's place, whichever field it was found on."""
    image = picture(grid(350))
    crowded, whole = (
        one_tile(image, described(m, "dark"), model=m, crowded=c)
        for m, c in ((PlacedModel(), 0.75), (PlacedModel(), 1.0))
    )
    assert (len(crowded), len(whole)) == (350, 200)
    centres = [np.array([p.centroid.coords[0] for p in cells.polygons]) for cells in (crowded, whole)]
    gaps = np.hypot(*(centres[0][:, None] - centres[1][None]).transpose(2, 0, 1))
    twin = gaps.argmin(0)
    assert gaps.min(0).max() < 1
    cosines = (crowded.descriptors[twin].astype(float) * whole.descriptors.astype(float)).sum(1)
    assert cosines.min() > 0.999
    other = (crowded.descriptors[np.roll(twin, 20)].astype(float) * whole.descriptors.astype(float)).sum(1)
    assert np.median(other) < 0.99


def test_a_tile_without_instances_gives_none():
    model = SpotModel()
    cells = one_tile(picture(grid(40, "red")), described(model, "dark", "purple"), model=model)
    assert len(cells) == 0
    _, cells, typing = text_run(picture([]), "dark", "red")
    assert (len(cells), typing.names) == (0, ("unassigned", "dark", "red"))


@pytest.mark.parametrize("origin", [0.0, 37.0])
def test_cells_at_the_seams_of_tiles_are_found_once(origin):
    """A run over four tiles and more, whose grid lies elsewhere the second time."""
    rng = np.random.default_rng(5)
    at = rng.permutation(np.stack(np.meshgrid(np.arange(12, 700, 24), np.arange(12, 700, 24)), -1).reshape(-1, 2))[:250]
    spots = [(x + 0.3, y + 0.6, 7.0, "dark") for x, y in at.astype(float)]
    tiling = TilingConfig(origin_um=origin)
    model, cells, _ = text_run(
        picture(spots, 700), "dark", tiling=tiling, masks=MaskConfig(convex_above=1, simplify_um=0)
    )
    assert model.trunk >= 4
    assert matched(cells, spots) == len(cells) == 250


def test_types_compete_for_each_cell():
    """The cell has the best phrase's type and score, the best outline once, and its lead over the other type is the margin."""
    spots = [*grid(9), (30.0, 30.0, 8.0, "red")]
    _, _, typing = text_run(picture(spots), "dark", "red")
    assert typing.count() == {"unassigned": 0, "dark": 9, "red": 1}
    assert (typing.scores > 0.8).all()
    assert typing.margins == pytest.approx(typing.scores)  # nothing was found twice
    twins = [DescribedType(name=n, color=(0, 0, 0), phrases=(n,), tokens=(t,)) for n, t in (("a", DARK), ("b", NEARLY))]
    found = one_tile(picture(grid(9)), twins)
    assert len(found) == 9
    assert (found.concept_scores > 0).all()
    assert (found.concept_scores[:, 0] > found.concept_scores[:, 1]).all()
    assert found.scores == pytest.approx(found.concept_scores.max(1))
    unsure = assign_described(np.array([[0.5, 0.48], [0.5, 0.2], [0, 0]], np.float32), twins, TypingConfig())
    assert unsure.codes.tolist() == [0, 1, 0]
    assert unsure.margins == pytest.approx([0.02, 0.3, 0])


DARK = np.array([COLOURS["dark"]], np.float32)
NEARLY = DARK + 15


def test_competition_does_not_depend_on_the_order():
    squares = [shapely.box(x, 0, x + 10, 10) for x in (0, 1, 2, 30, 31)]
    scores = np.array([[0.9, 0, 0], [0, 0.8, 0], [0, 0, 0.7], [0.6, 0, 0], [0, 0.6, 0]], np.float32)
    cells = Cells(
        polygons=np.array(squares, object),
        points_xy=np.array([[x + 5.0, 5.0] for x in (0, 1, 2, 30, 31)]),
        scores=scores.max(1),
        descriptors=np.zeros((5, 1), np.float16),
        concept_scores=scores,
    )
    expected = compete(cells, 0.5)
    assert expected.concept_scores == pytest.approx(np.array([[0.9, 0.8, 0.7], [0.6, 0.6, 0]]))
    for seed in range(5):
        again = compete(cells.take(np.random.default_rng(seed).permutation(5)), 0.5)
        assert np.array_equal(again.concept_scores, expected.concept_scores)
        assert list(again.polygons) == list(expected.polygons)


def test_twelve_types_share_one_pass_of_the_trunk():
    model = SpotModel()
    names = [f"dark {k}" for k in range(12)]
    one_tile(picture(grid(9)), described(model, *names), model=model)
    assert (model.trunk, model.detector.passes) == (1, 12)
    model, _, _ = text_run(picture(grid(9)), *names, model=SpotModel())
    assert model.detector.passes == 12 * model.trunk
    assert len(model.detector.encoded) == 12  # for the whole run, not for each of its tiles
    assert model.trunk > 1


def clicks(**places):
    return Seeds(tuple(SeedType(name, (1, 2, 3), tuple(p[:1]), tuple(p[1:])) for name, p in places.items()), "clicks")


def test_one_click_per_type_becomes_a_concept_on_every_tile():
    spots = [(s[0], s[1], 8.0, "dark" if k % 3 else "red") for k, s in enumerate(grid(144, size=1000))]
    seeds = clicks(dark=[spots[1][:2]], red=[spots[0][:2]])
    model, config = SpotModel(), RunConfig(method="exemplar", stain="he")
    cells, typing = segment_image(picture(spots, 1000), mpp=0.25, seeds=seeds, config=config, model=model)
    assert model.trunk >= 9
    assert len(cells) == 144 == matched(cells, spots)
    assert typing.count() == {"unassigned": 0, "dark": 96, "red": 48}
    assert model.detector.encoded == ["visual", "visual"]
    nothing, typing = segment_image(
        picture([*spots[:2]], 1000), mpp=0.25, seeds=seeds, config=config, model=(model := SpotModel())
    )
    assert (len(nothing), typing.count()) == (2, {"unassigned": 0, "dark": 1, "red": 1})
    assert model.detector.passes == 2  # nothing is searched for where nothing is sure to be of a type


def test_examples_are_the_clicked_cells_or_the_surest():
    model, spots = SpotModel(), [(s[0], s[1], 16.0, "dark" if k % 2 else "red") for k, s in enumerate(grid(36))]
    image = picture(spots)
    seeds = clicks(dark=[spots[1][:2], spots[3][:2]], red=[spots[0][:2]])  # spot 3 is dark, and clicked as not being so
    config = RunConfig(method="exemplar", stain="he")
    reader, lattice = ArrayReader(image, 0.25), Lattice(0.25, 0.25)
    bank = build_bank(reader, model, seeds, lattice, config, chains=True)
    embeddings = model.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
    outer = Box(0, 0, SIDE, SIDE)
    points = likely_places(embeddings, SIDE, 0.25, bank, 2.0, 24)
    assert 24 < len(points) <= 48
    found = find_examples(model, embeddings, 0, points, outer, lattice, bank, config)
    box = {k: (np.array([*spots[k][:2]]).repeat(2).reshape(2, 2).T + [[-16], [16]]).ravel() for k in (0, 1, 3)}
    assert found[0].positive == pytest.approx(box[1][None], abs=2)
    assert found[0].negative == pytest.approx(np.stack([box[3], box[0]]), abs=2)
    assert found[1].positive == pytest.approx(box[0][None], abs=2)
    types = [dataclasses.replace(of, clicks=np.empty((0, 2)), negative_clicks=None) for of in bank.types]
    elsewhere = dataclasses.replace(
        bank, types=(dataclasses.replace(types[0], negative=types[0].negative[:0]), types[1])
    )
    found = find_examples(model, embeddings, 0, points, outer, lattice, elsewhere, config)
    for own, other in ((0, 1), (1, 0)):
        assert len(found[own].positive) == config.detection.examples
        centres = found[own].positive.reshape(-1, 2, 2).mean(1)
        assert all(min(np.hypot(*(c - s[:2])) for s in spots[1 - own :: 2]) < 2 for c in centres)
        assert np.array_equal(found[own].negative, found[other].positive)
    only_red = model.encode(torch.from_numpy(picture(spots[::2])).permute(2, 0, 1)[None])
    points = likely_places(only_red, SIDE, 0.25, bank, 2.0, 24)
    found = find_examples(model, only_red, 0, points, outer, lattice, elsewhere, config)
    assert found[0] is None
    assert len(found[1].negative) == 0


def test_relative_lead_is_the_lead_over_other_types_and_negative_clicks():
    z = np.array([[1, 0], [0, 1], [0.8, 0.6]], np.float32)
    first = TypePrototypes(name="a", color=(0, 0, 0), clicks=np.empty((0, 2)), clicked=z[:1], negative=z[2:])
    second = dataclasses.replace(first, name="b", clicked=z[1:2], negative=z[:0])
    assert relative_lead(z, [first, second]) == pytest.approx(np.array([[1, -1], [-5, 1], [-1, -0.2]]), abs=1e-6)
    alone = dataclasses.replace(first, negative=z[:0])
    assert relative_lead(z, [alone])[:, 0] == pytest.approx([1, 0, 0.8])
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    chosen = choose(relative_lead(z, [first, second]), boxes, DetectionConfig(min_lead=0.25))
    assert [b.tolist() for b in chosen] == [boxes[:1].tolist(), boxes[1:2].tolist()]


def test_examples_of_crowded_tiles_reach_the_quarters():
    """A quarter without a given box is shown what the whole tile's pass was surest of there."""
    model, spots = SpotModel(), grid(350)
    shown = Examples(
        positive=np.array([[*np.subtract(spots[0][:2], 8), *np.add(spots[0][:2], 8)]], np.float32),
        negative=np.empty((0, 4), np.float32),
    )
    types = [DescribedType(name="a", color=(0, 0, 0), phrases=(), tokens=(np.zeros((1, 3), np.float32),))]
    cells = one_tile(picture(spots), types, model=model, examples=[shown])
    assert matched(cells, spots) == len(cells) == 350
    assert (model.detector.passes, model.trunk) == (5, 5)
