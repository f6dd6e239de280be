"""Inputs of a run: settings, slide, clicks and region are opened and checked before anything is written or long work starts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import shapely

from wsiseg.config import DETECTING, CopConfig, RunConfig, StitchingConfig, TypingConfig, check
from wsiseg.errors import ConfigError, FormatError, SlideError, counted
from wsiseg.formats import require_formats
from wsiseg.formats.bank import read_bank
from wsiseg.formats.given import points_inside
from wsiseg.formats.outlines import Labels, Points, read_side, trace_labels
from wsiseg.formats.regions import read_regions
from wsiseg.formats.seed_rules import MAX_NAME, default_colors, require_phrases, require_points
from wsiseg.formats.seeds import check_seeds, read_seeds, seeds_text
from wsiseg.geometry import largest_part
from wsiseg.models import find_weights, pick_device
from wsiseg.models.cards import file_hash
from wsiseg.models.contract import unable
from wsiseg.records import Seeds, SeedType
from wsiseg.runtime.paths import kind_of, readable, require_text
from wsiseg.segmentation.nuclear_scale import require_scale
from wsiseg.slide import open_slide
from wsiseg.slide.stain import SlideStain, find_stain
from wsiseg.workers import check_scheduler

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely import MultiPolygon

    from wsiseg.records import Bank, SlideInfo, TypeSpace
    from wsiseg.slide import SlideReader

_SAME_MPP = 0.02  #: relative difference of two statements of one scale


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Checked inputs of a run.

    Attributes
    ----------
    slide, path
        Path or URL as given, and as in manifests: absolute.
    reader
        The opened slide; the caller closes it.
    stain
        The slide's stain, and how the network is to see it.
    config
        Resolved: its method, precision and stain are not ``auto``.
    seeds
        Clicks of this run, level-0 px.
    clicks_name
        Name of clicks that are in no file; else empty.
    bank
        Prototypes from another slide, in place of clicks.
    roi
        Region to search, level-0 px.
    outlines
        Outlines (N,) to keep as they are, level-0 px, of ``--method outlines``.
    weights
        sha256 of the model's.
    run_hash, parts_hash
        Hashes of everything that decides the result, and of everything that decides the parts.
    warnings
        Sentences about what is doubtful.
    """

    slide: str
    path: str
    reader: SlideReader
    stain: SlideStain
    config: RunConfig
    seeds: Seeds | None
    clicks_name: str
    bank: Bank | None
    roi: MultiPolygon | None
    outlines: NDArray[np.object_] | None
    weights: str
    run_hash: str
    parts_hash: str
    warnings: tuple[str, ...]

    @property
    def info(self) -> SlideInfo:
        """Metadata of the slide."""
        return self.reader.info


def read_inputs(slide: str, config: RunConfig, *, clicks: Seeds | None = None) -> RunInputs:
    """Open and check the inputs of a run; the caller closes ``reader``.

    Parameters
    ----------
    slide
        Path or URL.
    config
        Settings; ``seeds`` and ``roi`` are paths.
    clicks
        Seeds that are in no file; in place of ``config.seeds``.

    Raises
    ------
    WsisegError
        The first thing that is wrong, in one line.
    """
    check(config)
    check_scheduler(config.scheduler, config.cluster)
    card, weights = find_weights(config.model)
    require_formats(config.formats)
    if config.seeds is not None and config.bank is not None:
        raise ConfigError("--bank and --seeds: both define the types; pass only one of them")
    if config.text:
        if config.seeds is not None or config.bank is not None or clicks is not None:
            raise ConfigError(
                '--text and --seeds or --bank: both define the types; pass only one of them (phrases fit into a seeds.json as "text")'
            )
        clicks = phrases_as_seeds(config.text)
    seeds = read_seeds(Path(config.seeds)) if config.seeds is not None else clicks
    bank = load_bank(Path(config.bank), weights) if config.bank is not None else None
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(
            open_slide(slide, mpp=config.mpp, force_mpp=config.force_mpp, reader=config.reader, require_mpp=False)
        )
        require_scale(reader)
        warnings = list(reader.info.warnings)
        if seeds is not None:
            seeds, more = check_seeds(seeds, reader.info)
            warnings += more
        roi = None
        if config.roi is not None:
            roi, more = read_regions(Path(config.roi), reader.info)
            warnings += more
        resolved = resolve(config, card.name, maps=card.instance_decoder, prompts=card.prompts, seeds=seeds, bank=bank)
        outlines = None
        if resolved.method == "outlines":
            outlines, more = read_given(Path(str(resolved.outlines)), reader.info)
            warnings += more
        stain = find_stain(reader, config.stain, config.tissue.overview_mpp)
        warnings += stain.warnings
        resolved = dataclasses.replace(resolved, stain=stain.name)
        run_hash, parts_hash = _digests(slide, resolved, reader.info, weights, _digest_of_clicks(config, clicks))
        stack.pop_all()
    return RunInputs(
        slide=slide,
        path=slide_path(slide),
        reader=reader,
        stain=stain,
        config=resolved,
        seeds=seeds,
        clicks_name="" if clicks is None else clicks.source,
        bank=bank,
        roi=roi,
        outlines=outlines,
        weights=file_hash(weights),
        run_hash=run_hash,
        parts_hash=parts_hash,
        warnings=tuple(warnings),
    )


