"""Plan of a run: model, tissue, bank and blocks of tiles; nothing is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsiseg.config import CHAINED, DETECTING
from wsiseg.geometry import Lattice
from wsiseg.models import load_model
from wsiseg.runs.inputs import require_known_types
from wsiseg.runs.plan_file import RunPlan, read_plan
from wsiseg.runtime.claims import Claims
from wsiseg.runtime.paths import target
from wsiseg.seeds.bank import build_bank
from wsiseg.seeds.descriptions import UNRELIABLE, describe_types
from wsiseg.segmentation.worker import RunSpec, WorkerContext
from wsiseg.slide import thumbnail
from wsiseg.slide.tiling import plan_for_model
from wsiseg.slide.tissue import SearchArea, find_tissue

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.records import Block
    from wsiseg.runs.inputs import RunInputs


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to start.

    Attributes
    ----------
    plan
        Plan for stitching and writing, as `plan_file` stores it.
    blocks
        The units of work.
    context
        Slide and model as they were opened for the checks, for the first worker.
    """

    plan: RunPlan
    blocks: list[Block]
    context: WorkerContext

    def at(self, parts: Path) -> PreparedRun:
        """The run with the folder of parts that was claimed for it."""
        spec = dataclasses.replace(self.context.spec, parts=parts)
        return dataclasses.replace(self, context=dataclasses.replace(self.context, spec=spec, claims=Claims(parts)))


def plan_run(inputs: RunInputs, parts: Path) -> PreparedRun:
    """Load the model, find tissue, take the clicked types' prototypes, encode phrases and lay out the tiles.

    Parameters
    ----------
    inputs
        Checked inputs.
    parts
        Folder of the part files; a bank that an earlier start of this run left there is used again.

    Raises
    ------
    WsisegError
        The weights cannot be loaded, or a click meets nothing.
    """
    reader, info, config, bank, stain = inputs.reader, inputs.info, inputs.config, inputs.bank, inputs.stain
    model = load_model(config.model, config.device, config.precision)
    if config.typing.known_types:
        require_known_types(config.model, model.types)
    lattice = Lattice(info.mpp, model.mpp)
    tissue = None
    if config.tissue.enabled:
        tissue = find_tissue(*thumbnail(reader, config.tissue.overview_mpp), config.tissue, mpp=info.mpp)
    area = SearchArea(tissue, inputs.roi)
    warnings = [*inputs.warnings, *(tissue.warnings if tissue else ())]
    earlier = read_plan(parts, inputs.run_hash)
    if earlier:  # one bank and one view of the slide for all shards of a run, wherever they were made
        bank, stain, warnings = earlier.bank, earlier.stain, [*earlier.warnings]
    elif inputs.seeds is not None and config.method != "text":
        bank = build_bank(
            stain.view(reader),
            model,
            inputs.seeds,
            lattice,
            config,
            chains=config.method in CHAINED,
            on_warning=warnings.append,
        )
        bank = dataclasses.replace(bank, cells=bank.cells.take(area.holds(bank.cells.points_xy)))
    described = earlier.described if earlier else ()
    if config.method in DETECTING and not earlier:
        described = describe_types(model, config, inputs.seeds, bank)
        if any(of.phrases for of in described):
            warnings.append(UNRELIABLE)
    blocks = plan_for_model(info, model, config.tiling, area.wanted)
    plan = RunPlan(
        info=dataclasses.replace(info, path=inputs.path),
        config=config,
        bank=bank,
        tiles={b.name: len(b.tiles) for b in blocks},
        run_hash=inputs.run_hash,
        parts_hash=inputs.parts_hash,
        weights=inputs.weights,
        descriptor_size=model.descriptor_size,
        tissue_mm2=area.size_um2(info) / 1e6,
        warnings=tuple(warnings),
        target=target(inputs.slide),
        seeds=inputs.clicks_name,
        stain=stain,
        described=described,
    )
    spec = RunSpec(inputs.slide, config, lattice, area, bank, parts, inputs.parts_hash, stain, described)
    return PreparedRun(plan, blocks, WorkerContext(spec, stain.view(reader), model, Claims(parts)))
