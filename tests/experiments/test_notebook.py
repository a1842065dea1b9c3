"""The notebook runs from top to bottom on a CPU, with a short budget."""

import pathlib

import nbformat
import optax
import pytest
from nbclient import NotebookClient

import wavg_jax as wavg
from experiments.setup.shared_flags import COMPARED, RATES
from wavg_jax import data, models

NOTEBOOK = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks" / "compare.ipynb"
SHORT = {"ROUNDS": "LOCAL_STEPS, ROUNDS, BATCH = 5, 3, 8", "SEEDS": "SEEDS = (0, 1)"}


def shorten(source):
    """Replaces the lines of the parameter cell that set the budget."""
    lines = source.splitlines()
    for name, line in SHORT.items():
        (at,) = (i for i, text in enumerate(lines) if name in text.split("=")[0])
        lines[at] = line
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the Jupyter client
def test_the_notebook_runs_and_shows_its_plots(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # What is tested is installed already.
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = shorten(parameters.source)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    shown = [output.get("data", {}) for output in outputs]
    text = "".join(
        output.get("text", "") + data.get("text/plain", "") for output, data in zip(outputs, shown, strict=True)
    )
    (report,) = (data["text/html"] for data in shown if "<table>" in data.get("text/html", ""))
    assert len(images) >= 4
    assert "JAX" in text
    assert "weighted" in report
    assert report.count("noisy shards") >= 2  # a scenario each
    (trained,) = (cell for cell in notebook.cells if "wavg.fit(" in cell.source)
    assert 1 <= len(trained.outputs) <= 2  # one bar for all runs, and perhaps what is said of it


def test_the_notebook_shows_the_recommended_weighting_with_clean_and_noisy_shards():
    names = {}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []) or "ARMS =" in cell.source:
            exec(cell.source, {"wavg": wavg, "data": data, "models": models, "optax": optax} | names, names)
    assert [bool(noisy) for noisy in names["SCENARIOS"]] == [False, True]
    assert names["ARMS"]["weighted"][0].needs == wavg.opinion_pool().needs
    assert {arm: tuple(rates) for arm, rates in names["RATES"].items()} == {
        arm: RATES[arm] for arm in COMPARED
    }  # as the binary has them


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells)
