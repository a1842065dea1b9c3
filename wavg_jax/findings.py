"""What the numbers of a report say, in sentences."""

import math

import scipy.stats

from wavg_jax import summary
from wavg_jax.summary import REFERENCE, Arm, Statistic, Summary


def half_width(d: Statistic) -> float:
    """Half of the 95 % interval of a mean by Student's t: with 3 seeds it is 2.5 times their sd.

    >>> from wavg_jax.summary import statistic
    >>> round(half_width(statistic([1.0, 2.0, 3.0])), 3)
    2.484
    """
    return float(scipy.stats.t.ppf(0.975, d.n - 1)) * d.sd / math.sqrt(d.n)


def findings(one: Summary) -> list[str]:
    """What the numbers say, in sentences: differences, weights, and what to beware of."""
    lines = [_versus(arm) for arm in one.arms if arm.differences]
    for arm in one.arms:
        lines += _weight_findings(arm, set(one.header["noisy_shards"] or ()))
    for run in one.runs:
        if not run.complete:
            lines.append(
                f"Incomplete: {run.header['run']} has {len(run.rounds)} of {run.header['rounds']} rounds; "
                f"round {run.rounds[-1]:.0f}, its last, stands for the final one."
            )
    lines += [f"Left out: {name} has no recorded round." for name in one.empty]
    if len(summary.distinct(run.header["hardware"] for run in one.runs)) > 1:
        lines.append("The runs were made on different hardware: their measured times are not comparable.")
    if len(summary.distinct(run.header["devices"] for run in one.runs)) > 1:
        lines.append("The arms ran on different numbers of devices: their measured times are not comparable.")
    lines.append(
        "One device that is already busy gains nothing from K replicas, it works through them all: hence two clocks: "
        "measured, on this hardware, and computed, the critical path with a device for each replica."
    )
    return lines


def _versus(arm: Arm) -> str:
    d = arm.differences["accuracy"]
    if d.n == 0:
        return f"{arm.name} cannot be compared with {REFERENCE}: they share no seed."
    if d.mean == 0 and d.sd == 0:
        return f"{arm.name} ended at the test accuracy of {REFERENCE} in each of {d.n} seeds."
    side = "above" if d.mean >= 0 else "below"
    line = f"{arm.name} ended {abs(100 * d.mean):.2f} points of test accuracy {side} {REFERENCE}"
    if d.n == 1:
        return f"{line} with one seed; how much seeds differ is not known."
    half = half_width(d)
    line += f" (paired over {d.n} seeds, 95 % interval {100 * (d.mean - half):+.2f} to {100 * (d.mean + half):+.2f})"
    return f"{line}." if abs(d.mean) > half else f"{line}: seeds differ by as much, so no difference is shown."


def _weight_findings(arm: Arm, noisy: set[int]) -> list[str]:
    if arm.weights is None:
        return []
    w, k = arm.weights, len(arm.weights.mean)
    lines = [
        f"{arm.name}: replica {i} took no part in {rounds} rounds (all seeds together)."
        for i, rounds in enumerate(w.dead)
        if rounds
    ]
    if arm.name == REFERENCE:
        return lines
    effective = f"effective number {w.effective_mean:.2f} of {k} replicas"
    if w.uniform:
        text = f"the weights were indistinguishable from uniform ({effective}): weighting had nothing to act on."
    elif not w.down_weighted:
        text = f"the weights differed ({effective}), but no replica's mean weight was below half of 1/{k}."
        share = k * w.mean[sorted(noisy)].mean() if noisy else 0.0
        text += f" The noisy shards ({summary.text(sorted(noisy))}) had {share:.2f} of 1/{k}." if noisy else ""
    else:
        same = set(w.down_weighted) == noisy
        verdict = "these are exactly the noisy shards" if same else f"noisy shards: {summary.text(sorted(noisy))}"
        text = f"replicas {summary.text(w.down_weighted)} were down-weighted (mean weight below half of 1/{k}; "
        text += f"{effective}); {verdict}."
    return [*lines, f"{arm.name}: {text}"]
