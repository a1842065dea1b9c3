"""--model=airbench from the commands: K = 1 is one network that learns, and the preset for a GPU builds."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from binary import invoke

import wavg_jax as wavg
from experiments import compare, train
from experiments.setup import app, arms, problem
from wavg_jax import data, models
from wavg_jax.base import Batch
from wavg_jax.storage.rows import read_rows

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("standard_promotion")
SMALL = (
    *("--model=airbench", "--widths=8", "--inner=airbench", "--augment", "--crop_padding=1", "--crop_fill=reflect"),
    *("--mirror", "--label_smoothing=0.1", "--devices=1", "--replica_map=map", "--heldout=20"),
)


def stripes(count: int, side: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Images striped across (1) or down (0), which neither mirroring nor moving changes."""
    rng = np.random.default_rng(count)
    y = rng.integers(0, 2, count)
    lines = 100 * ((np.arange(side) // 2 + rng.integers(0, 2, (count, 1))) % 2)[:, :, None, None]
    x = np.where(y[:, None, None, None] == 1, lines, lines.swapaxes(1, 2)) + rng.integers(
        0, 100, (count, side, side, 1)
    )
    return x.astype(np.uint8), y


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("images") / "stripes.npz"
    arrays = [*stripes(340), *stripes(60)]
    np.savez(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True)))
    return path


def test_one_replica_blended_is_one_network_alone_and_learns(file, tmp_path):
    one = ("--replicas=1", "--local_steps=10", "--rounds=2", "--batch_size=16", "--warmup=4", "--decay=linear")
    found = {}
    for arm in ("sequential", "plain"):
        options = (f"--dataset={file}", f"--arm={arm}", f"--lr_{arm}=0.1", f"--workdir={tmp_path / arm}")
        assert invoke(train.main, *SMALL, *one, *options) == 0
        found[arm] = [row["test_loss"] for row in read_rows(tmp_path / arm) if row["kind"] == "round"]
    assert found["sequential"] == pytest.approx(found["plain"], rel=1e-5)
    assert read_rows(tmp_path / "plain")[-1]["test_accuracy"] > 0.9


def test_the_preset_for_a_gpu_builds(monkeypatch):
    """Traced for full sizes, and lowered for a GPU, on images of noise: nothing is compiled."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2000, 32, 32, 3), np.uint8), rng.integers(0, 10, 2000)
    with flagsaver.flagsaver():
        app.parse(["compare", f"--flagfile={ROOT / 'experiments/presets/cifar10_94.flags'}"])
        task = problem.make_task(data.from_arrays(x, y, x[:10], y[:10], classes=10))
        made, augment, course = arms.make_arms(tuple(compare.F.arms)), problem.augmentation(), arms._course("sync")
    assert (course.steps, course.decay, round(course.warmup / course.steps, 2)) == (648, "linear", 0.2)
    assert {arm.name: (arm.local_steps * arm.batch_size) for arm in made} == {
        **dict.fromkeys(("sequential", "sync"), 12 * 1024),
        **dict.fromkeys(("plain", "weighted"), 12 * 256),
    }
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # so that convolutions stay as they are
    for arm in made[1], made[3]:  # sync; weighted, which does more than plain
        replicas = 1 if arm.pooled else 4
        rounds = wavg.make_rounds(task, arm.averager, arm.inner)
        state = jax.eval_shape(lambda rounds=rounds, k=replicas: rounds.init(jax.random.key(0), replicas=k))
        steps = replicas, arm.local_steps, arm.batch_size
        batches, held = (
            Batch(jax.ShapeDtypeStruct((*n, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct(n, jnp.uint8))
            for n in (steps, (256,))
        )
        traced = jax.jit(rounds.step).trace(state, batches, held)
        after, log = traced.out_info
        assert jax.tree.structure(after.params) == jax.tree.structure(state.params)
        assert log.weights.shape == (replicas,)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        products = [line for line in program.splitlines() if "stablehlo.convolution" in line]
        # Six 3x3 layers with two gradients each, and the first layer, which needs none.
        assert len(products) >= 19
        assert all("bf16" in line and "f32" not in line for line in products)
    moved = jax.eval_shape(augment, jax.random.key(0), jax.ShapeDtypeStruct((256, 32, 32, 3), jnp.float32))
    assert moved.shape == (256, 32, 32, 3)


def test_the_first_layer_is_made_of_training_images_alone(file):
    with flagsaver.flagsaver():
        app.parse(["train", *SMALL, f"--dataset={file}"])
        found = problem._whitening(problem.load())
        app.parse(["train", *SMALL, f"--dataset={file}", "--scale=none"])
        raw = problem._whitening(problem.load())
    x = stripes(340)[0].astype(np.float32)
    np.testing.assert_allclose(found, models.whitening((x - x.mean()) / x.std()), rtol=1e-3, atol=1e-4)
    assert np.abs(raw - found).max() > 0.1


BAD = [
    (["--model=airbench"], "an Airbench with 3 stages needs images [B, H, W, C] of at least 9x9"),
    (["--widths=4"], "--widths has no effect with --model=mlp"),
    (["--model=airbench", "--widths=4,0"], "--widths=4,0: give positive whole numbers"),
    (["--crop_padding=2"], "--crop_padding has no effect without --augment"),
    (["--crop_fill=reflect"], "--crop_fill has no effect without --augment"),
    (["--dataset=python_docs", "--model=transformer", "--mirror"], "--mirror has no effect on python_docs"),
    (["--dataset=python_docs", "--model=transformer", "--label_smoothing=0.1"], "--label_smoothing has no effect on"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_gives_one_clear_line(arguments, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert invoke(train.main, *arguments) == 2
    said = capfd.readouterr().err.strip()
    assert words in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []
