"""What the numbers of a report say, in sentences."""

import math
from collections.abc import Sequence

from wavg_jax.reporting.measures import KNOWN, Measure
from wavg_jax.reporting.runs import links_in_words
from wavg_jax.reporting.shares import Shares
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.reporting.summary import RATE, ArmSummary, Summary, scenario_names
from wavg_jax.reporting.wording import capitalised, common_decimals, distinct, in_words, interval, mean_sd, seeds


def answer(summaries: Sequence[Summary]) -> list[str]:
    """Whether weighting helped, and where: first in one sentence, then with numbers, scenario by scenario."""
    names = scenario_names(summaries)
    told: dict[tuple[int, str], list[str]] = {}
    for one, name in zip(summaries, names, strict=True):
        told.setdefault(_outcome(one), []).append(name + _of_seeds(one))
    sentence = "; ".join(f"{outcome}: {', '.join(where)}" for (_, outcome), where in sorted(told.items()))
    lines = [f"{capitalised(sentence)}."]
    for one, name in zip(summaries, names, strict=True):
        if one.comparable:
            ended = _versus(one, one.focus) + _loss(one) + _best(one) + _price(one) + _left_out(one)
            lines.append(f"{capitalised(name)}: {ended}")
    return lines


def _outcome(one: Summary) -> tuple[int, str]:
    """What came out of a scenario, and its place among what can come out."""
    d = _difference(one, one.focus) if one.comparable else None
    if d is None or not d.n:
        return 4, f"no comparison with {one.reference}" if one.reference else "no reference to compare with"
    if d.shown:
        return (0, "weighting helped") if (d.mean > 0) == one.measure.higher else (1, "weighting did harm")
    if d.too_few:
        return 3, "too few seeds to show a difference"
    return 2, f"no difference in {one.measure.words} from {one.reference} is shown"


def _difference(one: Summary, arm: ArmSummary) -> Statistic:
    return arm.differences[one.measure.metric]


def _loss(one: Summary) -> str:
    """The difference in loss, where arms are judged by something else."""
    d = one.focus.differences["loss"]
    if one.measure.metric == "loss" or not d.shown:
        return ""
    return f" Its test loss is {abs(d.mean):.3f} {'lower' if d.mean < 0 else 'higher'}."


def _of_seeds(one: Summary) -> str:
    """How many of its seeds a comparison is over, where runs diverged."""
    if not one.comparable:
        return ""
    focus, pairs = one.focus, one.focus.pairs
    lost = {one.reference: sum(base.failed for _, base in pairs), focus.name: sum(run.failed for run, _ in pairs)}
    counts = [(name, count) for name, count in lost.items() if count]
    if not counts:
        return ""
    which = ", ".join(f"{name} {'' if i else 'diverged '}in {count}" for i, (name, count) in enumerate(counts))
    return f" (in {_difference(one, focus).n} of {seeds(len(pairs))}; {which})"


def _best(one: Summary) -> str:
    """The arm with the best mean over the seeds that all arms finished: other seeds may be easier."""
    measure = one.measure
    found = {arm.name: {run.seed: run.final(measure.metric) for run in arm.runs} for arm in one.arms}
    common = set.intersection(
        *({seed for seed, value in own.items() if math.isfinite(value)} for own in found.values())
    )
    if not common:
        return ""
    means = {name: Statistic.of([own[seed] for seed in sorted(common)]).mean for name, own in found.items()}
    name = (max if measure.higher else min)(means, key=lambda name: means[name])
    part = any(set(own) != common for own in found.values())
    over = f" over the {seeds(len(common))} that all have" if part else ""
    value = f"{100 * means[name]:.2f} %" if measure.percent else f"{means[name]:.{common_decimals([means[name]])}f}"
    return f" Of all arms, {name} has the {'highest' if measure.higher else 'lowest'} mean{over}, {value}."


