"""What the numbers of a report say, in sentences."""

import math
from collections.abc import Sequence

from wavg_jax.reporting import summary
from wavg_jax.reporting.statistic import Statistic, interval, seeds, statistic
from wavg_jax.reporting.summary import RATE, REFERENCE, Arm, Summary


def answer(summaries: Sequence[Summary]) -> list[str]:
    """Says whether weighting helped, and where it did not: first in one sentence, then with numbers by scenario."""
    names = summary.names(summaries)
    said: dict[str, list[str]] = {}
    for one, name in zip(summaries, names, strict=True):
        said.setdefault(_outcome(one), []).append(name + _of_seeds(one))
    order = [outcome for outcome in OUTCOMES if outcome in said]
    sentence = "; ".join(f"{outcome}: {', '.join(said[outcome])}" for outcome in order)
    lines = [sentence[0].upper() + sentence[1:] + "."]
    for one, name in zip(summaries, names, strict=True):
        if _comparable(one):
            lines.append(
                f"{name[0].upper() + name[1:]}: {_versus(one.focus)}{_loss(one.focus)}{_highest(one)}{_lost(one)}"
            )
    return lines


HELPED, HARMED, EQUAL, UNDECIDED, APART = OUTCOMES = (
    "weighting helped",
    "weighting did harm",
    "no difference in accuracy from plain averaging is shown",
    "too few seeds to show a difference",
    "no comparison with plain averaging",
)
"""What can come out of a scenario, in the order in which it is told."""


def _comparable(one: Summary) -> bool:
    return bool(one.focus.differences) and one.focus.weights is not None


def _outcome(one: Summary) -> str:
    if not _comparable(one) or not one.focus.differences["accuracy"].n:
        return APART
    d = one.focus.differences["accuracy"]
    if d.shown:
        return HELPED if d.mean > 0 else HARMED
    return UNDECIDED if d.too_few else EQUAL


def _loss(arm: Arm) -> str:
    """Where accuracy does not tell arms apart, the loss may."""
    d = arm.differences["loss"]
    return f" Its test loss is {abs(d.mean):.3f} {'lower' if d.mean < 0 else 'higher'}." if d.shown else ""


def _of_seeds(one: Summary) -> str:
    """Over how many of its seeds a comparison is, where runs diverged."""
    focus = one.focus
    plain = next((arm for arm in one.arms if arm.name == REFERENCE), focus)
    lost = {arm.name: len(set(_diverged(arm)) & set(focus.pairs)) for arm in (plain, focus)}
    counts = [(name, count) for name, count in lost.items() if count]
    if not _comparable(one) or not counts:
        return ""
    which = ", ".join(f"{name} {'' if i else 'diverged '}in {count}" for i, (name, count) in enumerate(counts))
    return f" (in {focus.differences['accuracy'].n} of {len(focus.pairs)} seeds; {which})"


def _highest(one: Summary) -> str:
    """The arm with the highest mean over the seeds that all arms ended with: other seeds may be easier ones."""
    found = {arm.name: {run.seed: run.accuracy[-1] for run in arm.runs} for arm in one.arms}
    ended = [{seed for seed, value in own.items() if math.isfinite(value)} for own in found.values()]
    common = set.intersection(*ended)
    if not common:
        return ""
    means = {name: statistic([own[seed] for seed in sorted(common)]).mean for name, own in found.items()}
    best = max(means, key=lambda name: means[name])
    part = any(set(own) != common for own in found.values())
    over = f" over the {seeds(len(common))} that all have" if part else ""
    return f" The highest mean of all arms{over} is that of {best}, {100 * means[best]:.2f} %."


def _lost(one: Summary) -> str:
    """Which runs are in no mean: leaving them out flatters their arm."""
    found = [f"{arm.name} with {_which(arm)}" for arm in one.arms if _diverged(arm)]
    return f" Left out, since they diverged: {'; '.join(found)}." if found else ""


def _diverged(arm: Arm) -> list[int]:
    return [run.seed for run in arm.runs if run.diverged[-1]]


def _which(arm: Arm) -> str:
    found = _diverged(arm)
    return "every seed" if len(found) == len(arm.runs) else _listed(found)


def findings(one: Summary) -> list[str]:
    """What the numbers say, in sentences: differences, weights, and what to beware of."""
    lines = [line for arm in one.arms for line in _failures(arm)]
    lines += [_versus(arm) for arm in one.arms if arm.differences]
    lines += _rates(one)
    for arm in one.arms:
        lines += _weight_findings(arm, set(one.header["noisy_shards"] or ()))
    for run in one.runs:
        if not (run.complete or run.gave_up):
            lines.append(
                f"Incomplete: {run.header['run']} has {len(run.rounds)} of {run.header['rounds']} rounds; "
                f"round {run.rounds[-1]:.0f}, its last, stands for the final one."
            )
    lines += [f"Left out: {name} has no recorded round." for name in one.empty]
    if len(summary.distinct(run.header["hardware"] for run in one.runs)) > 1:
        lines.append("The runs were made on different hardware: their measured times are not comparable.")
    return lines


