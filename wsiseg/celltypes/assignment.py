"""Assignment of a type to every cell of a slide from a few clicks.

Steps:   infer_hypotheses()   what the clicks of all types together mean (plda.py)
         transfer_to_slide()  with clicks on another slide: this slide's own shift of all cells
         learn_from_sure_cells()  the cells that are surely of a type, as further clicks
         local_shift()        shift that the cells of each place share, removed
         posterior()          probability of each type, of reference classes without clicks, and of the background
         local prevalence     frequency of the types around each cell, by expectation maximisation [1]_; nothing is assumed about the slide
         assignment           the likeliest type, if it is likely enough; a clicked cell has the type it was clicked as

Chain-of-Prompts compares with clicks by cosine and extends the reliable set hop by hop; on descriptors of cells this was measured to be less
accurate (benchmarks/results/cop.md), so it is used only to find cells (prompts/chain_of_prompts.py).

References
----------
.. [1] Saerens, Latinne, Decaestecker: Adjusting the outputs of a classifier to new a priori probabilities, Neural Computation 14 (2002), eq. 2.7.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiseg.celltypes.plda import (
    ROWS,
    Hypothesis,
    hypothesis_without_clicks,
    infer_hypotheses,
    learn_from_sure_cells,
    local_shift,
    posterior,
    slide_space,
    smooth,
    squares,
    transfer_to_slide,
)
from wsiseg.formats.seed_rules import PALETTE
from wsiseg.records import UNASSIGNED, Typing, TypingNotes
from wsiseg.runtime.prefetch import parallel_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from wsiseg.config import TypingConfig
    from wsiseg.records import Bank, DescribedType, TypeSpace

GREY = (128, 128, 128)  #: of unassigned cells
_AMBIGUOUS = 0.1  #: probability of a second reference class from which a type's clicks are called ambiguous
_COVERED = (
    0.5  #: probability that some clicked type is a reference class, from which that class is not a type of its own
)
_MANY = 0.1  #: share of the cells from which a reference class without clicks is worth a warning


def assign_types(
    descriptors: NDArray[np.float16],
    xy_um: NDArray[np.float64],
    bank: Bank,
    space: TypeSpace | None,
    config: TypingConfig,
    stain: str = "he",
) -> tuple[Typing, TypingNotes]:
    """Type every cell.

    Parameters
    ----------
    descriptors
        (N, D), unit norm.
    xy_um
        (N, 2): where the cells are, microns.
    bank
        The clicked cells' descriptors and the types' names; ``bank.from_other_slide`` when they are from another slide. Without types, all
        types are the model's (``config.known_types``).
    space
        Type space of the model that made the descriptors; ``None``: estimated on the slide (:func:`plda.slide_space`).
    config
        Priors and thresholds.
    stain
        Of the slide, as in :class:`~wsiseg.config.RunConfig`; ``auto`` counts as H&E.

    Returns
    -------
    typing
        Type of each cell; independent of the order of the cells. Scores are p(t | z) with the local prevalence as prior, margins the
        difference to the second likeliest class, background classes included.
    notes
        Reference classes of the types, and warnings about types that cannot be told apart.
    """
    count = len(descriptors)
    if not count:
        empty = np.empty(0, np.float32)
        return Typing(
            names=(UNASSIGNED, *bank.names),
            colors=(GREY, *(of.color for of in bank.types)),
            codes=np.empty(0, np.int32),
            scores=empty,
            margins=empty.copy(),
            prototypes=np.empty(0, np.int32),
        ), TypingNotes()
    order = np.lexsort(
        (*descriptors[:, :2].T, xy_um[:, 1], xy_um[:, 0])
    )  # sums of floats depend on their order; the types must not
    space = space or slide_space(descriptors[order])
    other_stain = stain not in ("he", "auto")
    if other_stain and bank.types:  # without clicks there is nothing but the classes
        space = replace(space, class_variance=config.other_stain * space.class_variance)
    z = np.empty((count, space.transform.shape[1]), np.float32)

    def project(part: slice) -> None:
        z[part] = space.project(descriptors[order[part]])

    _for_rows(project, count)
    hypotheses, clicked, negative = _interpret(bank, z, space, config)
    known = _known_classes(bank, hypotheses, space) if config.known_types else []
    shift, here = local_shift(z, xy_um[order], hypotheses[0], space, config)
    p = np.zeros((count, len(bank.types) + len(space.reference_classes) + 1), np.float32)
    nearest = np.empty(count, np.int32)

    def score(part: slice) -> None:
        z[part] -= shift[here[part]]
        for hypothesis in hypotheses:
            p[part] += np.float32(hypothesis.weight) * posterior(z[part], hypothesis, space, config)
        _exclude_by_negative_clicks(p[part], z[part], clicked, negative)

    _for_rows(score, count)
    p = _with_local_prevalence(p, xy_um[order], config)
    ranked = np.argsort(-p, 1, kind="stable")
    top, second = (np.take_along_axis(p, ranked[:, k : k + 1], 1)[:, 0] for k in (0, 1))
    columns = np.array([*range(len(bank.types)), *(len(bank.types) + k for k in known)])
    best = p[:, columns].argmax(1)
    leads = ranked[:, 0] == columns[best]
    assigned = leads & (top >= config.min_score) & (top - second >= config.min_margin)

    def find_nearest(part: slice) -> None:
        nearest[part] = _nearest_click(z[part], clicked, best[part])

    _for_rows(find_nearest, count)
    back = np.empty(count, np.intp)
    back[order] = np.arange(count)
    codes = np.where(assigned, best + 1, 0).astype(np.int32)
    scores = np.take_along_axis(p, columns[best][:, None], 1)[:, 0]
    margins = np.where(leads, top - second, 0).astype(np.float32)
    prototypes = np.where(assigned, nearest, -1).astype(np.int32)
    typing = Typing(
        names=(UNASSIGNED, *bank.names, *(space.class_names[k] for k in known)),
        colors=(GREY, *(of.color for of in bank.types), *_unused_colors(bank, len(known))),
        codes=codes[back],
        scores=scores[back],
        margins=margins[back],
        prototypes=prototypes[back],
    )
    reference_classes = tuple(
        {
            name: round(sum(r.weight for r in hypotheses if r.classes[t] == k), 3)
            for k, name in enumerate(space.class_names)
        }
        for t in range(len(bank.types))
    )
    own = ", ".join(space.class_names)
    warnings = (
        *(
            []
            if clicked
            else [f"the types are the model's own ({own}), without a click: check them, or click one cell per type"]
        ),
        *(() if other_stain else _ambiguous(reference_classes, bank.names)),  # there, which class it is decides little
        *_confusable(hypotheses[0], bank.names, config),
        *_unclicked(ranked[:, 0] - len(bank.types), known, space),
    )
    return typing, TypingNotes(reference_classes, warnings)


def _for_rows(work: Callable[[slice], None], count: int) -> None:
    """Call ``work`` with slices that make up ``count`` rows, on all cores. Rows must be independent: the slices then change no number."""
    for _ in parallel_map(work, (slice(start, start + ROWS) for start in range(0, count, ROWS))):
        pass


def _interpret(
    bank: Bank, z: NDArray[np.float32], space: TypeSpace, config: TypingConfig
) -> tuple[list[Hypothesis], list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """What the clicks may mean on this slide; and its clicked and negative cells (n, D) of each type, in the space, as they would look here."""
    clicked, negative = (
        [space.project(cells).astype(np.float64) for cells in side]
        for side in ([of.clicked for of in bank.types], [of.negative for of in bank.types])
    )
    if not clicked:
        return [hypothesis_without_clicks(z, space, config)], clicked, negative
    hypotheses = [of for of in infer_hypotheses(clicked, space, config) if of.weight > 1e-3]  # the rest decides no type
    if not bank.from_other_slide:
        return learn_from_sure_cells(hypotheses, clicked, z, space, config), clicked, negative
    there = [of.slide_effect for of in hypotheses]
    hypotheses = transfer_to_slide(hypotheses, z, space, config)
    moved = [of.slide_effect - effect for of, effect in zip(hypotheses, there, strict=True)]
    hypotheses = learn_from_sure_cells(hypotheses, clicked, z, space, config, moved)
    return hypotheses, [x + moved[0] for x in clicked], [x + moved[0] for x in negative]


def _exclude_by_negative_clicks(
    p: NDArray[np.float32],
    z: NDArray[np.float32],
    clicked: list[NDArray[np.float64]],
    negative: list[NDArray[np.float64]],
) -> None:
    """Exclude type t, in place, for cells nearer to a negative click of t than to every click of t; other types are unaffected."""
    for t, against in enumerate(negative):
        if len(against):
            p[_squared_distances(z, against).min(1) < _squared_distances(z, clicked[t]).min(1), t] = 0
    p /= np.maximum(p.sum(1, keepdims=True), 1e-12)


def _squared_distances(z: NDArray[np.float32], anchors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Squared distances to the anchors (n, D), less what all anchors have in common -> (N, n)."""
    a = anchors.astype(np.float32)
    gaps: NDArray[np.float32] = (a**2).sum(1) - 2 * np.einsum("ij,kj->ik", z, a)
    return gaps


