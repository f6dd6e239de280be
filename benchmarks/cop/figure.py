"""The figure of a few panels, one for each table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.cop.typed import COUNTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, object]]
SHORT = {
    "nearest click (cosine)": "nearest click",
    "nearest click in the type space": "nearest, type space",
    "mean + sd, tile by tile": "mean + sd",
    "ours, shift from the cells (as a bank)": "ours, shift from cells",
    "a linear classifier, all labels of the other tiles": "all labels, linear",
}
FREQUENT = (
    "ours",
    "ours, no sure cells",
    "ours, min_score 0.999",
    "nearest click in the type space",
    "mean + sd, tile by tile",
    "chain of hops",
)


def _number(value: object) -> tuple[float, float]:
    """``0.738 +- 0.003`` -> both; without a spread 0."""
    mean, _, sd = str(value).partition(" +- ")
    return float(mean), float(sd or 0)


def _plt() -> object:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw(tables: dict[str, Rows]) -> None:
    """``cop.png``: the panels whose tables there are."""
    panels = [
        (draw_one, part) for key, draw_one in PANELS.items() for title, part in tables.items() if title.startswith(key)
    ]
    if not panels:
        return
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, axes = _plt().subplots(
        lines, columns, figsize=(4.7 * columns, 3.9 * lines), layout="constrained", squeeze=False
    )
    for axis, (draw_one, part) in zip(axes.flat, panels, strict=False):
        draw_one(axis, part)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.savefig(RESULTS / "cop.png", dpi=110)


def _retention(axis: Axes, rows: Rows) -> None:
    ways = {
        "apg, no click": "no click (apg)",
        "cop (default)": "one click, default",
        "cop, floor not limited": "one click, floor not limited",
    }
    sets = list(dict.fromkeys(r["set"] for r in rows))
    for k, (way, label) in enumerate(ways.items()):
        mean, sd = np.array(
            [
                _number(next(r["of one point per nucleus"] for r in rows if r["set"] == s and r["prompts"] == way))
                for s in sets
            ]
        ).T
        axis.bar(
            np.arange(len(sets)) + (k - 1) * 0.27,
            mean,
            0.25,
            yerr=sd,
            label=label,
            color=("#999999", "#1b6ca8", "#e09f3e")[k],
        )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(np.arange(len(sets)), [s.split("/")[0].replace("_histology", "") for s in sets])
    axis.set(title="What one click per image keeps", ylabel="AJI / AJI of one point per nucleus", ylim=(0, 1.25))
    axis.legend(fontsize=7, loc="upper left", ncols=2)


def _more_clicks(axis: Axes, rows: Rows) -> None:
    """Solid: the first collection; dashed: the second."""
    for dashes, name in zip(("-", "--"), dict.fromkeys(r["set"] for r in rows), strict=False):
        for k, rule in enumerate(dict.fromkeys(r["rule"] for r in rows)):
            row = next(r for r in rows if r["set"] == name and r["rule"] == rule)
            mean, sd = np.array([_number(row[f"{n} click{'s' * (n > 1)}"]) for n in COUNTS]).T
            axis.errorbar(
                COUNTS,
                mean,
                sd,
                fmt=f"o{dashes}",
                markersize=3,
                color=f"C{k}",
                label=SHORT.get(rule, rule) if dashes == "-" else None,
            )
    axis.set(
        title="More clicks (dashed: nucls_mini)",
        xlabel="clicks per type and image",
        ylabel="macro-F1 on true dots",
        ylim=(0, 1),
        xticks=COUNTS,
    )
    axis.legend(fontsize=7, ncols=2, loc="lower right")


def _differences(axis: Axes, rows: Rows) -> None:
    names, place = [], 0
    for name in dict.fromkeys(r["set"] for r in rows):
        for r in rows:
            if r["set"] == name and r["clicks"] == 1 and r["ours less this (95 %)"]:
                gap, low, high = (
                    float(v)
                    for v in str(r["ours less this (95 %)"]).replace("(", "").replace(")", "").replace("to", "").split()
                )
                axis.errorbar(
                    gap,
                    place,
                    xerr=[[gap - low], [high - gap]],
                    fmt="o",
                    markersize=4,
                    color="C0" if name.startswith("brca") else "C1",
                )
                names.append(
                    f"{SHORT.get(r['rule'], r['rule'])} ({name.split('/')[0].split('_')[0]})".replace(
                        ", measurements only", ", measured"
                    )
                )
                place += 1
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(place), names, fontsize=7)
    axis.invert_yaxis()
    axis.set(title="Ours less another rule, 1 click (95 %)", xlabel="difference of macro-F1")


def _bank(axis: Axes, rows: Rows) -> None:
    rules = list(dict.fromkeys((r["clicks in"], r["rule"]) for r in rows))
    labels = [
        "clicks in every image",
        "one image, shift found",
        "one image, no shift",
        "one image, nearest (space)",
        "one image, nearest (cosine)",
    ]
    for k, count in enumerate((1, 5)):
        of = {(r["clicks in"], r["rule"]): r["macro-F1"] for r in rows if r["clicks"] == count}
        mean, sd = np.array([_number(of[x]) for x in rules]).T
        axis.barh(
            np.arange(len(rules)) + (k - 0.5) * 0.38,
            mean,
            0.36,
            xerr=sd,
            label=f"{count} per type",
            color=("#7fb2d9", "#1b6ca8")[k],
        )
    axis.set_yticks(range(len(rules)), labels[: len(rules)], fontsize=7)
    axis.invert_yaxis()
    axis.set(title="Clicks in another image", xlabel="macro-F1 on true dots", xlim=(0, 1))
    axis.legend(fontsize=7)


def _absent(axis: Axes, rows: Rows) -> None:
    rules = list(dict.fromkeys(r["rule"] for r in rows))
    for k, where in enumerate(dict.fromkeys(r["clicks in"] for r in rows)):
        mine = [next(r for r in rows if r["clicks in"] == where and r["rule"] == rule) for rule in rules]
        mean, sd = np.array([_number(r["given a type its tile lacks"]) for r in mine]).T
        axis.barh(
            np.arange(len(rules)) + (k - 0.5) * 0.38,
            mean,
            0.36,
            xerr=sd,
            label=f"clicks in {where}",
            color=("#7fb2d9", "#1b6ca8")[k],
        )
    axis.set_yticks(range(len(rules)), [SHORT.get(r, r) for r in rules], fontsize=7)
    axis.set(
        title="Tiles without a type",
        xlabel="share of their cells given that type",
        xlim=(0, None),
        ylim=(len(rules) - 0.4, -1.3),
    )
    axis.legend(fontsize=7, loc="upper right")


def _frequent(axis: Axes, rows: Rows) -> None:
    for dashes, where in zip(("-", "--"), dict.fromkeys(r["clicks in"] for r in rows), strict=False):
        for k, rule in enumerate(FREQUENT):
            mine = [r for r in rows if r["clicks in"] == where and r["rule"] == rule]
            share = [float(str(r["share of the type"]).rstrip("%")) for r in mine]
            label = SHORT.get(rule, rule) if dashes == "-" else None
            axis.plot(
                share, [_number(r["recall"])[0] for r in mine], f"o{dashes}", markersize=3, color=f"C{k}", label=label
            )
    axis.set(
        title="Rare and frequent types",
        xlabel="share of the type, % (dashed: clicks in every tile)",
        ylabel="recall of the type",
        ylim=(0, 1.3),
    )
    axis.legend(fontsize=6.5, ncols=2, loc="upper center")


PANELS = {"a.": _retention, "b1.": _differences, "d.": _more_clicks, "Bank": _bank, "c1.": _absent, "c2.": _frequent}
