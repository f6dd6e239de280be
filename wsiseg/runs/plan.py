"""Plan of a run: model, tissue, bank and blocks of tiles; nothing is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import shapely

from wsiseg.config import CHAINED, DETECTING
from wsiseg.formats.given import points_inside
from wsiseg.geometry import Lattice
from wsiseg.models import load_model
from wsiseg.runs.inputs import require_known_types
from wsiseg.runs.plan_file import RunPlan, read_plan
from wsiseg.runtime.claims import Claims
from wsiseg.runtime.paths import target
from wsiseg.seeds.bank import build_bank
from wsiseg.seeds.descriptions import describe_types, doubts_of
from wsiseg.segmentation.worker import RunSpec, WorkerContext
from wsiseg.slide import thumbnail
from wsiseg.slide.tiling import TileGrid, plan_for_model
from wsiseg.slide.tissue import SearchArea, find_tissue

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

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
    given
        Outlines that are kept as they are, and a point inside each; ``None``: they are searched for.
    """

    plan: RunPlan
    blocks: list[Block]
    context: WorkerContext
    given: tuple[NDArray[np.object_], NDArray[np.float64]] | None = None

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
    tissue, given = None, None
    if config.tissue.enabled and inputs.outlines is None:
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
        warnings += doubts_of(model, described, stain.name)
    wanted: Callable[[float, float, float, float], bool] = area.wanted
    if inputs.outlines is not None:
        points = points_inside(inputs.outlines)
        kept = area.holds(points)
        given = inputs.outlines[kept], points[kept]
        wanted = holds_any(points[kept])
    blocks = plan_for_model(info, model, config.tiling, wanted)
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
        grid=TileGrid.of(blocks, lattice, config.tiling),
    )
    spec = RunSpec(inputs.slide, config, lattice, area, bank, parts, inputs.parts_hash, stain, described)
    return PreparedRun(plan, blocks, WorkerContext(spec, stain.view(reader), model, Claims(parts)), given)


def holds_any(points_xy: NDArray[np.float64]) -> Callable[[float, float, float, float], bool]:
    """Make the test whether any of the points (N, 2) lies in a box [x0, x1) x [y0, y1)."""
    tree = shapely.STRtree(shapely.points(points_xy))

    def test(x0: float, y0: float, x1: float, y1: float) -> bool:
        x, y = points_xy[tree.query(shapely.box(x0, y0, x1, y1))].T
        return bool(((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).any())

    return test
