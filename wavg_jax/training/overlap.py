"""Rounds with fragments on several CPU devices: exchanges run in a thread of their own while segments train.

On CPU one program runs its steps one after another, and so do the programs that one thread launches: an exchange hides
behind local steps only in a program and a thread of its own. All programs with a collective run in one thread, each to
its end, so that every process meets the others in the same order; a round returns only once all of them are done, so
that whatever follows may talk to other processes as well. On accelerators, whose compiler overlaps the collectives of
one program with its other work, and on one device, where nothing travels, a round is one program.
"""

import concurrent.futures
import functools
from collections.abc import Callable

import jax
import numpy as np

from wavg_jax.base import PyTree, TrainState
from wavg_jax.devices.placement import compiler_options
from wavg_jax.devices.transfer import put
from wavg_jax.rounds.common import RoundLog
from wavg_jax.rounds.pieces import Piece, Pieces
from wavg_jax.rounds.streaming import at_once, play
from wavg_jax.training.batches import Shared, Work
from wavg_jax.training.programs import Compiled, compiled_together, laid_out
from wavg_jax.training.recipe import Recipe, rounds_of


def overlaps(recipe: Recipe) -> bool:
    """Whether the rounds of a recipe run as several programs."""
    where = recipe.placement
    return recipe.at_sync.fragments > 1 and where.parts > 1 and where.devices[0].platform == "cpu"


_EXCHANGES = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="exchange")


def _launched(piece: Callable, *arguments: PyTree) -> Callable[[], tuple]:
    """Runs a piece to its end in the thread of exchanges; see `wavg_jax.rounds.streaming.Launch`."""
    return _EXCHANGES.submit(lambda: jax.block_until_ready(piece(*arguments))).result


@functools.lru_cache(maxsize=16)
def programs_of_pieces(recipe: Recipe) -> Pieces:
    """The jitted pieces of a recipe's rounds, shared by all runs of a process with an equal one."""
    options = compiler_options(recipe.placement)
    return jax.tree.map(
        lambda piece: jax.jit(piece, donate_argnums=piece.donates, compiler_options=options), rounds_of(recipe).pieces
    )


def requests_of(recipe: Recipe, *arguments: PyTree) -> list[tuple]:
    """What `compiled_together` needs to compile the pieces for a round of these `arguments` of `Programs.run`: each
    piece's program with the shapes and shardings of its arguments, in the order in which a round calls them."""
    requests: list[tuple] = []

    def traced(piece: Piece, program: jax.stages.Wrapped) -> Callable[..., tuple]:
        def call(*given: PyTree) -> tuple:
            requests.append((program, *given))
            outs = zip(jax.eval_shape(program, *given), piece.outs, strict=True)
            return tuple(laid_out(x, getattr(recipe.placement, kind)) for x, kind in outs)

        return call

    pieces = jax.tree.map(traced, rounds_of(recipe).pieces, programs_of_pieces(recipe))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments)
    _play(pieces, at_once, _numbers(recipe), *shapes)
    return requests


def _numbers(recipe: Recipe) -> list[jax.Array]:
    return [put(np.int32(s), recipe.placement.shared) for s in range(recipe.at_sync.fragments)]


def compiled_pieces(recipe: Recipe, *arguments: PyTree) -> Compiled:
    """Compiles a round of these `arguments` of `Programs.run`, which it can be called like."""
    requests = requests_of(recipe, *arguments)
    programs = compiled_together(*requests)
    seconds = sum(program.seconds for program in programs)
    calls = iter(program.call for program in programs)
    order = {id(program): next(calls) for program, *_ in requests}
    pieces = jax.tree.map(lambda program: order[id(program)], programs_of_pieces(recipe))
    digest = "".join(program.digest for program in programs)
    call = functools.partial(_play, pieces, _launched, _numbers(recipe))
    sizes = [program.temporary for program in {id(program.call): program for program in programs}.values()]
    # They run beside one another, and keep their results for others: all of their memory counts.
    return Compiled(call, seconds, digest, None if None in sizes else sum(size or 0 for size in sizes))


def _play(
    pieces: Pieces,
    launch: Callable,
    numbers: list[jax.Array],
    state: TrainState,
    work: Work,
    shared: Shared,
    stop: jax.Array | None = None,
) -> tuple[TrainState, RoundLog, jax.Array | None]:
    """As `Programs.run`."""
    given = (state, work.items, shared.held_out, shared.train, work.pace, shared.sizes, stop)
    return play(pieces, launch, numbers, *given)
