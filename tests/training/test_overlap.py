"""fit with fragments: on several devices exchanges run in a thread of their own, with the numbers of one device."""

import json
import math
import os
import re
import signal
import threading

import jax
import numpy as np
import pytest
from runs import INNER, OPTIONS, TASK, leaves, run, same, without_clocks
from small import sharded

import wavg_jax as wavg
from tests.spawn import joined, spawn
from wavg_jax.rounds import streaming
from wavg_jax.training import overlap
from wavg_jax.training.programs import compiled_together
from wavg_jax.training.recipe import make_recipe
from wavg_jax.training.run import Plan, Run
from wavg_jax.training.schedule import fixed

SOFTMAX = wavg.averager(wavg.softmax("loss", 0.5), outer=wavg.outer.nesterov())
LEARNED = wavg.averager(wavg.learned(), outer=wavg.outer.nesterov())


def close(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("averager", [SOFTMAX, LEARNED], ids=["softmax", "learned"])
def test_several_programs_give_the_numbers_of_one(averager, wire, monkeypatch):
    whole = run(sharded(), averager, fragments=2, wire=wire, devices=1)
    apart = run(sharded(), averager, fragments=2, wire=wire, devices=4)
    close(whole, apart)
    monkeypatch.setattr("wavg_jax.training.engine.overlaps", lambda recipe: False)
    close(apart, run(sharded(), averager, fragments=2, wire=wire, devices=4))
    for a, b in zip(whole.rows[1:], apart.rows[1:], strict=True):
        assert a["alive"] == b["alive"]
        np.testing.assert_allclose(a["weights"], b["weights"], rtol=1e-3)
        assert set(a) == set(b)


def requests(averager, wire):
    data = sharded(8)
    layout = wavg.Layout(devices=8, replica_map="vmap")
    recipe = make_recipe(TASK, data, averager, INNER, at_sync=wavg.AtSync(fragments=2, wire=wire), layout=layout)
    made = Run(recipe, data, Plan(fixed(4), 1, 8, 0, 1, 1), "run", ("loss", "accuracy"))
    return recipe, overlap.requests_of(recipe, made.first(), made.work(0, 1), made.shared, None)


def collectives(text):
    """What a compiled program sends: (collective, numbers), sorted."""
    found = re.findall(r"= (\S+|\([^)]*\)) ((?:all|collective|reduce)-[a-z-]+?)(?:-start)?\(", text)
    sent = [(kind, re.findall(r"\[([\d,]*)\]", shape)) for shape, kind in found if not kind.endswith("done")]
    return sorted((kind, sum(math.prod(int(n) for n in dims.split(",") if n) for dims in all)) for kind, all in sent)


@pytest.mark.parametrize(
    ("averager", "wire", "expected"),
    [
        (SOFTMAX, "float32", lambda n: [("all-gather", 8), ("all-reduce", n)]),  # who is alive; one weighted sum
        (LEARNED, "float32", lambda n: [("all-gather", 8 * (n + 1))]),
        (SOFTMAX, "bfloat16", lambda n: [("all-gather", 8 * (n + 2))]),
    ],
)
def test_only_exchanges_have_collectives_and_each_sends_its_fragment_once(averager, wire, expected):
    recipe, asked = requests(averager, wire)
    texts = {
        id(request[0]): done.call.as_text() for request, done in zip(asked, compiled_together(*asked), strict=True)
    }
    pieces = jax.tree.map(lambda program: texts[id(program)], overlap.programs_of_pieces(recipe))
    for local in (pieces.train, pieces.score, *pieces.swap):
        assert re.search("all-|collective-|reduce-scatter", local) is None
    assert [collectives(text) for text in pieces.exchange] == [expected(3), expected(12)]  # of b and of w
    # alive, three free signals, and the loss or the replica's statistics
    assert [numbers for kind, numbers in collectives(pieces.close) if kind == "all-gather"] == [8 * 5]


def test_exchanges_run_in_one_thread_and_local_steps_in_another(monkeypatch):
    threads = {}

    def noted(pieces, launch, *given):
        names = {id(piece): f"exchange {f}" for f, piece in enumerate(pieces.exchange)} | {id(pieces.close): "close"}

        def note(piece):
            def call(*arguments):
                threads.setdefault(names.get(id(piece), "local"), set()).add(threading.current_thread().name)
                return piece(*arguments)

            return call

        compiling = launch is streaming.at_once
        return streaming.play(pieces if compiling else jax.tree.map(note, pieces), launch, *given)

    monkeypatch.setattr(overlap, "play", noted)
    run(sharded(), SOFTMAX, fragments=2, devices=4)
    assert threads.pop("local") == {threading.current_thread().name}
    assert set(threads) == {"exchange 0", "exchange 1", "close"}
    assert len(set.union(*threads.values())) == 1


@pytest.mark.optimized
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_a_run_resumes_bit_for_bit(devices, wire, tmp_path):
    options = OPTIONS | {"fragments": 2, "wire": wire, "devices": devices}
    straight = run(sharded(), LEARNED, **options)
    with pytest.raises(wavg.Stopped):
        run(sharded(), LEARNED, workdir=tmp_path, on_round=stop_after(4), **options)
    resumed = run(sharded(), LEARNED, workdir=tmp_path, resume=True, **options)
    same(straight, resumed)
    assert without_clocks(resumed.rows)[1:] == without_clocks(straight.rows)[1:]


def stop_after(number):
    def on_round(row):
        if row["round"] == number:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_round


def test_other_fragments_are_another_run(tmp_path):
    run(sharded(), workdir=tmp_path, fragments=2)
    with pytest.raises(wavg.ResumeError, match="replicas/pending/params/w was"):
        run(sharded(), workdir=tmp_path, resume=True, rounds=4)


def test_clocks_add_up_and_rows_are_written_round_by_round():
    shown = []
    result = run(sharded(), fragments=2, devices=4, rounds=4, test_every=4, progress=shown.append)
    seconds = [row["seconds"] for row in result.rows[1:]]
    np.testing.assert_allclose(result.rows[-1]["elapsed"], sum(seconds))
    assert len(shown) == 4
    assert result.rows[-1]["test_accuracy"] > 0.5


def test_collections_are_averaged_and_smoothing_follows_the_rounds():
    options = {"fragments": 2, "smoothing": wavg.smoothing.ema(0.5), "stats": wavg.policy.reestimate(2)}
    close(run(sharded(), SOFTMAX, devices=1, **options), run(sharded(), SOFTMAX, devices=4, **options))


def test_an_exchange_that_fails_ends_the_run_with_its_error(monkeypatch):
    def fail(parts, *given):
        raise RuntimeError("no link")

    def broken(recipe, *arguments):
        done = compiled(recipe, *arguments)
        play = done.call
        exchange = tuple(fail for _ in play.args[0].exchange)
        pieces = play.args[0]._replace(exchange=exchange)
        return done._replace(call=type(play)(play.func, pieces, *play.args[1:]))

    compiled = overlap.compiled_pieces
    monkeypatch.setattr("wavg_jax.training.engine.compiled_pieces", broken)
    with pytest.raises(RuntimeError, match="no link"):
        run(sharded(), fragments=2, devices=4)


PROCESSES = """
sys.path.insert(0, "tests")
import json, os, signal
from runs import run
from small import sharded
import wavg_jax as wavg
averager = wavg.averager(wavg.softmax("loss", 0.5), outer=wavg.outer.nesterov())
def stop(row):
    if row["round"] == 2 and INDEX == 1:
        os.kill(os.getpid(), signal.SIGTERM)
options = dict(fragments=2, devices=2, rounds=6, workdir=ARGUMENTS[0])
try:
    run(sharded(), averager, on_round=stop, **options)
except wavg.Stopped as stopped:
    rounds = len(stopped.result.rows) - 1
resumed = run(sharded(), averager, resume=True, **options)
print(json.dumps([rounds, [float(x) for leaf in jax.tree.leaves(resumed.params) for x in leaf.ravel()]]))
"""


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_to_the_numbers_of_one(tmp_path):
    done = spawn(2, joined(PROCESSES), tmp_path)
    assert [process.returncode for process in done] == [0, 0], [process.stderr for process in done]
    alone = run(sharded(), SOFTMAX, fragments=2, devices=2, rounds=6)
    expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(alone.params)])
    said = [json.loads(process.stdout) for process in done]
    assert said[0][0] == said[1][0] in (2, 3)
    for _, params in said:
        np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-5)
