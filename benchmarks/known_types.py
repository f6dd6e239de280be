"""How well do the model's own classes type cells without a click (``--known-types``)?

    python -m benchmarks.known_types --data DATA

The descriptor of every true dot of brca_m2c/dev is typed, every image by itself. Counts of all images are
pooled; unassigned dots are misses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.common import write_results
from benchmarks.cop.typed import describe, known_type_rows
from wsiseg.models import load_model

SET = "brca_m2c/dev"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    model = load_model("nuclei-compact", "cpu")
    if model.types is None:
        raise SystemExit("the model knows no types")
    names = list(
        json.loads((options.data / "points" / SET.split("/", maxsplit=1)[0] / "classes.json").read_text()).values()
    )
    rows = known_type_rows(describe(model, options.data, SET), SET, names, model.types)
    write_results("known_types", rows, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