def _price(one: Summary) -> str:
    """How long a round takes beside the reference's, on the clocks that compare."""
    arm, clocks = one.focus, []
    if arm.same_devices:
        taken = [Statistic.of(a.seconds).mean / Statistic.of(b.seconds).mean for a, b in arm.pairs]
        clocks.append(("measured", mean_sd(Statistic.of(taken), decimals=2, exact=len(taken) < 2)))
    computed = Statistic.of([a.critical_round / b.critical_round for a, b in arm.pairs])
    if arm.same_hardware and computed.n:
        clocks.append(("computed", mean_sd(computed, decimals=2, exact=True)))
    if not clocks:
        return ""
    times = " and ".join(f"{shown} times ({clock})" for clock, shown in clocks)
    return f" A round takes {times} as long as {one.reference}'s."


def _left_out(one: Summary) -> str:
    """The runs that no mean counts: leaving them out flatters their arm."""
    found = [f"{arm.name} with {_which(arm)}" for arm in one.arms if _failed(arm)]
    return f" Left out because they diverged: {'; '.join(found)}." if found else ""


def _failed(arm: ArmSummary) -> list[int]:
    return [run.seed for run in arm.runs if run.failed]


def _which(arm: ArmSummary) -> str:
    found = _failed(arm)
    return "every seed" if len(found) == len(arm.runs) else _listed(found)


def _listed(found: Sequence[int]) -> str:
    return f"seed{'s' if len(found) > 1 else ''} {in_words(found)}"


def scenario_sentences(one: Summary) -> list[str]:
    """What the numbers of a scenario say: failures, differences, weights, and what is missing."""
    lines = [line for arm in one.arms for line in _failures(arm)]
    lines += [_versus(one, arm) for arm in one.arms if arm.differences]
    lines += _rates(one)
    for arm in one.arms:
        if arm.shares is not None:
            lines += _weights(one, arm, arm.shares)
    early = [run for run in one.runs if run.stopped_early]
    if early:
        which = ", ".join(f"{run.header['run']} after {len(run.rounds)} of {run.header['rounds']}" for run in early)
        lines.append(f"Stopped early by a callback, and complete: {which} rounds.")
    for run in one.runs:
        if not run.complete:
            lines.append(
                f"Incomplete: {run.header['run']} has {len(run.rounds)} of {run.header['rounds']} rounds; round "
                f"{run.rounds[run.last]:.0f}, the last evaluated one, stands for the final one."
            )
    lines += [f"Left out: {name} has no recorded round." for name in one.empty]
    if len(distinct(run.header["hardware"] for run in one.runs)) > 1:
        lines.append("The runs were made on different hardware: times compare only between arms on the same.")
    return lines


def caveats(summaries: Sequence[Summary]) -> list[str]:
    """What to beware of in all scenarios of a report."""
    differences = [_difference(one, arm) for one in summaries for arm in one.arms if arm.differences]
    differences += [
        one.focus.differences["loss"] for one in summaries if one.comparable and one.measure != KNOWN["loss"]
    ]
    references = distinct(one.reference for one in summaries if one.reference)
    lines = by_chance(sum(not d.too_few for d in differences), " or ".join(references))
    if any(len(distinct(run.header.get("devices") for run in one.runs)) > 1 for one in summaries):
        lines.append("The arms ran on different numbers of devices, so their measured times are not comparable.")
    links = links_in_words([run for one in summaries for run in one.runs])
    lines.append(
        "One device that is already busy gains nothing from K replicas: it works through them all. Hence two clocks: "
        f"measured, on this hardware, and computed, the critical path with a device for each replica {links}."
    )
    return lines


def by_chance(count: int, reference: str) -> list[str]:
    """What to beware of where `count` differences are each tested at 95 %; nothing below two."""
    if count < 2:
        return []
    return [
        f"{count} differences from {reference} are tested one by one at 95 %: if there were none at all, about "
        f"{0.05 * count:.2g} of them would still be shown."
    ]


def _rates(one: Summary) -> list[str]:
    """Whether the focus was trained at another inner learning rate than the reference."""
    name = one.focus.name
    base, own = (one.settings.get(RATE + arm) for arm in (one.reference, name))
    if not one.comparable or None in (base, own) or base == own:
        return []
    line = f"{one.reference} was trained at learning rate {base} and {name} at {own}"
    return [f"{line}: part of their difference may be due to that."]