def caveats(summaries: Sequence[Summary]) -> list[str]:
    """What to beware of in all scenarios of a report."""
    differences = [arm.differences["accuracy"] for one in summaries for arm in one.arms if arm.differences]
    differences += [one.focus.differences["loss"] for one in summaries if _comparable(one)]
    lines = by_chance(sum(not d.too_few for d in differences))
    if any(len(summary.distinct(run.header["devices"] for run in one.runs)) > 1 for one in summaries):
        lines.append("The arms ran on different numbers of devices: their measured times are not comparable.")
    lines.append(
        "One device that is already busy gains nothing from K replicas, it works through them all: hence two clocks: "
        "measured, on this hardware, and computed, the critical path with a device for each replica."
    )
    return lines


def by_chance(count: int) -> list[str]:
    """What to beware of where `count` differences are tested, each at 95 %; nothing where there are not several."""
    if count < 2:
        return []
    return [
        f"{count} differences from {REFERENCE} are tested one by one, at 95 %: about {0.05 * count:.2g} of them would "
        "be shown if nothing differed from it at all."
    ]


def _rates(one: Summary) -> list[str]:
    """Whether the focus was trained at another inner learning rate than the reference."""
    name = one.focus.name
    base, own = (one.settings.get(RATE + arm) for arm in (REFERENCE, name))
    if not _comparable(one) or None in (base, own) or base == own:
        return []
    line = f"{REFERENCE} was trained at learning rate {base} and {name} at {own}"
    return [f"{line}: their difference is then also the rates'."]


def _failures(arm: Arm) -> list[str]:
    """What went wrong with an arm as a whole, before any of its numbers."""
    lines = []
    if _diverged(arm):
        lines.append(
            f"{arm.name} diverged with {_which(arm)}: {_how(arm)}, so these runs have no quality, and are in no "
            "mean and no difference of it."
        )
    if arm.weights is not None and arm.weights.lost:
        ended = [run.seed for run in arm.runs if not run.alive[-1].any()]
        last = f"; with {_listed(ended)} that is how the run ended" if ended else ""
        lines.append(
            f"{arm.name}: all replicas were dead (numbers not finite, or masked) in {arm.weights.lost} of "
            f"{arm.weights.rounds} rounds (all seeds together), in which nothing was averaged{last}."
        )
    return lines


def _how(arm: Arm) -> str:
    """What became of the runs that diverged."""
    runs = [run for run in arm.runs if run.diverged[-1]]
    return " or ".join(
        summary.distinct(
            "nothing came of their last rounds" if run.gave_up else "the network's outputs are not finite"
            for run in runs
        )
    )


def _listed(found: Sequence[int]) -> str:
    return f"seed{'s' if len(found) > 1 else ''} {summary.text(found)}"


def _versus(arm: Arm) -> str:
    d = arm.differences["accuracy"]
    if d.n == 0:
        why = "no seed in which both ended with finite numbers" if arm.pairs else "they share no seed"
        return f"{arm.name} cannot be compared with {REFERENCE}: {why}."
    if d.mean == 0 and d.sd == 0:
        return f"{arm.name} ended at the test accuracy of {REFERENCE} in each of {d.n} seeds."
    return f"{arm.name} ended {_place(d)} ({_certainty(d)}."


def _place(d: Statistic) -> str:
    """Where an arm ended beside the reference."""
    size = f"{abs(100 * d.mean):.2f}"
    if not float(size):
        return f"at {REFERENCE}'s mean test accuracy"
    return f"{size} points of test accuracy {'above' if d.mean > 0 else 'below'} {REFERENCE}"


def _certainty(d: Statistic) -> str:
    if d.too_few:
        return f"{'one seed' if d.n == 1 else 'paired over 2 seeds'}): too few seeds to show a difference"
    line = f"paired over {d.n} seeds, 95 % interval {interval(d)})"
    return line if d.shown else f"{line}: seeds differ by as much, so no difference is shown"


def _effect(arm: Arm) -> str:
    """What came of weights that differ, as the end of a sentence."""
    d = arm.differences.get("accuracy")
    if d is None or not d.n:
        return ""
    if d.shown:
        return f", and it ended {_place(d)}"
    unsure = "there are too few seeds to show a difference in accuracy"
    return f", and {unsure if d.too_few else 'no difference in accuracy is shown'}"


def _weight_findings(arm: Arm, noisy: set[int]) -> list[str]:
    if arm.weights is None:
        return []
    w, k = arm.weights, len(arm.weights.mean)
    lines = [
        f"{arm.name}: replica {i} took no part in {rounds} rounds (all seeds together)."
        for i, rounds in enumerate(w.dead)
        if rounds
    ]
    if arm.name == REFERENCE or w.lost == w.rounds:
        return lines
    effective = f"effective number {w.effective_mean:.2f} of {k} replicas"
    if w.uniform:
        text = f"the weights were indistinguishable from uniform ({effective}): weighting had nothing to act on."
    elif not w.down_weighted:
        text = (
            f"the weights differed ({effective}), but no replica's mean weight was below half of 1/{k}{_effect(arm)}."
        )
        share = k * w.mean[sorted(noisy)].mean() if noisy else 0.0
        text += f" The noisy shards ({summary.text(sorted(noisy))}) had {share:.2f} of 1/{k}." if noisy else ""
    else:
        same = set(w.down_weighted) == noisy
        verdict = "these are exactly the noisy shards" if same else f"noisy shards: {summary.text(sorted(noisy))}"
        text = f"replicas {summary.text(w.down_weighted)} were down-weighted (mean weight below half of 1/{k}; "
        text += f"{effective}); {verdict}."
    return [*lines, f"{arm.name}: {text}"]
