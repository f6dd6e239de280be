"""The public functions of ``import wsiseg``, besides the records, the readers and the evaluation.

The functions here take what people have (paths, dicts, keywords) and call the same code as the commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiseg.config import RunConfig, from_mapping
from wsiseg.errors import ConfigError, RunError, SeedsError, SlideError, counted
from wsiseg.formats.cell_query import read_cells
from wsiseg.formats.ids import cell_ids
from wsiseg.formats.seeds import read_seeds
from wsiseg.records import Seeds, TypedCells
from wsiseg.runs import image as in_memory
from wsiseg.runs import slide as on_disk
from wsiseg.runs.folder import RunFolder
from wsiseg.runs.manifest import Manifest, Status
from wsiseg.runtime.text import show

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wsiseg.models.contract import PromptableModel

    SeedsSource = str | os.PathLike[str] | Mapping[str, Any] | Seeds

logger = logging.getLogger(__name__)

_IMAGE = "image"  #: what an image in memory is called in messages, and the key of its ids


@dataclass(frozen=True, repr=False)
class Run:
    """A run on one slide, in its folder.

    Attributes
    ----------
    path
        The folder.
    manifest
        Content of manifest.json: settings, slide, counts, warnings (docs/output.md has the keys).
    already
        The run was complete before the call that returned this, which changed nothing.

    Examples
    --------
    >>> import wsiseg
    >>> from wsiseg.demo import write_demo
    >>> slide, seeds = write_demo("demo")
    >>> run = wsiseg.segment_slide(slide, seeds=seeds, out="demo/out")
    >>> run  # doctest: +ELLIPSIS
    Run('demo/out/ihc', complete, ... cells: ...)
    >>> run.counts["tiles_failed"]
    0
    >>> len(run.cells()) == run.counts["cells"]
    True
    """

    path: Path
    manifest: dict[str, Any]
    already: bool = False

    @property
    def status(self) -> str:
        """``complete``, or ``incomplete`` when tiles could not be read; ``running`` or ``interrupted`` before the end."""
        return str(self.manifest.get("status", Status.RUNNING))

    @property
    def counts(self) -> dict[str, int]:
        """Cells, tiles, prompts and the rest, by the names of docs/output.md; empty before the end."""
        return dict(self.manifest.get("counts", {}))

    @property
    def types(self) -> dict[str, int]:
        """Cells per type; empty before the end."""
        return dict(self.manifest.get("types", {}))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what is doubtful."""
        return tuple(self.manifest.get("warnings", ()))

    def cells(self, *, bbox: Sequence[float] | None = None, types: str | Sequence[str] | None = None) -> TypedCells:
        """Read the cells, or those of a part of the slide, or of some types: :func:`read_cells` on this run."""
        return read_cells(self.path, bbox=bbox, types=types)

    def __repr__(self) -> str:
        types = ", ".join(f"{name} {count}" for name, count in self.types.items())
        ended = f", {counted(self.counts['cells'], 'cell')}: {types}" if "cells" in self.counts else ""
        return f"Run({str(self.path)!r}, {self.status}{ended})"


def read_run(path: str | os.PathLike[str]) -> Run:
    """Open an earlier run.

    Parameters
    ----------
    path
        Folder of one slide's run, such as ``wsiseg-out/slide``.

    Returns
    -------
    Run
        Its manifest is read, its cells are not.

    Raises
    ------
    RunError
        It is not the folder of a run.

    Examples
    --------
    >>> import wsiseg
    >>> from wsiseg.demo import write_demo
    >>> slide, seeds = write_demo("demo")
    >>> run = wsiseg.segment_slide(slide, seeds=seeds, out="demo/out")
    >>> wsiseg.read_run("demo/out/ihc").types == run.types
    True
    """
    manifest = RunFolder(Path(path)).manifest()
    if manifest is None:
        raise RunError(
            f"{path}: no manifest.json of wsiseg in it; pass the folder of one slide's run, for example wsiseg-out/slide"
        )
    return Run(Path(path), manifest.content())


