"""Tables of the cells, without their outlines."""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

from wsiseg.errors import ConfigError
from wsiseg.formats.geoparquet import TYPE
from wsiseg.formats.parts import descriptors_from
from wsiseg.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wsiseg.export.source import ExportSettings, RunCells


def write_csv(path: Path, run: RunCells, settings: ExportSettings) -> None:
    """Write comma-separated values: the columns of cells.parquet, and the centroid in microns."""
    _write_text(path, run, settings, ",")


def write_tsv(path: Path, run: RunCells, settings: ExportSettings) -> None:
    """Write the same as :func:`write_csv`, separated by tabs."""
    _write_text(path, run, settings, "\t")


def _write_text(path: Path, run: RunCells, settings: ExportSettings, delimiter: str) -> None:  # noqa: ARG001
    options = csv.WriteOptions(delimiter=delimiter, quoting_style="needed")
    with atomic_path(path) as partial, partial.open("wb") as stream:
        writer = None
        for chunk in run.chunks(run.listed):
            table = with_microns(chunk.chosen, run.mpp)
            if writer is None:
                writer = csv.CSVWriter(stream, table.schema, write_options=options)
            writer.write_table(table)
        if writer is None:  # no cell: the names of the columns alone
            stream.write(delimiter.join(f'"{name}"' for name in (*run.listed, "x_um", "y_um")).encode() + b"\n")
        else:
            writer.close()


def with_microns(table: pa.Table, mpp: float) -> pa.Table:
    """The table with the names of types as text, and ``x_um`` and ``y_um`` at its end."""
    table = table.set_column(table.column_names.index(TYPE), TYPE, table[TYPE].cast(pa.string()))
    for name in ("x", "y"):
        table = table.append_column(f"{name}_um", pa.array(table[name].to_numpy() * mpp))
    return table


def write_anndata(path: Path, run: RunCells, settings: ExportSettings) -> None:  # noqa: ARG001
    """Write an AnnData file: ``X`` the descriptors, ``obs`` the other columns, ``obsm["spatial"]`` the centroids in microns."""
    named = f"{path.name}.h5ad"
    with storable_text(), atomic_path(path) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as folder:
        as_anndata(run, "h5ad").write_h5ad(Path(folder) / named)
        (Path(folder) / named).rename(partial)


@contextmanager
def storable_text() -> Iterator[None]:
    """Pandas makes no texts of its own kind, which AnnData does not store."""
    with warnings.catch_warnings(action="ignore"), pd.option_context("future.infer_string", False):  # of the option
        yield


def as_anndata(run: RunCells, name: str) -> Any:  # noqa: ANN401
    """The cells as AnnData, all in memory; to be called, and written, within :func:`storable_text`.

    Parameters
    ----------
    run
        The cells.
    name
        Of the format, for messages.

    Raises
    ------
    ConfigError
        anndata is not installed, or the run has no cells, and AnnData needs at least one.
    """
    anndata = import_extra("anndata", name, "anndata")
    size = 0
    parts, described = [], []
    columns = [*run.listed, *(["descriptor"] if "descriptor" in run.columns else [])]
    for chunk in run.chunks(columns):
        table = chunk.chosen
        if "descriptor" in columns:
            size = table.schema.field("descriptor").type.list_size
            described.append(descriptors_from(table, size).astype(np.float32))
            table = table.drop_columns(["descriptor"])
        parts.append(table)
    if not parts:
        raise ConfigError(f"{run.file}: no cell to export; --format {name} needs at least one")
    obs = pa.concat_tables(parts, promote_options="default").unify_dictionaries().to_pandas()
    obs.index = pd.Index(obs.pop("id").tolist(), dtype=object, name="id")
    obs[TYPE] = pd.Categorical.from_codes(obs[TYPE].cat.codes, obs[TYPE].cat.categories.astype(object))
    made = anndata.AnnData(
        X=np.concatenate(described) if described else None,
        obs=obs,
        var=pd.DataFrame(index=[f"descriptor_{k}" for k in range(size)]),
    )
    made.obsm["spatial"] = obs[["x", "y"]].to_numpy() * run.mpp
    kinds = dict(zip(run.names, run.colors, strict=True))
    made.uns[f"{TYPE}_colors"] = ["#{:02x}{:02x}{:02x}".format(*kinds[kind]) for kind in obs[TYPE].cat.categories]
    made.uns["wsiseg"] = json.dumps({"slide": run.slide, "mpp": run.mpp, "spatial": "microns"})
    return made


def import_extra(module: str, name: str, extra: str) -> Any:  # noqa: ANN401
    """Import a package that an export format needs and wsiseg does not.

    Parameters
    ----------
    module, name, extra
        The package, the format, and the extra of wsiseg that brings it.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--format {name}: {module} is not installed; in the checkout, pip install '.[{extra}]'"
        ) from error
