"""Rows of what averaging and weighting can be expected to gain: computed, laid over recordings, simulated."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.setup import overlay, quadratic
from experiments.setup.overlay import Point
from experiments.setup.quadratic_runs import Case, computed, simulated
from experiments.setup.quadratic_shards import Arm, arms, finished, origin, settled, skewed, with_bad
from wavg_jax.reporting.statistic import Statistic
from wavg_jax.storage.schema import Row

START = 2.0
"""What the first parameters of a run lose, in nats: a little less than guessing among ten classes."""
WORKERS = (2, 4, 8, 16, 32, 64)
NOISIER = (1, 3, 10, 30, 100)
DRAWS = 10
"""Random draws of shards that differ, of which the figure shows the mean."""
FITTED = "fitted to {:,} samples, at most"


class Asked(NamedTuple):
    """The problem in question; each field is the flag of its name."""

    replicas: int
    local_steps: int
    rounds: int
    batch_size: int
    heldout: int
    bad: int
    bad_loss: float
    noise_loss: float

    def arms(self, replicas: int, bad: int) -> dict[str, Arm]:
        """Every way to train on shards like these."""
        problem = with_bad(replicas, bad, bad_loss=self.bad_loss, noise_loss=self.noise_loss)
        return arms(problem, bad, self.batch_size)

    def noisier(self, noisy: int, factor: float) -> dict[str, Arm]:
        """Every way to train where some shards have more noise instead of a wrong optimum."""
        problem = with_bad(self.replicas, noisy, bad_loss=0, noise_loss=self.noise_loss, bad_noise=factor)
        return arms(problem, noisy, self.batch_size)


def computed_rows(asked: Asked) -> Iterator[Row]:
    """A row for every arm: its loss of bias and of noise at the constant rate for ever, and at the end of two runs."""
    for name, arm in asked.arms(asked.replicas, asked.bad).items():
        row: Row = {"kind": "computed", "run": name}
        row["bias"], row["noise"] = quadratic.parts(arm.problem, settled(arm, asked.local_steps))
        for rate, decayed in (("constant", False), ("decaying", True)):
            end = finished(arm, asked.rounds, asked.local_steps, decayed=decayed, start=origin(START))
            row[rate] = quadratic.parts(arm.problem, end)
        yield row


def curves(asked: Asked, steps: Sequence[int]) -> Iterator[Row]:
    """Losses at the constant rate: against K, with clean shards and with half of them bad; against the number of bad
    shards; against the noise of a quarter of them; and against H, of shards that are equal and that differ."""
    for of, x, lines in (
        ("replicas", WORKERS, _by_replicas(asked)),
        ("bad", range(asked.replicas), _by_bad(asked)),
        ("noise", NOISIER, _by_noise(asked)),
        ("steps", steps, _by_steps(asked, steps)),
    ):
        for name, losses in lines.items():
            yield {"kind": "curve", "run": f"{of}: {name}", "of": of, "x": list(x), "loss": losses}


def _by_replicas(asked: Asked) -> dict[str, list[float]]:
    def against(name: str, share: float) -> list[float]:
        return [_end(asked.arms(k, int(k * share))[name], 1) for k in WORKERS]

    best = against("best weights", 0.5)
    costs = [quadratic.cost_of_learning(k, asked.heldout) for k in WORKERS]
    return {
        "one network, clean": against("sequential", 0),
        "plain, clean": against("plain", 0),
        "plain, half bad": against("plain", 0.5),
        "best weights, half bad": best,
        FITTED.format(asked.heldout): [a + b for a, b in zip(best, costs, strict=True)],
    }


def _by_bad(asked: Asked) -> dict[str, list[float]]:
    every = [asked.arms(asked.replicas, bad) for bad in range(asked.replicas)]
    names = {"sequential": "one network", "plain": "plain", "oracle": "oracle", "best weights": "best weights"}
    found = {label: [_end(one[name], 1) for one in every] for name, label in names.items()}
    cost = quadratic.cost_of_learning(asked.replicas, asked.heldout)
    return found | {FITTED.format(asked.heldout): [loss + cost for loss in found["best weights"]]}


def _by_noise(asked: Asked) -> dict[str, list[float]]:
    bad = max(asked.replicas // 4, 1)

    def against(name: str) -> list[float]:
        return [_end(asked.noisier(bad, factor)[name], 1) for factor in NOISIER]

    best, cost = against("best weights"), quadratic.cost_of_learning(asked.replicas, asked.heldout)
    return {
        "plain": against("plain"),
        "without them": against("oracle"),
        "best weights": best,
        FITTED.format(asked.heldout): [loss + cost for loss in best],
    }


def _by_steps(asked: Asked, steps: Sequence[int]) -> dict[str, list[float]]:
    differing = [skewed(asked.replicas, apart=1, spread=1, noise_loss=asked.noise_loss, seed=i) for i in range(DRAWS)]
    weighted = [Arm(problem, quadratic.best_round(problem)) for problem in differing]
    plain = [Arm(problem, quadratic.equal(problem)) for problem in differing]
    return {
        "plain, equal shards": [_end(asked.arms(asked.replicas, 0)["plain"], h) for h in steps],
        "plain, shards differ": [float(np.mean([_end(arm, h) for arm in plain])) for h in steps],
        "weighted, shards differ": [float(np.mean([_end(arm, h) for arm in weighted])) for h in steps],
    }


def _end(arm: Arm, local_steps: int) -> float:
    return quadratic.loss(arm.problem, settled(arm, local_steps))


def measured_rows(points: Sequence[Point], classes: int) -> Iterator[Row]:
    """A row for every recorded point, with two predictions of it; the quadratic one is fitted to a single point."""
    first, bad_loss = overlay.fitted(points) if points else (None, 0.0)
    for point in points:
        yield {
            "kind": "measured",
            "run": f"{point.recording}/{point.scenario}/{point.weighting}",
            **{name: value for name, value in point._asdict().items() if name != "gain"},
            "gain": point.gain.mean,
            "half_width": point.gain.half_width,
            "seeds": point.gain.n,
            "fitted": point is first,
            "quadratic": point.predicted(lambda share: bad_loss * share**2),
            "mixture": point.predicted(lambda share: overlay.mixture(share, classes)),
            "cost": point.cost,
        }


def simulated_row(case: Case, seeds: Sequence[int]) -> Row:
    """Trains a case with the library, and computes it."""
    found, samples = Statistic.of(simulated(case, seeds)), case.heldout
    return {
        "kind": "simulated",
        "run": case.name,
        "computed": computed(case),
        "cost": 0.0 if case.weighting is None else quadratic.cost_of_learning(case.arm.problem.replicas, samples),
        "simulated": found.mean,
        "half_width": found.half_width,
        "seeds": found.n,
    }


def sentences(asked: Asked, rows: Sequence[Row]) -> list[str]:
    """What the rows say of the problem in question."""
    found = {row["run"]: row["bias"] + row["noise"] for row in rows if row["kind"] == "computed"}
    k, cost = asked.replicas, quadratic.cost_of_learning(asked.replicas, asked.heldout)
    gain = found["plain"] - found["best weights"]
    enough = quadratic.samples_to_gain(k, gain) if gain > 1e-9 else np.inf
    return [
        f"Averaging {k} replicas takes {asked.noise_loss * (1 - 1 / k):.3g} nats of noise off the loss of one network "
        "at the constant rate; once the rate has fallen to zero there is next to no noise left to take.",
        f"{asked.bad} of {k} bad shards cost plain averaging and sync "
        f"{asked.bad_loss * (asked.bad / k) ** 2:.3g} nats, at any rate and any H.",
        f"The best weights take {gain:.3g} nats off plain averaging's loss. Fitting them to {asked.heldout:,} held-out "
        f"samples costs {cost:.3g} nats at most.",
        "So there is nothing to gain by weights."
        if np.isinf(enough)
        else f"So weights pay from {np.ceil(enough):,.0f} held-out samples on, at the latest.",
    ]
