"""The figures of a report, as PNG images.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and every arm has a line style of its own.
Nothing here touches pyplot, so there is no global state and no figure to close.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from wavg_jax.summary import KNOWN_ARMS, Arm, Floats, Run, Summary

INK = "#333333"
# The known arms first, in their order; then whatever else was trained.
COLOURS = ("#7F7F7F", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
STYLES = ("-.", "--", "-", "-", (0, (5, 1)), (0, (3, 1, 1, 1)), ":", (0, (1, 1)))
SIZE = (9.0, 4.8)  # inches, at 100 dots each: the 900 px that a report is wide
DPI = 150


class Plot(NamedTuple):
    """A drawn figure.

    Attributes:
      name: what the file is called, without ending.
      title: what it shows, in a few words.
      caption: how to read it.
      png: the image.
    """

    name: str
    title: str
    caption: str
    png: bytes


def draw(summary: Summary) -> tuple[Plot, ...]:
    """Draws the figures that the recorded runs allow.

    Args:
      summary: the statistics of one scenario.

    Returns:
      Plots in the order of the report: accuracy on the measured clock, on the computed clock and against samples;
      the effective number of replicas; the weights of one seed; the confusion matrix.
    """
    band = (
        "Line: mean over seeds, up to the last round that all have; band: ± 1 standard deviation; dotted: target. "
        "The frame may leave out early rounds."
    )
    k = int(summary.header["replicas"])
    plots = [
        _accuracy(
            summary,
            "accuracy_measured",
            "Test accuracy on the measured clock",
            f"{band} Wall time of all replicas on this hardware, compilation apart.",
            "measured wall time on this hardware (s)",
            lambda run: run.elapsed,
        ),
        _accuracy(
            summary,
            "accuracy_critical_path",
            "Test accuracy on the computed clock (critical path)",
            f"{band} Computed, not measured: rounds times what one replica's local phase, scoring and blend take.",
            f"critical path, computed for {k} devices (s)",
            lambda run: run.critical,
        ),
        _accuracy(
            summary,
            "accuracy_samples",
            "Test accuracy against samples",
            band,
            "training samples seen, all replicas together",
            lambda run: run.samples,
        ),
        _effective(summary),
        _heat_map(summary.focus),
        _confusion(summary.focus),
    ]
    return tuple(plot for plot in plots if plot is not None)


def colour(summary: Summary, arm: Arm) -> str:
    """The colour of an arm, the same in every figure."""
    return COLOURS[_index(summary, arm) % len(COLOURS)]


def _index(summary: Summary, arm: Arm) -> int:
    others = [other.name for other in summary.arms if other.name not in KNOWN_ARMS]
    return (*KNOWN_ARMS, *others).index(arm.name)


def _axes(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(labelsize=11, colors=INK)
    axes.xaxis.label.set(size=12, color=INK)
    axes.yaxis.label.set(size=12, color=INK)
    return figure, axes


def render(figure: Figure, name: str, title: str, caption: str) -> Plot:
    """Turns a figure into the image of a plot."""
    image = io.BytesIO()
    # Unlike savefig, this draws once; without the writer's version the same rows give the same bytes.
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    return Plot(name, title, caption, image.getvalue())


def _mean_sd(curves: Sequence[Floats]) -> tuple[Floats, Floats]:
    # Only the rounds that every seed has: a mean that loses a seed midway jumps without cause.
    length = min(map(len, curves))
    stacked = np.stack([curve[:length] for curve in curves])
    return stacked.mean(axis=0), stacked.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(length)


def _lines(
    axes: Axes, summary: Summary, arms: Sequence[Arm], x: Callable[[Run], Floats], y: Callable[[Run], Floats]
) -> list[tuple[Floats, Floats]]:
    """Draws mean and band of each arm; returns the lower and upper edges of the bands, arm by arm."""
    edges = []
    for arm in arms:
        across, _ = _mean_sd([x(run) for run in arm.runs])
        mean, sd = _mean_sd([y(run) for run in arm.runs])
        index, seeds = _index(summary, arm), len(arm.runs)
        label = f"{arm.name} ({seeds} seed{'s' if seeds > 1 else ''})"
        ink = COLOURS[index % len(COLOURS)]
        axes.fill_between(across, mean - sd, mean + sd, color=ink, alpha=0.18, linewidth=0)
        marker = "o" if len(mean) < 3 else None
        axes.plot(
            across,
            mean,
            color=ink,
            linestyle=STYLES[index % len(STYLES)],
            linewidth=2,
            marker=marker,
            label=label,
        )
        edges.append((mean - sd, mean + sd))
    return edges


def _accuracy(
    summary: Summary, name: str, title: str, caption: str, x_label: str, x: Callable[[Run], Floats]
) -> Plot | None:
    arms = [arm for arm in summary.arms if all(np.isfinite(x(run)).all() for run in arm.runs)]
    if not arms:
        return None
    figure, axes = _axes()
    edges = _lines(axes, summary, arms, x, lambda run: 100 * run.accuracy)
    target = 100 * summary.target
    if math.isfinite(target):
        axes.axhline(target, color=INK, linestyle=":", linewidth=1.2)
    axes.set_ylim(*_limits(edges, target))
    axes.set_xlim(left=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel("test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.legend(loc="lower right", framealpha=0.8, edgecolor="none", fontsize=11)
    return render(figure, name, title, caption)


def _limits(edges: Sequence[tuple[Floats, Floats]], target: float) -> tuple[float, float]:
    # The steep first quarter would squash the part in which arms differ, so the lines may enter from below.
    low = np.concatenate([lower[len(lower) // 4 :] for lower, _ in edges])
    high = np.concatenate([upper for _, upper in edges])
    if np.isnan(low).all():
        return 0.0, 100.0
    bottom, top = float(np.nanmin(low)), float(np.nanmax(high))
    span = max(top - bottom, 2.0)
    if bottom - span <= target <= top + span:
        bottom, top = min(bottom, target), max(top, target)
    margin = 0.06 * max(top - bottom, 2.0)
    return max(bottom - margin, -1.0), min(top + margin, 101.0)


def _effective(summary: Summary) -> Plot | None:
    arms = [arm for arm in summary.arms if arm.weights is not None]
    if not arms:
        return None
    figure, axes = _axes(height=3.8)
    edges = _lines(axes, summary, arms, lambda run: run.rounds, lambda run: run.effective)
    k = int(summary.header["replicas"])
    lowest = np.concatenate([lower for lower, _ in edges])
    # At least a tenth of K is shown, or the rounding of equal weights would look like a trend.
    bottom = min([0.9 * k, *lowest[np.isfinite(lowest)]])
    axes.set_ylim(max(bottom - 0.05 * (k - bottom), 0), k + 0.08 * (k - bottom))
    axes.axhline(k, color=INK, linestyle=":", linewidth=1.2)
    axes.set_xlabel("round")
    axes.set_ylabel("effective number of replicas")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.legend(loc="best", framealpha=0.8, edgecolor="none", fontsize=11)
    caption = f"1 / Σ w²: from 1 (one replica decides) to {k} (dotted: all count the same). Band: ± 1 sd over seeds."
    return render(figure, "effective_replicas", "Effective number of replicas", caption)


def _heat_map(arm: Arm) -> Plot | None:
    if arm.weights is None:
        return None
    run = arm.runs[0]
    k = run.replicas
    noisy = set(run.header["noisy_shards"] or ())
    figure, axes = _axes(height=max(3.2, min(1.4 + 0.32 * k, 7)))
    weights = run.weights.T
    finite = weights[np.isfinite(weights)]
    norm = TwoSlopeNorm(1 / k, vmin=0, vmax=max([2 / k, *finite]))
    first, last = run.rounds[0] - 0.5, run.rounds[-1] + 0.5
    image = axes.imshow(
        weights,
        aspect="auto",
        cmap="PuOr",
        norm=norm,
        interpolation="nearest",
        extent=(first, last, k - 0.5, -0.5),
    )
    dead = np.argwhere(~run.alive)
    if dead.size:
        axes.plot(run.rounds[dead[:, 0]], dead[:, 1], linestyle="", marker="x", color="white", markeredgewidth=2)
    step = math.ceil(k / 16)
    ticks = sorted({*range(0, k, step), *noisy})
    axes.set_yticks(ticks, [f"{tick} (noisy)" if tick in noisy else str(tick) for tick in ticks])
    for label, tick in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_fontweight("bold" if tick in noisy else "normal")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel("replica")
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.set_label(f"weight (white: 1/K = {1 / k:.3g})", size=11, color=INK)
    bar.ax.tick_params(labelsize=10, colors=INK)
    caption = f"Arm {arm.name}, seed {run.seed}. White is the equal weight 1/{k}. A cross: the replica took no part."
    return render(figure, "weights", "Weight of each replica", caption)


def _confusion(arm: Arm) -> Plot | None:
    counts = [run.confusion for run in arm.runs if run.confusion is not None]
    if not counts:
        return None
    total = np.sum(counts, axis=0)
    share = 100 * total / np.maximum(total.sum(axis=1, keepdims=True), 1)
    classes = len(share)
    figure, axes = _axes(height=7.2)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if classes <= 12:
        for (row, column), value in np.ndenumerate(share):
            ink = "white" if value > 55 else INK
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=10, color=ink)
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.set_label("share of the true class (%)", size=11, color=INK)
    bar.ax.tick_params(labelsize=10, colors=INK)
    seeds = ", ".join(str(run.seed) for run in arm.runs if run.confusion is not None)
    caption = f"Arm {arm.name}, final round, test split, summed over seeds {seeds}; each row adds up to 100 %."
    return render(figure, "confusion", "Confusion matrix", caption)
