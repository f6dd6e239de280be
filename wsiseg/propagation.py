"""From a few clicks to a type for every cell: Bayes' rule in a space in which cells of one type are a round Gaussian cloud.

Symbol   here                shape     meaning
z        z                   (N, D)    descriptor seen through ``TypeSpace.transform``: within a type the covariance is the identity
o        shift               (D,)      what all cells of a slide share (stain, scanner, thickness), N(0, ``space.shift``)
m_t      means               (T, D)    mean of type t on this slide: o + mu_t + d_t
mu_t     ``kinds[k]``        (D,)      the kind of cell that t is, d_t ~ N(0, ``kind_spread``); or no known kind: ``middle``, d_t ~ N(0, ``spread``)
a        reading             (T,)      which type is which kind; two types are never the same kind
p_t      posterior           (N, T)    p(t | z), with the unclicked kinds and "anything else" as rivals that are dropped from the output
pi_t     local share         (N, T)    how frequent t is around the cell

Steps:   read_clicks()   the clicks of all types together say which types are which kinds (all readings, weighted by their marginal likelihood),
                         how the slide is shifted, and how sure all that is: one click moves a mean less than five
         assign_types()  posterior of every cell, then its local share, then the verdict

One click is one cell, perhaps an odd one. What is known of kinds of cells corrects it: of two clicks only one can be the lymphocyte. Types of
no known kind have the wide prior and are told apart by the clicks alone. Nothing assumes how frequent a type is on the slide; around each cell
shares are estimated by expectation maximisation [2]_, which removes most of a type that occurs nowhere near.

The model is probabilistic linear discriminant analysis [1]_ with a mixture as the prior of the means and a shared shift. Chain-of-Prompts
compares with clicks by cosine and extends the reliable set hop by hop; on descriptors of cells that was measured and lost to this
(benchmarks/results/cop.md), so it stays where it is strong, in finding the cells (prompts/chain_of_prompts.py).

References
----------
.. [1] Ioffe: Probabilistic Linear Discriminant Analysis, ECCV 2006.
.. [2] Saerens, Latinne, Decaestecker: Adjusting the outputs of a classifier to new a priori probabilities, Neural Computation 14 (2002), eq. 2.7.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsiseg.records import UNASSIGNED, Typing, TypingNotes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import TypingConfig
    from wsiseg.records import Bank, Cells, TypeSpace

_GREY = (128, 128, 128)
_ROWS = 65_536  #: cells worked on at once: a few hundred MB at 75 numbers each
_CANDIDATES = 6  #: types that are tried for each known kind; more than that many clicked types of one kind is no use case
_READINGS = 16  #: readings that are kept; the rest weighs nothing
_DRIFT_SAMPLE = 200_000  #: cells from which the shifts of places are estimated; every k-th in a space-filling order
_DRIFT_ROUNDS = 5
_FEW = 5  #: cells of a type, around a place or on a slide, below which it says nothing about the shift
_UNSURE = 0.1  #: probability of a second kind from which a type's clicks are called doubtful
_MANY = 0.1  #: share of the cells from which an unclicked kind is worth a warning
_SAMPLE = 50_000  #: cells from which another slide's shift is estimated


@dataclass(frozen=True)
class Reading:
    """One way to understand the clicks. ``kinds``: per type the index of its kind, or -1; means and variances without the shift: (T, D)."""

    weight: float
    kinds: tuple[int, ...]
    shift: NDArray[np.float64]
    means: NDArray[np.float64]
    variances: NDArray[np.float64]


def read_clicks(clicked: list[NDArray[np.float64]], space: TypeSpace, config: TypingConfig) -> list[Reading]:
    """What the clicks may mean, the likeliest first.

    Parameters
    ----------
    clicked
        Per type, (n_t, D): the clicked cells in the space.
    space, config
        Of the model; priors.

    Returns
    -------
    list of Reading
        At most 16; weights sum to 1.
    """
    n = np.array([len(x) for x in clicked], float)[:, None]
    mean = np.stack([x.mean(0) for x in clicked])
    known = len(space.kinds)
    prior_mean = np.vstack([space.kinds, space.middle])  # the last row stands for "no known kind", also as index -1
    prior_variance = np.vstack([*([space.kind_spread] * known), space.spread])
    log_prior = np.log(np.r_[np.full(known, (1 - config.unknown_kind) / max(known, 1)), config.unknown_kind])
    kinds = _possible(mean, n, space, known)  # (M, T)
    residual, variance = mean - prior_mean[kinds], prior_variance[kinds] + 1 / n  # (M, T, D)
    # The shift integrated out: residuals of all types share it.
    precision = (1 / variance).sum(1)
    pull = (residual / variance).sum(1)
    total = precision + 1 / space.shift
    evidence = ((residual**2 / variance + np.log(variance)).sum((1, 2)) + (np.log(total * space.shift) - pull**2 / total).sum(1)) / -2
    evidence += log_prior[kinds].sum(1)
    order = np.argsort(-evidence, kind="stable")[:_READINGS]
    weight = np.exp(evidence[order] - evidence[order[0]])
    readings = []
    for k, w in zip(order, weight / weight.sum(), strict=True):
        shift = pull[k] / total[k]
        gain = prior_variance[kinds[k]] / variance[k]
        means = prior_mean[kinds[k]] + gain * (residual[k] - shift)
        readings.append(Reading(float(w), tuple(int(i) for i in kinds[k]), shift, means, 1 + prior_variance[kinds[k]] * (1 - gain)))
    return readings


def _possible(mean: NDArray[np.float64], n: NDArray[np.float64], space: TypeSpace, known: int) -> NDArray[np.intp]:
    """All ways (M, T) to give each known kind to at most one of the types that are nearest to it; -1 for the rest."""
    variance = space.shift + space.kind_spread + 1 / n
    far = ((mean[:, None] - space.kinds) ** 2 / variance[:, None]).sum(2)  # (T, known)
    near = [[None, *np.argsort(far[:, k], kind="stable")[:_CANDIDATES]] for k in range(known)]
    rows = []
    for chosen in itertools.product(*near):
        given = [t for t in chosen if t is not None]
        if len(set(given)) == len(given):
            row = np.full(len(mean), -1, np.intp)
            for k, t in enumerate(chosen):
                if t is not None:
                    row[t] = k
            rows.append(row)
    return np.stack(rows)


def carry_over(readings: list[Reading], z: NDArray[np.float32], space: TypeSpace, config: TypingConfig) -> list[Reading]:
    """Readings of one slide's clicks for the cells of another, whose shift is found from the cells themselves.

    Parameters
    ----------
    readings
        Of the slide with the clicks.
    z
        (N, D): cells of the other slide, in the space.
    space, config
        As for the clicks.

    Returns
    -------
    list of Reading
        What was peculiar to the first slide (the deviation of its types from their kinds, its shift) stays behind.
    """
    z = z[:: max(len(z) // _SAMPLE, 1)].astype(np.float32)
    carried = []
    for reading in readings:
        known = np.array(reading.kinds) >= 0
        kinds = np.array(reading.kinds)
        means = np.where(known[:, None], np.vstack([space.kinds, space.middle])[kinds], reading.means)
        spread = np.where(known[:, None], space.kind_spread, space.spread / 2)  # half: the first slide's clicks vouch for the type
        here = Reading(reading.weight, reading.kinds, reading.shift, means, 1 + spread)
        for _ in range(10):
            p = _posterior(z, here, space, config)
            p = p[:, : len(means)]
            n = p.sum(0)[:, None]
            seen = n[:, 0] >= _FEW  # a type that this slide does not have says nothing about its shift
            variance = spread + 1 / np.maximum(n, 1)
            residual = (p.T @ z) / np.maximum(n, 1e-9) - means
            shift = (residual / variance)[seen].sum(0) / (1 / space.shift + (1 / variance)[seen].sum(0))
            here = Reading(here.weight, here.kinds, shift, means, here.variances)
        carried.append(here)
    return carried


def _posterior(z: NDArray[np.float32], reading: Reading, space: TypeSpace, config: TypingConfig) -> NDArray[np.float32]:
    """p(. | z) under one reading: (N, T) for the clicked types, (N, K) for the kinds that nobody clicked (0 for the others), (N, 1) for the rest."""
    free = [k for k in range(len(space.kinds)) if k not in reading.kinds]
    means = reading.shift + np.vstack([reading.means, space.kinds[free], space.middle])
    variances = np.vstack([reading.variances, *([1 + space.kind_spread] * len(free)), 1 + space.spread])
    weights = np.log(np.r_[np.ones(len(reading.means)), np.full(len(free), config.rival_kind), config.rival_other])
    constant = weights - (np.log(variances) + means**2 / variances).sum(1) / 2
    # (z - m)^2 / v in two matrix products
    log_p = (z**2) @ (-0.5 / variances).T.astype(np.float32) + z @ (means / variances).T.astype(np.float32) + constant.astype(np.float32)
    log_p -= log_p.max(1, keepdims=True)
    p: NDArray[np.float32] = np.exp(log_p)
    p /= p.sum(1, keepdims=True)
    types = len(reading.means)
    full = np.zeros((len(z), types + len(space.kinds) + 1), np.float32)
    full[:, [*range(types), *(types + k for k in free), -1]] = p
    return full


def assign_types(
    descriptors: NDArray[np.float16], xy_um: NDArray[np.float64], bank: Bank, space: TypeSpace, config: TypingConfig
) -> tuple[Typing, TypingNotes]:
    """Type every cell.

    Parameters
    ----------
    descriptors
        (N, D), unit norm.
    xy_um
        (N, 2): where the cells are, microns.
    bank
        The clicked cells' descriptors and the types' names; ``bank.foreign`` when they are of another slide.
    space
        Of the model that made the descriptors.
    config
        Priors and thresholds.

    Returns
    -------
    typing
        One verdict per cell; independent of the order of the cells. Scores are p(t | z) with the local share, margins the lead over the
        runner-up, rivals included.
    notes
        What the types were taken for, and which cannot be told apart.
    """
    names, colors = (UNASSIGNED, *bank.names), (_GREY, *bank.colors)
    count = len(descriptors)
    if not count:
        empty = np.empty(0, np.float32)
        return Typing(names, colors, np.empty(0, np.int32), empty, empty.copy(), np.empty(0, np.int32)), TypingNotes()
    order = np.lexsort((xy_um[:, 1], xy_um[:, 0]))  # sums of floats depend on their order; the verdicts must not
    z = np.empty((count, descriptors.shape[1]), np.float32)
    for start in range(0, count, _ROWS):
        rows = order[start : start + _ROWS]
        z[start : start + _ROWS] = space.see(descriptors[rows])
    clicked = [space.see(x).astype(np.float64) for x in bank.clicked]
    readings = read_clicks(clicked, space, config)
    if bank.foreign:
        readings = carry_over(readings, z, space, config)
    readings = [r for r in readings if r.weight > 1e-3]  # no verdict hangs on less
    z -= _drift(z, xy_um[order], readings[0], space, config)
    posterior = np.zeros((count, len(bank.names) + len(space.kinds) + 1), np.float32)
    nearest = np.empty(count, np.int32)
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        for reading in readings:
            posterior[part] += np.float32(reading.weight) * _posterior(z[part], reading, space, config)
        _against(posterior[part], z[part], clicked, [space.see(x) for x in bank.negative])
    posterior = _with_local_share(posterior, xy_um[order], config)
    ranked = np.argsort(-posterior, 1, kind="stable")
    top, second = (np.take_along_axis(posterior, ranked[:, k : k + 1], 1)[:, 0] for k in (0, 1))
    best = posterior[:, : len(bank.names)].argmax(1)
    verdict = (ranked[:, 0] == best) & (top >= config.min_score) & (top - second >= config.min_margin)
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        nearest[part] = _nearest_click(z[part], clicked, best[part])
    back = np.empty(count, np.intp)
    back[order] = np.arange(count)
    codes = np.where(verdict, best + 1, 0).astype(np.int32)
    scores = np.take_along_axis(posterior, best[:, None], 1)[:, 0]
    margins = np.where(ranked[:, 0] == best, top - second, 0).astype(np.float32)
    prototypes = np.where(verdict, nearest, -1).astype(np.int32)
    typing = Typing(names, colors, codes[back], scores[back], margins[back], prototypes[back])
    kinds = tuple(
        {name: round(sum(r.weight for r in readings if r.kinds[t] == k), 3) for k, name in enumerate(space.kind_names)}
        for t in range(len(bank.names))
    )
    doubts = (*_unsure(kinds, bank.names), *_confusable(readings[0], bank.names, config), *_unclicked(ranked[:, 0] - len(bank.names), space))
    return typing, TypingNotes(kinds, doubts)


def _drift(
    z: NDArray[np.float32], xy_um: NDArray[np.float64], reading: Reading, space: TypeSpace, config: TypingConfig
) -> NDArray[np.float32] | np.float32:
    """How far the cells around each cell are shifted, beside the slide's own shift -> (N, D).

    Squares of ``drift_um`` have a shift each, N(0, ``drift`` x ``space.shift``), found from their cells and those of the 3 x 3 around (weights
    1, 2, 1) in the same way as another slide's: what all types of a place have in common is shift, the rest is type.
    """
    if not config.drift:
        return np.float32(0)
    here, height, width = _squares(xy_um, config.drift_um)
    step = max(len(z) // _DRIFT_SAMPLE, 1)
    seen, place = z[::step], here[::step]
    rows = np.argsort(place, kind="stable")
    seen, place = seen[rows], place[rows]
    squares, first = np.unique(place, return_index=True)
    free = [k for k in range(len(space.kinds)) if k not in reading.kinds]
    anchors = reading.shift + np.vstack([reading.means, space.kinds[free]])
    columns = [*range(len(reading.means)), *(len(reading.means) + k for k in free)]
    shift = np.zeros((height * width, z.shape[1]))
    for _ in range(_DRIFT_ROUNDS):
        p = _posterior(seen - shift[place].astype(np.float32), reading, space, config)[:, columns]
        n = np.zeros((height * width, len(columns), 1))
        total = np.zeros((height * width, len(columns), z.shape[1]))
        n[squares, :, 0] = np.add.reduceat(p, first, axis=0)
        for a in range(len(columns)):
            total[squares, a] = np.add.reduceat(p[:, a : a + 1] * seen, first, axis=0)
        n, total = (_smooth(x.reshape(height, width, -1)).reshape(x.shape) for x in (n, total))
        weight = np.where(n >= _FEW, 1 / (space.kind_spread + 1 / np.maximum(n, 1)), 0)
        shift = ((total / np.maximum(n, 1e-9) - anchors) * weight).sum(1) / (1 / (config.drift * space.shift) + weight.sum(1))
    return shift[here].astype(np.float32)


def _squares(xy_um: NDArray[np.float64], side_um: float) -> tuple[NDArray[np.intp], int, int]:
    """The square that each place lies in, counted row by row, and how many rows and columns there are."""
    square = np.floor((xy_um - xy_um.min(0)) / side_um).astype(np.intp)
    width, height = square.max(0) + 1
    return square[:, 1] * width + square[:, 0], int(height), int(width)


def _smooth(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights 1, 2, 1 over the 3 x 3 around each square of (height, width, ...); a square's own part keeps its size."""
    for axis in (0, 1):
        padded = np.pad(grid, [(1, 1) if k == axis else (0, 0) for k in range(3)])
        n = grid.shape[axis]
        grid = padded.take(range(n), axis) + 2 * grid + padded.take(range(2, n + 2), axis)
    return grid / 4


