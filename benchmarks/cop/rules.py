"""Ways to give every cell a type from a few clicks: ours, and the rules it is compared with.

Cells are ``z`` (N, D), unit norm, at ``xy`` (N, 2) microns; ``clicks`` has, for each type, the rows that were clicked (none: the type was not
clicked). Every rule returns (N,) codes: 0 is unassigned, t + 1 the t-th type.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from wsiseg.celltypes.assignment import assign_types
from wsiseg.config import TypingConfig
from wsiseg.models.nuclei_compact import LEARNED
from wsiseg.records import Bank, Cells, TypePrototypes, TypeSpace

Clicks = list[np.ndarray]


def bank_of(clicked: list[np.ndarray], *, from_other_slide: bool = False) -> Bank:
    """A bank of nothing but descriptors of clicked cells, one (n, D) per type."""
    size = clicked[0].shape[1]
    types = tuple(
        TypePrototypes(
            name=f"type {t}",
            color=(0, 0, 0),
            clicks=np.zeros((len(x), 2)),
            clicked=x.astype(np.float32),
            negative=np.empty((0, size), np.float32),
        )
        for t, x in enumerate(clicked)
    )
    return Bank(types, Cells.empty(size), from_other_slide=from_other_slide)


def ours(
    z: np.ndarray,
    xy: np.ndarray,
    clicked: list[np.ndarray],
    space: TypeSpace,
    config: TypingConfig | None = None,
    *,
    from_other_slide: bool = False,
    stain: str = "he",
) -> np.ndarray:
    """``assign_types`` as the product calls it; ``clicked`` are descriptors, so that they may come from other images."""
    kinds = [t for t, x in enumerate(clicked) if len(x)]
    typing, _ = assign_types(
        z.astype(np.float16),
        xy,
        bank_of([clicked[t] for t in kinds], from_other_slide=from_other_slide),
        space,
        config or TypingConfig(),
        stain,
    )
    return np.array([0, *(t + 1 for t in kinds)])[typing.codes]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9)


def cosines(z: np.ndarray, clicks: Clicks) -> np.ndarray:
    """Largest cosine with a click of each type -> (N, T); -inf for types that were not clicked."""
    return np.stack([(z @ z[c].T).max(1, initial=-np.inf) for c in clicks], 1)


def nearest_click(z: np.ndarray, clicks: Clicks) -> np.ndarray:
    return cosines(unit(z.astype(np.float32)), clicks).argmax(1) + 1


def nearest_by_measurements(z: np.ndarray, clicks: Clicks) -> np.ndarray:
    """Size, elongation and stain only."""
    return nearest_click(z[:, LEARNED:], clicks)


def nearest_in_space(z: np.ndarray, clicks: Clicks, space: TypeSpace) -> np.ndarray:
    """The metric that ours uses, without its model."""
    seen = space.project(z)
    gaps = [((seen[:, None] - seen[c][None]) ** 2).sum(2).min(1, initial=np.inf) for c in clicks]
    return np.stack(gaps, 1).argmin(1) + 1


def fitted_on_labels(z: np.ndarray, types: np.ndarray, tile: np.ndarray, space: TypeSpace) -> np.ndarray:
    """Types of each tile by a classifier fitted on every label of all other tiles: what the descriptors allow, without clicks."""
    seen = torch.from_numpy(space.project(z)).float()
    seen = torch.cat([seen / seen.std(0), torch.ones(len(seen), 1)], 1)
    truth, codes = torch.from_numpy(types - 1), np.zeros(len(z), int)
    for k in np.unique(tile):
        here = torch.from_numpy(tile == k)
        weights = torch.zeros(seen.shape[1], int(types.max()), requires_grad=True)
        frequency = torch.bincount(truth[~here], minlength=weights.shape[1]).float()
        optimiser = torch.optim.LBFGS([weights], max_iter=150, line_search_fn="strong_wolfe")

        def loss(weights=weights, here=here, frequency=frequency, optimiser=optimiser) -> torch.Tensor:
            optimiser.zero_grad()
            fit = F.cross_entropy(seen[~here] @ weights, truth[~here], weight=1 / frequency.clamp_min(1))
            total = fit + 0.01 * (weights[:-1] ** 2).sum()
            total.backward()
            return total

        optimiser.step(loss)
        codes[here.numpy()] = (seen[here] @ weights).argmax(1).numpy() + 1
    return codes


def _stand_out(z: np.ndarray, clicks: Clicks, tile: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines, and which exceed mean + sd of their type over the cells of their tile."""
    similar = cosines(unit(z.astype(np.float32)), clicks)
    clicked = [t for t, c in enumerate(clicks) if len(c)]
    tile = np.zeros(len(z), int) if tile is None else tile
    passed = np.zeros(similar.shape, bool)
    for k in np.unique(tile):
        here = np.ix_(tile == k, clicked)
        passed[here] = similar[here] > similar[here].mean(0) + similar[here].std(0)
    return similar, passed


