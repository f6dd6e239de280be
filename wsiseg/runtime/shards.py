"""``--shard K/N``: division of the work among N equal processes that do not communicate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from wsiseg.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Item = TypeVar("Item")

_SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")


@dataclass(frozen=True)
class Shard:
    """The ``number``-th of ``count`` shards, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Every ``count``-th item: neighbours go to different shards, so that all have as much tissue."""
        return list(items[self.number - 1 :: self.count])

    def owner(self, place: int) -> int:
        """Number of the shard that the item at ``place`` belongs to."""
        return place % self.count + 1


def read_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """``K/N``, or ``slurm``: the task of the job array that this process is.

    Parameters
    ----------
    text
        Value of ``--shard``.
    environment
        Where SLURM's variables are.

    Raises
    ------
    ConfigError
        It is neither, or the array is not 1 to N (or 0 to N - 1) without gaps, so that K and N cannot be told.
    """
    if text == "slurm":
        return _of_slurm(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(
            f"--shard {text}: not a shard; pass K/N with K from 1 to N, for example 2/7, or slurm inside a SLURM job array"
        )
    return Shard(int(match[1]), int(match[2]))


def _of_slurm(environment: Mapping[str, str]) -> Shard:
    try:
        task, first, last, count = (int(environment[name]) for name in _SLURM)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "--shard slurm: this is not a task of a SLURM job array; submit with sbatch --array=1-N, or pass --shard K/N"
        ) from error
    if first not in (0, 1) or last - first + 1 != count:
        raise ConfigError(
            f"--shard slurm: the array has {count} tasks from {first} to {last}, so it does not say how many shards there are; "
            f"pass --shard $SLURM_ARRAY_TASK_ID/N with the N of the first submission"
        )
    return Shard(task - first + 1, count)
