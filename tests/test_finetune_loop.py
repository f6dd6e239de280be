"""The training loop on a network of two numbers: it learns, stops early, keeps the best, and continues as if it had not been stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from wsiseg.errors import InterruptedRunError, RunError, WsisegError
from wsiseg.finetune.loop import rate_at, train

OPTIONS = {"seed": 0, "minutes": 1.0, "epochs": 4.0, "checks": 4, "patience": 4}


class Line:
    """y = 2 x + 1 with noise of torch's and numpy's; ``scores`` replaces what validation finds."""

    rate, epoch_steps = 0.1, 10.0

    def __init__(self, scores=None, broken_at=None):
        torch.manual_seed(1)
        self.network = nn.Linear(1, 1)
        self.scores, self.broken_at, self.drawn = list(scores or []), broken_at, 0

    def batch(self, step):
        return step, torch.from_numpy(np.random.default_rng(step).normal(size=(8, 1)).astype(np.float32))

    def losses(self, batch):
        step, x = batch
        y = 2 * x + 1 + 0.1 * torch.randn_like(x)
        loss = (self.network(x) - y).square().mean()
        return {"square": loss * (float("nan") if step == self.broken_at else 1), "_step": torch.tensor(float(step))}

    def validate(self):
        if self.scores:
            return {"score": self.scores.pop(0)}
        x = torch.linspace(-1, 1, 9)[:, None]
        return {"score": -(self.network(x) - 2 * x - 1).square().mean().item()}

    def draw(self, path):
        self.drawn += 1

    def tensors(self):
        return {k: v.detach().clone() for k, v in self.network.state_dict().items()}


def run(task, folder, identity="a", **more):
    return train(task, folder, identity={"it": identity}, **{**OPTIONS, **more})


def test_it_learns_and_writes_a_curve(tmp_path):
    task = Line()
    state = run(task, tmp_path, epochs=8.0)
    assert state.best["score"] > state.before["score"]
    assert task.validate()["score"] == pytest.approx(state.best["score"])  # the network holds the best weights
    rows = [json.loads(row) for row in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert rows[0]["steps"] == 80
    assert [row["step"] for row in rows if "square" in row] == list(range(10, 81, 10))
    assert [row["step"] for row in rows if "valid_score" in row] == [0, 20, 40, 60, 80]
    learned = [row["square"] for row in rows if "square" in row]
    assert learned[-1] < 0.2 * learned[0]
    assert task.drawn == 4


@pytest.mark.parametrize("after", [1, 7, 10, 23])
def test_stopped_anywhere_it_ends_with_the_same_numbers(after, tmp_path):
    whole = Line()
    run(whole, tmp_path / "whole")
    calls = iter([False] * (after - 1) + [True] * 99)
    with pytest.raises(InterruptedRunError, match=f"stopped at step {after} of 40; the same command continues"):
        run(Line(), tmp_path / "again", stopped=lambda: next(calls))
    again = Line()
    run(again, tmp_path / "again")
    for name, value in whole.tensors().items():
        assert torch.equal(value, again.tensors()[name])
    curves = [(tmp_path / k / "curve.jsonl").read_text().splitlines() for k in ("whole", "again")]
    assert [json.loads(a)["step"] for a in curves[0]] == [json.loads(b)["step"] for b in curves[1]]


def test_validations_without_improvement_end_it_and_the_best_is_kept(tmp_path):
    task = Line(scores=[0.1, 0.5, 0.4, 0.3, 0.2])
    state = run(task, tmp_path, checks=20, patience=3)
    assert (state.step, state.best_step, state.best) == (8, 2, {"score": 0.5})
    later = Line(scores=[0.1, 0.5])
    run(later, tmp_path / "short", epochs=4.0, checks=20, patience=1000)
    assert torch.equal(task.network.weight, later.network.weight)  # of step 2, whatever came later
    rising = Line(scores=np.linspace(0, 1, 30).tolist())
    assert run(rising, tmp_path / "rising", checks=20, patience=1).best_step == 40
    assert not torch.equal(task.network.weight, rising.network.weight)


def test_minutes_decide_the_number_of_steps(tmp_path):
    state = run(Line(), tmp_path, epochs=None, minutes=0.01, checks=1)
    assert 20 < state.steps < 100_000
    assert state.step == state.steps


def test_a_loss_that_is_not_a_number_ends_it(tmp_path):
    with pytest.raises(WsisegError, match=r"not a number at step 5 \(square nan\); nothing was written"):
        run(Line(broken_at=5), tmp_path)


def test_another_identity_or_a_damaged_state_is_refused(tmp_path):
    with pytest.raises(InterruptedRunError):
        run(Line(), tmp_path, stopped=lambda: True)
    with pytest.raises(RunError, match="other settings, weights or images"):
        run(Line(), tmp_path, identity="b")
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 no longer")
    with pytest.raises(RunError, match=r"state\.pt: cannot be read; delete it"):
        run(Line(), tmp_path)


def test_the_rate_rises_and_falls():
    rates = [rate_at(p) for p in np.linspace(0, 1, 101)]
    assert rates[0] < 0.1
    assert max(rates) == rates[5] == 1
    assert rates[-1] == 0
    assert (np.diff(rates[5:]) < 0).all()
