"""The setup of a worker process: the slide, the model, and its claims on blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from wsiseg.formats.given import GivenOutlines
from wsiseg.models import load_model
from wsiseg.runtime.claims import Claims
from wsiseg.segmentation.tile import TileSegmenter
from wsiseg.slide import open_slide
from wsiseg.slide.stain import AS_HE, SlideStain

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.config import RunConfig
    from wsiseg.geometry import Lattice
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Bank, DescribedType
    from wsiseg.slide import SlideReader
    from wsiseg.slide.tissue import SearchArea


@dataclass(frozen=True)
class RunSpec:
    """Description of a run for the workers; picklable.

    Attributes
    ----------
    slide
        Path or URL.
    config
        Resolved: its method and precision are not ``auto``.
    lattice
        Between model px and level-0 px.
    area
        Area to search for cells.
    bank
        Prototypes, of runs with clicks.
    parts, parts_hash
        Folder of the part files, and the digest of everything that decides their content.
    stain
        How the network is to see the slide.
    described
        The types that a detector is asked for.
    """

    slide: str
    config: RunConfig
    lattice: Lattice
    area: SearchArea
    bank: Bank | None
    parts: Path
    parts_hash: str
    stain: SlideStain = AS_HE
    described: tuple[DescribedType, ...] = ()


@dataclass(frozen=True)
class WorkerContext:
    """Resources of a worker process, opened once: the slide, the model, and the claims on its blocks."""

    spec: RunSpec
    reader: SlideReader
    model: PromptableModel
    claims: Claims

    def segmenter(self) -> TileSegmenter:
        """Steps of one tile, for this run."""
        spec = self.spec
        return TileSegmenter(
            self.model,
            spec.config,
            spec.lattice,
            spec.area,
            spec.bank,
            name=spec.slide,
            types=spec.described,
            given=GivenOutlines(spec.parts) if spec.config.method == "outlines" else None,
        )

    def close(self) -> None:
        """Close the slide and give up all claims."""
        self.reader.close()
        self.claims.close()


def open_worker_context(spec: RunSpec, number: int = 0) -> WorkerContext:
    """Open the slide and model of worker ``number``; where there are several GPUs, each worker has its own."""
    config = spec.config
    reader = spec.stain.view(open_slide(spec.slide, mpp=config.mpp, force_mpp=config.force_mpp, reader=config.reader))
    device = config.device
    if device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
    claims = Claims(spec.parts)
    claims.start()
    return WorkerContext(spec, reader, load_model(config.model, device, config.precision), claims)
