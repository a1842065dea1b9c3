"""Rows: the schema describes every entry that its builders make."""

import inspect
import math
import re

import numpy as np
import pytest

from wavg_jax.storage import schema
from wavg_jax.storage.rows import Records

CELL = {"scenario": "iid", "weighting": "plain", "seed": 0, "rate": 0.1}


def made_up(build, **given):
    """A row of a builder, with 1 for every argument that is not given."""
    return build(**(dict.fromkeys(inspect.signature(build).parameters, 1) | given))


def round_of(train_loss, alive):
    arrays = {"train_loss": np.float32(train_loss), "alive": np.array(alive), "weights": np.float32([0.25, 0.75])}
    return made_up(
        schema.round_row,
        **arrays,
        scores={"loss": np.float32([1, 2])},
        diagnosis={"gain": np.float32(np.nan)},
        guard={"rolled_back": False},
    )


def classifier(last):
    measured = {name: np.float32(0.5) for name in ("loss", "accuracy", "macro_f1", "ece")}
    return schema.quality_row(
        scalars=list(measured), measured=measured | {"confusion": np.eye(2, dtype=np.int32)}, last=last
    )


def described(kind):
    """The words of the schema's section on a kind of row."""
    start = schema.__doc__.index(f'`kind="{kind}"`')
    return set(re.findall(r"\w+", schema.__doc__[start:].partition("\n\n")[0]))


@pytest.mark.parametrize(
    "row",
    [
        made_up(schema.run_row, shard_sizes=[4, 4]),
        round_of([1, 2], [True, True]) | classifier(last=True),
        made_up(schema.matrix_row, scenarios={"iid": "IID"}, settings={}, roles={"plain": "rule"}, series={"a": "b"}),
        schema.cell_row(run="iid/plain/0", **CELL, rows=[round_of([1, 2], [True, True]) | classifier(last=True)]),
    ],
    ids=lambda row: row["kind"],
)
def test_the_schema_describes_every_entry(row):
    assert set(row) <= described(row["kind"])


def test_a_run_of_one_replica_sends_nothing_and_one_of_two_sends_up_and_down():
    runs = [made_up(schema.run_row, shard_sizes=[8] * k, blended_bytes=10, batch_size=3) for k in (1, 2)]
    assert [row["bytes_per_round"] for row in runs] == [0, 40]
    assert [row["samples_per_round"] for row in runs] == [3, 6]


def test_the_training_loss_of_a_round_is_the_mean_of_the_living_and_null_without_any():
    assert round_of([1, np.nan], [True, False])["train_loss"] == 1
    dead = round_of([1, 2], [False, False])
    assert math.isnan(dead["train_loss"])
    kept = Records(None)
    kept.append(dead | {"run": "a"})
    assert kept.rows[0]["train_loss"] is None


def test_array_metrics_stand_on_the_last_row_alone_as_whole_numbers():
    assert "confusion" not in classifier(last=False)
    assert schema.plain(classifier(last=True)["confusion"]) == [[1, 0], [0, 1]]
