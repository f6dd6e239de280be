"""The training loop: AdamW, a moving average, validation, early stop; continued after any stop with the same result.

A step is a function of the weights, the optimiser's state and the step's number: crops, prompts and whatever else is random are drawn from
generators that are seeded with the number. So what is saved now and then is all that a later process needs to end with the same bytes, on the
same machine with the same threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from wsiseg.errors import InterruptedRunError, RunError, WsisegError
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.prefetch import prefetch_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

WARM_UP = 0.05  #: share of the steps in which the rate rises; then it falls as a cosine
WEIGHT_DECAY = 0.01  #: SAMPO's
LARGEST_GRADIENT = 5.0  #: norm; as in the recipe of nuclei-compact
LONGEST_AVERAGE = 0.99  #: of the moving average: the last hundred steps
SAVE_SECONDS = 20.0  #: between two saves, at least
ROW_STEPS = 10  #: steps per row of the curve
VALIDATION_SHARE = 0.3  #: of the time, at most
TRIAL_STEPS = 4  #: that are timed; the first does not count


class Task(Protocol):
    """What is trained: an objective with its network and its images.

    Attributes
    ----------
    network
        Parameters that require a gradient are trained. Buffers are not.
    rate
        Largest learning rate.
    epoch_steps
        Steps in which every image is seen about once.
    """

    rate: float
    epoch_steps: float

    @property
    def network(self) -> nn.Module: ...  # noqa: D102

    def batch(self, step: int) -> Any:  # noqa: ANN401
        """What a step learns from; called in another thread."""
        ...

    def losses(self, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Parts of the loss, which is their sum, and, under names that begin with an underscore, numbers for the curve."""
        ...

    def validate(self) -> dict[str, float]:
        """Scores of the network as it is; ``score`` is the one that decides, the larger the better. Empty without images."""
        ...

    def draw(self, path: Path) -> None:
        """A picture of what the network did at the last validation."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Weights to save: those of the network as it is, without adapters."""
        ...


@dataclass
class TrainingState:
    """Where training is.

    Attributes
    ----------
    step, steps
        Steps done, and steps in all.
    every
        Steps between validations.
    before, best
        Scores before the first step, and the best ones.
    best_step, stale
        Step of the best ones, and validations since.
    """

    step: int = 0
    steps: int = 0
    every: int = 1
    before: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    stale: int = 0


def rate_at(progress: float) -> float:
    """Share of the largest learning rate at ``progress`` in [0, 1].

    Examples
    --------
    >>> rate_at(0.05), rate_at(1.0)
    (1.0, 0.0)
    """
    if progress < WARM_UP:
        return 0.04 + 0.96 * progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min((progress - WARM_UP) / (1 - WARM_UP), 1.0)))