def segment_slide(
    slide: str | os.PathLike[str],
    *,
    seeds: SeedsSource | None = None,
    out: str | os.PathLike[str] = "wsiseg-out",
    config: RunConfig | None = None,
    name: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_warning: Callable[[str], None] = logger.warning,
    stopped: Callable[[], bool] = lambda: False,
    **settings: Any,  # noqa: ANN401
) -> Run:
    """Outline every cell of a slide and, with clicks, give each a type: what ``wsiseg run`` does.

    Parameters
    ----------
    slide
        Path or URL of the slide.
    seeds
        The clicks: path of a seeds file, a dict as in seeds.json, or :class:`Seeds`. Without them no cell has a type.
    out
        Folder of all runs; the slide's own folder is created below it.
    config
        Settings; defaults when absent.
    name
        Name of the slide's folder; defaults to the slide's stem.
    overwrite
        Replace a run that has another configuration; write the files of a complete one again.
    on_progress
        Called with tiles done, tiles in all, outlines so far.
    on_warning
        Called with each warning before the work begins; logged when absent.
    stopped
        When it turns true, the current block is finished and no other is started.
    **settings
        Fields of :class:`RunConfig`, in place of those of ``config``: ``mpp=0.25``, ``method="cop"``, ``tiling={"tile_um": 128}``.

    Returns
    -------
    Run
        The finished run; one that was already complete is only opened. Its ``status`` is ``incomplete`` when tiles could not be read; the
        same call again tries only those.

    Raises
    ------
    InterruptedRunError
        ``stopped`` turned true before the end. What is finished is kept; the same call continues.
    WsisegError
        Wrong input; nothing has been written then.

    Examples
    --------
    >>> import wsiseg
    >>> from wsiseg.demo import write_demo
    >>> slide, seeds = write_demo("demo")
    >>> run = wsiseg.segment_slide(slide, seeds=seeds, out="demo/out")
    >>> run.status
    'complete'
    >>> cells = run.cells().to_geodataframe()
    >>> sorted(cells.cell_type.unique())
    ['epithelium', 'immune', 'stroma', 'unassigned']

    A dict works in place of a file of clicks, and any setting is a keyword:

    >>> clicks = {"version": 1, "types": [{"name": "gland", "points": [[424, 112]]}]}
    >>> run = wsiseg.segment_slide(slide, seeds=clicks, out="demo/glands", device="cpu")
    >>> sorted(run.types)
    ['gland', 'unassigned']
    """
    if isinstance(slide, np.ndarray) or not isinstance(slide, str | os.PathLike):
        raise SlideError(
            f"slide: found {_described(slide)}; pass the path of a slide, or use wsiseg.segment_image for an array"
        )
    config, clicks = _configured(config, settings, "segment_slide"), None
    if seeds is not None:  # in place of the clicks of the configuration, of either kind
        file, clicks = _file_or_clicks(seeds)
        config = dataclasses.replace(config, seeds=file, bank=None, text=())
    manifest = on_disk.segment_slide(
        os.fspath(slide),
        config,
        os.fspath(out),
        seeds=clicks,
        name=name,
        overwrite=overwrite,
        on_progress=on_progress,
        on_warning=on_warning,
        stopped=stopped,
    )
    return Run(Path(manifest.folder), manifest.content(), already=isinstance(manifest, Manifest) and manifest.already)


def segment_image(
    image: Any,  # noqa: ANN401 - whatever NumPy makes an array of
    *,
    mpp: float | None = None,
    seeds: SeedsSource | None = None,
    config: RunConfig | None = None,
    model: PromptableModel | str | os.PathLike[str] | None = None,
    **settings: Any,  # noqa: ANN401
) -> TypedCells:
    """Outline and type the cells of one image in memory; writes nothing.

    Parameters
    ----------
    image
        uint8 RGB of shape (H, W, 3). All of it is searched, also what is not tissue.
    mpp
        Microns per pixel.
    seeds
        The clicks, in px of the image: path of a seeds file, a dict as in seeds.json, or :class:`Seeds`. A slide that they name is ignored.
    config
        Defaults when absent.
    model
        A loaded model (:func:`wsiseg.models.load_model`), to use it for many images; or its name or file. As ``config`` says when absent.
    **settings
        Fields of :class:`RunConfig`, in place of those of ``config``: ``method="amg"``, ``masks={"min_score": 0.5}``.

    Returns
    -------
    TypedCells
        Polygons in px of the image.

    Raises
    ------
    WsisegError
        Wrong input, in one line.

    Examples
    --------
    >>> import wsiseg
    >>> from skimage import data
    >>> image = data.immunohistochemistry()[:256, 256:]
    >>> clicks = {"version": 1, "types": [{"name": "gland", "points": [[168, 112]]}]}
    >>> cells = wsiseg.segment_image(image, mpp=0.5, seeds=clicks)
    >>> cells.count()["gland"] > 5
    True
    >>> 20 < float(cells.areas_um2.mean()) < 100
    True
    """
    if isinstance(image, str | os.PathLike):
        raise SlideError(
            f"{_IMAGE}: {show(os.fspath(image))} is a path; use wsiseg.segment_slide for a file, or pass a uint8 RGB array of shape (H, W, 3)"
        )
    if isinstance(model, str | os.PathLike):
        settings, model = settings | {"model": os.fspath(model)}, None
    config = _configured(config, settings, "segment_image")
    if mpp is not None:
        config = dataclasses.replace(config, mpp=mpp)
    if config.mpp is None:
        raise ConfigError(f"{_IMAGE}: microns per pixel are not known; pass mpp, for example mpp=0.25")
    if seeds is None and config.seeds is not None:
        seeds = config.seeds
    cells, typing = in_memory.segment_image(
        np.asarray(image),
        mpp=config.mpp,
        seeds=None if seeds is None else read_seeds(seeds),
        config=config,
        model=model,
    )
    ids = np.array(cell_ids(_IMAGE, cells), np.str_)
    return TypedCells(cells=cells, typing=typing, ids=ids, mpp=config.mpp, slide=_IMAGE)


def _configured(config: RunConfig | None, settings: dict[str, Any], where: str) -> RunConfig:
    """The configuration with the settings that were given as keywords."""
    if config is not None and not isinstance(config, RunConfig):
        raise ConfigError(
            f"{where}: config is {show(config)}; pass wsiseg.RunConfig(...), or the settings as keywords (mpp=0.25)"
        )
    return from_mapping(settings, where, config)


def _file_or_clicks(seeds: SeedsSource) -> tuple[str | None, Seeds | None]:
    """The file that the clicks are in, or else the clicks: what was read from a file and not changed is that file, as for the commands."""
    if isinstance(seeds, str | os.PathLike):
        return os.fspath(seeds), None
    if isinstance(seeds, Seeds):
        with contextlib.suppress(SeedsError):
            if read_seeds(seeds.source) == seeds:
                return seeds.source, None
    return None, read_seeds(seeds)


def _described(value: object) -> str:
    """What was passed, for a message."""
    return f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else show(value)
