"""Ways in which a worker breaks, as hooks: at a (worker, round), once."""

import os
import pathlib
import signal
import threading
import time
from typing import NamedTuple

import numpy as np


def with_leaves(reply, change):
    return reply._replace(leaves=change(list(reply.leaves)))


def filled(reply, value):
    return with_leaves(reply, lambda leaves: [np.full_like(leaves[0], value), *leaves[1:]])


BROKEN = {
    "not finite": lambda reply: filled(reply, np.nan),
    "far": lambda reply: filled(reply, 1e9),
    "shape": lambda reply: with_leaves(reply, lambda leaves: [leaves[0][:1], *leaves[1:]]),
    "dtype": lambda reply: with_leaves(reply, lambda leaves: [leaves[0].astype(np.float64), *leaves[1:]]),
    "tree": lambda reply: with_leaves(reply, lambda leaves: leaves[:-1]),
    "nothing": lambda reply: None,
    "odd": lambda reply: (5, [], 0.1),
    "earlier": lambda reply: reply._replace(ticket=reply.ticket._replace(round=1)),
    "huge": lambda reply: with_leaves(reply, lambda leaves: [*leaves, np.zeros(10**6)]),
}


class Hook(NamedTuple):
    """`plan` is {(worker, round): what}; in `folder` it leaves a file for every (point, worker, round) reached."""

    plan: dict
    folder: str

    def __call__(self, point, worker, round, reply):
        once = pathlib.Path(self.folder, f"{point}-{worker}-{round}")
        met = once.exists()
        # Whole at once, since whoever waits for it reads it.
        new = once.with_suffix(".new")
        new.write_text(str(os.getpid()))
        new.replace(once.with_name(once.name + "-again") if met else once)
        what = None if met else self.plan.get((worker, round))
        if point == "train":
            if what == "raise":
                raise RuntimeError("no luck")
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if what is not None and what.startswith("let the other go on"):
                os.kill(int(wait_for(once.with_name("train-0-2"))), signal.SIGCONT)
                wait_for(once.with_name("counted" if what.endswith("count") else "reply-0-2"))
        if point == "reply":
            if what == "kill on the way":
                threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGKILL)).start()
            if what == "lie":
                return with_leaves(reply, lambda leaves: [*leaves[:-1], np.zeros_like(leaves[-1])])
            if what == "slow":
                return reply._replace(seconds=reply.seconds * 4)
            if what in BROKEN:
                return BROKEN[what](reply)
        if point == "score" and what == "lie about others":
            return with_leaves(reply, lambda leaves: [np.zeros_like(x) for x in leaves])
        return reply


def wait_for(path, seconds=120):
    """Waits until a file is there, and returns what it says."""
    end = time.monotonic() + seconds
    while not pathlib.Path(path).exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)
    return pathlib.Path(path).read_text()
