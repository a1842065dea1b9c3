"""Multilayer perceptrons of K replicas, as scikit-learn's estimators."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from wavg_jax import data, models
from wavg_jax.averaging.averager import averager as make_averager
from wavg_jax.base import Averager, Task
from wavg_jax.extras import need
from wavg_jax.rounds.score import Scoring
from wavg_jax.training.fit import fit as train
from wavg_jax.training.recipe import Layout
from wavg_jax.weighting.pool import opinion_pool
from wavg_jax.weighting.scores import softmax

need("sklearn", extra="sklearn", why="wavg_jax.estimators")

from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.class_weight import compute_class_weight  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

_AT_ONCE = 256
"""Rows predicted at a time. Always as many, so that a row's numbers do not depend on what it is predicted with."""


class _Perceptron(BaseEstimator):
    """What both estimators share."""

    def __init__(
        self,
        *,
        hidden: Sequence[int] | int = (64,),
        replicas: int = 4,
        local_steps: int = 10,
        rounds: int = 20,
        batch_size: int = 32,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        averager: Averager | None = None,
        validation_fraction: float = 0.1,
        layout: Layout | None = None,
        random_state: Any = None,
    ):
        self.hidden = hidden
        self.replicas = replicas
        self.local_steps = local_steps
        self.rounds = rounds
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.averager = averager
        self.validation_fraction = validation_fraction
        self.layout = layout
        self.random_state = random_state

    def _train(self, x: np.ndarray, y: np.ndarray, classes: int | None, task: Task, default: Averager) -> None:
        """Trains on checked inputs [N, F] in float64 and targets, and keeps what predicting needs."""
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction!r}: give a share above 0 and below 1")
        if len(x) < 2:
            raise ValueError("found 1 sample; give 2 or more, of which one is held out to score the replicas")
        self.mean_ = x.mean(axis=0)
        self.scale_ = _scale(self.mean_, x.std(axis=0))
        seed = int(check_random_state(self.random_state).randint(2**31))
        held = min(max(round(self.validation_fraction * len(x)), 1), len(x) - 1)
        replicas = min(self.replicas, len(x) - held)
        inputs = self._standardised(x)
        dataset = data.from_arrays(inputs, y, inputs[:1], y[:1], name=type(self).__name__, classes=classes)
        shards = data.shard(
            dataset, lambda split, seed: data.iid(len(split.y), replicas, seed), heldout=held, seed=seed, scale=None
        )
        result = train(
            task,
            shards,
            default if self.averager is None else self.averager,
            inner=_inner(self.learning_rate, self.momentum),
            local_steps=self.local_steps,
            rounds=self.rounds,
            batch_size=min(self.batch_size, (len(x) - held) // replicas),
            seed=seed,
            scoring=Scoring(test_every=self.rounds),
            layout=_LAYOUT if self.layout is None else self.layout,
            progress=False,
        )
        self.params_ = jax.device_get(result.params)
        # `fit` wants a test split, and here there is none.
        self.rows_ = [{name: x for name, x in row.items() if not name.startswith("test_")} for row in result.rows]

    def _widths(self) -> tuple[int, ...]:
        """The widths of the hidden layers; a single one may be given as a number."""
        return tuple(np.atleast_1d(self.hidden).tolist())

    def _standardised(self, x: np.ndarray) -> np.ndarray:
        return ((x - self.mean_) / self.scale_).astype(np.float32)

    def _outputs(self, x: Any, task: Task) -> np.ndarray:
        """What the network makes of new inputs [N, F], in float64 [N, ...]."""
        x = self._standardised(validate_data(self, x, dtype=np.float64, reset=False))
        predict, found = _predict_of(task), []
        for first in range(0, len(x), _AT_ONCE):
            part = x[first : first + _AT_ONCE]
            padded = np.pad(part, ((0, _AT_ONCE - len(part)), (0, 0)))
            found.append(np.asarray(predict(self.params_, padded), np.float64)[: len(part)])
        return np.concatenate(found)


class WavgClassifier(ClassifierMixin, _Perceptron):
    """A multilayer perceptron, trained as K replicas on K parts of the samples and blended by weights.

    An estimator of scikit-learn: it goes into pipelines, `cross_val_score` and grid searches. Inputs are standardised;
    images, texts and networks of your own are for `wavg_jax.fit`. Estimators that differ in their samples alone share
    compiled programs, unless they have class weights or a clone of your `averager`.

    Args:
      hidden: widths of the hidden layers, or the width of one.
      replicas: K; fewer for fewer samples.
      local_steps: H, steps between two blends.
      rounds: how many blends.
      batch_size: samples per replica and step; fewer for fewer samples.
      learning_rate, momentum: of SGD, the inner optimizer.
      averager: how replicas are blended; by default by `opinion_pool()`. See `wavg_jax.averager`. With one of your own,
        only cloudpickle (which joblib uses) pickles the estimator.
      validation_fraction: of the samples, above 0 and below 1, held out to score replicas and blends; one at least.
      class_weight: None, "balanced", or {class: weight}, how much a sample counts in the training loss beside others.
      layout: where replicas live; by default all on the first device.
      random_state: of the split, the initial parameters and the order of samples.

    Attributes:
      classes_: the labels [C].
      params_: the network's parameters.
      rows_: a row for the run and one per round, without a test split; see `wavg_jax.storage.schema`.

    Example:
      >>> from sklearn.datasets import load_iris
      >>> x, y = load_iris(return_X_y=True)
      >>> model = WavgClassifier(hidden=(8,), rounds=5, random_state=0).fit(x, y)
      >>> bool(model.score(x, y) > 0.9)
      True
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] | int = (64,),
        replicas: int = 4,
        local_steps: int = 10,
        rounds: int = 20,
        batch_size: int = 32,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        averager: Averager | None = None,
        validation_fraction: float = 0.1,
        class_weight: Any = None,
        layout: Layout | None = None,
        random_state: Any = None,
    ):
        super().__init__(
            hidden=hidden,
            replicas=replicas,
            local_steps=local_steps,
            rounds=rounds,
            batch_size=batch_size,
            learning_rate=learning_rate,
            momentum=momentum,
            averager=averager,
            validation_fraction=validation_fraction,
            layout=layout,
            random_state=random_state,
        )
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any) -> "WavgClassifier":
        """Trains on inputs [N, F] and labels [N] of any type.

        Raises:
          ValueError: what scikit-learn refuses, a single sample, or a single class.
        """
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"found one class, {self.classes_[0]!r}; give samples of 2 classes or more")
        weights = None
        if self.class_weight is not None:
            given = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
            weights = tuple((given / given[labels].mean()).tolist())  # lest large ones act as a large learning rate
        task = _classifier(x.shape[1], len(self.classes_), self._widths(), weights)
        self._train(x, labels, len(self.classes_), task, _POOL)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [N, C], in the order of `classes_`."""
        logits = self._logits(X)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each input [N]."""
        logits = self._logits(X)
        return self.classes_[logits.argmax(axis=1)]

    def _logits(self, x: Any) -> np.ndarray:
        check_is_fitted(self)
        return self._outputs(x, _classifier(self.n_features_in_, len(self.classes_), self._widths(), None))


class WavgRegressor(RegressorMixin, _Perceptron):
    """A multilayer perceptron for numbers, trained as K replicas on K parts of the samples and blended by weights.

    Inputs and targets are standardised. See `WavgClassifier`, which has the same other arguments.

    Args:
      averager: how replicas are blended; by default `softmax("loss", 0.1)`, of losses in variances of the targets.

    Example:
      >>> from sklearn.datasets import load_diabetes
      >>> x, y = load_diabetes(return_X_y=True)
      >>> model = WavgRegressor(hidden=(8,), rounds=5, random_state=0).fit(x, y)
      >>> bool(model.score(x, y) > 0.4)
      True
    """

    def fit(self, X: Any, y: Any) -> "WavgRegressor":
        """Trains on inputs [N, F] and numbers [N].

        Raises:
          ValueError: what scikit-learn refuses, or a single sample.
        """
        x, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = y.astype(np.float64)
        self.target_mean_ = float(y.mean())
        self.target_scale_ = float(_scale(y.mean(), y.std()))
        targets = ((y - self.target_mean_) / self.target_scale_).astype(np.float32)[:, None]
        self._train(x, targets, None, _regressor(x.shape[1], self._widths()), _SOFTMAX)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """A number for each input [N]."""
        check_is_fitted(self)
        outputs = self._outputs(X, _regressor(self.n_features_in_, self._widths()))
        return outputs[:, 0] * self.target_scale_ + self.target_mean_


# One object each: runs share compiled programs only if they get the same ones.
_POOL, _SOFTMAX = make_averager(opinion_pool()), make_averager(softmax("loss", 0.1))
_LAYOUT = Layout(devices=1, replica_map="map")


def _scale(mean: Any, spread: Any) -> Any:
    """What to divide by: the standard deviation, or 1 where it is the rounding error of a constant."""
    return np.where(spread > 10 * np.finfo(np.float64).eps * np.abs(mean), spread, 1.0)


@functools.lru_cache(maxsize=64)
def _inner(learning_rate: float, momentum: float) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=momentum)


@functools.lru_cache(maxsize=64)
def _classifier(features: int, classes: int, hidden: tuple[int, ...], weights: tuple[float, ...] | None) -> Task:
    make = functools.partial(models.classifier, class_weights=weights)
    return models.from_linen(models.MLP(hidden, classes), (features,), make=make)


@functools.lru_cache(maxsize=64)
def _regressor(features: int, hidden: tuple[int, ...]) -> Task:
    return models.from_linen(models.MLP(hidden, 1), (features,), make=models.regressor)


@functools.lru_cache(maxsize=64)
def _predict_of(task: Task) -> Callable[[Any, np.ndarray], jax.Array]:
    return jax.jit(lambda params, x: task.predict(params, {}, x))
