"""Types on pseudo-slides by the maps of an intent, beside the typing rule and both together: are the maps evidence that descriptors are not?

Each type's clicks are meant, the other types' are not; the score of a nucleus is the mean of the likeliest map inside its mask. Tiles, clicks and
figures are those of the table c1 of cop (benchmarks/cop/mosaic.py).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.common import MPP, encode
from benchmarks.cop.mosaic import CLICKS, Mosaic, click, lacking, lay_out, without_types
from benchmarks.cop.rules import ours
from benchmarks.cop.typed import SETS, Scene, confusion, macro_f1, spread, unassigned
from training.intent import Clicked, IntentDecoder, describe_clicked
from wsiseg.celltypes import assignment
from wsiseg.models.nuclei_compact import MASK_STRIDE_PX
from wsiseg.models.phrases import STRIDE_PX, MixedPyramid, pyramid_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from wsiseg.models.nuclei_compact import NucleiCompact

GAMMAS = (0.5, 1.0, 2.0)  #: powers of the map beside the rule's probabilities
OFF = 0.1  #: a type of which the maps give fewer of a tile's nuclei is taken off there


@dataclass(frozen=True)
class Seen:
    """One image as the decoder sees it: description of every dot (n, 267), features, and the cells of the map inside each dot's mask."""

    descriptions: torch.Tensor
    features: torch.Tensor
    inside: list[torch.Tensor]


@torch.inference_mode()
def look(model: NucleiCompact, network: MixedPyramid, scene: Scene) -> Seen:
    """Encode an image, and decode a mask at every dot."""
    scale = scene.mpp / MPP
    size = round(scene.image.shape[1] * scale), round(scene.image.shape[0] * scale)
    embeddings = encode(model, np.asarray(Image.fromarray(scene.image).resize(size, Image.Resampling.BICUBIC)))
    pyramid = pyramid_of(embeddings)
    points = torch.from_numpy((scene.xy / scene.mpp * scale).astype(np.float32))
    tile = torch.zeros(len(points), dtype=torch.long)
    masks = model.decode(embeddings, tile, points)
    features = network.features({k: v.float() for k, v in pyramid.items()})
    height, width = pyramid["p4"].shape[2:]
    inside = []
    for mask, origin, point in zip(masks.logits > 0, masks.origin_xy, points, strict=True):
        y, x = mask.nonzero().T
        at = torch.stack(
            [
                torch.div(origin[1] + MASK_STRIDE_PX * y, STRIDE_PX, rounding_mode="floor"),
                torch.div(origin[0] + MASK_STRIDE_PX * x, STRIDE_PX, rounding_mode="floor"),
            ]
        )
        at = at[:, (at[0] >= 0) & (at[0] < height) & (at[1] >= 0) & (at[1] < width)]
        if not at.shape[1]:
            at = torch.div(point.flip(0), STRIDE_PX, rounding_mode="floor").long().clamp(min=0)[:, None]
            at = torch.minimum(at, torch.tensor([[height - 1], [width - 1]]))
        inside.append(at[0] * width + at[1])
    return Seen(describe_clicked(pyramid, tile, masks), features, inside)


@torch.inference_mode()
def map_scores(network: IntentDecoder, seen: list[Seen], clicked: list[torch.Tensor]) -> np.ndarray:
    """(dots of all images, types): mean of each type's likeliest map; ``clicked`` are the descriptions of each type's clicks."""
    kinds = torch.cat([torch.full((len(of),), t) for t, of in enumerate(clicked)])
    signs = torch.where(kinds == torch.arange(len(clicked))[:, None], 1.0, -1.0)
    queries = Clicked(torch.cat(clicked)[None].expand(len(clicked), -1, -1).float(), signs)
    every = torch.arange(len(clicked))
    scores = []
    for image in seen:
        logits, quality = network(
            image.features, torch.zeros_like(every), queries, all_nuclei=torch.zeros(len(clicked), dtype=torch.bool)
        )
        chance = logits[every, quality.argmax(1)].sigmoid().flatten(1)
        scores += [chance[:, inside].mean(1) for inside in image.inside]
    return torch.stack(scores).numpy()