def _nearest_click(
    z: NDArray[np.float32], clicked: list[NDArray[np.float64]], best: NDArray[np.intp]
) -> NDArray[np.int32]:
    """Index of the most similar click of each cell's best type, counted through all types; -1 for a type without -> (N,)."""
    first = np.cumsum([0, *(len(x) for x in clicked)])
    nearest = np.full(len(z), -1, np.int32)
    for t, anchors in enumerate(clicked):
        of_type = best == t
        nearest[of_type] = first[t] + _squared_distances(z[of_type], anchors).argmin(1)
    return nearest


def _with_local_prevalence(
    p: NDArray[np.float32], xy_um: NDArray[np.float64], config: TypingConfig
) -> NDArray[np.float32]:
    """Posteriors (N, types and background classes) with the prevalence around each cell as prior.

    The prevalence is estimated on squares of ``neighbourhood_um`` and smoothed over the 3 x 3 around each (weights 1, 2, 1), with the slide's
    as a prior of ``neighbourhood_cells`` cells.
    """
    here, height, width = squares(xy_um, config.neighbourhood_um)
    types = p.shape[1]
    prevalence = np.full((height * width, types), 1 / types)
    if config.prevalence_rounds and config.prevalence_temperature != 1:
        p = p ** np.float32(1 / config.prevalence_temperature)
        p /= np.maximum(p.sum(1, keepdims=True), 1e-12)
    out = p
    for _ in range(config.prevalence_rounds):
        out = p * prevalence[here].astype(np.float32)
        out /= np.maximum(out.sum(1, keepdims=True), 1e-12)
        count = np.stack(
            [np.bincount(here, weights=out[:, t], minlength=height * width) for t in range(types)], 1
        ).astype(np.float64)
        overall = count.sum(0) / max(count.sum(), 1e-12)
        around = smooth(count.reshape(height, width, types)).reshape(-1, types)
        prevalence = (around + config.neighbourhood_cells * overall) / np.maximum(
            around.sum(1, keepdims=True) + config.neighbourhood_cells, 1e-12
        )
    return out


