"""The notebooks run from top to bottom on a CPU, with a short budget."""

import copy
import pathlib
import subprocess
from types import SimpleNamespace

import nbformat
import optax
import pytest
from nbclient import NotebookClient

import wavg_jax as wavg
from experiments.setup.shared_flags import COMPARED, RATES
from wavg_jax import data, models

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(FOLDER.glob("*.ipynb"))}
# Lines of the parameter cell that set the budget, by how they begin.
SHORT = {
    "compare": {
        "LOCAL_STEPS, ROUNDS": "LOCAL_STEPS, ROUNDS, BATCH = 5, 3, 8",
        "SEEDS": "SEEDS = (0, 1)",
    },
    "your_model": {"REPLICAS": "REPLICAS, LOCAL_STEPS, ROUNDS, BATCH = 2, 10, 5, 16"},
    "bad_shards": {"REPLICAS": "REPLICAS, NOISY = 3, (1,)", "LOCAL_STEPS": "LOCAL_STEPS, ROUNDS, BATCH = 10, 6, 16"},
    "language_model": {
        "REPLICAS": "REPLICAS, LOCAL_STEPS, ROUNDS, BATCH = 2, 4, 2, 4",
        "LAYERS": "LAYERS, WIDTH, HEADS = 1, 16, 2",
        "PROMPT": 'PROMPT, WRITTEN = "The ", 10',
    },
}
# Run as a last cell: what a notebook ends with is in its kernel.
CHECKS = {
    "your_model": "assert accuracies[-1] > 0.5 and fitted[-1] > 0.5",
    "bad_shards": "assert weights[-1, 1] < weights[-1, [0, 2]].min() and worth.argmin() == 1",
    "language_model": "assert all(r.rows[-1]['test_bits_per_byte'] < 8.1 for r in results.values())",
}
PICTURES = {"compare": 4, "your_model": 1, "bad_shards": 2, "language_model": 1}


def tagged(notebook, tag):
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", []))
    return cell


def shortened(source, lines):
    """Replaces the lines of a source that begin so."""
    for start, line in lines.items():
        (before,) = (text for text in source.splitlines() if text.startswith(start))
        source = source.replace(before, line)
    return source


def executed(name, folder):
    """The notebook, run with a short budget; what it would install is tested as it is."""
    notebook = copy.deepcopy(NOTEBOOKS[name])
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    parameters = tagged(notebook, "parameters")
    parameters.source = shortened(parameters.source, SHORT[name])
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS.get(name, "")))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    return notebook


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the Jupyter client
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_shows_its_plots(name, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = executed(name, tmp_path)
    outputs = outputs_of(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES[name]
    if name == "compare":
        check_comparison(notebook, outputs)


def check_comparison(notebook, outputs):
    shown = [output.get("data", {}) for output in outputs]
    text = "".join(
        output.get("text", "") + data.get("text/plain", "") for output, data in zip(outputs, shown, strict=True)
    )
    (report,) = (data["text/html"] for data in shown if "<table>" in data.get("text/html", ""))
    assert "JAX" in text
    assert "weighted" in report
    assert report.count("noisy shards") >= 2  # a scenario each
    (trained,) = (cell for cell in notebook.cells if "wavg.fit(" in cell.source)
    assert 1 <= len(trained.outputs) <= 2  # one bar for all runs, and perhaps what is said of it


def test_the_comparison_shows_the_recommended_weighting_with_clean_and_noisy_shards():
    names = {}
    for cell in NOTEBOOKS["compare"].cells:
        if "parameters" in cell.metadata.get("tags", []) or "ARMS =" in cell.source:
            exec(cell.source, {"wavg": wavg, "data": data, "models": models, "optax": optax} | names, names)
    assert [bool(noisy) for noisy in names["SCENARIOS"]] == [False, True]
    assert names["ARMS"]["weighted"][0].needs == wavg.opinion_pool().needs
    assert {arm: tuple(rates) for arm, rates in names["RATES"].items()} == {
        arm: RATES[arm] for arm in COMPARED
    }  # as the binary has them


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_outputs(name):
    nbformat.validate(NOTEBOOKS[name])
    assert all(not cell.get("outputs") for cell in NOTEBOOKS[name].cells)


def test_all_notebooks_install_in_the_same_way():
    assert len({tagged(notebook, "install").source for notebook in NOTEBOOKS.values()}) == 1


ADDRESS = "https://host.example/owner/name"


@pytest.mark.parametrize(
    ("driver", "plugins", "repository", "source"),
    [
        (None, [], "../..", "../..[experiments]"),
        (None, [], ADDRESS, f"wavg-jax[experiments] @ git+{ADDRESS}"),
        ("12.4", [], ADDRESS, f"wavg-jax[experiments,cuda12] @ git+{ADDRESS}"),
        ("13.0", [], ADDRESS, f"wavg-jax[experiments,cuda13] @ git+{ADDRESS}"),
        ("13.0", ["jax_cuda12_plugin"], ADDRESS, f"wavg-jax[experiments,cuda12] @ git+{ADDRESS}"),  # as Colab has it
    ],
)
def test_what_is_installed_suits_the_gpu_and_the_jax_that_is_there(monkeypatch, driver, plugins, repository, source):
    said = SimpleNamespace(stdout=f"| NVIDIA-SMI 580   Driver Version: 580   CUDA Version: {driver} |")
    monkeypatch.setattr(subprocess, "run", lambda *command, **how: said)
    monkeypatch.setattr("shutil.which", lambda name: driver and name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in plugins else None)
    lines, magic = tagged(NOTEBOOKS["compare"], "install").source.rsplit("\n", 1)
    names = {}
    exec(lines.replace('"../.."', repr(repository)), names)
    assert names["SOURCE"] == source
    assert magic == '%pip install --quiet "{SOURCE}"'