def _weighed(z: np.ndarray, xy: np.ndarray, scores: np.ndarray, gamma: float) -> Callable[..., np.ndarray]:
    """The rule's last step with its probabilities times a power of the maps."""
    inner = assignment._with_local_prevalence
    order = np.lexsort((*z[:, :2].T, xy[:, 1], xy[:, 0]))  # that of the rule

    def weighed(p: np.ndarray, xy_um: np.ndarray, config: object) -> np.ndarray:
        p = p.copy()
        p[:, : scores.shape[1]] *= scores[order].clip(1e-3) ** gamma
        return inner(p / np.maximum(p.sum(1, keepdims=True), 1e-12), xy_um, config)

    return weighed


def _taken_off(codes: np.ndarray, scores: np.ndarray, m: Mosaic) -> np.ndarray:
    codes = codes.copy()
    for k in np.unique(m.tile):
        here = m.tile == k
        share = (scores[here].argmax(1)[:, None] == np.arange(scores.shape[1])).mean(0)
        for t in np.flatnonzero(share < OFF):
            codes[here & (codes == t + 1)] = 0
    return codes


def slide_rows(
    model: NucleiCompact, network: IntentDecoder, scenes: list[Scene], name: str, seeds: int
) -> list[dict[str, object]]:
    """Macro-F1, unassigned cells, and cells that get a type their tile lacks."""
    kinds, rows = SETS[name][1], []
    seen = [look(model, network, scene) for scene in scenes]
    dots = [(k, i) for k, scene in enumerate(scenes) for i in range(len(scene.z))]
    first = np.cumsum([0, *(len(scene.z) for scene in scenes)])
    for where in CLICKS:
        found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 1])
            order = np.random.default_rng([seed, 1]).permutation(len(scenes))  # as lay_out draws it
            whole = lay_out(scenes, kinds, rng)
            number = np.concatenate(
                [np.arange(first[k], first[k + 1]) for k in order]
            )  # of each dot, whatever its place
            state = rng.bit_generator.state
            m = without_types(whole, kinds, rng)
            rng.bit_generator.state = state
            mine = without_types(
                Mosaic(number, *(getattr(whole, f) for f in ("xy", "types", "tile", "centres", "source"))), kinds, rng
            ).z
            clicks = click(m, kinds, where, rng)
            clicked = [torch.stack([seen[dots[n][0]].descriptions[dots[n][1]] for n in mine[of]]) for of in clicks]
            scores = map_scores(network, seen, clicked)[mine]
            z = [m.z[of] for of in clicks]
            rule = ours(m.z, m.xy, z, model.types)
            given = {
                "the rule": rule,
                "the likeliest map": scores.argmax(1) + 1,
                f"the rule, without types that get < {OFF:.0%} of a tile by the maps": _taken_off(rule, scores, m),
            }
            for gamma in GAMMAS:
                step = _weighed(m.z.astype(np.float16), m.xy, scores, gamma)
                with mock.patch.object(assignment, "_with_local_prevalence", step):
                    given[f"the rule times the map^{gamma:g}"] = ours(m.z, m.xy, z, model.types)
            for what, codes in given.items():
                table = confusion(codes, m.types, kinds, clicks)
                wrong = float(np.mean([(codes[here] == t).mean() for here, t in lacking(m, kinds)]))
                found[what].append((float(macro_f1(table)), float(unassigned(table)), wrong))
        for what, values in found.items():
            of = zip(("macro-F1", "unassigned", "given a type its tile lacks"), np.array(values).T, strict=True)
            rows.append({"clicks in": where, "typed by": what} | {k: spread(v) for k, v in of})
    return rows