def _ambiguous(reference_classes: tuple[dict[str, float], ...], names: tuple[str, ...]) -> list[str]:
    """A warning for each type whose clicks fit two reference classes: the types may be swapped."""
    warnings = []
    for name, classes in zip(names, reference_classes, strict=True):
        likely = sorted(classes, key=lambda c: -classes[c])[:2]
        if len(likely) == 2 and classes[likely[1]] > _AMBIGUOUS:
            said = " or ".join(f"{c} ({classes[c]:.0%})" for c in likely)
            warnings.append(f"the clicks on {name} could mean {said}; click another typical cell of the type")
    return warnings


def _confusable(hypothesis: Hypothesis, names: tuple[str, ...], config: TypingConfig) -> list[str]:
    """A warning for each pair of types whose distributions overlap too much."""
    warnings = []
    for a, b in itertools.combinations(range(len(names)), 2):
        variance = (hypothesis.variances[a] + hypothesis.variances[b]) / 2
        apart = float(np.sqrt(((hypothesis.means[a] - hypothesis.means[b]) ** 2 / variance).sum()))
        if apart < config.separable:
            warnings.append(
                f"types {names[a]} and {names[b]} are hard to tell apart for this model (distance {apart:.1f}, {config.separable:g} is needed); "
                "click a few more typical cells of each"
            )
    return warnings


