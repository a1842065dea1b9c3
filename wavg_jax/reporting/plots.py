"""The figures of one scenario: quality on three axes, effective replicas, weights, confusion matrix."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import DASHES, MARKERS, SMALL, TEXT, Plot, Theme
from wavg_jax.reporting.lanes import draw_lanes
from wavg_jax.reporting.measures import Measure
from wavg_jax.reporting.runs import RecordedRun, links_in_words
from wavg_jax.reporting.statistic import Floats
from wavg_jax.reporting.summary import ArmSummary, Summary
from wavg_jax.reporting.wording import capitalised, clock_unit, distinct, seeds

HEIGHT = 4.4
REFERENCE_PLACE, FOCUS_PLACE = 2, 3
Curve = Callable[[RecordedRun], Floats]
Places = Mapping[str, int]


def arm_places(summaries: Sequence[Summary]) -> dict[str, int]:
    """The place of each arm among colours, dashes and markers, the same in every figure of a report.

    The arm in focus is solid and the reference dashed in every report; others take the rest in order of appearance.
    """
    names = dict.fromkeys(arm.name for one in summaries for arm in one.arms)
    reference = next((one.reference for one in summaries if one.reference), "")
    places = {reference: REFERENCE_PLACE, summaries[0].focus.name: FOCUS_PLACE}
    free = [place for place in range(len(MARKERS)) if place not in places.values()]
    others = [name for name in names if name not in places]
    places |= {name: free[number % len(free)] for number, name in enumerate(others)}
    return {name: places[name] for name in names}


def draw_scenario(summary: Summary, places: Places) -> tuple[Plot, ...]:
    """Draws the figures that the recorded runs allow.

    Args:
      summary: the statistics of one scenario.
      places: the place of each arm among colours, dashes and markers.

    Returns:
      Plots in the order of the report: test accuracy (or loss) on the measured clock, on the computed clock and against
      samples; the effective number of replicas; the weights of one seed; the confusion matrix; what workers did.
    """
    words, metric = capitalised(summary.measure.words), summary.measure.metric
    dotted = "; dotted: target" if math.isfinite(summary.target) else ""
    band = (
        f"Line: mean over seeds, up to the last round in which all are finite; band: ± 1 standard deviation{dotted}. "
        "The frame may cut off early rounds."
    )
    k, apart = int(summary.header["replicas"]), ""
    if len(distinct(run.header.get("devices") for run in summary.runs)) > 1:
        apart = " The arms ran on different numbers of devices, so their lines do not compare here."
    plots = [
        _quality(
            summary,
            places,
            f"{metric}_measured",
            f"{words} on the measured clock",
            f"{band} Wall time of all replicas on this hardware, without compilation.{apart}",
            ("wall time on this hardware", lambda run: run.elapsed),
        ),
        _quality(
            summary,
            places,
            f"{metric}_critical_path",
            f"{words} on the computed clock (critical path)",
            f"{band} Computed, not measured: rounds times the time of one replica's local phase, scoring and blend, "
            f"with one device for each replica {links_in_words(summary.runs)}.",
            (f"critical path, computed for {k} device{'s' if k > 1 else ''}", lambda run: run.critical),
        ),
        _quality(summary, places, f"{metric}_samples", f"{words} against samples", band, None),
        _effective(summary, places),
        _heat_map(summary),
        _confusion(summary),
        draw_lanes(summary.focus.runs, f"{summary.header['dataset']}, {summary.scenario}"),
    ]
    return tuple(plot for plot in plots if plot is not None)


def _subtitle(summary: Summary) -> str:
    """What was trained on, and over how many seeds if all arms have as many."""
    counts = {len(arm.runs) for arm in summary.arms}
    count = f", {seeds(*counts)}" if len(counts) == 1 else ""
    return f"{summary.header['dataset']}, {summary.scenario}{count}"


def _band(curves: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Mean and standard deviation over seeds."""
    # Only the rounds that every seed has: a mean that loses a seed midway jumps without cause.
    length = min(map(len, curves))
    stacked = np.stack([curve[:length] for curve in curves])
    return stacked.mean(axis=0), stacked.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(length)