def mean_sd(z: np.ndarray, clicks: Clicks, tile: np.ndarray | None = None) -> np.ndarray:
    """The threshold of Chain-of-Prompts, tile by tile; of the types that a cell passes, the most similar."""
    similar, passed = _stand_out(z, clicks, tile)
    return np.where(passed.any(1), np.where(passed, similar, -np.inf).argmax(1) + 1, 0)


def first_click_wins(z: np.ndarray, clicks: Clicks, order: np.ndarray, tile: np.ndarray | None = None) -> np.ndarray:
    """The same threshold; types claim what passes in the ``order`` of clicking, as in the paper's demo."""
    _, passed = _stand_out(z, clicks, tile)
    codes = np.zeros(len(z), int)
    for t in order:
        codes[passed[:, t] & (codes == 0)] = t + 1
    return codes


# ------------------------------------------------------------------------------------------------------ the chain of hops over cells

REACH_UM, FEWEST, FEW, SIZE, DECAY, HOPS = 750.0, 50, 30, 16, 0.9, 30
GROWN = 3  #: a type's calibration counts from this many reliable cells


@dataclass
class _Type:
    """A type while it grows. ``hop``: per cell, how many hops from a click; -1 outside the reliable set."""

    clicks: np.ndarray
    hop: np.ndarray
    bank: np.ndarray
    used: list[int] = field(default_factory=list)
    start: np.ndarray | None = None
    drift: float = -1.0

    @property
    def reliable(self) -> np.ndarray:
        return np.flatnonzero(self.hop >= 0)

    def affinity(self, z: np.ndarray) -> np.ndarray:
        """A: largest cosine with the bank; nobody vouches for himself (-inf where that leaves nobody)."""
        similar = z @ z[self.bank].T
        similar[self.bank, np.arange(len(self.bank))] = -np.inf
        return similar.max(1)

    def floor(self, a: np.ndarray) -> float:
        """tau: mean + sd, and once the type has grown not above the 5th percentile of its own."""
        known = a[np.isfinite(a)]
        tau, own = known.mean() + known.std(), a[self.reliable]
        return float(tau if len(own) < FEW else min(tau, np.percentile(own, 5)))

    def refresh(self, z: np.ndarray) -> None:
        """The bank: the clicks, and cells near to them in hops, farthest first among the features."""
        near = np.flatnonzero((self.hop >= 0) & (DECAY**self.hop >= 0.5))
        chosen = list(self.clicks)
        while len(chosen) < min(SIZE, len(near)):
            chosen.append(int(near[(z[near] @ z[chosen].T).max(1).argmin()]))
        self.bank = np.array(chosen)


def chain(z: np.ndarray, xy: np.ndarray, clicks: Clicks, *, delta: float = 0.15) -> np.ndarray:
    """Chain-of-Prompts carried from pixels to cells: hops to the farthest reliable cell, with a local gate, an anchor and a drift guard.

    Cosines of centred descriptors. A cell joins type t when it exceeds mean + sd of the similarity to the prompt among the cells around it, when
    its similarity to the type's bank reaches the slide-wide floor, and when t leads the other types by ``delta`` after a two-point calibration
    (0 a typical cell of the others, 1 a typical own cell). At the end every cell gets the type of the highest calibrated score, if that is 0.5
    and leads by ``delta``. One type alone is told from the rest by a mixture of two normals.
    """
    z = z.astype(np.float64)
    z = unit(z - z.mean(0))
    kinds = [t for t, c in enumerate(clicks) if len(c)]
    types = []
    for t in kinds:
        hop = np.full(len(z), -1)
        hop[clicks[t]] = 0
        types.append(_Type(np.asarray(clicks[t]), hop, np.asarray(clicks[t])))
    affinity = np.stack([t.affinity(z) for t in types], 1)
    similarity_thresholds = [t.floor(affinity[:, k]) for k, t in enumerate(types)]
    area = float(np.prod(np.ptp(xy, 0)))
    for number in range(max(HOPS, int(np.ceil(4 * area / (np.pi * REACH_UM**2))))):
        grew = [_hop(k, types, affinity, similarity_thresholds[k], z, xy, delta) for k in range(len(types))]
        if not any(grew):
            break
        if number % 8 == 7:
            for k, t in enumerate(types):
                t.refresh(z)
                affinity[:, k] = t.affinity(z)
                similarity_thresholds[k] = t.floor(affinity[:, k])
    for k, t in enumerate(types):
        t.refresh(z)
        affinity[:, k] = t.affinity(z)
    score = _calibrated(types, affinity)
    best, lead = score.argmax(1), _lead(score)
    codes = np.where((score.max(1) >= 0.5) & (lead >= delta), np.array(kinds)[best] + 1, 0)
    for k in kinds:
        codes[clicks[k]] = k + 1
    return codes


