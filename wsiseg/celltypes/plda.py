"""Probabilistic LDA: what the clicks mean and the type of each cell, in a space where each type is a spherical Gaussian.

Symbol   here                shape     meaning
z        z                   (N, D)    descriptor seen through ``TypeSpace.transform``: within a type the covariance is the identity
o        shift               (D,)      what all cells of a slide share (stain, scanner, thickness), N(0, ``space.shift``)
m_t      means               (T, D)    mean of type t on this slide, without o: mu_t + d_t
mu_t     ``kinds[k]``        (D,)      the kind of cell that t is, d_t ~ N(0, ``kind_spread``); or no known kind: ``middle``, d_t ~ N(0, ``spread``)
a        Reading             (T,)      which type is which kind; two types are never the same kind
p        posterior()         (N, .)    of the clicked types, of the kinds that nobody clicked, and of anything else

One click is one cell, perhaps an odd one. What is known of kinds of cells corrects it: of two clicks only one can be the lymphocyte. Types of
no known kind have the wide prior and are told apart by the clicks alone.

This is probabilistic linear discriminant analysis [1]_ with a mixture as the prior of the means and a shift that all types share.

References
----------
.. [1] Ioffe: Probabilistic Linear Discriminant Analysis, ECCV 2006.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.records import TypeSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import TypingConfig

_CANDIDATES = (
    6  #: types that are tried for each known kind; more than that many clicked types of one kind is no use case
)
_HYPOTHESES = 16  #: readings that are kept; the rest weighs nothing
_FEW = 5  #: cells of a type, around a place or on a slide, below which it says nothing about the shift
_SAMPLE = 50_000  #: cells from which another slide's shift is estimated
_DRIFT_SAMPLE = 200_000  #: cells from which the shifts of places are estimated; every k-th from left to right
_ROUNDS, _DRIFT_ROUNDS = 10, 5
_DIRECTIONS, _WITHIN, _SHIFT = (
    32,
    0.25,
    0.1,
)  #: of a space that is found on the slide itself (benchmarks/results/slide_space.md)
_LEAST = 0.01  #: of its variances: none is nothing


@dataclass(frozen=True)
class Hypothesis:
    """One way to understand the clicks. ``kinds``: per type the index of its kind, or -1; means and variances without the shift: (T, D)."""

    weight: float
    kinds: tuple[int, ...]
    shift: NDArray[np.float64]
    means: NDArray[np.float64]
    variances: NDArray[np.float64]


def infer_hypotheses(clicked: list[NDArray[np.float64]], space: TypeSpace, config: TypingConfig) -> list[Hypothesis]:
    """Infer what the clicks may mean, the most probable hypothesis first.

    Parameters
    ----------
    clicked
        Per type, (n_t, D): the clicked cells in the space.
    space, config
        Type space of the model; priors.

    Returns
    -------
    list of Hypothesis
        At most 16; weights sum to 1.
    """
    n = np.array([len(x) for x in clicked], float)[:, None]
    mean = np.stack([x.mean(0) for x in clicked])
    known = len(space.kinds)
    prior_mean = np.vstack([space.kinds, space.middle])  # the last row stands for "no known kind", also as index -1
    prior_variance = np.vstack([*([space.kind_spread] * known), space.spread])
    log_prior = np.log(np.r_[np.full(known, (1 - config.unknown_kind) / max(known, 1)), config.unknown_kind])
    kinds = _enumerate_assignments(mean, n, space, known)  # (M, T)
    residual, variance = mean - prior_mean[kinds], prior_variance[kinds] + 1 / n  # (M, T, D)
    # The shift integrated out: residuals of all types share it.
    precision = (1 / variance).sum(1)
    pull = (residual / variance).sum(1)
    total = precision + 1 / space.shift
    evidence = (
        (residual**2 / variance + np.log(variance)).sum((1, 2)) + (np.log(total * space.shift) - pull**2 / total).sum(1)
    ) / -2
    evidence += log_prior[kinds].sum(1)
    order = np.argsort(-evidence, kind="stable")[:_HYPOTHESES]
    weight = np.exp(evidence[order] - evidence[order[0]])
    hypotheses = []
    for k, w in zip(order, weight / weight.sum(), strict=True):
        shift = pull[k] / total[k]
        gain = prior_variance[kinds[k]] / variance[k]
        means = prior_mean[kinds[k]] + gain * (residual[k] - shift)
        hypotheses.append(
            Hypothesis(
                float(w), tuple(int(i) for i in kinds[k]), shift, means, 1 + prior_variance[kinds[k]] * (1 - gain)
            )
        )
    return hypotheses


def _enumerate_assignments(
    mean: NDArray[np.float64], n: NDArray[np.float64], space: TypeSpace, known: int
) -> NDArray[np.intp]:
    """Enumerate all ways (M, T) to assign each reference class to at most one of its nearest types; -1 for the rest."""
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


def carry_over(
    hypotheses: list[Hypothesis], z: NDArray[np.float32], space: TypeSpace, config: TypingConfig
) -> list[Hypothesis]:
    """Transfer the hypotheses of one slide's clicks to the cells of another, whose shift is estimated from those cells.

    Parameters
    ----------
    readings
        Hypotheses inferred on the slide with the clicks.
    z
        (N, D): cells of the other slide, in the space.
    space, config
        As for the clicks.

    Returns
    -------
    list of Hypothesis
        What was peculiar to the first slide (the deviation of its types from their kinds, its shift) stays behind.
    """
    z = z[:: max(len(z) // _SAMPLE, 1)].astype(np.float32)
    carried = []
    for hypothesis in hypotheses:
        known = np.array(hypothesis.kinds) >= 0
        kinds = np.array(hypothesis.kinds)
        means = np.where(known[:, None], np.vstack([space.kinds, space.middle])[kinds], hypothesis.means)
        spread = np.where(
            known[:, None], space.kind_spread, space.spread / 2
        )  # half: the first slide's clicks vouch for the type
        here = Hypothesis(hypothesis.weight, hypothesis.kinds, hypothesis.shift, means, 1 + spread)
        for _ in range(_ROUNDS):
            p = posterior(z, here, space, config)
            p = p[:, : len(means)]
            n = p.sum(0)[:, None]
            seen = n[:, 0] >= _FEW  # a type that this slide does not have says nothing about its shift
            variance = spread + 1 / np.maximum(n, 1)
            residual = (p.T @ z) / np.maximum(n, 1e-9) - means
            shift = (residual / variance)[seen].sum(0) / (1 / space.shift + (1 / variance)[seen].sum(0))
            here = Hypothesis(here.weight, here.kinds, shift, means, here.variances)
        carried.append(here)
    return carried


def posterior(
    z: NDArray[np.float32], hypothesis: Hypothesis, space: TypeSpace, config: TypingConfig
) -> NDArray[np.float32]:
    """p(. | z) under one reading: (N, T) for the clicked types, (N, K) for the kinds that nobody clicked (0 for the others), (N, 1) for the rest."""
    free = [k for k in range(len(space.kinds)) if k not in hypothesis.kinds]
    means = hypothesis.shift + np.vstack([hypothesis.means, space.kinds[free], space.middle])
    variances = np.vstack([hypothesis.variances, *([1 + space.kind_spread] * len(free)), 1 + space.spread])
    weights = np.log(np.r_[np.ones(len(hypothesis.means)), np.full(len(free), config.rival_kind), config.rival_other])
    constant = weights - (np.log(variances) + means**2 / variances).sum(1) / 2
    # (z - m)^2 / v in two matrix products
    log_p = (
        (z**2) @ (-0.5 / variances).T.astype(np.float32)
        + z @ (means / variances).T.astype(np.float32)
        + constant.astype(np.float32)
    )
    log_p -= log_p.max(1, keepdims=True)
    p: NDArray[np.float32] = np.exp(log_p)
    p /= p.sum(1, keepdims=True)
    types = len(hypothesis.means)
    full = np.zeros((len(z), types + len(space.kinds) + 1), np.float32)
    full[:, [*range(types), *(types + k for k in free), -1]] = p
    return full


def drift(
    z: NDArray[np.float32], xy_um: NDArray[np.float64], hypothesis: Hypothesis, space: TypeSpace, config: TypingConfig
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Estimate the local shift around each cell, in addition to the slide's own: (squares, D), and each cell's square (N,).

    Squares of ``drift_um`` have a shift each, N(0, ``drift`` x ``space.shift``), found from their cells and those of the 3 x 3 around (weights
    1, 2, 1) in the same way as another slide's: what all types of a place have in common is shift, the rest is type.
    """
    if not config.drift:
        return np.zeros((1, z.shape[1]), np.float32), np.zeros(len(z), np.intp)
    here, height, width = squares(xy_um, config.drift_um)
    step = max(len(z) // _DRIFT_SAMPLE, 1)
    seen, place = z[::step], here[::step]
    rows = np.argsort(place, kind="stable")
    seen, place = seen[rows], place[rows]
    filled, first = np.unique(place, return_index=True)
    free = [k for k in range(len(space.kinds)) if k not in hypothesis.kinds]
    anchors = hypothesis.shift + np.vstack([hypothesis.means, space.kinds[free]])
    columns = [*range(len(hypothesis.means)), *(len(hypothesis.means) + k for k in free)]
    shift = np.zeros((height * width, z.shape[1]))
    for _ in range(_DRIFT_ROUNDS):
        p = posterior(seen - shift[place].astype(np.float32), hypothesis, space, config)[:, columns]
        n = np.zeros((height * width, len(columns), 1))
        total = np.zeros((height * width, len(columns), z.shape[1]))
        n[filled, :, 0] = np.add.reduceat(p, first, axis=0)
        for a in range(len(columns)):
            total[filled, a] = np.add.reduceat(p[:, a : a + 1] * seen, first, axis=0)
        n, total = (smooth(x.reshape(height, width, -1)).reshape(x.shape) for x in (n, total))
        weight = np.where(n >= _FEW, 1 / (space.kind_spread + 1 / np.maximum(n, 1)), 0)
        shift = ((total / np.maximum(n, 1e-9) - anchors) * weight).sum(1) / (
            1 / (config.drift * space.shift) + weight.sum(1)
        )
    return shift.astype(np.float32), here


def slide_space(descriptors: NDArray[np.float16] | NDArray[np.float32]) -> TypeSpace:
    """A space for a model whose weights do not say how types lie among its descriptors: from the slide's own cells.

    Cells of one type are taken for a round cloud whose variance is a share of that of all cells along their main direction; what the cells vary
    more than that along a direction is between types. No kinds are known, so nothing but the clicks says what a type is.

    Parameters
    ----------
    descriptors
        (N, D): all cells, unit norm; in an order that does not depend on the tiles.
    """
    x = descriptors[:: max(len(descriptors) // _SAMPLE, 1)].astype(np.float64)
    variance, direction = np.linalg.eigh(np.cov(x.T) if len(x) > 1 else np.eye(x.shape[1]))
    main = np.argsort(-variance)[: min(_DIRECTIONS, max(len(x) - 1, 1))]
    within = _WITHIN * max(float(variance.max()), 1e-8)
    transform = direction[:, main] / np.sqrt(within)
    total = variance[main] / within
    return TypeSpace(
        transform.astype(np.float32),
        x.mean(0) @ transform,
        np.maximum(total, _LEAST),
        np.empty((0, len(main))),
        np.ones(len(main)),
        np.maximum(_SHIFT * total, _LEAST),
    )


def squares(xy_um: NDArray[np.float64], side_um: float) -> tuple[NDArray[np.intp], int, int]:
    """Index of the square of each point, row by row, and the numbers of rows and columns."""
    square = np.floor((xy_um - xy_um.min(0)) / side_um).astype(np.intp)
    width, height = square.max(0) + 1
    return square[:, 1] * width + square[:, 0], int(height), int(width)


def smooth(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights 1, 2, 1 over the 3 x 3 around each square of (height, width, ...); a square's own part keeps its size."""
    for axis in (0, 1):
        padded = np.pad(grid, [(1, 1) if k == axis else (0, 0) for k in range(3)])
        n = grid.shape[axis]
        grid = padded.take(range(n), axis) + 2 * grid + padded.take(range(2, n + 2), axis)
    return grid / 4
