"""Statistics of a run's blocks: counts, failures, seconds, memory; of this process, or of all shards together."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsiseg.errors import FormatError, InterruptedRunError, RunError, counted
from wsiseg.formats.parts import open_part, part_is_current
from wsiseg.runs.manifest import Status
from wsiseg.runtime import machine
from wsiseg.runtime.atomic import write_json
from wsiseg.runtime.profiling import Clock, peak_bytes
from wsiseg.runtime.shards import Shard
from wsiseg.segmentation.blocks import BLOCK_COUNTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch

    from wsiseg.runs.folder import RunFolder
    from wsiseg.runs.plan_file import RunPlan
    from wsiseg.runtime.claims import Claims
    from wsiseg.segmentation.blocks import BlockReport
    from wsiseg.slide.tiling import TileGrid

logger = logging.getLogger(__name__)

_NAMED = 8  #: missing blocks that are named in one message


@dataclass(frozen=True)
class ShardRecord:
    """What a shard did and cost: its file beside the parts, which the merge adds up."""

    record: dict[str, Any]

    @property
    def status(self) -> str:
        """``shard``."""
        return str(self.record["status"])

    @property
    def shard(self) -> str:
        """Number of the shard and of all, as in ``1/7``."""
        return str(self.record["shard"])

    @property
    def folder(self) -> str:
        """Folder of the run."""
        return str(self.record["folder"])

    @property
    def counts(self) -> dict[str, int]:
        """Counts of its blocks."""
        return dict(self.record["counts"])

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence per tile that could not be read."""
        return tuple(self.record["failures"])

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage, and ``total``."""
        return dict(self.record["seconds"])

    def content(self) -> dict[str, Any]:
        """Keys and values of the file."""
        return dict(self.record)


class RunStatistics:
    """Sums of the reports of blocks.

    Parameters
    ----------
    slide
        Name of the run in messages.

    Attributes
    ----------
    clock
        Seconds per stage; those of several processes add up.
    blocks
        Counts of each finished block, by name.
    device
        Device of the model.
    """

    def __init__(self, slide: str) -> None:
        self.slide, self.clock, self.device = slide, Clock(), ""
        self.blocks: dict[str, dict[str, int]] = {}
        self._failures: dict[str, list[str]] = {}
        self._failed_px0: dict[str, Sequence[tuple[float, float]]] = {}
        self._started = time.perf_counter()
        self._resumed = 0
        self._processes: set[str] = set()
        self._earlier: dict[str, Any] = {}
        self._run_hash = ""
        self._model_share: float | None = None
        self._peak, self._device_peak = 0, 0

    @property
    def tiles(self) -> int:
        """Number in the finished blocks."""
        return sum(c["tiles"] for c in self.blocks.values())

    @property
    def outlines(self) -> int:
        """Number in the finished blocks."""
        return sum(c["outlines"] for c in self.blocks.values())

    def begin(self, device: torch.device, folder: RunFolder, plan: RunPlan, shard: Shard | None) -> None:
        """Record the start, before the first block."""
        self.device, self._run_hash = str(device), plan.run_hash
        facts = {"slide": self.slide, "device": self.device, "folder": str(folder.path)}
        if shard:
            facts["shard"] = str(shard)
            self._earlier = _read_record(_record(folder, shard), plan.run_hash)
            if self._earlier.get("status") != Status.SHARD:
                write_json(
                    _record(folder, shard),
                    {"status": Status.RUNNING, "shard": str(shard), "host": machine.host(), "run_hash": plan.run_hash},
                )
        logger.info("%s: begins", self.slide, extra={"event": "begin", "facts": facts})

    def add(self, report: BlockReport) -> None:
        """Add the report of a block."""
        self._count(report.name, report.counts, report.failures, report.failed_px0)
        self.clock.add(report.seconds)
        self._resumed += report.resumed
        self._processes |= {report.process} - {""}
        self._peak, self._device_peak = (
            max(self._peak, report.peak_bytes),
            max(self._device_peak, report.peak_device_bytes),
        )
        if not report.resumed:
            seconds = {k: round(v, 4) for k, v in report.seconds.items()}
            facts = {
                "slide": self.slide,
                "block": report.name,
                **report.counts,
                "seconds": seconds,
                "failures": report.failures,
            }
            logger.info(
                "%s: block %s, %d outlines",
                self.slide,
                report.name,
                report.counts["outlines"],
                extra={"event": "block", "facts": facts},
            )

    def _count(
        self, name: str, counts: dict[str, int], failures: list[str], failed_px0: Sequence[tuple[float, float]]
    ) -> None:
        self.blocks[name] = counts
        self._failures.pop(name, None)
        self._failed_px0[name] = failed_px0
        if failures:
            self._failures[name] = failures

    def interrupted(self, blocks: int | None = None) -> InterruptedRunError:
        """Error to raise when the run was asked to stop; ``blocks`` is the number of blocks while some are unfinished."""
        where = (
            "while its files were written"
            if blocks is None
            else f"with {len(self.blocks)} of {counted(blocks, 'block')} finished"
        )
        logger.info(
            "%s: stopped",
            self.slide,
            extra={"event": "stopped", "facts": {"slide": self.slide, "blocks": len(self.blocks)}},
        )
        return InterruptedRunError(
            f"{self.slide}: stopped {where}; nothing is lost: run the same command again to resume"
        )

    def end_shard(self, folder: RunFolder, shard: Shard) -> ShardRecord:
        """Write the costs of a finished shard beside the parts, for the merge, and return them."""
        record = self._cost() | {
            "status": Status.SHARD,
            "shard": str(shard),
            "host": machine.host(),
            "device": self.device,
            "folder": str(folder.path),
            "run_hash": self._run_hash,
            "counts": self._sums() | {"blocks": len(self.blocks), "blocks_resumed": self._resumed},
            "failures": self._failure_messages(),
            "warnings": [],
        }
        if (
            self._earlier.get("status") != Status.SHARD or self._processes
        ):  # else nothing was done, and what it cost then stays
            write_json(_record(folder, shard), record)
        return ShardRecord(record)

    def collect(self, folder: RunFolder, plan: RunPlan) -> list[str]:
        """Add up the parts and what the shards say they cost; returns the blocks that are missing or have tiles that could not be read."""
        missing = []
        for name in plan.tiles:
            path = folder.parts / f"{name}.parquet"
            try:
                part = open_part(path) if part_is_current(path, plan.parts_hash) else None
            except FormatError:
                part = None
            if part is not None:
                self._count(name, part.counts, part.failures, part.failed_px0)
            if part is None or part.counts["tiles_failed"]:
                missing.append(name)
        self._resumed = len(self.blocks)
        records = [_read_record(path, plan.run_hash) for path in sorted(folder.parts.glob("shard-*.json"))]
        records = [r for r in records if r.get("status") == Status.SHARD]
        for record in records:
            self.clock.add({k: float(v) for k, v in record["seconds"].items() if k not in ("total", "plan")})
            self._peak = max(self._peak, int(record["peak_ram_mb"] * 2**20))
            self._device_peak = max(self._device_peak, int(record["peak_vram_mb"] * 2**20))
        self.device = ", ".join(sorted({str(r["device"]) for r in records}))
        tiles = sum(r["seconds"].get("tiles", 0) for r in records)
        self._model_share = sum(r["model_share"] * r["seconds"].get("tiles", 0) for r in records) / max(tiles, 1e-9)
        return missing

    def describe_missing(self, folder: RunFolder, missing: list[str], plan: RunPlan, claims: Claims) -> str:
        """Describe missing blocks: of which shards, who works on them, and which have unreadable tiles."""
        said = []
        absent = [name for name in missing if name not in self.blocks]
        if absent:
            records = [_read_record(path, plan.run_hash) for path in folder.parts.glob("shard-*-of-*.json")]
            counts = {int(r["shard"].rpartition("/")[2]) for r in records if r}
            names = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
            said.append(
                f"{len(absent)} of {counted(len(plan.tiles), 'block')} {'is' if len(absent) == 1 else 'are'} missing ({names})"
            )
            if len(counts) == 1:
                shard = Shard(1, counts.pop())
                owners = sorted({shard.owner(place) for place, name in enumerate(plan.tiles) if name in absent})
                said.append(
                    f"they belong to shard{'s' * (len(owners) > 1)} {', '.join(f'{k}/{shard.count}' for k in owners)}"
                )
            busy = claims.busy(absent)
            if busy:
                said.append(f"{len(busy)} of them are being worked on ({claims.holder(busy[0])})")
        if self._failures:
            failures = self._failure_messages()
            said.append(f"{counted(len(failures), 'tile')} could not be read (first: {failures[0]})")
        return "; ".join(said)

    def require_current(self, parts: Sequence[Path], parts_hash: str) -> None:
        """Refuse parts that changed since they were counted.

        Raises
        ------
        RunError
            Another run has written into the folder.
        """
        for path in parts:
            if not part_is_current(path, parts_hash):
                raise RunError(
                    f"{path}: was changed by another run during this one; run the command again, one run per folder"
                )

    def account(self, plan: RunPlan) -> dict[str, Any]:
        """Summary of the blocks and their cost for the manifest."""
        absent = {name: tiles for name, tiles in plan.tiles.items() if name not in self.blocks}
        failures = [
            *self._failure_messages(),
            *(f"block {name}: none of its tiles was worked on ({tiles})" for name, tiles in absent.items()),
        ]
        counts = self._sums()
        counts["tiles"] += sum(absent.values())
        counts["tiles_failed"] += sum(absent.values())
        cost = self._cost()
        return cost | {
            "status": Status.INCOMPLETE if failures else Status.COMPLETE,
            "failures": failures,
            "tiles": {} if plan.grid is None else self._tiles(plan.grid, absent),
            "counts": {"blocks": len(plan.tiles), "blocks_missing": len(absent), "blocks_resumed": self._resumed}
            | counts,
            "seconds_per_mm2": round(cost["seconds"]["total"] / max(plan.tissue_mm2, 1e-9), 3),
        }

    def _tiles(self, grid: TileGrid, absent: Iterable[str]) -> dict[str, Any]:
        """Where the tiles lie, and which are missing: what the report's map needs."""
        failed = sorted(corner for name in self._failed_px0 for corner in self._failed_px0[name])
        return dataclasses.asdict(grid) | {"failed_px0": failed, "missing_blocks": list(absent)}

    def _sums(self) -> dict[str, int]:
        return {key: sum(c[key] for c in self.blocks.values()) for key in BLOCK_COUNTS}

    def _failure_messages(self) -> list[str]:
        return [failure for name in sorted(self._failures) for failure in self._failures[name]]

    def _cost(self) -> dict[str, Any]:
        seconds = dict(self.clock.seconds)
        model = seconds.pop("busy", 0) / max(len(self._processes), 1)
        share = min(model / max(seconds.get("tiles", 0), 1e-9), 1) if self._model_share is None else self._model_share
        return {
            "seconds": {k: round(v, 3) for k, v in seconds.items()}
            | {"total": round(time.perf_counter() - self._started, 3)},
            "model_share": round(share, 4),
            "peak_ram_mb": round(max(self._peak, peak_bytes()) / 2**20, 1),
            "peak_vram_mb": round(self._device_peak / 2**20, 1),
        }


def interrupt_shard(folder: RunFolder, shard: Shard, run_hash: str) -> None:
    """Record that a started shard was stopped."""
    record = _read_record(_record(folder, shard), run_hash)
    if record.get("status") == Status.RUNNING:
        write_json(_record(folder, shard), record | {"status": Status.INTERRUPTED})


def _record(folder: RunFolder, shard: Shard) -> Path:
    return folder.parts / f"shard-{shard.number}-of-{shard.count}.json"


def _read_record(path: Path, run_hash: str) -> dict[str, Any]:
    """Read the record of a shard of this run; nothing for another run."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("run_hash") == run_hash else {}