def _known_classes(bank: Bank, hypotheses: list[Hypothesis], space: TypeSpace) -> list[int]:
    """Reference classes that are types of their own: those that no clicked type probably is, or is called like."""
    clicked = {name.casefold() for name in bank.names}
    return [
        k
        for k, name in enumerate(space.class_names)
        if name.casefold() not in clicked and sum(h.weight for h in hypotheses if k in h.classes) < _COVERED
    ]


def _unused_colors(bank: Bank, count: int) -> list[tuple[int, int, int]]:
    """Colours for this many more types."""
    used = {of.color for of in bank.types}
    return list(itertools.islice(itertools.cycle([c for c in PALETTE if c not in used] or PALETTE), count))


def _unclicked(best_class: NDArray[np.intp], known: list[int], space: TypeSpace) -> list[str]:
    """A warning for each reference class that many cells belong to and that is not a type."""
    warnings = []
    for k, name in enumerate(space.class_names):
        share = float((best_class == k).mean())
        if share >= _MANY and k not in known:
            warnings.append(
                f"{share:.0%} of the cells look {name}, which none of the clicked types covers, and stay {UNASSIGNED}; click one to have them typed"
            )
    return warnings


def set_click_labels(typing: Typing, rows: list[NDArray[np.intp]]) -> Typing:
    """``typing`` with the clicked cells' types as clicked, at score and margin 1.

    ``rows`` has per type the rows of its clicks, in order; -1 where there is no cell.
    """
    codes, scores, margins, prototypes = (
        typing.codes.copy(),
        typing.scores.copy(),
        typing.margins.copy(),
        typing.prototypes.copy(),
    )
    number = 0
    for t, clicked in enumerate(rows):
        for row in clicked:
            if row >= 0:
                codes[row], scores[row], margins[row], prototypes[row] = t + 1, 1, 1, number
            number += 1
    return Typing(
        names=typing.names, colors=typing.colors, codes=codes, scores=scores, margins=margins, prototypes=prototypes
    )


def typing_summary(
    typing: Typing, bank: Bank | None, notes: TypingNotes, described: Sequence[DescribedType] = ()
) -> dict[str, Any]:
    """Summary of the types for the manifest: clicks (numbered as in ``prototypes``), reference classes, phrases, cells, fraction unassigned."""
    cells = np.bincount(typing.codes, minlength=len(typing.names))
    types: dict[str, dict[str, Any]] = {
        name: {"cells": int(n), "clicks": [], "negative": 0, "kind": {name: 1.0}}
        for name, n in zip(typing.names[1:], cells[1:], strict=True)
    }
    for t, of in enumerate(bank.types if bank else ()):
        types[of.name] |= {
            "clicks": np.round(of.clicks, 2).tolist() if bank and not bank.from_other_slide else len(of.clicked),
            "negative": len(of.negative),
            "kind": notes.reference_classes[t] if notes.reference_classes else {},
        }
    for described_type in described:
        types[described_type.name]["text"] = list(described_type.phrases)
    return {
        "types": types,
        "warnings": list(notes.warnings),
        "unassigned": round(float(cells[0]) / max(len(typing.codes), 1), 4),
    }
