"""Where workers come from: what is asked for, and that nothing of the surroundings is left changed."""

from __future__ import annotations

import logging
import os
import signal
from typing import TYPE_CHECKING

import pytest

from wsiseg.errors import ConfigError
from wsiseg.workers import clusters

if TYPE_CHECKING:
    from pathlib import Path


def test_addresses_are_told_from_batch_systems() -> None:
    assert [clusters.is_batch(name) for name in ("slurm", "pbs", "lsf", "sge")] == [True] * 4
    assert [clusters.is_batch(name) for name in (None, "tcp://10.0.0.1:8786", "Slurm")] == [False] * 3
    for address in ("tcp://10.0.0.1:8786", "tls://node:1", "ws://node:1"):
        clusters.check_scheduler(address)
    with pytest.raises(ConfigError, match=r"^--scheduler slrum: .*did you mean 'slurm'\?"):
        clusters.check_scheduler("slrum")


@pytest.mark.parametrize("there", [True, False], ids=["parent exists", "parent is created"])
def test_the_scratch_folder_goes_and_its_parent_is_as_before(tmp_path: Path, there: bool) -> None:
    parent = tmp_path / "parent"
    if there:
        parent.mkdir()
    with clusters.scratch_folder(parent, keep=True) as folder:
        assert folder.parent == parent
        (folder / "worker").mkdir()
        (folder / "worker" / "state").touch()
    assert not folder.exists()
    assert parent.exists() is there


@pytest.mark.parametrize("keep", [True, False])
def test_after_an_error_the_scratch_folder_stays_only_if_asked(tmp_path: Path, keep: bool) -> None:
    with pytest.raises(ValueError, match="on the way"), clusters.scratch_folder(tmp_path, keep=keep) as folder:  # noqa: PT012
        (folder / "log").touch()
        raise ValueError("on the way")
    assert folder.exists() is keep


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSISEG_KEPT", "before")
    monkeypatch.delenv("WSISEG_NEW", raising=False)
    with clusters._environment("WSISEG_NEW", WSISEG_KEPT="during"):
        assert os.environ["WSISEG_KEPT"] == "during"
        os.environ["WSISEG_NEW"] = "made by another"
    assert os.environ["WSISEG_KEPT"] == "before"
    assert "WSISEG_NEW" not in os.environ


def test_signals_are_held_back_only_while_workers_start() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with clusters._signals_held_back():
        assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_dasks_own_words_are_quiet_and_its_loggers_restored() -> None:
    import distributed  # noqa: F401 - which sets its loggers' levels

    logger = logging.getLogger("distributed")
    level = logger.level
    with clusters.quiet():
        assert logger.level == logging.CRITICAL
    assert logger.level == level


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "Command exited.\nstdout:\n\nstderr:\nsbatch: error:  no such\n partition\n",
            "sbatch: error: no such partition",
        ),
        ("stderr:\n", "RuntimeError: stderr"),
    ],
)
def test_what_a_batch_command_printed_is_one_line(said: str, words: str) -> None:
    assert clusters._last_words(RuntimeError(said)) == words
