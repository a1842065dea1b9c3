"""scikit-learn's own checks of our estimators, and what they do beside them."""

import pickle
import sys

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import wavg_jax as wavg
from wavg_jax.estimators import WavgClassifier, WavgRegressor

SMALL = {"hidden": (16,), "rounds": 8}


# The checks have some 30 shapes of data, each a program; two replicas make it a smaller one.
SMALLEST = {"hidden": (8,), "replicas": 2, "rounds": 8}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its checks give estimators what they should warn of
@pytest.mark.parametrize("estimator", [WavgClassifier, WavgRegressor])
def test_scikit_learns_own_checks_pass(estimator):
    found = check_estimator(estimator(**SMALLEST), on_skip=None)
    assert len(found) > 40
    assert {one["status"] for one in found} <= {"passed", "skipped"}


def test_a_search_over_a_pipeline_finds_the_rate_that_learns_and_shares_programs(compilations):
    x, y = load_breast_cancer(return_X_y=True)
    x, names = x[:400], np.array(["malignant", "benign"])[y[:400]]
    pipeline = make_pipeline(StandardScaler(), WavgClassifier(random_state=0, **SMALL))
    search = GridSearchCV(pipeline, {"wavgclassifier__batch_size": [8, 16]}, cv=2).fit(x, names)
    assert search.best_score_ > 0.9
    assert set(search.predict(x[:50])) <= {"malignant", "benign"}
    before = len(compilations)
    pipeline.set_params(wavgclassifier__batch_size=8, wavgclassifier__random_state=1).fit(x[:200], names[:200])
    assert len(compilations) - before < 10  # a fold had as many samples; what is left are small ones of the start


def test_a_fitted_estimator_is_pickled_with_its_rows():
    x, y = load_diabetes(return_X_y=True)
    model = WavgRegressor(random_state=0, **SMALL).fit(x, y)
    assert model.score(x, y) > 0.4
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.predict(x), model.predict(x))
    assert [row["kind"] for row in copy.rows_] == ["run", *["round"] * 8]
    assert np.any(np.array(copy.rows_[-1]["weights"]) != 0.25)


def test_class_weights_help_the_class_that_counts_more():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, (180, 2)), rng.normal(1, 1, (20, 2))])
    y = np.repeat([0, 1], [180, 20])
    recalls = [
        np.mean(WavgClassifier(class_weight=weight, random_state=0, **SMALL).fit(x, y).predict(x[180:]))
        for weight in (None, "balanced")
    ]
    assert recalls[1] > recalls[0]


def test_an_averager_of_ones_own_is_used():
    x, y = load_diabetes(return_X_y=True)
    plain = WavgRegressor(averager=wavg.averager(wavg.uniform()), random_state=0, **SMALL).fit(x, y)
    assert {tuple(row["weights"]) for row in plain.rows_[1:]} == {(0.25,) * 4}


def test_without_scikit_learn_one_line_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("wavg_jax.estimators.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delattr(wavg.estimators, "WavgClassifier", raising=False)
    with pytest.raises(wavg.MissingExtra, match=r"wavg_jax.estimators needs sklearn, .*'wavg-jax\[sklearn\]'"):
        _ = wavg.estimators.WavgClassifier


def test_a_constant_column_says_nothing_whatever_its_value():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (100, 2)), np.arange(100) % 2
    x[:, 0] += 3 * y
    x = np.column_stack([x, np.full(100, 0.1)])  # its standard deviation is a rounding error
    model = WavgClassifier(random_state=0, hidden=8, rounds=8).fit(x, y)
    moved = x + np.array([0, 0, 0.01])
    np.testing.assert_allclose(model.predict_proba(moved), model.predict_proba(x), atol=0.05)


@pytest.mark.parametrize("fraction", [0, 1, -1, 20, float("nan")])
def test_a_share_held_out_is_above_0_and_below_1(fraction):
    with pytest.raises(ValueError, match=r"validation_fraction=.*give a share above 0 and below 1"):
        WavgClassifier(validation_fraction=fraction).fit(np.zeros((4, 1)), [0, 1, 0, 1])


def test_rows_tell_of_no_test_split():
    x, y = load_diabetes(return_X_y=True)
    model = WavgRegressor(random_state=0, hidden=(4,), rounds=2).fit(x, y)
    assert not [name for row in model.rows_ for name in row if name.startswith("test_")]
