"""Applying the clicks of the page to the whole run, in the background, and telling whether that has been done."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.config import from_mapping
from wsiseg.errors import RunError, WsisegError
from wsiseg.report.page import write_report
from wsiseg.runs.retype import type_run
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wsiseg.records import SeedType
    from wsiseg.runs.manifest import Manifest

logger = logging.getLogger(__name__)

TYPED_HERE = 100_000  #: cells that are typed in the server's own process: below half a GB and some seconds


class Applying:
    """Does what ``wsiseg type RUN --seeds FILE`` does, in a thread.

    Parameters
    ----------
    slide
        Where the slide is, for the pictures of the report.
    on_typed
        Called when the table has its new types.

    Attributes
    ----------
    running
        It is at work.
    error
        What went wrong the last time, in one line; empty when nothing did.
    """

    def __init__(self, slide: Path, on_typed: Callable[[], None]) -> None:
        self.slide, self.on_typed = slide, on_typed
        self.running, self.error = False, ""

    def start(self, run: Path, seeds: Path, cells: int) -> None:
        """Begin; ``cells`` is their number in the run. The process does not end before the thread has."""
        self.running, self.error = True, ""
        threading.Thread(target=self._work, args=(run, seeds, cells), name="wsiseg-apply", daemon=False).start()

    def _work(self, run: Path, seeds: Path, cells: int) -> None:
        started = time.perf_counter()
        try:
            self._type(run, seeds, cells)
            self.on_typed()
        except (WsisegError, MemoryError, OSError) as error:
            self.error = first_line(error)
        except Exception as error:  # a fault of ours: logged, and one line for the page
            logger.exception("%s: applying the clicks failed", run)
            self.error = f"internal error ({type(error).__name__}: {first_line(error)}); please report it"
        finally:
            self.running = False
            logger.info("%s: applied in %.1f s %s", run, time.perf_counter() - started, self.error)

    def _type(self, run: Path, seeds: Path, cells: int) -> None:
        """Type the run and write its report: here, or for many cells in a process of its own, which gives its memory back at the end."""
        if cells <= TYPED_HERE:
            type_run(run, seeds=seeds)
            write_report(run, slide=self.slide)
            return
        command = [sys.executable, "-m", "wsiseg", "type", str(run), "--seeds", str(seeds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"`wsiseg type` ended with status {done.returncode}"]
            raise RunError(lines[-1].removeprefix("Error: "))


@lru_cache(maxsize=32)
def typed_hash(text: str, config: str, parts_hash: str) -> str:
    """The hash of a run that `wsiseg type` has typed with seeds of this text (runs/retype.py); ``config`` is that of its manifest, as JSON."""
    typing = from_mapping(json.loads(config), "manifest.json").typing
    clicked = hashlib.sha256(text.encode()).hexdigest()
    return hashlib.sha256(json.dumps(["type", parts_hash, clicked, asdict(typing)]).encode()).hexdigest()[:16]


def is_typed_with(kind: SeedType, manifest: Manifest) -> bool:
    """Whether the run was typed with just these clicks of a type: its manifest has them, the file may have changed since."""
    noted = manifest.typing.get("types", {}).get(kind.name, {})
    clicks = np.round(np.array(kind.points, float).reshape(-1, 2), 2).tolist()
    return bool(clicks) and noted.get("clicks") == clicks and noted.get("negative") == len(kind.negative)
