"""Accuracy on immunohistochemistry: nuclei of scikit-image's picture, forms of showing it to the network, and recognition of the stain.

    python -m benchmarks.ihc_accuracy [--data DATA] [--model nuclei-compact]

A nucleus is found when an outline's centroid lies within 6 um (or 3 um) of its dot (benchmarks/ihc), one to one. The settings of the
picture's view were chosen on its upper two thirds; the lower third took no part. The types are fitted on images shown as IHC (training/fit_types.py):
forms of that were first compared on all dots, the lower third included, and then on the upper part, with the same result. With the labelled images of
DATA also: nuclei that are brown themselves, made from
H&E (a share of the labelled nuclei gets DAB in place of most of its haematoxylin; SYNTHETIC), and the recognition of the stain on every H&E image.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely
import torch
from PIL import Image
from scipy import ndimage
from skimage import data

from benchmarks.common import encode, instance_images, write_results
from benchmarks.cop.rules import ours
from benchmarks.cop.typed import accuracy, confusion, draw_clicks, macro_f1, spread, unassigned
from wsiseg.config import RunConfig, TypingConfig
from wsiseg.demo import MPP, demo_seeds
from wsiseg.evaluation.detection import detect, match_points
from wsiseg.models import load_model
from wsiseg.runs.image import segment_image
from wsiseg.slide import thumbnail
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.stain import BROWN, SlideStain, compose, find_stain, optical_density, render, separate
from wsiseg.slide.tissue import WHITE_POINT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DOTS = Path(__file__).parent / "ihc" / "ihc_dots.csv"
RADII_UM = (6.0, 3.0)
DRAWS = 40  #: of random clicks
SPLIT_Y = 341  #: the held-out third begins here
HE_SETS = {  #: H&E images and their microns per px, where not stated what their nuclei suggest
    "nuinsseg/train": 0.2, "nuinsseg/dev": 0.2, "tnbc/train": 0.25, "tnbc/dev": 0.25, "dsb2018_histology/train": 0.4,
    "dsb2018_histology/dev": 0.4, "nucls_mini/train": 0.22, "nucls_mini/dev": 0.22, "monuseg/dev_nc": 0.25, "conic_sample/dev_nc": 0.5,
    "pannuke_sample/dev_nc": 0.25, "brca_m2c/train": 0.5, "brca_m2c/dev": 0.5,
}  # fmt: skip
#: Rules of typing that are compared: name, settings, whether the clicks count as those of another slide.
RULES = (
    ("as it is", TypingConfig(), False),
    ("as it is, clicks taken as another slide's (a bank)", TypingConfig(), True),
    *((f"other_stain {k}", TypingConfig(other_stain=k), False) for k in (1, 2, 8, 16)),
    ("no sure cells", TypingConfig(sure_cells=0), False),
    ("other_stain 1, no sure cells", TypingConfig(other_stain=1, sure_cells=0), False),
)
_HAEMATOXYLIN, _DAB, _EOSIN = ((0.650, 0.704, 0.286), (0.268, 0.570, 0.776), (0.072, 0.990, 0.105))


def read_dots() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places (N, 2), types (N,) and whether held out (N,)."""
    with DOTS.open() as stream:
        rows = list(csv.DictReader(stream))
    places = np.array([(float(r["x"]), float(r["y"])) for r in rows])
    return places, np.array([r["type"] for r in rows], object), np.array([r["part"] == "held_out" for r in rows])


def centroids(cells) -> np.ndarray:
    return shapely.get_coordinates(shapely.centroid(cells.polygons))


def detection_row(xy: np.ndarray, held_out: bool) -> dict[str, object]:
    """Recall and precision on one part of the picture."""
    places, _, out = read_dots()
    mine = xy[(xy[:, 1] >= SPLIT_Y) == held_out]
    row: dict[str, object] = {"dots": int((out == held_out).sum()), "outlines": len(mine)}
    for radius in RADII_UM:
        found = detect(places[out == held_out], mine, radius / MPP)
        row |= {
            f"recall {radius:g} um": found.recall,
            f"precision {radius:g} um": found.precision,
            f"F1 {radius:g} um": found.f1,
        }
    return row


