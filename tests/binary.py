"""A binary run in the process of the tests."""

from absl.testing import flagsaver

from experiments.setup import app


def invoke(main, *arguments):
    """Runs a binary in this process; returns its exit code."""
    with flagsaver.flagsaver():
        try:
            app.call(main, app.parse(["binary", *arguments]))
        except SystemExit as ended:
            return ended.code
    return 0