def phrases_as_seeds(phrases: tuple[str, ...]) -> Seeds:
    """Make seeds of phrases (``--text``): each is a type that is called like it.

    Raises
    ------
    SeedsError
        As for the phrases and names in a seeds.json.
    """
    names = [" ".join(phrase.replace(":", " ").split())[:MAX_NAME].strip() for phrase in phrases]
    colors = default_colors([None] * len(phrases))
    types = [SeedType(name, color, text=(phrase,)) for name, color, phrase in zip(names, colors, phrases, strict=True)]
    return read_seeds(Seeds(tuple(types), "--text"))


def resolve(
    config: RunConfig,
    model: str,
    *,
    maps: bool,
    prompts: tuple[str, ...] = ("points", "boxes"),
    seeds: Seeds | None = None,
    bank: Bank | None = None,
) -> RunConfig:
    """Resolve ``auto`` in every setting that decides the result.

    ``--method auto`` is automatic prompts where the model has instance maps: with them they type better on typed data than Chain-of-Prompts as
    the way in (docs/methods.md has the table). Without maps the clicks lead to the cells; without clicks, or with a bank that no chain was run for,
    a grid does. Types that have only phrases are searched for by them.

    Parameters
    ----------
    config
        Settings.
    model
        Its name in messages.
    maps, prompts
        Whether the model has instance maps, and what it can be asked with (:class:`ModelCard`).
    seeds, bank
        The types, if any.

    Raises
    ------
    ConfigError
        The method needs what the model or the command does not have.
    SeedsError
        The method needs clicks, or phrases, and a type has none.
    """
    method = config.method
    if config.outlines is not None:
        return _resolve_given(config, seeds=seeds, bank=bank)
    if method == "outlines":
        raise ConfigError("--method outlines: needs a file of outlined cells; use wsiseg type SLIDE --outlines FILE")
    clicked, chains = seeds is not None or bank is not None, bank is None or bool(bank.chains)
    if method == "auto":
        method = "apg" if maps else "cop" if clicked and chains else "amg"
        if seeds is not None and not any(kind.points for kind in seeds.types):
            method = "text"
    if method == "text":
        _require_words(config, seeds)
    elif seeds is not None:
        require_points(seeds, f"--method {method}")
    if method in DETECTING and {"text": "text", "exemplar": "exemplars"}[method] not in prompts:
        raise unable(method, model)
    if method in {"cop", "amg", "exemplar"} and "points" not in prompts:
        raise ConfigError(
            f"--method {method}: {model} takes no points; import the whole model of its authors (SAM 3: Sam3VideoModel, with its tracker)"
        )
    if method in {"cop", "exemplar"} and not clicked:
        other = "text with --text" if method == "exemplar" else "apg" if maps else "amg"
        raise ConfigError(f"--method {method}: needs clicks; pass --seeds FILE or --bank FILE, or use --method {other}")
    if method in {"cop", "exemplar"} and not chains:
        raise ConfigError(
            f"--bank {config.bank}: has no prototypes for --method {method}; leave --method out, or make it by a run with --method {method}"
        )
    if method == "apg" and not maps:
        raise ConfigError(
            f"--method apg: {model} has no instance decoder; use --method cop with --seeds, or --method amg, or another model"
        )
    return dataclasses.replace(config, method=method, precision=_precision(config))