def picture_rows(model) -> list[dict[str, object]]:
    """Before and now, both parts, without clicks; and the types by the demo's clicks."""
    image, rows = data.immunohistochemistry(), []
    places, types, out = read_dots()
    for name, stain in (("as H&E (before)", "he"), ("recognised (now)", "auto")):
        config = RunConfig(stain=stain)
        xy = centroids(segment_image(image, mpp=MPP, config=config, model=model)[0])
        cells, typing = segment_image(image, mpp=MPP, seeds=demo_seeds(), config=config, model=model)
        typed = centroids(cells)
        names = np.array(["", *typing.names[1:]], object)[typing.codes]
        for part in (False, True):
            mine = (typed[:, 1] >= SPLIT_Y) == part
            found = detect(places[out == part], typed[mine], RADII_UM[0] / MPP, types[out == part], names[mine])
            rows.append(
                {"shown": name, "part": "held out" if part else "chosen on"}
                | detection_row(xy, part)
                | {"type accuracy": found.type_accuracy, "macro F1": found.macro_f1, "unassigned": found.unassigned}
            )
    return rows


def random_click_rows(model) -> list[dict[str, object]]:
    """Types of the true dots by random clicks per type, all within the part that settings were chosen on; every other dot is judged."""
    image = data.immunohistochemistry()
    places, types, out = read_dots()
    names, codes = np.unique(types.astype(str), return_inverse=True)
    stain = find_stain(ArrayReader(image, MPP), "auto", RunConfig().tissue.overview_mpp)
    size = tuple(round(n * MPP / model.mpp) for n in image.shape[1::-1])
    shown = Image.fromarray(render(image, stain)).resize(size, Image.Resampling.BICUBIC)
    embeddings = encode(model, np.asarray(shown))
    points = torch.from_numpy((places * MPP / model.mpp).astype(np.float32))
    with torch.inference_mode():
        z = model.decode(embeddings, torch.zeros(len(points), dtype=torch.long), points).descriptors.half().numpy()
    rows = []
    for what, typing, elsewhere in RULES:
        for count in (1, 2, 4):
            found = {"chosen on": [], "held out": []}
            for seed in range(DRAWS):
                clicks, _ = draw_clicks(np.where(out, 0, codes + 1), len(names), count, seed)
                clicked = [z[c] for c in clicks]
                given = ours(
                    z, places * MPP, clicked, model.types, typing, from_other_slide=elsewhere, stain=stain.name
                )
                judged = np.setdiff1d(np.arange(len(z)), np.concatenate(clicks))
                for part, mine in (("chosen on", judged[~out[judged]]), ("held out", judged[out[judged]])):
                    table = confusion(given[mine], codes[mine] + 1, len(names))
                    found[part].append((macro_f1(table), accuracy(table), unassigned(table)))
            for part, values in found.items():
                kinds = zip(("macro-F1", "accuracy of assigned", "unassigned"), np.array(values).T, strict=True)
                row = {"typing": what, "clicks per type": count, "part": part}
                rows.append(row | {name: spread(of) for name, of in kinds})
    return rows


