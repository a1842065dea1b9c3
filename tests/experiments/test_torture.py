"""Runs killed at random end as if nobody had disturbed them, and what is lost is found."""

import json
import random

import pytest
from binary import invoke

from experiments import torture
from experiments.setup import lives
from experiments.setup.lives import End, Lost
from experiments.setup.victim import PHASES, STARTING, Marks

SINGLE = torture.FORMS["single"]
ROWS = [{"kind": "run", "run": "a"}, {"kind": "round", "run": "a", "round": 1, "train_loss": 0.5}]
EXPECTED = End([{"params/w": "1", "round": "2"}], ROWS, {})


@pytest.mark.slow
def test_what_is_killed_at_random_ends_as_if_nobody_had_disturbed_it(tmp_path, capfd):
    assert invoke(torture.main, "--kills=5", "--forms=single", f"--workdir={tmp_path}") == 0
    figures = json.loads((tmp_path / "torture.json").read_text())
    assert figures["survived"] == figures["tried"] >= 3
    assert figures["lost"] == []
    assert "kills survived" in capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torture.json", "torture.md"]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (EXPECTED._replace(digests=[{"params/w": "9", "round": "2"}]), "the state of process 0 differs in params/w"),
        (EXPECTED._replace(digests=[{"params/w": "1"}]), "differs in round"),
        (EXPECTED._replace(rows=ROWS[:1]), "1 rows instead of 2"),
        (EXPECTED._replace(rows=[ROWS[0], ROWS[1] | {"train_loss": 0.25}]), "row 1 differs in train_loss"),
        (EXPECTED._replace(rows=[ROWS[0], ROWS[1] | {"more": 1}]), "row 1 differs in more"),
    ],
)
def test_any_difference_counts_as_lost(found, says):
    lives.compare(EXPECTED, EXPECTED)
    with pytest.raises(Lost, match=says):
        lives.compare(EXPECTED, found)


class Harmed(lives.Life):
    """A life without processes, whose end is not the expected one."""

    def die(self, kill, seconds):
        return kill.phase

    def rows(self):
        return ROWS[:1]

    def finish(self):
        return EXPECTED._replace(digests=[{"params/w": "9", "round": "2"}])


def test_a_loss_is_recorded_and_kept_and_ends_with_an_error(tmp_path, monkeypatch, capfd):
    def reference(form, folder):
        (folder / "cache").mkdir(parents=True)
        return EXPECTED

    monkeypatch.setattr(lives, "reference", reference)
    monkeypatch.setattr(lives, "Life", Harmed)
    assert invoke(torture.main, "--kills=3", "--forms=int8", f"--workdir={tmp_path}") == 1
    figures = json.loads((tmp_path / "torture.json").read_text())
    assert (figures["survived"], figures["tried"], figures["forms"]["int8"]["all"]) == (0, 3, [0, 3])
    assert "the state of process 0 differs in params/w" in figures["lost"][0]
    assert (tmp_path / "scratch" / "int8-0").is_dir()
    assert "3 of 3 kills lost something" in capfd.readouterr().err


def test_kills_come_again_with_their_seed_and_fall_in_every_phase():
    kills = lives.plan(SINGLE, 200, random.Random(0))
    assert kills == lives.plan(SINGLE, 200, random.Random(0))
    assert {kill.phase for kill in kills} == set(PHASES)
    assert [kill.phase for kill in kills[-20:]] == [PHASES[-1]] * 20
    assert {kill.victims for kill in lives.plan(torture.FORMS["two_processes"], 50, random.Random(0))} == {
        (0,),
        (1,),
        (0, 1),
    }
    assert len(lives.plan(SINGLE, 1, random.Random(0))) == 1


def test_marks_outlive_whoever_makes_them(tmp_path):
    ours, theirs = Marks(tmp_path / "marks"), Marks(tmp_path / "marks")
    assert theirs.now() == STARTING
    seen = []

    def fail():
        seen.append(theirs.now())
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - the one above
        ours.during("saving", fail)()
    assert seen == ["saving"]
    assert theirs.now() == STARTING
    assert theirs.entered("saving") == 1
    assert set(theirs.seconds()) == {"saving"}
    assert ours.during("in a round", ours.during("writing rows", theirs.now))() == "writing rows"


def test_a_kill_for_each_form_is_the_least(tmp_path, capfd):
    assert invoke(torture.main, "--kills=3", f"--workdir={tmp_path}") == 2
    assert "--kills=3: give at least 7, one for each of --forms" in capfd.readouterr().err
