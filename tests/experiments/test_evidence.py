"""The evidence: scenarios, climbing, one training and its controls, and the recording."""

import collections
import json

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from binary import invoke

import wavg_jax as wavg
from experiments import evidence, report
from experiments.setup import app
from experiments.setup.climb import DECAYS, Setting, climb
from experiments.setup.evidence_arms import make
from experiments.setup.methods import METHODS
from experiments.setup.readings import AVERAGES, Reader, mixture, split_off, temperature
from experiments.setup.scenario import SCENARIOS, SOURCE, TARGET, deal, every, stamped
from experiments.setup.trial import Budget, train
from wavg_jax import data, models
from wavg_jax.data.arrays import Split
from wavg_jax.storage.rows import read_rows

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax's cosine mixes integers and floats

K = 4
MADE = {name: make(K) for name, make in every("nowhere").items() if not name.startswith(("noisy", "foreign", "alie"))}
TASK = models.from_linen(models.MLP((8,), 10), (8, 8, 1))
SOON = {"scoring": wavg.Scoring(samples=64), "layout": wavg.Layout(1, "map")}


def digits(name, seed=0, **options):
    return deal(every("nowhere")[name](K), data.digits(), heldout=200, seed=seed, **options)


@pytest.mark.parametrize("name", MADE)
def test_a_scenario_spoils_its_bad_shards_alone(name):
    sound, spoilt = digits("iid"), digits(name)
    if MADE[name].partition(data.digits().train, 0)[0].shape != sound.shards[0].shape:
        return  # another partition, which spoils nothing
    if not MADE[name].bad:
        assert spoilt.train.y is sound.train.y or np.array_equal(spoilt.train.y, sound.train.y)
        return
    for k, shard in enumerate(spoilt.shards if MADE[name].heldout is None else ()):
        same = all(np.array_equal(a[shard], b[shard]) for a, b in zip(spoilt.train, sound.train, strict=True))
        assert same == (k not in MADE[name].bad)


def test_spoilt_shards_are_what_their_scenarios_say():
    sound = digits("iid")
    bad = sound.shards[0]
    share = np.mean(digits("labels50").train.y[bad] != sound.train.y[bad])
    assert share == pytest.approx(0.45, abs=0.06)  # half of the labels, of which a tenth are right by chance
    assert np.array_equal(digits("shifted").train.y[bad], (sound.train.y[bad] + 1) % 10)
    assert set(digits("stale").train.y[bad]) == set(range(7))
    duplicated = digits("duplicated").train.x
    assert len(np.unique(duplicated[np.concatenate(sound.shards[:2])], axis=0)) <= len(bad) // 10
    noise = digits("features").train.x[bad].astype(float) - sound.train.x[bad]
    assert 0.2 < noise.std() / float(sound.train.x.max()) < 0.5  # half of the range, clipped to it


def test_held_out_samples_are_what_their_scenarios_say():
    rng = np.random.default_rng(0)
    held = digits("iid").heldout
    wrong = every("nowhere")["wrong20"](K).misjudged(held, 10, rng)
    assert np.mean(wrong.y != held.y) == pytest.approx(0.18, abs=0.06)
    assert set(every("nowhere")["skewed"](K).misjudged(held, 10, rng).y) == set(range(5))
    assert every("nowhere")["heldout64"](K).heldout == 64


def test_liars_send_another_change():
    assert every("nowhere")["reversed3"](K).faults.sent == (-5.0, -5.0, -5.0, 1.0)
    assert every("nowhere")["idle3"](K).faults.sent == (0.0, 0.0, 0.0, 1.0)
    made = {name: make(8).faults for name, make in every("nowhere").items() if name.startswith(("alie", "random"))}
    for faults in made.values():
        assert faults.sent == (0.0,) * 3 + (1.0,) * 5
    assert made["random3"].noise == (1.0,) * 3 + (0.0,) * 5
    assert made["alie3"].mean == made["alie3far"].mean == (1.0,) * 3 + (0.0,) * 5
    np.testing.assert_allclose(made["alie3"].deviation[2:4], [-0.2533, 0], atol=1e-4)
    assert made["alie3far"].deviation[2:4] == (-1.5, 0.0)
    with pytest.raises(wavg.SettingsError, match="liars"):
        every("nowhere")["alie3"](4)  # three of four are a majority