def _require_words(config: RunConfig, seeds: Seeds | None) -> None:
    """Refuse to search by phrases where there are none, or where something else names the types too."""
    if config.typing.known_types:
        raise ConfigError("--known-types and --method text: both say what the types are; pass only one of them")
    if seeds is None:
        raise ConfigError('--method text: needs phrases; pass --text PHRASE, or --seeds with "text" for every type')
    require_phrases(seeds, "--method text")


def _resolve_given(config: RunConfig, *, seeds: Seeds | None, bank: Bank | None) -> RunConfig:
    """:func:`resolve` for a run whose outlines are given; they are typed afterwards, as those of any finished run."""
    if config.method not in ("auto", "outlines"):
        raise ConfigError(
            f"--outlines: nothing is searched for, so --method {config.method} has no meaning; leave it out"
        )
    if seeds is not None or bank is not None:
        raise ConfigError("--outlines: the run has no types yet; pass the clicks to wsiseg type")
    return dataclasses.replace(config, method="outlines", precision=_precision(config))


def _precision(config: RunConfig) -> Literal["fp32", "bf16"]:
    """Precision that ``auto`` means on the device."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if pick_device(config.device).type == "cuda" else "fp32"


def read_given(path: Path, info: SlideInfo) -> tuple[NDArray[np.object_], list[str]]:
    """Read outlines of another program.

    Parameters
    ----------
    path
        GeoJSON, GeoParquet or a label image of the slide's size.
    info
        The slide: its bounds are added to the coordinates of GeoJSON, as QuPath's are relative to them.

    Returns
    -------
    tuple of (ndarray, list of str)
        Polygons (N,) of absolute level-0 px, those whose centre lies on the slide, without holes; and warnings.

    Raises
    ------
    FormatError
        The file cannot be read, holds no outlines, or its outlines lie elsewhere.
    """
    width, height = info.size_px0
    if kind_of(path, FormatError) == "nothing":
        raise FormatError(f"{path}: no such file; check the path")
    side = read_side(path, {})
    if isinstance(side, Points):
        raise FormatError(f"{path}: points, no outlines; pass GeoJSON or GeoParquet of polygons, or a label image")
    warnings = list(side.notes)
    if isinstance(side, Labels):
        if side.ids.shape != (height, width):
            raise FormatError(
                f"{path}: a label image of {side.ids.shape[1]} x {side.ids.shape[0]} px, the slide has {width} x {height}; "
                "make it at level 0, or pass polygons"
            )
        polygons = trace_labels(side.ids)
    else:
        polygons = side.polygons
        if side.frame == "qupath" and info.bounds is not None:
            polygons = shapely.transform(polygons, lambda xy: xy + info.bounds[:2])
        if side.mpp is not None and abs(side.mpp / info.mpp - 1) > _SAME_MPP:
            warnings.append(f"{path}: says {side.mpp:g} um per px, the slide {info.mpp:g}; px are taken as they are")
    pieces = np.array([largest_part(polygon) for polygon in polygons], object)
    parts, owner = shapely.get_parts(polygons, return_index=True)
    holed = len(np.unique(owner[shapely.get_num_interior_rings(parts) > 0]))
    several = int((np.bincount(owner, minlength=len(polygons)) > 1).sum())
    if several:
        warnings.append(f"{path}: {counted(several, 'outline')} of several parts; the largest part of each was taken")
    if holed:
        warnings.append(f"{path}: {counted(holed, 'outline')} with holes, which were filled")
    on_slide = shapely.contains_xy(shapely.box(0, 0, width, height), points_inside(pieces))
    if not on_slide.any():
        raise FormatError(
            f"{path}: none of its {counted(len(pieces), 'outline')} has its centre on the slide, which has {width} x {height} px; "
            "coordinates are level-0 px: check that the file belongs to this slide"
        )
    if not on_slide.all():
        warnings.append(
            f"{path}: {int((~on_slide).sum())} of {len(pieces)} outlines have their centre outside the slide and were left out"
        )
    return pieces[on_slide], warnings


def require_known_types(model: str, types: TypeSpace | None) -> None:
    """Refuse to type by the model's own classes when it has none.

    Raises
    ------
    ConfigError
        ``types`` is missing, or names no class.
    """
    if types is None or not types.class_names:
        raise ConfigError(
            f"--known-types: {model} knows no types by itself; leave the option out and click one cell per type, or use another model"
        )


def slide_path(slide: str) -> str:
    """The slide's name in manifests: absolute path, that of a symbolic link as it is; or URL.

    Raises
    ------
    SlideError
        A folder above it has a name that is not text.
    """
    path = slide if "://" in slide else os.path.abspath(slide)  # noqa: PTH100 - Path.absolute() leaves the ".." in it
    require_text(path, SlideError)
    return path


def load_bank(path: Path, weights: Path) -> Bank:
    """The bank of another slide, for a model with these weights.

    Raises
    ------
    WsisegError
        The file is not a bank, or was made with other weights.
    """
    bank, note = read_bank(path)
    if note["weights"] != file_hash(weights):
        raise ConfigError(
            f"--bank {path}: was made with other weights than those of {weights.name}; pass --model with those, or make the bank again"
        )
    return bank


def _digest_of_clicks(config: RunConfig, clicks: Seeds | None) -> str:
    """Of the file of clicks or the bank; clicks that are in no file have the digest of the seeds.json that would hold them."""
    if clicks is not None:
        return hashlib.sha256(seeds_text(clicks).encode()).hexdigest()
    return _content_hash(config.bank if config.seeds is None else config.seeds)


def _digests(slide: str, config: RunConfig, info: SlideInfo, weights: Path, clicks: str) -> tuple[str, str]:
    """Digests of everything that decides the result, and of what decides the parts; ``config`` is resolved."""
    facts: dict[str, object] = {
        "slide": _slide_key(slide),
        "levels": info.level_sizes,
        "reader": info.reader,
        "mpp": info.mpp,
        "weights": file_hash(weights),
        "roi": _content_hash(config.roi),
    }
    if config.method == "outlines":
        facts["outlines"] = _content_hash(config.outlines)
    if config.method in DETECTING:  # the hashes of other methods are those of versions that had no detector
        facts["detection"] = dataclasses.asdict(config.detection)
        if decoder := find_weights(config.model)[0].phrases_sha256:
            facts["phrases"] = decoder
    if config.stain != "he":  # the hash of H&E is that of versions that knew no other stain
        facts["stain"] = config.stain
    # Stages after the parts do not make them stale: types, overlaps, and under APG the seeds.
    segmenting = dataclasses.replace(config, typing=TypingConfig(), stitching=StitchingConfig())
    clicked = {"seeds": clicks} if config.method in {"cop", *DETECTING} else {}
    segmenting = segmenting if clicked else dataclasses.replace(segmenting, cop=CopConfig())
    typed = bool(clicks) or config.typing.known_types
    return config.hash(typed=typed, **facts, seeds=clicks), segmenting.hash(typed=False, **facts, **clicked)


def _slide_key(slide: str) -> str:
    """Identity of a slide without reading all of it: size and digest of both ends."""
    if "://" in slide:
        return slide
    path, end = Path(slide), 1 << 20
    with readable(path, SlideError), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(stream.read(end))
        stream.seek(max(size - end, 0))
        digest.update(stream.read(end))
    return f"{size}-{digest.hexdigest()}"


def _content_hash(path: str | None) -> str:
    if path is None:
        return ""
    with readable(Path(path), ConfigError):
        return file_hash(Path(path))
