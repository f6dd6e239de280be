"""The command line as a process: ``wsiseg``, and ``python -m wsiseg``."""

from __future__ import annotations

import atexit
import os
import sys

#: How often a thread of torch looks for work before it sleeps. GNU OpenMP's own 300,000 keeps a core from whoever it waits for: on two cores, of
#: which another program used one, the demo took 6 to 43 s, now 5; on idle ones, a slide of 0.8 mm2 11.7 s, now 11.2 (more with 300 or none).
SPINS = "1000"


def run() -> None:
    """Run the command line, and end the process without taking its modules apart: with torch that takes half a second."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:  # read when torch is loaded, here and in workers
        os.environ["GOMP_SPINCOUNT"] = SPINS
    status: list[int] = []
    atexit.register(_leave, status)  # the first that is registered is called last
    from wsiseg.cli import main

    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            status.append(end.code or 0)
        raise


def _leave(status: list[int]) -> None:
    """End the process, if it was about to end with an exit status and all that it printed is out."""
    if not status:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return  # Python says what happened
    os._exit(status[0])


if __name__ == "__main__":
    run()