def _hop(
    k: int, types: list[_Type], affinity: np.ndarray, floor: float, z: np.ndarray, xy: np.ndarray, delta: float
) -> bool:
    """One prompt of type k; whether the type grew."""
    own = types[k]
    left = np.setdiff1d(own.reliable, own.used)
    if not len(left):
        return False
    prompt = int(left[0])
    if own.used:
        prompt = int(left[np.hypot(*(xy[left, None] - xy[own.used]).transpose(2, 0, 1)).min(1).argmax()])
    own.used.append(prompt)
    gap, reach = np.hypot(*(xy - xy[prompt]).T), REACH_UM
    while (gap <= reach).sum() < min(FEWEST, len(z)):
        reach *= 1.5
    near = np.flatnonzero((gap <= reach) & (np.arange(len(z)) != prompt))
    similar = z[near] @ z[prompt]
    ok = (similar > similar.mean() + similar.std()) & (affinity[near, k] >= floor)
    if min(len(t.reliable) for t in types) >= GROWN:
        score, margin = _calibrated(types, affinity)[near], delta
    else:
        score, margin = affinity[near], 0.0
    rest = np.delete(score, k, 1).max(1, initial=-np.inf)
    ok &= score[:, k] - rest >= margin
    ok &= np.all([t.hop[near] < 0 for t in types], 0)
    accepted = near[ok]
    if not len(accepted):
        return False
    if own.start is None:
        first = np.r_[own.clicks, accepted]
        own.start = z[first].mean(0) / np.linalg.norm(z[first].mean(0)).clip(1e-9)
        own.drift = float(np.percentile(z[first] @ own.start, 10))
    mean = z[accepted].mean(0)
    if mean @ own.start / np.linalg.norm(mean).clip(1e-9) < own.drift:
        return False
    own.hop[accepted] = own.hop[prompt] + 1
    return True


def _calibrated(types: list[_Type], affinity: np.ndarray) -> np.ndarray:
    """c (N, T): 0 at the median of the other types' reliable cells, 1 at that of its own."""
    if len(types) == 1:
        return _exclusive(types[0], affinity[:, 0])[:, None]
    out = np.empty(affinity.shape)
    for k, own in enumerate(types):
        a = affinity[:, k]
        mine = a[own.reliable]
        mine = mine[np.isfinite(mine)]
        high = (
            np.median(mine) if len(mine) else a.max()
        )  # a lone click that has not grown: the best that any cell reaches
        low = np.median(np.concatenate([a[t.reliable] for t in types if t is not own]))
        out[:, k] = (a - low) / max(high - low, 0.02)
    return np.where(np.isfinite(out), out, 1.0)


def _exclusive(own: _Type, a: np.ndarray) -> np.ndarray:
    x = a[np.isfinite(a)]
    mean, sd, share = np.percentile(x, [25, 75]), np.full(2, x.std() + 1e-6), np.full(2, 0.5)
    for _ in range(100):
        p = share * np.exp(-(((x[:, None] - mean) / sd) ** 2) / 2) / sd + 1e-300
        p /= p.sum(1, keepdims=True)
        share, mean = p.mean(0), (p * x[:, None]).sum(0) / p.sum(0)
        sd = np.sqrt((p * (x[:, None] - mean) ** 2).sum(0) / p.sum(0)) + 1e-6
    if np.sqrt(2) * (mean[1] - mean[0]) / np.hypot(*sd) > 2:
        return np.where(np.isfinite(a), (a - mean[0]) / (mean[1] - mean[0]), 1.0)
    mine = a[own.reliable]
    mine = mine[np.isfinite(mine)]
    return (a >= (np.percentile(mine, 5) if len(mine) else -np.inf)).astype(float)


def _lead(score: np.ndarray) -> np.ndarray:
    """Of the best over the second; infinite with one type."""
    if score.shape[1] == 1:
        return np.full(len(score), np.inf)
    top = np.sort(score, 1)
    return top[:, -1] - top[:, -2]