def _against(
    posterior: NDArray[np.float32], z: NDArray[np.float32], clicked: list[NDArray[np.float64]], negative: list[NDArray[np.float32]]
) -> None:
    """A cell nearer to a negative click of type t than to every click of t is not t; the other types are not touched by it. In place."""
    for t, against in enumerate(negative):
        if len(against):
            posterior[_gap(z, against) <= _gap(z, clicked[t].astype(np.float32)), t] = 0
    posterior /= np.maximum(posterior.sum(1, keepdims=True), 1e-12)


def _gap(z: NDArray[np.float32], anchors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distance to the nearest anchor, less what all anchors have in common -> (N,)."""
    gap: NDArray[np.float32] = ((anchors**2).sum(1) - 2 * z @ anchors.T).min(1)
    return gap


def _nearest_click(z: NDArray[np.float32], clicked: list[NDArray[np.float64]], best: NDArray[np.intp]) -> NDArray[np.int32]:
    """Of the clicks of the cell's best type, the index of the most similar one, counted through all types."""
    first = np.cumsum([0, *(len(x) for x in clicked)])
    nearest = np.empty(len(z), np.int32)
    for t, anchors in enumerate(clicked):
        mine = best == t
        a = anchors.astype(np.float32)
        nearest[mine] = first[t] + ((a**2).sum(1) - 2 * z[mine] @ a.T).argmin(1)
    return nearest


def _with_local_share(posterior: NDArray[np.float32], xy_um: NDArray[np.float64], config: TypingConfig) -> NDArray[np.float32]:
    """Posteriors (N, types and rivals) with the shares around each cell as prior.

    Shares live on squares of ``neighbourhood_um`` and are smoothed over the 3 x 3 around each (weights 1, 2, 1). They are drawn towards the
    slide's by ``neighbourhood_cells`` cells' worth.
    """
    here, height, width = _squares(xy_um, config.neighbourhood_um)
    types = posterior.shape[1]
    share = np.full((height * width, types), 1 / types)
    out = posterior
    for _ in range(config.share_rounds):
        out = posterior * share[here].astype(np.float32)
        out /= np.maximum(out.sum(1, keepdims=True), 1e-12)
        count = np.stack([np.bincount(here, weights=out[:, t], minlength=height * width) for t in range(types)], 1).astype(np.float64)
        overall = count.sum(0) / count.sum()
        smooth = _smooth(count.reshape(height, width, types)).reshape(-1, types)
        share = (smooth + config.neighbourhood_cells * overall) / (smooth.sum(1, keepdims=True) + config.neighbourhood_cells)
    return out


def _unsure(kinds: tuple[dict[str, float], ...], names: tuple[str, ...]) -> list[str]:
    """A sentence for each type whose clicks can be taken for two kinds: the types may have changed places."""
    warnings = []
    for name, share in zip(names, kinds, strict=True):
        likely = sorted(share, key=lambda kind: -share[kind])[:2]
        if len(likely) == 2 and share[likely[1]] > _UNSURE:
            said = " or ".join(f"{kind} ({share[kind]:.0%})" for kind in likely)
            warnings.append(f"the clicks on {name} can be taken for {said}; click another typical cell of it")
    return warnings


def _confusable(reading: Reading, names: tuple[str, ...], config: TypingConfig) -> list[str]:
    """A sentence for each pair of types whose clouds overlap too much."""
    warnings = []
    for a, b in itertools.combinations(range(len(names)), 2):
        variance = (reading.variances[a] + reading.variances[b]) / 2
        apart = float(np.sqrt(((reading.means[a] - reading.means[b]) ** 2 / variance).sum()))
        if apart < config.separable:
            warnings.append(
                f"types {names[a]} and {names[b]} are hardly told apart by this model (distance {apart:.1f}, {config.separable:g} is needed); "
                "click a few more typical cells of each"
            )
    return warnings


def _unclicked(kind: NDArray[np.intp], space: TypeSpace) -> list[str]:
    """A sentence for each known kind that many cells (index of their best kind: ``kind``) are, and nobody clicked."""
    warnings = []
    for k, name in enumerate(space.kind_names):
        share = float((kind == k).mean())
        if share >= _MANY:
            warnings.append(f"{share:.0%} of the cells look {name}, a kind without a click, and stay {UNASSIGNED}; click one to have them typed")
    return warnings


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
        Score and margin of a clicked cell are 1.
    warnings
        A sentence per click that meets no cell (it lies outside the region or tissue that was searched).
    """
    rows: list[NDArray[np.intp]] = []
    warnings = []
    tree = shapely.STRtree(cells.polygons)
    for name, clicks in zip(bank.names, bank.clicks, strict=True):
        mine = np.full(len(clicks), -1, np.intp)
        for k, point in enumerate(shapely.points(clicks)):
            near = tree.query_nearest(point, max_distance=reach_px0) if len(cells) else []
            if len(near):
                mine[k] = near[0]
            else:
                warnings.append(f"the click on {name} at [{point.x:g}, {point.y:g}] meets no cell of the result")
        rows.append(mine)
    return claim(typing, rows), warnings


def claim(typing: Typing, rows: list[NDArray[np.intp]]) -> Typing:
    """``typing`` with the clicked cells' types as clicked: per type the rows of its clicks, in order; -1 where there is no cell."""
    codes, scores, margins, prototypes = typing.codes.copy(), typing.scores.copy(), typing.margins.copy(), typing.prototypes.copy()
    number = 0
    for t, clicked in enumerate(rows):
        for row in clicked:
            if row >= 0:
                codes[row], scores[row], margins[row], prototypes[row] = t + 1, 1, 1, number
            number += 1
    return Typing(typing.names, typing.colors, codes, scores, margins, prototypes)


def account(typing: Typing, bank: Bank, notes: TypingNotes) -> dict[str, Any]:
    """The manifest's account of the types: clicks (numbered as in ``prototypes``), kinds, cells, share unassigned."""
    cells = np.bincount(typing.codes, minlength=len(typing.names))
    types = {
        name: {
            "cells": int(cells[t + 1]),
            "clicks": np.round(bank.clicks[t], 2).tolist() if not bank.foreign else len(bank.clicked[t]),
            "negative": len(bank.negative[t]),
            "kind": notes.kinds[t] if notes.kinds else {},
        }
        for t, name in enumerate(bank.names)
    }
    return {"types": types, "unassigned": round(float(cells[0]) / max(len(typing.codes), 1), 4)}
