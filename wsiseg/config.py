"""All settings, each with its default and the reason for it. Lengths are microns unless the name says px."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import reprlib
import tomllib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from wsiseg.errors import ConfigError
from wsiseg.runtime.paths import require_text
from wsiseg.runtime.text import did_you_mean, parse_json, read_text

if typing.TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Method = Literal["auto", "apg", "cop", "amg"]

CELLULAR_MPP = (0.05, 2.0)  #: finer is below what light resolves, coarser makes a 6 um nucleus 3 px wide
FORCED_MPP = (0.01, 100.0)  #: with --force-mpp: 1000x oil immersion with a small camera pixel .. a macro photograph
_OBJECTIVES = (5.0, 10.0, 20.0, 40.0, 60.0, 63.0, 80.0, 100.0)  # powers that are typed in place of a scale
_UM_OF_1X = 10.0  # scanners have about this over the objective's power


@dataclass(frozen=True)
class TissueConfig:
    """Tissue search: where to look for cells.

    Attributes
    ----------
    enabled
        ``False``: the whole slide (``--no-tissue``).
    overview_mpp
        Microns per pixel of the overview: a lymphocyte is one pixel, a 60 k slide is 1900 px.
    min_area_um2
        Smaller pieces are dust: 80 um across.
    max_hole_um2
        Smaller holes are lumina and tears, whose lining has cells.
    margin_um
        Added around the tissue, about four nuclei: an edge that the threshold misses is not lost.
    """

    enabled: bool = True
    overview_mpp: float = 8.0
    min_area_um2: float = 5_000.0
    max_hole_um2: float = 40_000.0
    margin_um: float = 32.0


TILE_UM = 256.0  #: 1024 px at 0.25: the halo costs 27 %, the working set stays under 1 GB
HALO_UM = 24.0  #: the encoder's receptive field has died away (benchmarks/results/tiling.md)


@dataclass(frozen=True)
class TilingConfig:
    """Tiling of the slide.

    Attributes
    ----------
    tile_um
        Side of a tile's core. ``None``: ``TILE_UM``, or what the halo leaves of the input of a model that takes one size.
    halo_um
        Read around the core, and never less than half of the model's mask window (16 um for nuclei-compact): a mask that starts at the
        core's border fits. ``None``: ``HALO_UM``, or half of the mask window of a model that takes one size.
    block_tiles
        A block is this many tiles squared: the unit of work, of the part file and of resuming. 16 tiles are about 20 s on two CPU cores.
    origin_um
        Moves the grid; for checking that cells do not depend on it.
    """

    tile_um: float | None = None
    halo_um: float | None = None
    block_tiles: int = 4
    origin_um: float = 0.0


@dataclass(frozen=True)
class ApgConfig:
    """Automatic prompt generation: Archit and Pape, arXiv:2603.17845, the published thresholds.

    Attributes
    ----------
    foreground, centre, boundary
        A prompt's component has foreground at or above, and both distances below these.
    min_component_um2
        Smaller components are noise: one map cell is 0.25 um2.
    """

    foreground: float = 0.5
    centre: float = 0.5
    boundary: float = 0.5
    min_component_um2: float = 0.5


@dataclass(frozen=True)
class GridConfig:
    """A grid of points (``--method amg``): SAM's automatic mask generator, the plain baseline for models without instance maps.

    Attributes
    ----------
    spacing_um
        Between points. SAM's 32 per side of its input are 8 um at 0.25 mpp: a nucleus.
    min_quality, min_stability
        SAM's thresholds on predicted IoU and stability.
    """

    spacing_um: float = 8.0
    min_quality: float = 0.88
    min_stability: float = 0.95


@dataclass(frozen=True)
class SecondRoundConfig:
    """Mask refinement: every instance prompted again with its box and its neighbours' points (refinement.py).

    Attributes
    ----------
    enabled
        Off: it costs half as much again as the first round, and with nuclei-compact it does not pay (benchmarks/results/second_round.md).
    neighbours
        Nearest instances whose points are "not this"; upstream's 6.
    agree
        The second mask is taken when its IoU with the first is at least this; upstream's 0.7.
    max_overlap
        And when at most this share of it lies on other instances; upstream's 0.15.
    """

    enabled: bool = False
    neighbours: int = 6
    agree: float = 0.7
    max_overlap: float = 0.15


@dataclass(frozen=True)
class CopConfig:
    """Chain-of-Prompts (arXiv 2605.29429).

    Attributes
    ----------
    gate
        ``product``: threshold F_h and F_l similarity together, as in the paper; ``candidate``: F_h per pixel, then F_l per candidate.
    localise
        ``maps``: candidates are the instance maps' components, gated by similarity, when the model has such maps (they split
        touching nuclei, similarity does not); ``components``: connected components of the similarity map, as in the paper.
    window_um
        Field of view around a click; the published tables are strongest at 128 um. A model with one input size sees that.
    min_component_um2, dedup_um
        The demo's 10 cells and 3 cells at its usual scale, in microns.
    max_hops
        The demo's cap on prompts per click.
    prototypes
        Size of a type's bank.
    floor_percentile, highest_floor
        A place enters a tile's candidates when its similarity reaches this percentile of the reliable set's own (leave one out), or
        ``highest_floor``: a click that found only its like would otherwise shut out a third of the cells (benchmarks/results/cop.md).
        The latter holds for ``localise = "maps"``.
    click_reach_um
        A click may miss its cell by this much.
    click_min_score
        Predicted IoU x stability that a clicked cell needs: half of what an automatic prompt needs, since a person saw a cell there.
    """

    gate: Literal["product", "candidate"] = "candidate"
    localise: Literal["maps", "components"] = "maps"
    window_um: float = 128.0
    min_component_um2: float = 2.0
    dedup_um: float = 1.5
    max_hops: int = 30
    prototypes: int = 16
    floor_percentile: float = 5.0
    highest_floor: float = 0.2
    click_reach_um: float = 4.0
    click_min_score: float = 0.2


#: Chain-of-Prompts by one name: ours; as the paper's text has it; as the authors' demo does it.
COP_FORMS = {
    "wsiseg": CopConfig(),
    "paper": CopConfig(gate="product", localise="components"),
    "demo": CopConfig(localise="components"),
}


@dataclass(frozen=True)
class MaskConfig:
    """Thresholds for decoded masks to count as cells.

    Attributes
    ----------
    min_score
        Predicted IoU x stability; at 0.3 the two development sets together are best, above 0.4 cells are lost (benchmarks/results/apg_sweep.md).
    min_area_um2
        A sphere of 2.5 um; smaller outlines are debris or slivers.
    simplify_um
        Outlines are thinned by this much: a tenth of the mask's own sampling, 60 -> 25 vertices.
    convex_above
        An outline that fills at least this share of its convex hull becomes the hull: nuclei are convex, small dents are the mask's noise.
        1 leaves outlines as they are. It gains on one development set what it loses on the other, so it stays
        near 1 (benchmarks/results/apg_sweep.md).
    prompts_per_batch
        Prompts decoded together; memory grows by about 1.5 MB each.
    """

    min_score: float = 0.30
    min_area_um2: float = 5.0
    simplify_um: float = 0.05
    convex_above: float = 0.9
    prompts_per_batch: int = 128


@dataclass(frozen=True)
class StitchingConfig:
    """Resolution of overlapping outlines: best score first, as in the merge of APG v2 (micro-sam's ``dev`` branch).

    Attributes
    ----------
    max_overlap
        An outline is dropped when more than this share of it belongs to better ones. Upstream has 0.15; between 0.15 and 0.5 the
        development sets do not tell (benchmarks/results/apg_sweep.md), and what overlaps is trimmed here anyway.
    contained
        An outline that holds at least ``cluster_size`` others to this share is a cluster, and dropped.
    cluster_size
        See ``contained``.
    nested
        Share of the smaller outline at which the worse of two is dropped: no cell lies inside another.
    """

    max_overlap: float = 0.3
    contained: float = 0.9
    cluster_size: int = 2
    nested: float = 0.6


@dataclass(frozen=True)
class TypingConfig:
    """Typing from clicks. The numbers are priors of the model in plda.py; benchmarks/results/cop.md compares other values.

    Attributes
    ----------
    unknown_kind
        Prior probability that a clicked type is none of the model's reference classes.
    rival_kind, rival_other
        Weight of a reference class without clicks, and of anything else, relative to a clicked type's 1: cells closer to these stay
        ``unassigned``. Without them every cell gets a clicked type.
    min_score, min_margin
        Probability, and lead over the runner-up, below which a cell stays ``unassigned``. Higher values leave out right and wrong cells alike.
    drift, drift_um
        Cells of a place share a shift beside the slide's own: its variance, relative to that between slides, on squares of this side. More
        costs accuracy where the clicks are near, less where the stain changes.
    neighbourhood_um
        Side of the squares on which, with their neighbours, the prevalence of types is estimated.
    neighbourhood_cells
        The slide's shares count like this many cells of the square.
    share_rounds
        Rounds of estimating the shares; 0 leaves them out.
    share_temperature
        Probabilities are softened by this before the shares are estimated, so that the neighbours say more: fewer cells get a type that is not
        near, and more of a rare type are lost (benchmarks/results/cop.md: c1, c2 and the ablation have it at 4).
    separable
        Types whose clouds are closer than this (in standard deviations; at 2, one in six cells is on the wrong side) are reported.
    """

    unknown_kind: float = 0.3
    rival_kind: float = 0.3
    rival_other: float = 0.1
    min_score: float = 0.5
    min_margin: float = 0.05
    drift: float = 0.1
    drift_um: float = 128.0
    neighbourhood_um: float = 256.0
    neighbourhood_cells: float = 20.0
    share_rounds: int = 20
    share_temperature: float = 1.0
    separable: float = 2.0


@dataclass(frozen=True)
class ClusterConfig:
    """A job of a batch system (``--scheduler slurm``, ``pbs``, ``lsf`` or ``sge``); each is one worker.

    Attributes
    ----------
    cores
        Threads of the model. Small jobs start soonest: most nodes have room for four.
    memory
        The default model takes below 1 GB; this is 2 GB per core, what most clusters give anyway, and room for larger models.
    queue, account
        Partition, and who pays. ``None``: the system's own.
    walltime
        As the system spells it (``02:00:00``). ``None``: the queue's own. A job that comes to its end is submitted again, so short ones do.
    interface
        Network interface between this machine and the jobs, such as ``ib0``. ``None``: the one that leads outside.
    directives
        More options of a job, one each: ``--gres=gpu:1`` for slurm. For sge also cores and memory, which every site spells its own way.
    prologue
        Lines of shell before the worker starts, such as ``module load cuda``. None: the job runs the Python that submits it.
    """

    cores: int = 4
    memory: str = "8GB"
    queue: str | None = None
    account: str | None = None
    walltime: str | None = None
    interface: str | None = None
    directives: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a run.

    Attributes
    ----------
    mpp, force_mpp
        Microns per level-0 pixel in place of what the file says; outside of ``CELLULAR_MPP`` only with ``force_mpp``.
    batch_size
        Tiles encoded together. ``None``: one on a CPU, as many as fit on a GPU.
    max_ram_gb, max_vram_gb
        Memory limit of a process; queues, caches and batches are sized to fit. ``None``: all available memory.
    workers
        Processes on this machine, or jobs of a batch system.
    scheduler
        ``tcp://host:port`` of a Dask scheduler, or ``slurm``, ``pbs``, ``lsf``, ``sge``. ``None``: this machine alone.
    """

    model: str = "nuclei-compact"
    method: Method = "auto"
    mpp: float | None = None
    force_mpp: bool = False
    reader: Literal["auto", "openslide", "tiffslide", "image"] = "auto"
    seeds: str | None = None
    bank: str | None = None
    roi: str | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    tissue: TissueConfig = field(default_factory=TissueConfig)
    tiling: TilingConfig = field(default_factory=TilingConfig)
    apg: ApgConfig = field(default_factory=ApgConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    cop: CopConfig = field(default_factory=CopConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    second_round: SecondRoundConfig = field(default_factory=SecondRoundConfig)
    stitching: StitchingConfig = field(default_factory=StitchingConfig)
    typing: TypingConfig = field(default_factory=TypingConfig)
    device: str = "auto"
    batch_size: int | None = None
    max_ram_gb: float | None = None
    max_vram_gb: float | None = None
    workers: int = 1
    scheduler: str | None = None
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    formats: tuple[str, ...] = ("geojson", "parquet")

    def hash(self, **facts: object) -> str:
        """Short digest of everything that decides the cells; ``facts`` adds what the fields only point to (slide, weights, seeds, scale)."""
        what = {k: v for k, v in dataclasses.asdict(self).items() if k not in NOT_HASHED}
        return hashlib.sha256(json.dumps([REVISION, what, facts], sort_keys=True).encode()).hexdigest()[:16]


#: Raised when the same inputs give other cells than before: parts of an older wsiseg are then made again.
REVISION = 4
#: How fast it goes and what is written; and what is hashed by its content instead of its name.
NOT_HASHED = (
    "device",
    "batch_size",
    "max_ram_gb",
    "max_vram_gb",
    "workers",
    "scheduler",
    "cluster",
    "formats",
    "model",
    "mpp",
    "force_mpp",
    "reader",
    "seeds",
    "bank",
    "roi",
)

_SHARE = (0.0, 1.0)
_LARGEST = 1e300  #: a whole number may be too large for a float
#: Allowed range of every number.
LIMITS: dict[str, tuple[float, float]] = {
    "mpp": FORCED_MPP,
    "workers": (1, 1024),
    "batch_size": (1, 1024),
    "max_ram_gb": (0.5, 1e5),
    "max_vram_gb": (0.1, 1e5),
    "cluster.cores": (1, 1024),
    "tissue.overview_mpp": (0.25, 64),
    "tissue.min_area_um2": (0, 1e9),
    "tissue.max_hole_um2": (0, 1e9),
    "tissue.margin_um": (0, 1e4),
    "tiling.tile_um": (16, 4096),
    "tiling.halo_um": (0, 512),
    "tiling.block_tiles": (1, 64),
    "tiling.origin_um": (-1e6, 1e6),
    "apg.foreground": _SHARE,
    "apg.centre": _SHARE,
    "apg.boundary": _SHARE,
    "apg.min_component_um2": (0, 1e4),
    "grid.spacing_um": (0.5, 1000),
    "grid.min_quality": _SHARE,
    "grid.min_stability": _SHARE,
    "cop.window_um": (32, 1024),
    "cop.min_component_um2": (0, 1e4),
    "cop.dedup_um": (0, 100),
    "cop.max_hops": (1, 10_000),
    "cop.prototypes": (1, 1024),
    "cop.floor_percentile": (0, 100),
    "cop.highest_floor": _SHARE,
    "cop.click_reach_um": (0.1, 100),
    "cop.click_min_score": _SHARE,
    "masks.min_score": _SHARE,
    "masks.min_area_um2": (0, 1e4),
    "masks.simplify_um": (0, 10),
    "masks.convex_above": _SHARE,
    "masks.prompts_per_batch": (1, 65536),
    "second_round.neighbours": (0, 64),
    "second_round.agree": _SHARE,
    "second_round.max_overlap": _SHARE,
    "stitching.max_overlap": _SHARE,
    "stitching.contained": (0.01, 1),
    "stitching.cluster_size": (1, 1000),
    "stitching.nested": (0.01, 1),
    "typing.unknown_kind": (1e-6, 1 - 1e-6),
    "typing.rival_kind": (1e-9, 1e6),
    "typing.rival_other": (1e-9, 1e6),
    "typing.min_score": _SHARE,
    "typing.min_margin": _SHARE,
    "typing.drift": (0, 100),
    "typing.drift_um": (64, 1e6),
    "typing.neighbourhood_um": (8, 1e6),
    "typing.neighbourhood_cells": (0, 1e6),
    "typing.share_rounds": (0, 1000),
    "typing.share_temperature": (1, 100),
    "typing.separable": (0, 100),
}


def from_mapping(mapping: dict[str, Any], where: str, base: RunConfig | None = None) -> RunConfig:
    """Apply the values of a nested mapping to ``base``.

    Parameters
    ----------
    mapping
        Keys as in :class:`RunConfig`; sections are mappings.
    where
        Name of the mapping in errors (a file name).
    base
        Configuration to update; the defaults when absent.

    Raises
    ------
    ConfigError
        A key is unknown or a value has the wrong type or range.
    """
    config: RunConfig = _merge(base or RunConfig(), mapping, where, "")
    check(config, where)
    return config


def read_config(path: Path, base: RunConfig | None = None) -> RunConfig:
    """Read a configuration file, TOML or JSON; the manifest of a run is accepted too (its ``config`` member is used)."""
    try:
        text = read_text(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{error}; a TOML or JSON file of settings is needed") from error
    if text.lstrip().startswith("{"):
        mapping = parse_json(text, str(path), ConfigError)
    else:
        try:
            mapping = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: neither TOML nor JSON ({error}); docs/methods.md names the keys") from error
    return from_mapping(mapping.get("config", mapping), str(path), base)


def check(config: RunConfig, where: str = "configuration") -> None:
    """Refuse values of the wrong type, not among the choices or out of range, and empty texts.

    Raises
    ------
    ConfigError
        The first such value, with what is allowed.
    """
    for name, value, hint in _settings(config):
        _cast(value, hint, where, name)
    check_mpp(config.mpp, force=config.force_mpp, where=f"{where}: mpp")
    for name, value in _numbers(config):
        low, high = LIMITS[name]
        if not low <= value <= high:  # false for NaN as well
            raise ConfigError(f"{where}: {name} is {_short_repr(value)}; it must lie between {low:g} and {high:g}")
    for name, text in _texts(config):
        if not text.strip():
            raise ConfigError(f"{where}: {name} is empty; give a value, or leave it out")
        require_text(text, ConfigError)
    if not config.formats:
        raise ConfigError(f"{where}: formats is empty; name at least one, for example parquet")


def check_mpp(mpp: float | None, *, force: bool = False, where: str = "--mpp") -> None:
    """Refuse a stated scale at which no cell can be found; a magnification typed as microns looks like one.

    Parameters
    ----------
    mpp
        Microns per level-0 pixel; ``None``: nothing was stated.
    force
        Accept what lies outside of ``CELLULAR_MPP``, as long as it lies in ``FORCED_MPP``.
    where
        Name of the setting in the error.

    Raises
    ------
    ConfigError
        The scale is not allowed; with the one that was probably meant.
    """
    low, high = FORCED_MPP if force else CELLULAR_MPP
    if mpp is None or low <= mpp <= high:
        return
    usual = "40x is about 0.25, 20x about 0.5"
    if force or not FORCED_MPP[0] <= mpp <= FORCED_MPP[1] * 100:  # false for NaN as well
        raise ConfigError(f"{where}: {mpp:g} is not allowed; give microns per pixel from {low:g} to {high:g} ({usual})")
    if mpp in _OBJECTIVES:
        meant = f"{_UM_OF_1X / mpp:.2g}"
        raise ConfigError(
            f"{where}: {mpp:g} looks like a magnification; {mpp:g}x is about {meant} microns per pixel: pass --mpp {meant}"
        )
    if low <= mpp / 1000 <= high:
        raise ConfigError(
            f"{where}: {mpp:g} looks like nanometres; that is {mpp / 1000:g} microns per pixel: pass --mpp {mpp / 1000:g}"
        )
    kind = "fine" if mpp < low else "coarse"
    raise ConfigError(
        f"{where}: {mpp:g} microns per pixel is too {kind} for cells; allowed is {low:g} to {high:g} ({usual}), or pass --force-mpp"
    )


def _settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401
    """Every setting with its dotted name and its annotated type."""
    hints = typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(hints[item.name]) and type(value) is hints[item.name]:
            yield from _settings(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value, hints[item.name]


def _numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:  # noqa: ANN401
    """Every number of the configuration with its dotted name; settings that are ``None`` are left out."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{prefix}{item.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + item.name, value


def _texts(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Every text of the configuration with its dotted name."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _texts(value, f"{prefix}{item.name}.")
        elif isinstance(value, str | tuple):
            yield from ((prefix + item.name, text) for text in ((value,) if isinstance(value, str) else value))


def _merge(current: Any, mapping: Any, where: str, prefix: str) -> Any:  # noqa: ANN401
    if not isinstance(mapping, dict):
        raise ConfigError(
            f"{where}: {prefix.rstrip('.') or 'the top level'} must be a table of keys, found {type(mapping).__name__}"
        )
    known = sorted(f.name for f in dataclasses.fields(current))
    hints = typing.get_type_hints(type(current))
    changes: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in known:
            shown = prefix + (key if key.isprintable() and len(key) < 100 else reprlib.repr(key))
            raise ConfigError(
                f"{where}: unknown key {shown}; {did_you_mean(key, known)}allowed here: {', '.join(known)}"
            )
        if dataclasses.is_dataclass(getattr(current, key)):
            changes[key] = _merge(getattr(current, key), value, where, f"{prefix}{key}.")
        else:
            changes[key] = _cast(value, hints[key], where, prefix + key)
    return dataclasses.replace(current, **changes)


def _cast(value: Any, hint: Any, where: str, name: str) -> Any:  # noqa: ANN401
    """Convert ``value`` to the annotated type of its field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _cast(value, next(a for a in arguments if a is not type(None)), where, name)
    if origin is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(_cast(v, str, where, name) for v in value)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            allowed = ", ".join(map(str, arguments))
            raise ConfigError(
                f"{where}: {name} is {_short_repr(value)}; {did_you_mean(value, arguments)}choose from {allowed}"
            )
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return math.copysign(math.inf, value > 0 or -1) if abs(value) > _LARGEST else float(value)
    if not (isinstance(value, str) if hint is str else type(value) is hint):
        raise ConfigError(
            f"{where}: {name} is {_short_repr(value)}; it must be of type {getattr(hint, '__name__', str(hint))}"
        )
    if hint is str and "\0" in value:
        raise ConfigError(
            f"{where}: {name} is {_short_repr(value)}; a NUL character is not allowed in it; leave it out"
        )
    return value


def _short_repr(value: object) -> str:
    """A value in a message: short, in one line, whatever it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "too large" if abs(value) > _LARGEST else f"{value:g}"
    return reprlib.repr(value)[:100]