def _lines(
    theme: Theme, axes: Axes, summary: Summary, arms: Sequence[ArmSummary], places: Places, x: Curve, y: Curve
) -> list[tuple[Floats, Floats]]:
    """Draws mean and band of each arm; returns the lower and upper edges of the bands, arm by arm."""
    edges = []
    uneven = len({len(arm.runs) for arm in summary.arms}) > 1
    for arm in arms:
        across, _ = _band([x(run) for run in arm.runs])
        mean, sd = _band([y(run) for run in arm.runs])
        place = places[arm.name]
        ink = theme.colours[place]
        axes.fill_between(across, mean - sd, mean + sd, color=ink, alpha=0.18, linewidth=0)
        apart = max(len(mean) // 6, 1)
        axes.plot(
            across,
            mean,
            color=ink,
            linestyle=DASHES[place],
            linewidth=2,
            marker=MARKERS[place],
            markersize=5.5,
            # Not where the other arms have theirs.
            markevery=(place % apart, apart),
            label=f"{arm.name} ({seeds(len(arm.runs))})" if uneven else arm.name,
        )
        edges.append((mean - sd, mean + sd))
    return edges


def _quality(
    summary: Summary, places: Places, name: str, title: str, caption: str, clock: tuple[str, Curve] | None
) -> Plot | None:
    """What arms are judged by on a clock, or, without one, against samples; None if nothing finite is recorded."""
    measure = summary.measure
    label, x = clock or ("training samples seen, all replicas together", lambda run: run.samples)
    arms = [arm for arm in summary.arms if all(np.isfinite(x(run)).all() for run in arm.runs)]
    if not arms or not any(np.isfinite(run.quality[measure.metric]).any() for arm in arms for run in arm.runs):
        return None
    unit, scale = clock_unit([float(x(run)[-1]) for arm in arms for run in arm.runs])
    label, scale = (label, 1.0) if clock is None else (f"{label} ({unit})", scale)
    target = 100 * summary.target

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, _subtitle(summary), HEIGHT)
        edges = _lines(
            theme,
            axes,
            summary,
            arms,
            places,
            lambda run: scale * x(run)[run.evaluated],
            lambda run: measure.scale * run.quality[measure.metric][run.evaluated],
        )
        if math.isfinite(target):
            axes.axhline(target, color=theme.ink, linestyle=":", linewidth=1.2)
        axes.set_ylim(*_limits(edges, target, measure))
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.set_ylabel(f"test {measure.title}")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        axes.grid(axis="y", color=theme.faint, linewidth=0.8)
        canvas.legend(theme, axes)
        return figure

    return canvas.make_plot(name, title, caption, paint)


