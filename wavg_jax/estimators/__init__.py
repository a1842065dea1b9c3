"""Estimators for scikit-learn: `WavgClassifier` and `WavgRegressor`.

scikit-learn, of the extra `sklearn`, is imported at first use.
"""

from typing import TYPE_CHECKING

from wavg_jax import lazy

if TYPE_CHECKING:
    from wavg_jax.estimators.perceptron import WavgClassifier, WavgRegressor
else:
    __getattr__, __dir__ = lazy.attach(__name__, {"WavgClassifier": "perceptron", "WavgRegressor": "perceptron"})

__all__ = ["WavgClassifier", "WavgRegressor"]
