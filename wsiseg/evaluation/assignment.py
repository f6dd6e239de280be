"""One-to-one matching of two sets along weighted edges: exact, for a million of them.

Nearly all edges are decided without solving anything: an edge that weighs at least as much as the next best edge of its row and the next best of
its column together is in some best matching, since putting it in for those two loses nothing. Taking such edges again and again leaves small
groups, which are solved one by one with the Hungarian method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

if TYPE_CHECKING:
    from numpy.typing import NDArray

DENSE = 250_000  #: entries of a cost matrix up to which the dense solver is the faster one


def assign(rows: NDArray[np.integer], columns: NDArray[np.integer], weights: NDArray[np.float64]) -> NDArray[np.intp]:
    """The edges of a one-to-one matching with the largest sum of weights.

    Parameters
    ----------
    rows, columns
        Ends of E edges, no edge twice.
    weights
        float64 of shape (E,), > 0.

    Returns
    -------
    ndarray
        intp: the chosen edges, ascending. Of several matchings that weigh the same, always the same one for the same input.
    """
    alive, taken = np.ones(len(rows), bool), np.zeros(len(rows), bool)
    by_row, by_column = np.lexsort((-weights, rows)), np.lexsort((-weights, columns))
    while len(by_row):
        best_r, next_r = _leaders(by_row, rows, weights)
        best_c, next_c = _leaders(by_column, columns, weights)
        good = best_r & best_c & (weights >= next_r + next_c)
        if not good.any():
            break
        taken |= good
        alive &= ~(np.isin(rows, rows[good]) | np.isin(columns, columns[good]))
        by_row, by_column = by_row[alive[by_row]], by_column[alive[by_column]]
    left = np.flatnonzero(alive)
    taken[left[_solve(rows[left], columns[left], weights[left])]] = True
    return np.flatnonzero(taken)


def _leaders(
    order: NDArray[np.intp], ends: NDArray[np.integer], weights: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Mark the first edge of each row, with the weight of that row's second one (0: there is none)."""
    first, second = np.zeros(len(ends), bool), np.zeros(len(ends))
    end = ends[order]
    starts = np.flatnonzero(np.concatenate([[True], end[1:] != end[:-1]]))
    first[order[starts]] = True
    follows = starts[np.diff(starts, append=len(order)) > 1]
    second[order[follows]] = weights[order[follows + 1]]
    return first, second


def _solve(rows: NDArray[np.integer], columns: NDArray[np.integer], weights: NDArray[np.float64]) -> NDArray[np.intp]:
    """Solve the matching for conflicting edges, one connected group at a time."""
    if not len(rows):
        return np.empty(0, np.intp)
    r, c = np.unique(rows, return_inverse=True)[1], np.unique(columns, return_inverse=True)[1]
    n, m = int(r.max()) + 1, int(c.max()) + 1
    graph = sparse.coo_matrix((np.ones(len(r)), (r, n + c)), shape=(n + m, n + m))
    group = connected_components(graph, directed=False)[1][r]
    order = np.argsort(group, kind="stable")
    chosen = [
        _solve_group(edges, r, c, weights) for edges in np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    ]
    return np.concatenate(chosen)


def _solve_group(
    edges: NDArray[np.intp], r: NDArray[np.intp], c: NDArray[np.intp], weights: NDArray[np.float64]
) -> NDArray[np.intp]:
    rows, i = np.unique(r[edges], return_inverse=True)
    columns, j = np.unique(c[edges], return_inverse=True)
    n, m = len(rows), len(columns)
    if n * m <= DENSE:
        gain, which = np.zeros((n, m)), np.full((n, m), -1, np.intp)
        gain[i, j], which[i, j] = weights[edges], edges
        chosen = which[linear_sum_assignment(gain, maximize=True)]
        return np.asarray(chosen[chosen >= 0])
    # The sparse solver wants every row matched, at the least cost, and no cost of 0: each row gets a column of its own that gains nothing.
    top = float(weights[edges].max()) + 1
    cost = np.concatenate([top - weights[edges], np.full(n, top)])
    table = sparse.csr_matrix(
        (cost, (np.concatenate([i, np.arange(n)]), np.concatenate([j, m + np.arange(n)]))), shape=(n, m + n)
    )
    match_r, match_c = min_weight_full_bipartite_matching(table)
    which_edge = sparse.csr_matrix((edges + 1, (i, j)), shape=(n, m))
    real = match_c < m
    return np.asarray(which_edge[match_r[real], match_c[real]]).ravel().astype(np.intp) - 1