def _limits(edges: Sequence[tuple[Floats, Floats]], target: float, measure: Measure) -> tuple[float, float]:
    # The steep first quarter would squash the part in which arms differ, so the lines may enter from outside.
    late = [(lower[len(lower) // 4 :], upper[len(upper) // 4 :]) for lower, upper in edges]
    low = np.concatenate([lower for lower, _ in (late if measure.higher else edges)])
    high = np.concatenate([upper for _, upper in (edges if measure.higher else late)])
    if np.isnan(low).all() or np.isnan(high).all():
        return 0.0, 100.0 if measure.percent else 1.0
    bottom, top = float(np.nanmin(low)), float(np.nanmax(high))
    least = 2.0 if measure.percent else 0.02 * max(abs(bottom), abs(top), 1e-9)
    span = max(top - bottom, least)
    if bottom - span <= target <= top + span:
        bottom, top = min(bottom, target), max(top, target)
    margin = 0.06 * max(top - bottom, least)
    bottom, top = bottom - margin, top + margin
    return (max(bottom, -1.0), min(top, 101.0)) if measure.percent else (bottom, top)


def _effective(summary: Summary, places: Places) -> Plot | None:
    arms = [arm for arm in summary.arms if arm.shares is not None and arm.shares.lost < arm.shares.rounds]
    if not arms:
        return None
    title, k = "Effective number of replicas", int(summary.header["replicas"])

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, _subtitle(summary), HEIGHT - 0.8)
        edges = _lines(theme, axes, summary, arms, places, lambda run: run.rounds, _living)
        lowest = np.concatenate([lower for lower, _ in edges])
        # Show at least a tenth of K, or the rounding of equal weights would look like a trend.
        bottom = min([0.9 * k, *lowest[np.isfinite(lowest)]])
        axes.set_ylim(max(bottom - 0.05 * (k - bottom), 0), k + 0.08 * (k - bottom))
        axes.axhline(k, color=theme.ink, linestyle=":", linewidth=1.2)
        axes.set_xlabel("round")
        axes.set_ylabel("effective number")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=theme.faint, linewidth=0.8)
        canvas.legend(theme, axes)
        return figure

    caption = f"1 / Σ w²: from 1 (one replica decides) to {k} (dotted: all count the same). Band: ± 1 sd over seeds."
    return canvas.make_plot("effective_replicas", title, caption, paint)


def _living(run: RecordedRun) -> Floats:
    """The effective number of replicas [R]; nan in a round in which all were dead."""
    return np.where(run.alive.any(axis=1), run.effective, np.nan)


def _heat_map(summary: Summary) -> Plot | None:
    arm = summary.focus
    if arm.shares is None:
        return None
    run = arm.runs[0]
    k, title = run.replicas, f"Weight of each replica: {arm.name}, seed {run.seed}"
    made_from = f"{summary.header['dataset']}, {summary.scenario}"
    noisy = set(run.header["noisy_shards"] or ())
    weights = np.where(run.alive.any(axis=1, keepdims=True), run.weights, np.nan).T
    norm = TwoSlopeNorm(1 / k, vmin=0, vmax=max([2 / k, *weights[np.isfinite(weights)]]))
    dead = np.argwhere(~run.alive)
    ticks = sorted({*range(0, k, math.ceil(k / 16)), *noisy})

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, made_from, max(3.4, min(1.8 + 0.3 * k, 7)))
        extent = (run.rounds[0] - 0.5, run.rounds[-1] + 0.5, k - 0.5, -0.5)
        image = axes.imshow(
            weights, aspect="auto", cmap=theme.diverging, norm=norm, interpolation="nearest", extent=extent
        )
        if dead.size:
            axes.plot(run.rounds[dead[:, 0]], dead[:, 1], linestyle="", marker="x", color=theme.ink, markeredgewidth=2)
        axes.set_yticks(ticks, [f"{tick} (noisy)" if tick in noisy else str(tick) for tick in ticks])
        for label, tick in zip(axes.get_yticklabels(), ticks, strict=True):
            label.set_fontweight("bold" if tick in noisy else "normal")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("round")
        axes.set_ylabel("replica")
        canvas.colour_bar(theme, figure, axes, image, f"weight (equal: 1/{k} = {1 / k:.3g})")
        return figure

    caption = (
        f"Arm {arm.name}, seed {run.seed}. Red: less than the equal weight 1/{k}, blue: more. A cross: the replica "
        "took no part."
    )
    return canvas.make_plot("weights", title, caption, paint)


def _confusion(summary: Summary) -> Plot | None:
    arm = summary.focus
    counts = [run.confusion for run in arm.runs if run.confusion is not None]
    if not counts:
        return None
    total = np.sum(counts, axis=0)
    share = 100 * total / np.maximum(total.sum(axis=1, keepdims=True), 1)
    title, names = f"Confusion matrix: {arm.name}", _class_names(summary, len(share))

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, _subtitle(summary), 6.0)
        image = axes.imshow(share, cmap=theme.shares, vmin=0, vmax=100)
        if len(share) <= 12:
            for (row, column), value in np.ndenumerate(share):
                if value >= 0.5:
                    ink = theme.on(*theme.shares(value / 100)[:3])
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=SMALL, color=ink)
            slanted = max(map(len, names)) > 2
            axes.set_xticks(range(len(names)), names, rotation=45 * slanted, ha="right" if slanted else "center")
            axes.set_yticks(range(len(names)), names)
        else:
            canvas.colour_bar(theme, figure, axes, image, "share of the true class (%)")
        axes.set_xlabel("predicted class", size=TEXT)
        axes.set_ylabel("true class", size=TEXT)
        return figure

    shown = ", ".join(str(run.seed) for run in arm.runs if run.confusion is not None)
    caption = (
        f"Arm {arm.name}, final round, test split, summed over seeds {shown}: share of each true class in %, by row; "
        "shares below 0.5 are left out."
    )
    return canvas.make_plot("confusion", title, caption, paint)


def _class_names(summary: Summary, classes: int) -> list[str]:
    """Names of the classes, shortened if long; their numbers if no names were recorded."""
    names = summary.header.get("class_names") or ()
    names = names if len(names) == classes else range(classes)
    return [name if len(name) <= 14 else f"{name[:13]}…" for name in map(str, names)]
