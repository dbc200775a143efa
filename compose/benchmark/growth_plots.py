"""Curves of growing costs as a PNG; needs matplotlib, which the `evaluation` extra has."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_compose.compose.benchmark.curves import Curve


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Writes one panel for each curve and quantity; axes begin at 0, so that what grows linearly is straight."""
    columns = max(len(curve.points[0].costs) for curve in curves)
    figure = Figure(figsize=(3 * columns, 2.4 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, curve in enumerate(curves):
        x = [point.at for point in curve.points]
        for column, name in enumerate(curve.points[0].costs):
            axes = figure.add_subplot(len(curves), columns, row * columns + column + 1)
            axes.plot(x, [point.costs[name] for point in curve.points], "o-", color="black", markersize=4, linewidth=1)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{name} by {curve.against}", fontsize=9, loc="left")
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
