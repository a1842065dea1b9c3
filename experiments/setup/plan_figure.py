"""The figure of a plan: efficiency against the number of workers."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.setup.simulation import Outcome
from wavg_jax.reporting import canvas
from wavg_jax.reporting.canvas import DASHES, MARKERS, Plot, Theme

HEIGHT = 4.0


def draw_plan(found: Mapping[tuple[int, int, str], Outcome], subtitle: str) -> Plot:
    """Draws the efficiency of every case: a colour and marker for sync and each H, dashes for each wire format.

    Args:
      found: (workers, H or 0 for sync, wire) -> outcome.
      subtitle: what was planned with.
    """
    title = "Share of the time spent on work that is kept"
    workers, forms = sorted({case[0] for case in found}), sorted({case[1] for case in found})
    wires, dashes = dict.fromkeys(case[2] for case in found), ("-", DASHES[2], DASHES[1])

    def paint(theme: Theme) -> Figure:
        figure, axes = canvas.make_axes(theme, title, subtitle, HEIGHT)
        for i, form in enumerate(forms):
            ink, marker = theme.colours[i % len(theme.colours)], MARKERS[i % len(MARKERS)]
            for wire, dash in zip(wires, dashes, strict=False):
                shares = [100 * found[at, form, wire].efficiency for at in workers]
                axes.plot(workers, shares, color=ink, linestyle=dash, marker=marker, linewidth=1.8)
            axes.plot([], [], color=ink, marker=marker, label=f"H = {form:,}" if form else "sync")
        for wire, dash in zip(wires, dashes, strict=False):
            axes.plot([], [], color=theme.ink, linestyle=dash, label=wire)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 105)
        axes.set_xlabel("workers")
        axes.set_ylabel("efficiency (%)")
        axes.grid(axis="y", color=theme.faint, linewidth=0.8)
        canvas.legend(theme, axes)
        return figure

    caption = "Computed: the share of communication and what failures cost are taken off. Dashes: format on the wire."
    return canvas.make_plot("plan", title, caption, paint)