def _failures(arm: ArmSummary) -> list[str]:
    """What went wrong with an arm as a whole, before any of its numbers."""
    lines = []
    if _failed(arm):
        lines.append(
            f"{arm.name} diverged with {_which(arm)}: {_how(arm)}. These runs have no quality and count in no mean and "
            "no difference."
        )
    if arm.shares is not None and arm.shares.lost:
        ended = [run.seed for run in arm.runs if not run.alive[-1].any()]
        last = f"; with {_listed(ended)} the run ended that way" if ended else ""
        lines.append(
            f"{arm.name}: all replicas were dead (numbers not finite, or masked) in {arm.shares.lost} of "
            f"{arm.shares.rounds} rounds (all seeds together), so nothing was averaged there{last}."
        )
    return lines


def _how(arm: ArmSummary) -> str:
    """How the runs that diverged ended."""
    failed = [run for run in arm.runs if run.failed]
    return " or ".join(
        distinct(
            "all replicas were dead in their last rounds" if run.gave_up else "the network's outputs are not finite"
            for run in failed
        )
    )


def _versus(one: Summary, arm: ArmSummary) -> str:
    d = _difference(one, arm)
    if d.n == 0:
        why = "in no seed did both end with finite numbers" if arm.pairs else "they share no seed"
        return f"{arm.name} cannot be compared with {one.reference}: {why}."
    if d.mean == 0 and d.sd == 0:
        return f"{arm.name} ended at the {one.measure.words} of {one.reference} in each of {d.n} seeds."
    return f"{arm.name} ended {_place(one, d)} ({_certainty(one.measure, d)}."


def _decimals(measure: Measure, d: Statistic) -> int:
    return common_decimals([d.mean, d.sd]) if measure.decimals is None else measure.decimals


def _place(one: Summary, d: Statistic) -> str:
    """Where an arm ended beside the reference."""
    measure = one.measure
    size = f"{abs(measure.scale * d.mean):.{_decimals(measure, d)}f}"
    if not float(size):
        return f"at {one.reference}'s mean {measure.words}"
    unit = f" {measure.unit}" if measure.unit else ""
    return f"with a {measure.words} {size}{unit} {'above' if d.mean > 0 else 'below'} {one.reference}'s"


def _certainty(measure: Measure, d: Statistic) -> str:
    if d.too_few:
        return f"{'one seed' if d.n == 1 else 'paired over 2 seeds'}): too few seeds to show a difference"
    line = f"paired over {d.n} seeds, 95 % interval {interval(d, measure.scale, _decimals(measure, d))})"
    return line if d.shown else f"{line}: seeds differ by as much, so no difference is shown"


def _effect(one: Summary, arm: ArmSummary) -> str:
    """What weights that differ led to, as the end of a sentence."""
    d = arm.differences.get(one.measure.metric)
    if d is None or not d.n:
        return ""
    if d.shown:
        return f", and it ended {_place(one, d)}"
    if d.too_few:
        return f", and there are too few seeds to show a difference in {one.measure.words}"
    return f", and no difference in {one.measure.words} is shown"


def _weights(one: Summary, arm: ArmSummary, shares: Shares) -> list[str]:
    k, noisy = len(shares.mean), sorted(one.header["noisy_shards"] or ())
    lines = [
        f"{arm.name}: replica {i} took no part in {rounds} rounds (all seeds together)."
        for i, rounds in enumerate(shares.dead)
        if rounds
    ]
    if arm.name == one.reference or not arm.weighted or shares.lost == shares.rounds:
        return lines
    effective = f"effective number {shares.effective_mean:.2f} of {k} replicas"
    if shares.uniform:
        text = f"the weights were indistinguishable from uniform ({effective}): weighting had nothing to act on."
    elif not shares.down_weighted:
        text = f"the weights differed ({effective}), but no replica's mean weight was below half of 1/{k}"
        text += f"{_effect(one, arm)}."
        share = k * shares.mean[noisy].mean() if noisy else 0.0
        text += f" The noisy shards ({in_words(noisy)}) had {share:.2f} of 1/{k}." if noisy else ""
    else:
        same = [*shares.down_weighted] == noisy
        verdict = "these are exactly the noisy shards" if same else f"noisy shards: {in_words(noisy)}"
        text = f"replicas {in_words(shares.down_weighted)} were down-weighted (mean weight below half of 1/{k}; "
        text += f"{effective}); {verdict}."
    return [*lines, f"{arm.name}: {text}"]