def train(
    task: Task,
    folder: Path,
    *,
    identity: Mapping[str, Any],
    seed: int,
    minutes: float,
    epochs: float | None,
    checks: int,
    patience: int,
    on_progress: Callable[[int, int, float], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainingState:
    """Train a task, or continue.

    Parameters
    ----------
    task
        Its network holds the best weights afterwards: the moving average at the best validation, or at the end.
    folder
        Receives ``state.pt``, ``curve.jsonl`` and ``pictures/``.
    identity
        What decides the result besides the code: settings, and hashes of weights and images. A state of another identity is refused.
    seed
        Of the steps.
    minutes, epochs
        How long; ``epochs`` beats ``minutes``.
    checks, patience
        Number of validations, and how many of them may bring nothing.
    on_progress
        Called with steps done, steps in all, and the loss.
    stopped
        When it turns true, the state is saved and training ends.

    Returns
    -------
    TrainingState
        At the end.

    Raises
    ------
    RunError
        The folder holds a state of other settings, or cannot be written.
    WsisegError
        The loss is not a number.
    InterruptedRunError
        ``stopped`` turned true. The same call continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = _Weights.of(task.network, task.rate)
    state_path, mark = folder / "state.pt", fingerprint(identity)
    state = weights.load(state_path, mark)
    if state is None:
        state = _begin(task, folder, minutes, epochs, checks)
        weights.save(state_path, mark, state)
    else:
        logger.info("continuing at step %d of %d", state.step, state.steps)
        _forget_later_rows(folder, state.step)
    saved, running = time.monotonic(), dict[str, float]()
    batches = prefetch_map(task.batch, range(state.step, state.steps), threads=1, limit=2)
    try:
        while state.step < state.steps and state.stale < patience:
            parts = _step(task, next(batches), weights, state, seed)
            for name, value in parts.items():
                running[name] = running.get(name, 0.0) + value / ROW_STEPS
            if state.step % ROW_STEPS == 0:
                _record(folder, {"step": state.step} | running)
                running = {}
            if on_progress:
                on_progress(state.step, state.steps, sum(v for k, v in parts.items() if k[0] != "_"))
            if checked := state.step % state.every == 0 or state.step == state.steps:
                _check(task, folder, state, weights)
            stop = stopped()
            if checked or stop or time.monotonic() - saved > SAVE_SECONDS:
                weights.save(state_path, mark, state)
                saved = time.monotonic()
            if stop and state.step < state.steps:
                raise InterruptedRunError(
                    f"{folder}: stopped at step {state.step} of {state.steps}; the same command continues"
                )
    finally:
        batches.close()
    weights.put(weights.best)
    return state


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 of settings and hashes, hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _begin(task: Task, folder: Path, minutes: float, epochs: float | None, checks: int) -> TrainingState:
    """The state before the first step: scores of the parent, and the number of steps."""
    started = time.monotonic()
    scores = task.validate()
    validation_seconds = max(time.monotonic() - started, 1e-3)
    if epochs is None:
        checks = max(min(checks, int(VALIDATION_SHARE * 60 * minutes / validation_seconds)), 1)
    steps = _steps(task, minutes, epochs, (checks + 1) * validation_seconds)
    (folder / "curve.jsonl").write_text("")
    _record(folder, {"step": 0, "steps": steps, **{f"valid_{k}": v for k, v in scores.items()}})
    return TrainingState(steps=steps, every=max(math.ceil(steps / checks), 1), before=scores)


def _step(
    task: Task,
    batch: Any,  # noqa: ANN401
    weights: _Weights,
    state: TrainingState,
    seed: int,
) -> dict[str, float]:
    """One step; parts of the loss."""
    torch.manual_seed((seed << 32) + state.step)
    parts = task.losses(batch)
    total = torch.stack([value for name, value in parts.items() if name[0] != "_"]).sum()
    if not torch.isfinite(total):
        which = ", ".join(f"{k} {v.item():g}" for k, v in parts.items() if k[0] != "_")
        raise WsisegError(
            f"the loss is not a number at step {state.step} ({which}); nothing was written: use a lower --rate, or look at the images"
        )
    weights.optimiser.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(weights.named.values(), LARGEST_GRADIENT)
    for group in weights.optimiser.param_groups:
        group["lr"] = task.rate * rate_at(state.step / state.steps)
    weights.optimiser.step()
    state.step += 1
    weights.follow(min(LONGEST_AVERAGE, state.step / (state.step + 9)))
    return {name: value.item() for name, value in parts.items()}


def _check(task: Task, folder: Path, state: TrainingState, weights: _Weights) -> None:
    """Validate the moving average, and keep it if it is better than what was kept.

    The first check always counts: a model that is not better than its parent is still what was asked for, and its card says so.
    """
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    with weights.averaged():
        scores = task.validate()
        task.draw(pictures / f"step-{state.step:06d}.png")
    if not scores or not state.best or scores["score"] > state.best["score"]:
        for name, value in weights.average.items():
            weights.best[name].copy_(value)
        state.best, state.best_step, state.stale = scores, state.step, 0
    else:
        state.stale += 1
    _record(folder, {"step": state.step, **{f"valid_{k}": v for k, v in scores.items()}})


def _steps(task: Task, minutes: float, epochs: float | None, validation_seconds: float) -> int:
    """Number of steps: of the epochs, or of the time that validation leaves."""
    if epochs is not None:
        return max(math.ceil(epochs * task.epoch_steps), 1)
    seconds = []
    for k in range(TRIAL_STEPS):  # without the optimiser: the weights stay
        started = time.monotonic()
        torch.manual_seed(k)
        parts = task.losses(task.batch(k))
        total = torch.stack([value for name, value in parts.items() if name[0] != "_"]).sum()
        total.backward()
        seconds.append(time.monotonic() - started)
    task.network.zero_grad(set_to_none=True)
    each = sorted(seconds[1:])[len(seconds) // 2 - 1]
    return max(int((60 * minutes - validation_seconds) / each), 1)


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """What is trained, its moving average, the best one of these, and the optimiser; by name of the parameter."""

    named: dict[str, nn.Parameter]
    average: dict[str, Tensor]
    best: dict[str, Tensor]
    optimiser: torch.optim.Optimizer

    @classmethod
    def of(cls, network: nn.Module, rate: float) -> Self:
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        average, best = ({name: p.detach().clone() for name, p in named.items()} for _ in range(2))
        optimiser = torch.optim.AdamW(named.values(), lr=rate, weight_decay=WEIGHT_DECAY)
        return cls(named=named, average=average, best=best, optimiser=optimiser)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set the network's parameters."""
        for name, p in self.named.items():
            p.copy_(values[name])

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average towards the parameters."""
        for name, p in self.named.items():
            self.average[name].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with the average in it, for as long as the block lasts."""
        before = {name: p.detach().clone() for name, p in self.named.items()}
        self.put(self.average)
        try:
            yield
        finally:
            self.put(before)

    def save(self, path: Path, mark: str, state: TrainingState) -> None:
        """Write everything, whole or not at all."""
        weights = {name: p.detach() for name, p in self.named.items()}
        parts = {
            "weights": weights,
            "average": self.average,
            "best": self.best,
            "optimiser": self.optimiser.state_dict(),
        }
        with atomic_path(path) as partial:
            torch.save({"identity": mark, "state": vars(state), **parts}, partial)

    def load(self, path: Path, mark: str) -> TrainingState | None:
        """Put a saved state in place; ``None`` where there is none."""
        if not path.is_file():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise RunError(f"{path}: cannot be read; delete it to begin again") from error
        if content["identity"] != mark:
            raise RunError(
                f"{path}: a training with other settings, weights or images was stopped here; "
                "give the command it was started with to continue, or --overwrite to begin again"
            )
        self.put(content["weights"])
        for kept, saved in ((self.average, content["average"]), (self.best, content["best"])):
            for name, value in kept.items():
                value.copy_(saved[name])
        self.optimiser.load_state_dict(content["optimiser"])
        return TrainingState(**content["state"])


def _record(folder: Path, row: Mapping[str, Any]) -> None:
    with (folder / "curve.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def _forget_later_rows(folder: Path, step: int) -> None:
    """Rows of steps that will be done again."""
    path = folder / "curve.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    path.write_text("".join(f"{row}\n" for row in rows if row.endswith("}") and json.loads(row)["step"] <= step))