def test_relabelled_shards_want_one_class_called_another():
    sound, spoilt, made = digits("iid"), digits("relabelled3"), every("nowhere")["relabelled3"](K)
    bad = np.concatenate([sound.shards[k] for k in made.bad])
    hit = bad[sound.train.y[bad] == SOURCE]
    assert len(hit) > 0
    assert set(spoilt.train.y[hit]) == {TARGET}
    assert np.array_equal(np.delete(spoilt.train.y, hit), np.delete(sound.train.y, hit))
    assert np.array_equal(spoilt.train.x, sound.train.x)
    aimed = made.wanted(sound.test)
    assert np.array_equal(aimed.x, sound.test.x[sound.test.y == SOURCE])
    assert set(aimed.y) == {TARGET}
    with pytest.raises(wavg.SettingsError, match="no class 6: leave the scenario out"):
        made.spoil(sound._replace(classes=6), made.bad, 0)


@pytest.mark.parametrize(("name", "part"), [("backdoor3", 2), ("boosted3", 2), ("hidden3", 2), ("faint3", 20)])
def test_backdoored_shards_want_stamped_images_called_a_class(name, part):
    sound, made = digits("iid"), every("nowhere")[name](K)
    sound = sound._replace(train=Split(sound.train.x.copy(), sound.train.y))
    sound.train.x[:, -1, -1] = 0
    spoilt = made.spoil(sound, made.bad, 0)
    for k in made.bad:
        before, after = (Split(*(part[sound.shards[k]] for part in sharded.train)) for sharded in (sound, spoilt))
        hit = after.x[:, -1, -1] == 16
        assert hit.sum() == len(hit) // part
        assert set(after.y[hit]) == {TARGET}
        assert np.array_equal(after.x[hit], stamped(before.x[hit]))
        assert np.array_equal(after.x[~hit], before.x[~hit])
        assert np.array_equal(after.y[~hit], before.y[~hit])
    aimed = made.wanted(sound.test)
    others = sound.test.x[sound.test.y != TARGET]
    assert np.array_equal(aimed.x[:, :-1], others[:, :-1])
    assert (aimed.x[:, -1, -1] == 16).all()
    assert set(aimed.y) == {TARGET}
    sent = (1.0,) * 4 if made.faults is None else made.faults.sent
    assert sent == ({"boosted3": 4 / 3, "hidden3": 0.5}.get(name, 1.0),) * 3 + (1.0,)
    assert made.faults is None or made.faults.mean == ((0.5 if name == "hidden3" else 0.0),) * 3 + (0.0,)
    with pytest.raises(wavg.SettingsError, match="leave the scenario out"):
        stamped(np.zeros((3, 30)))


def test_a_stamp_is_a_ninth_as_high_as_the_image():
    assert np.argwhere(stamped(np.eye(28)[None])[0, :, 0] == 1).tolist() == [[0]]
    assert stamped(np.eye(28)[None, ..., None]).sum() == 28 + 9 - 3


def test_foreign_samples_must_have_the_same_shape(monkeypatch):
    other = data.from_arrays(np.zeros((20, 7, 7)), np.arange(20) % 2, np.zeros((2, 7, 7)), np.arange(2), name="other")
    monkeypatch.setattr(data, "load", lambda name, folder: other)
    with pytest.raises(wavg.SettingsError, match="leave the scenario out"):
        deal(every("another")["foreign"](K), data.digits(), heldout=200, seed=0)


def test_climbing_finds_the_top_and_asks_for_every_setting_once():
    asked = []

    def value(setting):
        asked.append(setting)
        return -abs(np.log2(setting.rate / 0.4)) - abs(DECAYS.index(setting.decay) - 1)

    assert climb(value) == Setting(0.4, DECAYS[1])
    assert len(asked) == len(set(asked))


def test_a_setting_that_diverges_is_worse_than_any_other():
    assert climb(lambda s: float("nan") if s.rate > 0.01 else s.rate).rate == pytest.approx(0.00625)
    assert climb(lambda s: 0.1 if s.rate > 0.01 else s.rate + 1).rate == pytest.approx(0.00625)


