"""What the benchmarks share: labelled images, one encoding per image, and the table they print."""

from __future__ import annotations

import csv
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from training.data import image_files, read_instances
from wsiseg.geometry import Box, Lattice
from wsiseg.records import Cells, Embeddings
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts.apg import apg_points
from wsiseg.segmentation.refinement import refine_masks
from wsiseg.stitching.stitch import stitch

if TYPE_CHECKING:
    from wsiseg.config import RunConfig

RESULTS = Path(__file__).parent / "results"
MPP = 0.25


def instance_images(data: Path, name: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(id, image, label) of `instances/<name>`, in order of id, at the scale that the training reads them at."""
    out = []
    for path in image_files(data / "instances" / name / "image"):
        image, label = read_instances(path, name.partition("/")[0])
        out.append((path.stem, image, label.astype(np.int64)))
    return out


def point_images(data: Path, name: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(id, image, rows of x, y, type) of `points/<name>`; x, y in the corner frame."""
    folder = data / "points" / name
    out = []
    for p in image_files(folder / "image"):
        with (folder / "points" / f"{p.stem}.csv").open() as stream:
            rows = np.array(
                [(float(r["x"]) + 0.5, float(r["y"]) + 0.5, int(r["type"])) for r in csv.DictReader(stream)]
            )
        out.append((p.stem, np.asarray(Image.open(p).convert("RGB")), rows))
    return out


def encode(model, image: np.ndarray) -> Embeddings:
    """The whole image as one tile at the model's scale, reflected up to the lattice."""
    pad = [(0, -n % model.stride_px) for n in image.shape[:2]]
    padded = np.pad(image, [*pad, (0, 0)], mode="reflect")
    with torch.inference_mode():
        return model.encode(torch.from_numpy(padded).permute(2, 0, 1)[None].to(model.device))


def automatic_points(embeddings: Embeddings, config: RunConfig) -> np.ndarray:
    return apg_points(embeddings.maps[0].float().cpu().numpy(), 2, MPP, config.apg)


def cells_of(model, embeddings: Embeddings, points: np.ndarray, shape: tuple[int, int], config: RunConfig) -> Cells:
    """Decode, trace and settle the prompts of one encoded image."""
    height, width = shape
    box, lattice = Box(0, 0, width, height), Lattice(MPP, MPP)
    batches = list(decode(model, embeddings, 0, points.astype(np.float32), config.masks))
    if config.refinement.enabled:
        batches = refine_masks(model, embeddings, max(shape), batches, config.masks, config.refinement)
    traced = [trace(m, box, lattice, config.masks)[0] for m in batches]
    cells = Cells.concatenate(traced, model.descriptor_size)
    settled, _ = stitch(
        [cells],
        (width, height),
        config.masks.min_area_um2 / MPP**2,
        config.stitching,
        descriptor_size=cells.descriptor_size,
    )
    return settled.take(slice(None))


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_cell(r[k]) for k in keys) + " |" for r in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"


def write_results(name: str, rows: list[dict[str, object]] | dict[str, list[dict[str, object]]], note: str) -> None:
    """`results/<name>.md` and `.json`, with the versions they were measured with. Several tables come as {title: rows}."""
    RESULTS.mkdir(exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    found = {"tables": rows} if isinstance(rows, dict) else {"rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps({"versions": versions, **found}, indent=1) + "\n")
    measured = "Measured with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."
    if isinstance(rows, dict):
        parts = [f"# {name}", note, measured, *(f"## {title}\n\n{table(part)}" for title, part in rows.items())]
    else:
        parts = [f"# {name}", note, table(rows), measured]
    text = "\n\n".join(parts) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
