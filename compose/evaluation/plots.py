"""Quality against cost, as SVG with the colours of the page that contains it."""

import io
import re
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lora_compose.compose.evaluation.summary import Metric
from lora_compose.compose.support.terminal import plain

_COLOURS = {"#010101": "var(--ink)", "#020202": "var(--faint)", "#030303": "var(--rule)", "#040404": "var(--accent)"}
"""Stand-ins for the colours of the page, because matplotlib knows no variables."""
_INK, _FAINT, _RULE, _ACCENT = _COLOURS
_INKS = {"sanity": _FAINT, "baseline": _ACCENT, "method": _INK}
_MARKERS = {"sanity": "o", "baseline": "D", "method": "o"}
_LONGEST = 22  # characters of a label


def against_cost(summary: pd.DataFrame, metric: Metric) -> str:
    """A metric with its intervals against latent rows relative to the row without LoRA, every row of `summary` a point.

    Points of the same cost are drawn side by side. An `<svg>` element, empty if there is nothing to draw; the page
    defines `--ink`, `--faint`, `--rule` and `--accent`.
    """
    points = summary.dropna(subset=["rows_ratio", metric.key])
    if points.empty:
        return ""
    settings: Any = {
        "svg.hashsalt": metric.key,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _style(axes, metric)
        _draw(axes, points, metric)
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _for_page(stream.getvalue(), f"{metric.title} against latent rows", metric.key)


def _style(axes: Axes, metric: Metric) -> None:
    axes.set_xlabel("latent rows, plain image = 1", color=_FAINT, fontsize=9)
    axes.set_title(metric.title, loc="left", color=_INK, fontsize=11)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_RULE)


def _draw(axes: Axes, points: pd.DataFrame, metric: Metric) -> None:
    points = points.sort_values(metric.key, kind="stable")
    cost, value = points["rows_ratio"].to_numpy(), points[metric.key].to_numpy()
    names = np.array([_shortened(plain(name)) for name in points["arm"]])
    inks = np.array([_INKS[kind] for kind in points["role"]])
    start, stop = float(cost.min()), max(float(cost.max()), float(cost.min()) + 1)
    room = 0.02 * max(map(len, names)) + 0.05  # of the axis, for a label
    step = 0.035 * (stop - start)
    x = _side_by_side(cost, step)
    low, high = _ends(points, metric)
    margin = max(0.08 * (high.max() - low.min()), 0.02)
    axes.set_xlim(start - 3 * step, x.max() + (room + 0.06) * (stop - start) * 1.3)
    axes.set_ylim(low.min() - margin, high.max() + margin)
    axes.set_xticks(
        sorted(set(cost.round(2).tolist())) if len(set(cost.round(2))) < 6 else np.linspace(start, stop, 5).round(1)
    )
    for i, kind in enumerate(points["role"]):
        axes.plot([x[i], x[i]], [low[i], high[i]], color=inks[i], linewidth=1.4, solid_capstyle="round")
        axes.plot([x[i]], [value[i]], _MARKERS[kind], color=inks[i], markersize=5.5)
    gap = 0.062 * float(np.ptp(axes.get_ylim()))
    for group in _groups(x, room * (stop - start)):
        _label(axes, x[group], value[group], names[group], inks[group], gap, step)


def _label(
    axes: Axes, x: np.ndarray, y: np.ndarray, names: np.ndarray, inks: np.ndarray, gap: float, step: float
) -> None:
    """Names to the right of a group of points, with thin lines to them."""
    for i, height in enumerate(_apart(y, gap)):
        axes.plot([x[i], x.max() + 0.6 * step], [y[i], height], color=_RULE, linewidth=0.7, zorder=0.5)
        axes.text(x.max() + 0.8 * step, height, names[i], color=inks[i], fontsize=9, va="center")


def _ends(points: pd.DataFrame, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the intervals; a mean without an interval is both."""
    low, high = (points[f"{metric.key}_{end}"].fillna(points[metric.key]).to_numpy() for end in ("low", "high"))
    return low, high


def _side_by_side(cost: np.ndarray, step: float) -> np.ndarray:
    """Moves points of (nearly) the same cost to the right, so that each can be seen."""
    x = cost.astype(float)
    for i in np.argsort(cost, kind="stable"):
        while any(abs(x[i] - x[j]) < 0.9 * step for j in range(len(x)) if j != i and (cost[j], j) < (cost[i], i)):
            x[i] += step
    return x


def _groups(x: np.ndarray, room: float) -> list[np.ndarray]:
    """Points between which there is no room for a label, from the lowest to the highest."""
    order = np.argsort(x, kind="stable")
    cuts = np.flatnonzero(np.diff(x[order]) > room) + 1
    return [np.sort(group) for group in np.split(order, cuts)]


def _apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Ascending heights, moved as little as it takes to keep a distance."""
    lifted = heights.astype(float).copy()
    for i in range(1, len(lifted)):
        lifted[i] = max(lifted[i], lifted[i - 1] + gap)
    return lifted - (lifted - heights).mean()


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1].rstrip()}…"


def _for_page(svg: str, title: str, key: str) -> str:
    """The element alone, in the page's colours and font, with identifiers of its own and a name."""
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r"<(defs|metadata)>\s*<style.*?</style>\s*</\1>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg role="img" aria-label="{title}" \1>', svg, count=1)
