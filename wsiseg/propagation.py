"""From a few clicks to a type for every cell: competition between types on the cells' descriptors.

Symbol   here           meaning
z_i      z              descriptor of cell i, seen from the mean of the types' means, unit norm
a_i^t    affinity       largest cosine of z_i with the prototypes of type t
m_pos    typical        median of a^t over the cells that are surely t
m_neg    other          median of a^t over the cells that are surely of another type
c_i^t    score          (a_i^t - m_neg) / (m_pos - m_neg): 0 = typical other, 1 = typical member

Label = argmax_t c where c reaches ``min_score`` and leads by ``min_margin``; otherwise ``unassigned``. The calibration has no prevalence in it:
a type that makes up 70 % of the slide is covered as well as one of 1 % (mean + sd, as in the image-level method, can cover at most half).
A cell that looks more like a negative click of type t than like t itself cannot be t; other types are not touched by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.records import UNASSIGNED, Typing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import TypingConfig
    from wsiseg.records import Bank, Cells

_GREY = (128, 128, 128)
_SURE = 400  #: cells per type that calibrate it; enough for a median to a few per cent


def assign_types(descriptors: NDArray[np.float16], bank: Bank, config: TypingConfig) -> tuple[Typing, list[str]]:
    """Type every cell.

    Parameters
    ----------
    descriptors
        (N, D), unit norm.
    bank
        The clicked cells' descriptors and the types' names.
    config
        Thresholds.

    Returns
    -------
    typing
        One verdict per cell; independent of the order of the cells.
    warnings
        Sentences about types that cannot be told apart.
    """
    names, colors = (UNASSIGNED, *bank.names), (_GREY, *bank.colors)
    if not len(descriptors):
        return Typing(names, colors, np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32)), []
    z = descriptors.astype(np.float32)
    anchors = list(bank.clicked)
    warnings: list[str] = []
    if len(anchors) == 1:
        centre = z.mean(0, dtype=np.float64).astype(np.float32)
        affinity = _affinity(z, anchors, centre)
        score = _calibrate_alone(affinity)
    else:
        affinity = _affinity(z, anchors, _balance(anchors))
        # One round of transduction: each type's sure cells sharpen its prototypes and the centre; the clicks stay in.
        means = [
            (z[rows] if len(rows) else a).mean(0, keepdims=True) for rows, a in zip(_sure_cells(affinity), anchors, strict=True)
        ]
        anchors = [np.vstack([a, m]) for a, m in zip(anchors, means, strict=True)]
        centre = _balance(means)
        affinity = _affinity(z, anchors, centre)
        score, warnings = _calibrate(affinity, _sure_cells(affinity), names[1:], config)
    for t, negative in enumerate(bank.negative):
        if len(negative):
            score[_affinity(z, [negative], centre)[:, 0] >= affinity[:, t], t] = 0
    order = np.argsort(-score, 1, kind="stable")
    best = order[:, 0]
    top = np.take_along_axis(score, order[:, :1], 1)[:, 0]
    second = np.take_along_axis(score, order[:, 1:2], 1)[:, 0] if score.shape[1] > 1 else np.zeros_like(top)
    verdict = (top >= config.min_score) & (top - second >= config.min_margin)
    codes = np.where(verdict, best + 1, 0).astype(np.int32)
    return Typing(names, colors, codes, top.astype(np.float32), (top - second).astype(np.float32)), warnings


def _balance(groups: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Mean of the groups' means: a centre without prevalence (the plain mean of the cells would be the common type itself)."""
    centre: NDArray[np.float32] = np.mean([g.mean(0) for g in groups], axis=0).astype(np.float32)
    return centre


