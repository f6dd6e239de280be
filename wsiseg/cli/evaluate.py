"""``wsiseg evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsiseg.cli.arguments import Command
from wsiseg.cli.options import overwrite_option
from wsiseg.cli.streams import OUTPUT
from wsiseg.errors import counted

if TYPE_CHECKING:
    from wsiseg.evaluation import Evaluation

TITLES = {
    "aji": "AJI",
    "aji_plus": "AJI+",
    "pq": "PQ",
    "dq": "DQ",
    "sq": "SQ",
    "msa": "mSA",
    "dice": "Dice",
    "detection_f1": "detection F1",
    "detection_precision": "precision",
    "detection_recall": "recall",
    "macro_f1": "macro-F1",
    "type_accuracy": "type accuracy",
    "unassigned": "unassigned",
    "point_precision": "point precision",
    "typed_point_precision": "typed point prec.",
    "bpq": "bPQ",
    "mpq": "mPQ",
    "mpq_plus": "mPQ+",
}
OF_IMAGES = (
    "aji",
    "aji_plus",
    "pq",
    "msa",
    "dice",
    "detection_f1",
    "macro_f1",
    "type_accuracy",
    "point_precision",
)  # columns of the image table


@click.command(cls=Command, short_help="Score outlines and types against the truth.")
@click.argument("prediction", metavar="PRED", type=click.Path(path_type=Path))
@click.argument("truth", metavar="TRUTH", type=click.Path(path_type=Path))
@click.option(
    "--pred-types",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Image of type ids for a label image PRED, or a folder of such images.",
)
@click.option("--truth-types", type=click.Path(path_type=Path), metavar="PATH", help="As --pred-types, for TRUTH.")
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSON with the names of type ids: {"1": "tumour"}.',
)
@click.option(
    "--mpp", type=float, metavar="UM", help="Microns per px, for types and points; cells.parquet states its own."
)
@click.option(
    "--radius", type=float, default=3.0, show_default=True, metavar="UM", help="Centroids within this distance match."
)
@click.option(
    "--thresholds", default="0.5", show_default=True, metavar="LIST", help="IoU thresholds for F1, comma-separated."
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="PRED2",
    help="Another prediction; prints PRED's scores as a share of its scores.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write all scores to FILE.")
@overwrite_option("Replace the --json file.")
@click.option("--summary", is_flag=True, help="Omit per-image rows.")
def command(
    prediction: Path,
    truth: Path,
    pred_types: Path | None,
    truth_types: Path | None,
    classes: Path | None,
    mpp: float | None,
    radius: float,
    thresholds: str,
    baseline: Path | None,
    json_file: Path | None,
    overwrite: bool,
    summary: bool,
) -> None:
    """Compare PRED with TRUTH: two files, or two folders whose files are paired by name.

    Each is a label image (.png, .tif, .npy), outlines (.geojson, .parquet, the folder of a run) or points (.csv with x, y, type).

    \b
    wsiseg evaluate labels/ truth/ --json scores.json
    wsiseg evaluate wsiseg-out/slide truth.geojson
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.errors import ConfigError
    from wsiseg.evaluation import evaluate
    from wsiseg.runtime.atomic import require_free, write_json
    from wsiseg.runtime.paths import kind_of

    if json_file is not None:
        if kind_of(json_file, ConfigError) == "file" and not overwrite:
            raise ConfigError(f"{json_file}: already exists; give another --json file, or pass --overwrite")
        require_free(json_file, ConfigError, overwrite=True)
    try:
        levels = tuple(float(text) for text in thresholds.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--thresholds: {thresholds!r} is not a list of numbers; give IoU values such as 0.5,0.75"
        ) from error
    scores = evaluate(
        prediction,
        truth,
        prediction_types=pred_types,
        truth_types=truth_types,
        classes=classes,
        mpp=mpp,
        radius_um=radius,
        thresholds=levels,
        baseline=baseline,
    )
    OUTPUT.extra = json_file is not None
    for note in scores.notes:
        click.echo(f"Warning: {note}", err=True)
    _report(scores, images=not summary)
    if json_file is not None:
        try:
            write_json(json_file, scores.as_dict())
        except OSError as error:
            raise ConfigError(f"{json_file}: cannot be written ({_reason(error)}); give another --json file") from error


def _reason(error: OSError) -> str:
    cause = error.__cause__
    return (cause.strerror if isinstance(cause, OSError) else error.strerror) or str(error)


def _report(scores: Evaluation, *, images: bool) -> None:
    truth, predicted = (sum(image.counts[k] for image in scores.images) for k in (0, 1))
    n = len(scores.images)
    click.echo(f"{counted(n, 'image')}, {counted(truth, 'cell')} in the truth, {predicted} in the prediction\n")
    kept = {"retention": scores.retention} if scores.retention else {}
    rows = [["metric", "mean", "95 % interval", "pooled", *kept]]
    for metric in dict.fromkeys([*scores.means, *scores.pooled]):
        interval = scores.means.get(metric)
        low_high = "" if interval is None or math.isnan(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}"
        more = [_number(column.get(metric)) for column in kept.values()]
        mean = _number(None if interval is None else interval.mean)
        rows.append(
            [
                TITLES.get(metric, metric.replace("f1@", "F1@")),
                mean,
                low_high,
                _number(scores.pooled.get(metric)),
                *more,
            ]
        )
    _table(rows)
    if scores.classes:
        click.echo()
        _table(
            [
                ["type", "truth", "predicted", "F1", "PQ", "PQ+"],
                *(
                    [c, str(s.truth), str(s.prediction), _number(s.f1), _number(s.pq), _number(s.pq_plus)]
                    for c, s in scores.classes.items()
                ),
            ]
        )
    if images and n > 1:
        columns = [m for m in OF_IMAGES if m in scores.means]
        click.echo()
        _table(
            [
                ["image", "truth", "predicted", *(TITLES[m] for m in columns)],
                *(
                    [image.name, *map(str, image.counts), *(_number(values.get(m)) for m in columns)]
                    for image, values in zip(scores.images, scores.values, strict=True)
                ),
            ]
        )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _table(rows: list[list[str]]) -> None:
    """Print a table: first column left-aligned, numbers right-aligned."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        click.echo(
            "  ".join(
                [f"{row[0]:<{widths[0]}}", *(f"{text:>{w}}" for text, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
        )
