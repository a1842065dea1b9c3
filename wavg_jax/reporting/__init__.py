"""Recorded rows -> statistics, sentences, figures and reports; knows rows alone, and nothing of training.

    from wavg_jax import reporting

    report = reporting.summarise(result.rows)  # shown by a notebook; by a terminal with `rich.print`
    report.figures()  # each one shown by a notebook, with its PNG in `.png`
    report.write("out")  # or reporting.write_report("out", result.rows)

Matplotlib, scipy, rich and markdown-it are imported at first use.
"""

from typing import TYPE_CHECKING, Any

from wavg_jax import lazy
from wavg_jax.base import MissingExtra

if TYPE_CHECKING:
    from wavg_jax.reporting.document import Caller
    from wavg_jax.reporting.publish import summarise, write_report
    from wavg_jax.reporting.statistic import Statistic
else:
    _load, __dir__ = lazy.attach(
        __name__,
        {"Caller": "document", "Statistic": "statistic", "summarise": "publish", "write_report": "publish"},
    )

    def __getattr__(name: str) -> Any:
        try:
            return _load(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("wavg_jax"):
                raise
            raise MissingExtra(f"reports need {error.name}: pip install 'wavg-jax[report]'") from error


__all__ = ["Caller", "Statistic", "summarise", "write_report"]
