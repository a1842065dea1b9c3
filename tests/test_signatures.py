"""How weightings, reductions and the averager are called: a default that moves changes runs of all who rely on it."""

import inspect

import pytest

import wavg_jax as wavg
from wavg_jax.averaging.pull import toward_new

ROOMS = {"": wavg} | {name: getattr(wavg, name) for name in ("outer", "pull", "robust", "smoothing", "transforms")}
SIGNATURES = {
    "averager": "(weighting, *, outer=None, reduce=weighted_mean, pull=1.0, transform=None, deltas=False)",
    "best": "(signal='loss', *, higher_is_better=None)",
    "best_of": "(*weightings, signal='loss')",
    "disjoint_mean": "(stacked, weights, *, sum_over=None)",
    "effective_replicas": "(weights)",
    "fisher_merging": "(floor=1e-06, *, normalise=False)",
    "grawa": "(layerwise=False)",
    "greedy_soup": "(signal='accuracy')",
    "inverse": "(signal='loss', *, higher_is_better=None)",
    "learned": "(start=None, *, steps=8, learning_rate=None, carry=False, optimizer=None)",
    "model_stock": "(stacked, weights, *, sum_over=None)",
    "momentum": "(weighting, decay)",
    "norm_preserving": "(stacked, weights, *, sum_over=None)",
    "normalise": "(scores, alive)",
    "opinion_pool": "(*, prior=100.0, memory=0.95)",
    "proportional": "(signal='accuracy', *, chance=0.0, power=1.0, higher_is_better=None)",
    "pseudo_gradient_penalty": "(temperature=1.0, *, threshold=3.0, rate=0.02, warmup=10, layerwise=False)",
    "radial_directional": "(stacked, weights, *, sum_over=None)",
    "rank": "(signal='loss', *, higher_is_better=None)",
    "shortlist": "(weighting, keep, signal='train_loss', *, higher_is_better=None)",
    "smooth_signals": f"(weighting, decay={0.9**8})",
    "softmax": "(signal='loss', temperature=1.0, *, higher_is_better=None, standardise=False)",
    "token_weighted": "(tokens='tokens')",
    "uniform": "()",
    "uniform_floor": "(weighting, floor)",
    "weighted_mean": "(stacked, weights, *, sum_over=None)",
    "outer.bmuf": "(momentum, block_learning_rate=1.0, *, nesterov=True)",
    "outer.delayed": "(outer)",
    "outer.fedadagrad": "(learning_rate=0.1, b1=0.0, tau=0.001)",
    "outer.fedadam": "(learning_rate=0.01, b1=0.9, b2=0.99, tau=0.001)",
    "outer.fedavgm": "(learning_rate=1.0, momentum=0.9)",
    "outer.fedyogi": "(learning_rate=0.01, b1=0.9, b2=0.99, tau=0.001)",
    "outer.isotropic": "()",
    "outer.lookahead": "(alpha=0.5)",
    "outer.nesterov": "(learning_rate=0.7, momentum=0.9)",
    "pull.scheduled": "(factor, toward=toward_new)",
    "pull.toward_new": "(factor=1.0)",
    "pull.toward_old": "(factor)",
    "robust.bulyan": "(byzantine)",
    "robust.clip_deltas": "(max_norm=None)",
    "robust.coordinate_median": "()",
    "robust.geometric_median": "(iterations=8, smoothing=1e-06)",
    "robust.krum": "(byzantine)",
    "robust.mean_around_median": "(byzantine)",
    "robust.multi_krum": "(byzantine, keep)",
    "robust.trimmed_mean": "(trim)",
    "smoothing.ema": "(decay)",
    "smoothing.lawa": "(window)",
    "smoothing.swa": "(start=0, every=1)",
    "transforms.drop_deltas": "(rate, seed=0)",
    "transforms.trim_deltas": "(density=0.2)",
}


def public():
    """Name -> function, of the averaging and weighting rooms."""
    for prefix, room in ROOMS.items():
        for name in room.__all__:
            function = getattr(room, name)
            if inspect.isfunction(function) and function.__module__.split(".")[1] in ("averaging", "weighting"):
                yield f"{prefix}.{name}".lstrip("."), function


FUNCTIONS = dict(public())


def signature(function):
    """As one would write it, without types."""
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    shown = str(inspect.Signature(bare))
    for default in (wavg.weighted_mean, toward_new):
        shown = shown.replace(repr(default), default.__name__)
    return shown


def test_none_is_missing():
    assert set(FUNCTIONS) == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_is_called_as_ever(name):
    assert signature(FUNCTIONS[name]) == SIGNATURES[name]
