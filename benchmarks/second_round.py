"""What prompting every instance a second time gains with nuclei-compact: with its box, its point and its neighbours' points as negatives.

    python -m benchmarks.second_round --data DATA [--sets monuseg/dev_nc tnbc/dev]

Without points (APG), as benchmarks/accuracy.py. The difference in AJI comes with its 95 % bootstrap interval over images.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np

from benchmarks.accuracy import interval
from benchmarks.common import automatic_points, cells_of, encode, instance_images, write_results
from wsiseg.config import RefinementConfig, RunConfig
from wsiseg.evaluation.metrics import score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.models import load_model

FORMS = {
    "once": RefinementConfig(),
    "box, 6 negatives": RefinementConfig(enabled=True),
    "box alone": RefinementConfig(enabled=True, neighbours=0),
    "box, 6 negatives, agree 0.5": RefinementConfig(enabled=True, agree=0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["monuseg/dev_nc", "tnbc/dev"])
    options = parser.parse_args()
    model = load_model("nuclei-compact", "cpu")
    rows: list[dict[str, object]] = []
    for name in options.sets:
        images = [(image, label, encode(model, image)) for _, image, label in instance_images(options.data, name)]
        before = np.empty(0)
        for form, second in FORMS.items():
            config = dataclasses.replace(RunConfig(), refinement=second)
            started = time.process_time()
            cells = [cells_of(model, e, automatic_points(e, config), label.shape, config) for _, label, e in images]
            seconds = time.process_time() - started
            scores = [
                score(label, rasterise(c.polygons, label.shape)) for c, (_, label, _) in zip(cells, images, strict=True)
            ]
            aji = np.array([s["aji"] for s in scores])
            before = aji if form == "once" else before
            rows.append(
                {
                    "set": name,
                    "form": form,
                    **{k: float(np.mean([s[k] for s in scores])) for k in ("aji", "pq", "msa")},
                    "AJI gained": float((aji - before).mean()),
                    "95 %": interval(aji - before),
                    "CPU s after the encoder": seconds,
                }
            )
            print(rows[-1], flush=True)
    write_results("second_round", rows, __doc__.split("\n\n")[0] + " " + __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