def _affinity(z: NDArray[np.float32], anchors: list[NDArray[np.float32]], centre: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest cosine of each cell with each group of anchors, seen from ``centre`` -> (N, groups)."""
    z = _unit(z - centre)
    return np.stack([(z @ _unit(group - centre).T).max(1) for group in anchors], 1)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)).astype(np.float32)
    return unit


def _sure_cells(affinity: NDArray[np.float32]) -> list[NDArray[np.intp]]:
    """Per type, the cells that lead most clearly: the better half of those it wins, at most ``_SURE``."""
    order = np.sort(affinity, 1)
    lead = order[:, -1] - order[:, -2]
    winner = affinity.argmax(1)
    out = []
    for t in range(affinity.shape[1]):
        mine = np.flatnonzero(winner == t)
        mine = mine[np.argsort(-lead[mine], kind="stable")]
        out.append(mine[: max(min((len(mine) + 1) // 2, _SURE), 1)])
    return out


def _calibrate(
    affinity: NDArray[np.float32], sure: list[NDArray[np.intp]], names: tuple[str, ...], config: TypingConfig
) -> tuple[NDArray[np.float32], list[str]]:
    """Two-point calibration of each type against the others."""
    score, warnings = np.empty_like(affinity), []
    for t in range(affinity.shape[1]):
        others = np.concatenate([rows for k, rows in enumerate(sure) if k != t])
        other = float(np.median(affinity[others, t])) if len(others) else 0.0
        typical = float(np.median(affinity[sure[t], t])) if len(sure[t]) else other
        if typical - other < config.separable:
            warnings.append(f"type {names[t]} is hardly told apart from the others by this model; click a few more typical cells of each")
        score[:, t] = (affinity[:, t] - other) / max(typical - other, config.separable)
    return score, warnings


def _calibrate_alone(affinity: NDArray[np.float32]) -> NDArray[np.float32]:
    """One type and no competitor: two Gaussians on the affinity when they stand apart (Ashman's D > 2), else everything is the type."""
    a = affinity[:, 0].astype(np.float64)
    low, high = np.percentile(a, [25, 75])
    sd = max(a.std(), 1e-6)
    spread, weight = np.array([sd, sd]), np.array([0.5, 0.5])
    centre = np.array([low, high])
    for _ in range(60):
        density = weight / spread * np.exp(-0.5 * ((a[:, None] - centre) / spread) ** 2) + 1e-300
        share = density / density.sum(1, keepdims=True)
        mass = share.sum(0) + 1e-9
        centre = (share * a[:, None]).sum(0) / mass
        spread = np.sqrt((share * (a[:, None] - centre) ** 2).sum(0) / mass) + 1e-4
        weight = mass / len(a)
    ashman = abs(centre[1] - centre[0]) * np.sqrt(2 / (spread**2).sum())
    if ashman > 2 and weight.min() > 0.02:
        score: NDArray[np.float32] = ((affinity - centre.min()) / np.ptp(centre)).astype(np.float32)
        return score
    return np.ones_like(affinity)


def keep_clicks(cells: Cells, typing: Typing, bank: Bank, reach_px0: float) -> tuple[Typing, list[str]]:
    """Give every clicked cell the type it was clicked as.

    Parameters
    ----------
    cells, typing
        Stitched cells and their types; not modified.
    bank
        Its ``clicks`` are level-0 px.
    reach_px0
        A click beside its cell finds it within this distance.

    Returns
    -------
    typing
        Score and margin of a clicked cell are at least 1.
    warnings
        A sentence per click that meets no cell (it lies outside the region or tissue that was searched).
    """
    codes, scores, margins = typing.codes.copy(), typing.scores.copy(), typing.margins.copy()
    warnings = []
    tree = shapely.STRtree(cells.polygons)
    for t, clicks in enumerate(bank.clicks):
        for point in shapely.points(clicks):
            near = tree.query_nearest(point, max_distance=reach_px0) if len(cells) else []
            if not len(near):
                warnings.append(f"the click on {bank.names[t]} at [{point.x:g}, {point.y:g}] meets no cell of the result")
                continue
            codes[near[0]], scores[near[0]], margins[near[0]] = t + 1, max(scores[near[0]], 1.0), max(margins[near[0]], 1.0)
    return Typing(typing.names, typing.colors, codes, scores, margins), warnings
