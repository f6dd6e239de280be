"""All settings, each with its default and the reason for it. Lengths are microns unless the name says px."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from wsiseg.errors import ConfigError
from wsiseg.runtime.settings import check_types, check_values, in_group, merge, setting, short_repr
from wsiseg.runtime.text import parse_json, read_text

if typing.TYPE_CHECKING:
    from pathlib import Path

Method = Literal["auto", "apg", "cop", "amg", "text", "exemplar", "outlines"]
DETECTING = ("text", "exemplar")  #: methods that find the cells of the types that are asked for
CHAINED = ("cop", "exemplar")  #: methods that spread from the clicks by Chain-of-Prompts

CELLULAR_MPP = (0.05, 2.0)  #: finer is below what light resolves, coarser makes a 6 um nucleus 3 px wide
FORCED_MPP = (0.01, 100.0)  #: with --force-mpp: 1000x oil immersion with a small camera pixel .. a macro photograph
_OBJECTIVES = (5.0, 10.0, 20.0, 40.0, 60.0, 63.0, 80.0, 100.0)  # powers that are typed in place of a scale
_UM_OF_1X = 10.0  # scanners have about this over the objective's power


@dataclass(frozen=True, kw_only=True)
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
    overview_mpp: float = setting(8.0, 0.25, 64)
    min_area_um2: float = setting(5_000.0, 0, 1e9)
    max_hole_um2: float = setting(40_000.0, 0, 1e9)
    margin_um: float = setting(32.0, 0, 10000)


TILE_UM = 256.0  #: 1024 px at 0.25: a process takes about 1.5 GB
HALO_UM = 40.0  #: behind it a tile border moves no probability by more than 0.01 (benchmarks/results/tiling.md)


@dataclass(frozen=True, kw_only=True)
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

    tile_um: float | None = setting(None, 16, 4096)
    halo_um: float | None = setting(None, 0, 512)
    block_tiles: int = setting(4, 1, 64)
    origin_um: float = setting(0.0, -1e6, 1e6)


@dataclass(frozen=True, kw_only=True)
class ApgConfig:
    """Automatic prompt generation: Archit and Pape, arXiv:2603.17845, the published thresholds.

    Attributes
    ----------
    foreground, centre, boundary
        A prompt's component has foreground at or above, and both distances below these.
    min_component_um2
        Smaller components are noise: one map cell is 0.25 um2.
    """

    foreground: float = setting(0.5, 0, 1)
    centre: float = setting(0.5, 0, 1)
    boundary: float = setting(0.5, 0, 1)
    min_component_um2: float = setting(0.5, 0, 10000)


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

    spacing_um: float = setting(8.0, 0.5, 1000)
    min_quality: float = setting(0.88, 0, 1)
    min_stability: float = setting(0.95, 0, 1)


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
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
    neighbours: int = setting(6, 0, 64)
    agree: float = setting(0.7, 0, 1)
    max_overlap: float = setting(0.15, 0, 1)


@dataclass(frozen=True, kw_only=True)
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
    window_um: float = setting(128.0, 32, 1024)
    min_component_um2: float = setting(2.0, 0, 10000)
    dedup_um: float = setting(1.5, 0, 100)
    max_hops: int = setting(30, 1, 10000)
    prototypes: int = setting(16, 1, 1024)
    floor_percentile: float = setting(5.0, 0, 100)
    highest_floor: float = setting(0.2, 0, 1)
    click_reach_um: float = setting(4.0, 0.1, 100)
    click_min_score: float = setting(0.1, 0, 1)


#: Forms of Chain-of-Prompts: that of wsiseg, that of the paper's text, that of the authors' demo.
COP_FORMS = {
    "wsiseg": CopConfig(),
    "paper": CopConfig(gate="product", localise="components"),
    "demo": CopConfig(localise="components"),
}


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Detection of described types (``--method text``, ``exemplar``): SAM 3's detector, but for ``min_score``.

    Attributes
    ----------
    min_score
        Least score of an instance: the default of transformers' post-processing. Meta's demo uses 0.5, which finds fewer. With ``nuclei-compact``
        the least share of a cell that its type's map covers: at 0.3 macro-F1 at true nuclei is 0.81, at 0.5 0.80 (benchmarks/results/phrases.md).
    crowded
        Share of the instances that one pass can find at all (200 in SAM 3) from which a tile is searched again in quarters: more may be there.
    smallest_field_um
        A quarter is not searched in quarters again below this: on 64 um there is no room for 150 nuclei.
    same_cell
        Outlines of two passes on a tile with at least this IoU are one cell, and their types compete for it. COCO's threshold of a match.
    seam_um
        A cell belongs to the tile whose core holds its centre. Two tiles may see the centre in two places: both take cells this near to the
        border, and the better one is kept like any that overlaps.
    examples
        Boxes per type and tile, of cells of the type, and as many of others: one odd cell among four is outvoted. Not measured on SAM 3's own
        weights, whose licence has to be accepted first.
    min_lead
        Least lead of an example (prompts/exemplars.py): 0 is half way between two types' clicks, 1 is like the click. A tile without the type
        should give no example of it; in between, a quarter is a choice.
    candidates
        Places per type and tile that look most like its clicks and are decoded, for the examples to be chosen from: six for each.
    """

    min_score: float = setting(0.3, 0, 1)
    crowded: float = setting(0.75, 0.01, 1)
    smallest_field_um: float = setting(64.0, 8, 4096)
    same_cell: float = setting(0.5, 0.01, 1)
    seam_um: float = setting(2.0, 0, 32)
    examples: int = setting(4, 1, 64)
    min_lead: float = setting(0.25, 0, 1)
    candidates: int = setting(24, 1, 1000)


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Thresholds for decoded masks to count as cells.

    Attributes
    ----------
    min_score
        Predicted IoU x stability; below 0.2 nothing is gained on the development sets, above 0.3 cells are lost (benchmarks/results/apg_sweep.md).
    min_area_um2
        A disc of 2.5 um diameter; smaller outlines are debris.
    simplify_um
        Outlines are thinned by this much: a tenth of the mask's own sampling, 60 -> 25 vertices.
    convex_above
        An outline that fills at least this share of its convex hull becomes the hull: nuclei are convex, small dents are the mask's noise.
        1 leaves outlines as they are. It gains on one development set what it loses on the other, so it stays
        near 1 (benchmarks/results/apg_sweep.md).
    prompts_per_batch
        Prompts decoded together, for each tile of a batch; memory grows by about 1.5 MB each.
    """

    min_score: float = setting(0.20, 0, 1)
    min_area_um2: float = setting(5.0, 0, 10000)
    simplify_um: float = setting(0.05, 0, 10)
    convex_above: float = setting(0.9, 0, 1)
    prompts_per_batch: int = setting(128, 1, 65536)


@dataclass(frozen=True, kw_only=True)
class StitchingConfig:
    """Resolution of overlapping outlines: best score first, as in the merge of APG v2 (micro-sam's ``dev`` branch).

    Attributes
    ----------
    max_overlap
        An outline is dropped when more than this share of it belongs to better ones. Upstream has 0.15; between 0.15 and 0.5 the
        development sets do not tell (benchmarks/results/apg_sweep.md), and what overlaps is clipped here anyway.
    contained
        An outline that holds at least ``cluster_size`` others to this share is a cluster, and dropped.
    cluster_size
        See ``contained``.
    nested
        Share of the smaller outline at which the worse of two is dropped: no cell lies inside another.
    """

    max_overlap: float = setting(0.3, 0, 1)
    contained: float = setting(0.9, 0.01, 1)
    cluster_size: int = setting(2, 1, 1000)
    nested: float = setting(0.6, 0.01, 1)


@dataclass(frozen=True, kw_only=True)
class TypingConfig:
    """Typing from clicks. The numbers are priors of the model in plda.py; benchmarks/results/cop.md compares other values.

    Attributes
    ----------
    known_types
        The model's reference classes are types too: without clicks all of them, with clicks those that no click covers. Off, because a lab
        decides what its types are.
    unknown_class
        Prior probability that a clicked type is none of the model's reference classes.
    sure_cells
        Cells of the slide that are surely of a type (0.9) count together as at most this many further clicks on it; 0: the clicks alone. Chosen
        among 0, 2, 5 and 10 on dots of H&E (benchmarks/results/cop.md, the ablation); 10 gains on immunohistochemistry, and loses rare types.
    other_stain
        On a slide that is not H&E, a clicked type differs from its reference class with this many times the variance: the classes are of H&E.
        Chosen among 1, 2, 4, 8 and 16 on one picture (benchmarks/results/ihc_accuracy.md); 8 gains a little more with one click, and 16 loses again.
    unclicked_weight, background_weight
        Weight of a reference class without clicks, and of anything else, relative to a clicked type's 1: cells closer to these stay
        ``unassigned``. Without them every cell gets a clicked type.
    min_score, min_margin
        Probability, and lead over the runner-up, below which a cell stays ``unassigned``. Higher values leave out right and wrong cells alike.
    local_shift, local_shift_um
        Cells of a place share a shift beside the slide's own: its variance, relative to that between slides, on squares of this side. More
        costs accuracy where the clicks are near, less where the stain changes.
    neighbourhood_um
        Side of the squares on which, with their neighbours, the prevalence of types is estimated.
    neighbourhood_cells
        The slide's shares count like this many cells of the square.
    prevalence_rounds
        Rounds of estimating the shares; 0 leaves them out.
    prevalence_temperature
        Probabilities are softened by this before the shares are estimated, so that the neighbours say more: fewer cells get a type that is not
        near, and more of a rare type are lost (benchmarks/results/cop.md: c1, c2 and the ablation have it at 4).
    separable
        Types whose clouds are closer than this (in standard deviations; at 2, one in six cells is on the wrong side) are reported.
    """

    known_types: bool = setting(False)
    unknown_class: float = setting(0.3, 1e-6, 1 - 1e-6)
    sure_cells: float = setting(5.0, 0, 1000)
    other_stain: float = setting(4.0, 0.01, 100)
    unclicked_weight: float = setting(0.3, 1e-9, 1e6)
    background_weight: float = setting(0.1, 1e-9, 1e6)
    min_score: float = setting(0.5, 0, 1)
    min_margin: float = setting(0.05, 0, 1)
    local_shift: float = setting(0.1, 0, 100)
    local_shift_um: float = setting(128.0, 64, 1e6)
    neighbourhood_um: float = setting(256.0, 8, 1e6)
    neighbourhood_cells: float = setting(20.0, 0, 1e6)
    prevalence_rounds: int = setting(20, 0, 1000)
    prevalence_temperature: float = setting(1.0, 1, 100)
    separable: float = setting(2.0, 0, 100)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A job of a batch system (``--scheduler slurm``, ``pbs``, ``lsf`` or ``sge``); each is one worker.

    Attributes
    ----------
    cores
        Threads of the model. Small jobs start soonest: most nodes have room for four.
    memory
        The default model takes about 1.5 GB; this is 2 GB per core, what most clusters give anyway, and room for larger models.
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

    cores: int = setting(4, 1, 1024)
    memory: str = "8GB"
    queue: str | None = None
    account: str | None = None
    walltime: str | None = None
    interface: str | None = None
    directives: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one run.

    Attributes
    ----------
    mpp, force_mpp
        Microns per level-0 pixel in place of what the file says; outside of ``CELLULAR_MPP`` only with ``force_mpp``.
    stain
        ``he``: haematoxylin and eosin; ``ihc``: haematoxylin with a brown chromogen outside of nuclei; ``ihc-nuclear``: with brown nuclei.
        ``auto`` looks at the slide. What is not H&E is shown to the network as if it were (slide/stain.py).
    text
        Phrases, each a type of its own, for ``--method text``.
    outlines
        File of outlined cells of another program, for ``--method outlines``: they are kept as they are, and get descriptors.
    formats
        Names of the final files (``wsiseg.formats.FORMATS``); execution, since they decide nothing about the cells.
    batch_size
        Tiles encoded together. ``None``: one on a CPU, as many as fit on a GPU.
    max_ram_gb, max_vram_gb
        Memory limit of a process; queues, caches and batches are sized to fit. ``None``: all available memory.
    workers
        Processes on this machine, or jobs of a batch system.
    scheduler
        ``tcp://host:port`` of a Dask scheduler, or ``slurm``, ``pbs``, ``lsf``, ``sge``. ``None``: this machine alone.

    Examples
    --------
    >>> import wsiseg
    >>> from wsiseg.config import TilingConfig
    >>> wsiseg.RunConfig()
    RunConfig()
    >>> wsiseg.RunConfig(method="amg", tiling=TilingConfig(tile_um=128))
    RunConfig(method='amg', tiling=TilingConfig(tile_um=128))
    """

    model: str = setting("nuclei-compact", group="source")
    method: Method = "auto"
    mpp: float | None = setting(None, *FORCED_MPP, group="source")
    force_mpp: bool = setting(False, group="source")
    reader: Literal["auto", "openslide", "tiffslide", "image"] = setting("auto", group="source")
    stain: Literal["auto", "he", "ihc", "ihc-nuclear"] = setting("auto", group="source")
    seeds: str | None = setting(None, group="source")
    bank: str | None = setting(None, group="source")
    text: tuple[str, ...] = setting((), group="source")
    roi: str | None = setting(None, group="source")
    outlines: str | None = setting(None, group="source")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    tissue: TissueConfig = field(default_factory=TissueConfig)
    tiling: TilingConfig = field(default_factory=TilingConfig)
    apg: ApgConfig = field(default_factory=ApgConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    cop: CopConfig = field(default_factory=CopConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    stitching: StitchingConfig = field(default_factory=StitchingConfig)
    typing: TypingConfig = field(default_factory=TypingConfig)
    # enters the hashes of detecting methods only, so that those of other methods stay what they were in earlier versions
    detection: DetectionConfig = field(default_factory=DetectionConfig, metadata={"group": "source"})
    device: str = setting("auto", group="execution")
    batch_size: int | None = setting(None, 1, 1024, group="execution")
    max_ram_gb: float | None = setting(None, 0.5, 100000, group="execution")
    max_vram_gb: float | None = setting(None, 0.1, 100000, group="execution")
    workers: int = setting(1, 1, 1024, group="execution")
    scheduler: str | None = setting(None, group="execution")
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata={"group": "execution"})
    formats: tuple[str, ...] = setting(("geojson", "parquet"), group="execution")

    def __repr__(self) -> str:
        return short_repr(self)

    def hash(self, *, typed: bool = True, **facts: object) -> str:
        """Short digest of everything that decides the cells; ``facts`` adds what the fields only point to (slide, weights, seeds, scale).

        Where no types are decided (``typed``), settings of the typing that later versions added are left out: parts of earlier ones are still used.
        """
        same = merge(self, dataclasses.asdict(self), "configuration")  # 20 and 20.0 are one setting
        values = in_group(same, "method")
        if not typed:
            values["typing"] = {k: v for k, v in values["typing"].items() if k not in _LATER}
        return hashlib.sha256(json.dumps([REVISION, values, facts], sort_keys=True).encode()).hexdigest()[:16]


#: Raised when the same inputs give other cells than before: parts of an older wsiseg are then recomputed.
REVISION = 4
_LATER = ("sure_cells", "other_stain")  # settings of TypingConfig without which parts and untyped runs were hashed


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
    config: RunConfig = merge(base or RunConfig(), _current_names(mapping), where)
    check(config, where)
    return config


_FORMER = {
    "second_round": "refinement",
    "unknown_kind": "unknown_class",
    "rival_kind": "unclicked_weight",
    "rival_other": "background_weight",
    "drift": "local_shift",
    "drift_um": "local_shift_um",
    "share_rounds": "prevalence_rounds",
    "share_temperature": "prevalence_temperature",
}  #: keys of version 0.1: its manifests and files of settings are read


def _current_names(mapping: Any) -> Any:  # noqa: ANN401 - whatever a file holds
    """Replace the former names of keys, unless the mapping has the current one too."""
    if not isinstance(mapping, dict):
        return mapping
    renamed = {k: _FORMER[k] if k in _FORMER and _FORMER[k] not in mapping else k for k in mapping}
    return {renamed[k]: _current_names(v) for k, v in mapping.items()}


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
    check_types(config, where)
    check_mpp(config.mpp, force=config.force_mpp, where=f"{where}: mpp")
    check_values(config, where)
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