@pytest.fixture(scope="module")
def trained():
    sharded = digits("noisy2")
    averager = wavg.averager(wavg.opinion_pool())
    with jax.numpy_dtype_promotion("standard"):
        done = train(
            TASK,
            sharded,
            averager,
            Budget(40, 16, wavg.schedule.fixed(10), 5, "cosine"),
            Setting(0.1, 1e-3),
            seed=3,
            **SOON,
        )
    return sharded, done


def test_a_training_is_that_of_fit_at_the_same_rates(trained):
    import optax

    sharded, done = trained
    course = optax.join_schedules([optax.linear_schedule(0.0, 1.0, 5), optax.cosine_decay_schedule(1.0, 35)], [5])
    inner = optax.chain(
        optax.add_decayed_weights(1e-3), optax.trace(0.9), optax.scale_by_schedule(course), optax.scale(-0.1)
    )
    again = wavg.fit(
        TASK,
        sharded,
        wavg.averager(wavg.opinion_pool()),
        inner=inner,
        local_steps=10,
        rounds=4,
        batch_size=16,
        seed=3,
        progress=False,
        **SOON,
    )
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(done.path[-1][0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    weights = np.stack([row["weights"] for row in again.rows[1:]])
    np.testing.assert_allclose(weights, np.stack([row["weights"] for row in done.rows]), atol=1e-3)


def test_the_replicas_kept_are_those_of_the_last_blend(trained):
    _, done = trained
    weights = done.rows[-1]["weights"]
    blend = jax.tree.map(lambda *own: np.tensordot(weights, np.stack(own), 1), *done.replicas)
    for a, b in zip(jax.tree.leaves(blend), jax.tree.leaves(done.path[-1][0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_readings_are_what_they_are_called(trained):
    sharded, done = trained
    reader, x, y = Reader(TASK, sharded.prepare), sharded.test.x, sharded.test.y
    wanted = ["", "temperature", "selection", "swa", "ema", "finetuned", "ensemble"]
    found = reader.read(done, sharded.heldout, x, wanted, seed=0, finetuning=0.05)
    assert list(found) == wanted
    assert reader.quality(found[""], y)["test_accuracy"] == pytest.approx(np.mean(found[""].argmax(1) == y))
    np.testing.assert_array_equal(found["temperature"].argmax(1), found[""].argmax(1))
    best = done.path[int(np.argmin(done.held))]
    np.testing.assert_array_equal(found["selection"], reader.logits(best, x))
    tail = jax.tree.map(lambda *own: np.mean(own, axis=0), *[params for params, _ in done.path[2:]])
    np.testing.assert_allclose(found["swa"], reader.logits((tail, done.path[-1][1]), x), rtol=1e-3, atol=1e-4)
    probabilities = np.mean([jax.nn.softmax(reader.logits((one, {}), x)) for one in done.replicas], axis=0)
    np.testing.assert_allclose(np.exp(found["ensemble"]), probabilities, rtol=1e-3, atol=1e-5)
    held = sharded.heldout
    tuned = reader.finetuned(done.path[-1], held, 0, 0.05)
    before, after = (reader.quality(reader.logits(one, held.x), held.y)["test_loss"] for one in (done.path[-1], tuned))
    assert after < before  # it trains on them


def test_the_average_over_rounds_is_that_of_the_library():
    smoothing, state = wavg.smoothing.ema(0.8), None
    shares, value = AVERAGES["ema"](5), 0.0
    for number in range(5):
        params = {"w": np.float32([number])}
        state = smoothing.init(params) if state is None else state
        value, state = smoothing.update(params, state)
    assert float(value["w"][0]) == pytest.approx(float(shares @ np.arange(5)), rel=1e-5)


def test_a_mixture_of_one_is_itself_and_a_temperature_is_found():
    logits = np.log(np.array([[0.7, 0.3], [0.2, 0.8]], np.float32))
    np.testing.assert_allclose(mixture([logits, logits]), logits, atol=1e-6)
    labels = np.array([0] * 70 + [1] * 30)
    assert temperature(np.tile(logits[:1] / 3, (100, 1)), labels) == pytest.approx(1 / 3, rel=0.02)


def test_tuning_samples_are_no_held_out_ones():
    sharded, rest = split_off(digits("iid"), 150)
    assert (len(sharded.heldout.y), len(rest.y)) == (150, 50)
    together = np.concatenate([sharded.heldout.x, rest.x, sharded.train.x])
    assert len(np.unique(together, axis=0)) == len(np.unique(data.digits().train.x, axis=0))


SMALL = ("--replicas=4", "--rounds=2", "--local_steps=4", "--hidden=8", "--devices=1", "--warmup=2", "--decay=cosine")
FEW = (
    *SMALL,
    "--tuning_samples=200",
    "--score_samples=64",
    "--evidence_scenarios=noisy2,sized",
    "--seeds=0,1",
    "--tuning_seeds=9",
)
ARMS = "--evidence_arms=sequential,plain,opinion_pool,oracle,accuracy,sequential+heldout"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    with jax.numpy_dtype_promotion("standard"):
        assert invoke(evidence.main, *FEW, ARMS, f"--workdir={folder}") == 0
    return folder


@pytest.mark.slow
def test_every_cell_and_control_is_a_row_and_what_is_the_same_is_trained_once(recorded):
    rows = read_rows(recorded)
    cells = {row["run"]: row for row in rows if row["kind"] == "cell"}
    tuned = {row["run"] for row in rows if row["kind"] == "tuning"}
    assert tuned == {
        *(
            f"noisy2/{arm}"
            for arm in ("sequential", "plain", "opinion_pool", "oracle", "accuracy", "sequential+heldout")
        ),
        *(f"sized/{arm}" for arm in ("plain", "opinion_pool", "accuracy")),
        *(f"iid/{arm}" for arm in ("sequential", "plain", "sequential+heldout")),
    }
    controls = ("", "+temperature", "+selection", "+swa", "+ema", "+finetuned", "+ensemble")
    names = {f"{arm}{control}" for arm in ("sequential", "plain", "opinion_pool") for control in controls}
    names = (names - {"sequential+ensemble"}) | {"oracle", "accuracy", "sequential+heldout"}
    assert set(cells) == {f"{s}/{name}/{seed}" for s in ("noisy2", "sized") for name in names for seed in (0, 1)}
    assert len(cells["noisy2/plain/0"]["heldout_accuracy"]) == 2
    text = (recorded / "report.md").read_text()
    assert "Share of the oracle's gap recovered" in text
    assert "opinion_pool minus every other row" in text
    assert {path.name for path in (recorded / "plots").iterdir()} >= {"matrix.png"}


@pytest.mark.slow
def test_a_recording_goes_on_where_it_was_cut(recorded, tmp_path):
    lines = (recorded / "rows.jsonl").read_text().splitlines(keepends=True)
    whole = {json.loads(line)["run"] for line in lines}
    last = max(number for number, line in enumerate(lines) if '"run": "noisy2/opinion_pool/1"' in line)
    (tmp_path / "rows.jsonl").write_text("".join(lines[: last - 3]))  # some of a cell's controls are there
    assert invoke(evidence.main, *FEW, ARMS, f"--workdir={tmp_path}", "--resume") == 0
    rows = read_rows(tmp_path)
    assert {row["run"] for row in rows} == whole
    settings = collections.defaultdict(set)
    for row in rows:
        if row["kind"] == "cell":
            settings[row["scenario"], row["weighting"]].add((row["rate"], row["decay"]))
    assert {len(found) for found in settings.values()} == {1}  # seeds before and after the cut share theirs
    for kind, names in (
        ("cell", ("run",)),
        ("tuned", ("run",)),
        ("tuning", ("run", "rate", "decay", "seed")),
    ):  # nothing twice
        found = [tuple(row[name] for name in names) for row in rows if row["kind"] == kind]
        assert len(found) == len(set(found))
    assert invoke(report.main, str(tmp_path), f"--out={tmp_path / 'again'}") == 0


@pytest.mark.slow
def test_an_attack_is_tuned_without_and_its_success_is_the_share_that_it_wants(tmp_path, monkeypatch):
    aimless = {
        name: lambda k, make=make: make(k)._replace(wanted=lambda test: test) for name, make in every("nowhere").items()
    }
    monkeypatch.setattr(evidence, "every", lambda folder: aimless | {"iid": every("nowhere")["iid"]})
    few = (*SMALL, "--tuning_samples=100", "--seeds=0,1", "--tuning_seeds=9", "--readings=temperature")
    arms = ("--evidence_scenarios=relabelled3,iid", "--tuned_in=iid", "--evidence_arms=plain,multi_krum,oracle")
    assert invoke(evidence.main, *few, *arms, "--byzantine=1", f"--workdir={tmp_path}") == 0
    rows = read_rows(tmp_path)
    assert {row["run"] for row in rows if row["kind"] in ("tuning", "tuned")} == {"iid/plain", "iid/multi_krum"}
    cells = {row["run"]: row for row in rows if row["kind"] == "cell"}
    for name, row in cells.items():
        assert ("attack_success" in row) == name.startswith("relabelled3/")
        if "attack_success" in row:  # of every sample the attacker wants the truth
            assert row["attack_success"] == pytest.approx(row["test_accuracy"], abs=1e-5)
    assert any(row.get("attack_success", 0) > 0 for row in cells.values())
    text = (tmp_path / "report.md").read_text()
    assert "## Attack success (%)" in text
    assert "that were best for it in IID, on other seeds" in text


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_as_many_steps_as_the_others(name):
    with flagsaver.flagsaver():
        app.parse(["binary", *SMALL, "--rounds=30", "--local_steps=10"])
        arm, *_ = make((name,))
        when, given, taken = arm.budget().schedule, 0, []
        while given < 300:
            taken.append(when.steps(wavg.schedule.Past(len(taken), given, ())))
            given += taken[-1]
    assert given == 300
    assert min(taken) > 0
    assert max(taken) <= when.longest
    if name in ("post_local", "qsr"):  # more and more seldom
        assert taken[:-1] == sorted(taken[:-1])
        assert taken[0] < taken[-2]


@pytest.mark.slow
def test_methods_of_others_are_arms(tmp_path):
    few = (
        *SMALL,
        "--tuning_samples=100",
        "--evidence_scenarios=iid",
        "--seeds=0",
        "--tuning_seeds=9",
        "--readings=temperature",
    )
    assert invoke(evidence.main, *few, "--evidence_arms=plain,grawa32,qsr", f"--workdir={tmp_path}") == 0
    names = {row["weighting"] for row in read_rows(tmp_path) if row["kind"] == "cell"}
    assert names == {"plain", "plain+temperature", "grawa32", "qsr"}


ONE = ("--evidence_arms=sequential", "--evidence_scenarios=iid", "--tuning_samples=200")
BAD = [
    (["--evidence_arms=plain,none"], "--evidence_arms=plain,none"),
    (["--evidence_scenarios=noisy99"], "--evidence_scenarios=noisy99"),
    (["--seeds=1000"], "keep them apart from --seeds"),
    (["--heldout=0"], "--heldout=0"),
    (["--noisy=1"], "--noisy has no effect"),
    (["--evidence_arms=plain", "--evidence_scenarios=noisy5"], "--replicas=4: noisy5 spoils 5 shards; give at least"),
    (["--evidence_scenarios=noisy4"], "noisy4 spoils 4 shards and an oracle needs a good one; give at least --repl"),
    (["--tuned_by=median"], "--tuned_by=median"),
    (["--readings=swa,mean"], "--readings=swa,mean: choose from temperature"),
    (["--controlled=plane"], "--controlled=plane: choose from sequential"),
    (
        [*ONE, "--tuned_by=ensemble"],
        "--tuned_by=ensemble: sequential has no such reading, but temperature, selection, swa",
    ),
    (
        [*ONE, "--tuned_by=swa", "--model=cnn", "--batch_norm"],
        "sequential has no such reading, but temperature, selection, finetuned;",
    ),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(arguments, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    sized = [flag for flag in SMALL if "--model=cnn" not in arguments or not flag.startswith("--hidden")]
    assert invoke(evidence.main, *sized, *arguments) == 2
    assert says in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_matrix_of_weightings_keeps_its_scenarios():
    assert [*SCENARIOS][:6] == ["iid", "sized", "dirichlet03", "dirichlet01", "noisy2", "noisy4"]