def forms(stain: SlideStain) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Ways to show immunohistochemistry to the network."""

    def of(show, dyes=(_HAEMATOXYLIN, _DAB)):
        return lambda image: compose(*show(*separate(optical_density(image, np.array(stain.white)), np.array(dyes))))

    def saturated(h, darkest=0.9, veil=0.05, halfway=0.2):
        return darkest * (1 - np.exp(-np.maximum(h - veil, 0) / halfway))

    measured = ((0.685, 0.619, 0.383), (0.32, 0.512, 0.797))  # medians of the picture's bluest and brownest px
    return {
        "as it is": lambda image: image,
        "haematoxylin only": of(lambda h, d: (h, 0 * d)),
        "haematoxylin x 2": of(lambda h, d: (2 * h, 0 * d)),
        "haematoxylin x 2, eosin 0.1 everywhere": of(lambda h, d: (2 * h, 0 * d + 0.1)),
        "haematoxylin x 2, 0.4 of the brown as eosin": of(lambda h, d: (2 * h, 0.4 * d)),
        "3 x haematoxylin above 0.05, 0.4 of the brown as eosin": of(
            lambda h, d: (3 * np.maximum(h - 0.05, 0), 0.05 + 0.4 * d)
        ),
        "saturating haematoxylin, eosin 0.1 everywhere": of(lambda h, d: (saturated(h), 0 * d + 0.1)),
        "saturating haematoxylin, 0.4 of the brown as eosin": of(lambda h, d: (saturated(h), 0.05 + 0.4 * d)),
        "the same, dyes measured on the picture": of(lambda h, d: (saturated(h), 0.05 + 0.4 * d), measured),
        "what wsiseg does": lambda image: render(image, stain),
    }


def form_rows(model) -> list[dict[str, object]]:
    """Every form on the two thirds that settings were chosen on."""
    image = data.immunohistochemistry()
    stain = dataclasses.replace(
        find_stain(ArrayReader(image, MPP), "auto", RunConfig().tissue.overview_mpp), name="ihc"
    )
    rows = []
    for name, show in forms(stain).items():
        cells, _ = segment_image(show(image), mpp=MPP, config=RunConfig(stain="he"), model=model)
        rows.append({"shown": name} | detection_row(centroids(cells), held_out=False))
    return rows


def brown_nuclei(
    image: np.ndarray, label: np.ndarray, share: float, strength: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """SYNTHETIC: the H&E image with a share of its nuclei brown and its eosin gone; and which labels are brown (from 0)."""
    white = np.clip(np.percentile(image.reshape(-1, 3), WHITE_POINT, axis=0), 220, 255)
    blue, _ = separate(optical_density(image, white), np.array((_HAEMATOXYLIN, _EOSIN)))
    brown = np.concatenate([[False], np.random.default_rng(seed).random(label.max()) < share])
    inside = ndimage.gaussian_filter(brown[label].astype(float), 1.0)
    haematoxylin = blue * (0.6 * (1 - inside) + 0.25 * inside)
    dab = strength * blue * inside + 0.03
    first, second = (np.array(dye) / np.linalg.norm(dye) for dye in (_HAEMATOXYLIN, _DAB))
    density = haematoxylin[..., None] * first + dab[..., None] * second
    return np.rint(242 * 10**-density).astype(np.uint8), brown


def nuclear_rows(model, folder: Path) -> list[dict[str, object]]:
    """Recall of nuclei that are brown, and of those that are not, by how the image is shown."""
    counts: dict[str, np.ndarray] = {}
    for seed, (_, image, label) in enumerate(instance_images(folder, "tnbc/dev")[::2]):
        synthetic, brown = brown_nuclei(image, label, 0.5, 1.5, seed)
        centres = np.array(ndimage.center_of_mass(label > 0, label, np.arange(1, label.max() + 1)))[:, ::-1] + 0.5
        for stain in ("he", "ihc", "ihc-nuclear", "auto"):
            xy = centroids(segment_image(synthetic, mpp=0.25, config=RunConfig(stain=stain), model=model)[0])
            found, _ = match_points(centres, xy, 4.0 / 0.25)
            hit = np.isin(np.arange(len(centres)), found)
            new = np.array(
                [hit[brown[1:]].sum(), brown.sum(), hit[~brown[1:]].sum(), (~brown[1:]).sum(), len(found), len(xy)]
            )
            counts[stain] = counts.get(stain, 0) + new
    return [
        {"--stain": k, "recall of brown nuclei": v[0] / v[1], "of blue nuclei": v[2] / v[3], "precision": v[4] / v[5]} for k, v in counts.items()
    ]  # fmt: skip


def he_images(folder: Path, name: str) -> Iterator[np.ndarray]:
    kind = "points" if name.startswith("brca") else "instances"
    for path in sorted((folder / kind / name / "image").iterdir()):
        yield np.asarray(Image.open(path).convert("RGB"))


def brown_on_overview(image: np.ndarray, mpp: float) -> float:
    """The simpler way to recognise the stain: the share of brown px on the overview of 8 um per px alone."""
    overview, _ = thumbnail(ArrayReader(image, mpp), RunConfig().tissue.overview_mpp)
    density = optical_density(overview, np.percentile(overview.reshape(-1, 3), WHITE_POINT, axis=0))
    tissue = np.linalg.norm(density, axis=2) > 0.08
    brown = (density[..., 2] > 1.1 * density[..., :2].max(2)) & (separate(density)[1] > BROWN) & tissue
    return float(brown.sum() / max(tissue.sum(), 1))


def recognition_rows(folder: Path) -> list[dict[str, object]]:
    """What every H&E image is taken for; the picture's own quarters; and synthetic nuclear markers of several shares and strengths."""

    def row(name: str, images: list[tuple[np.ndarray, float]]) -> dict[str, object]:
        found = [find_stain(ArrayReader(image, mpp), "auto", RunConfig().tissue.overview_mpp) for image, mpp in images]
        return {
            "images": name,
            "number": len(images),
            **{stain: sum(f.name == stain for f in found) for stain in ("he", "ihc", "ihc-nuclear")},
            "largest share of brown": max(f.brown or 0.0 for f in found),
            "least pink where brown >= 0.05": min((f.pink for f in found if (f.brown or 0.0) >= 0.05), default="-"),
            "largest on the overview alone": max(brown_on_overview(image, mpp) for image, mpp in images),
        }

    rows = [row(name, [(image, mpp) for image in he_images(folder, name)]) for name, mpp in HE_SETS.items()]
    picture = data.immunohistochemistry()
    quarters = [np.ascontiguousarray(picture[y : y + 256, x : x + 256]) for y in (0, 256) for x in (0, 256)]
    rows.append(row("immunohistochemistry, whole and in quarters", [(part, MPP) for part in (picture, *quarters)]))
    labelled = [*instance_images(folder, "tnbc/dev"), *instance_images(folder, "tnbc/train")[:20]]
    for strength in (0.7, 1.0, 1.5):
        for share in (0.1, 0.3, 0.6):
            made = [(brown_nuclei(i, label, share, strength, k)[0], 0.25) for k, (_, i, label) in enumerate(labelled)]
            rows.append(row(f"SYNTHETIC: {share:.0%} of nuclei brown, DAB {strength:g} x haematoxylin", made))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="nuclei-compact")
    parser.add_argument("--name", default="ihc_accuracy")
    options = parser.parse_args()
    model = load_model(options.model, "cpu")
    tables = {
        "nuclei of the picture; types by the clicks of `wsiseg demo`": picture_rows(model),
        f"types of the true dots by random clicks, mean +- sd over {DRAWS} draws": random_click_rows(model),
        "forms of showing it, on the part that settings were chosen on": form_rows(model),
    }
    if options.data is not None:
        tables |= {
            "brown nuclei: SYNTHETIC, half of the nuclei of six images of tnbc/dev, within 4 um": nuclear_rows(model, options.data),
            "what images are taken for": recognition_rows(options.data),
        }  # fmt: skip
    note = (
        f"`benchmarks/ihc_accuracy.py`, model {options.model}: scikit-image's picture at {MPP:g} um per px, dots of benchmarks/ihc. "
        "The largest shares of brown are those of single fields; a slide's is an average."
    )
    write_results(options.name, tables, note)


if __name__ == "__main__":
    main()
