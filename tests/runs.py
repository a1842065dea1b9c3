"""Short runs of `fit` on the small problem, and what two of them have in common."""

import os
import pathlib

import jax
import numpy as np
import optax
from small import regression

import wavg_jax as wavg

HERE = pathlib.Path(__file__).parent
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
TASK = regression()
INNER = optax.sgd(0.1, momentum=0.9)
WEIGHTED = wavg.averager(wavg.softmax("loss", 0.5))
AVERAGER = wavg.averager(wavg.softmax("loss", 0.5), outer=wavg.outer.nesterov())
OPTIONS = {"rounds": 6, "checkpoint_every": 3}
CLOCKS = ("seconds", "elapsed", "compile_seconds", "started", "memory", "peak_memory")


GROUPS = {"scoring": wavg.Scoring, "at_sync": wavg.AtSync, "layout": wavg.Layout, "store": wavg.Store}


def train(*arguments, progress=False, **options):
    """`wavg.fit` without a bar; it takes the fields of the groups as arguments of its own, such as `devices=1`."""
    for group, kind in GROUPS.items():
        own = {name: options.pop(name) for name in kind._fields if name in options}
        if own:
            options[group] = kind(**own)
    return wavg.fit(*arguments, progress=progress, **options)


def run(sharded_data, averager=WEIGHTED, task=TASK, inner=INNER, **options):
    defaults = {"local_steps": 4, "rounds": 3, "batch_size": 8, "devices": 1}
    return train(task, sharded_data, averager, inner=inner, **(defaults | options))


def leaves(result):
    state = result.state._replace(
        replicas=result.state.replicas._replace(rng=jax.random.key_data(result.state.replicas.rng))
    )
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def without_clocks(rows):
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
