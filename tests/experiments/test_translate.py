"""What a binary prints of the library's messages: arguments become flags, everything else stays."""

import pytest

from experiments import scenarios  # noqa: F401 - defines --lr_iid
from experiments.setup.translate import to_flags

MESSAGES = {
    "devices=3: 4 replicas do not divide": "--devices=3: 4 replicas do not divide",
    "choose another workdir=": "choose another --workdir",
    "continue with resume=True, the same settings and workdir=runs/a": (
        "continue with --resume, the same settings and --workdir=runs/a"
    ),
    "keep the data on the devices with resident=True": "keep the data on the devices with --feed=resident",
    "stream them with resident=False": "stream them with --feed=stream",
    "samples=0: score at least one": "--score_samples=0: score at least one",
    "opt_state= is no policy": "--opt_state_at_sync is no policy",
    "replica_map='threads': choose from vmap, map": "--replica_map=threads: choose from vmap, map",
    "local_steps is 0; give a whole number from 1": "--local_steps is 0; give a whole number from 1",
    # The flag of the arm that diverged.
    "'sync-noisy2-seed0' diverged; lower the learning rate of inner=": (
        "'sync-noisy2-seed0' diverged; lower the learning rate of --lr_sync"
    ),
    "'mine' diverged; lower the learning rate of inner= or of outer=": (
        "'mine' diverged; lower the learning rate of inner= or of --outer_lr"
    ),
    "iid/plain/0 at 0.02: 'run' diverged; lower the learning rate of inner=": (
        "iid/plain/0 at 0.02: 'run' diverged; lower the learning rate of --lr_iid"
    ),
    # No flags: other arguments, comparisons, equations in words, and flags themselves.
    "higher_is_better=True is needed": "higher_is_better=True is needed",
    "the network outputs K==3": "the network outputs K==3",
    "set --devices=2": "set --devices=2",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_arguments_of_the_library_are_flags_of_the_binaries(message):
    assert to_flags(message) == MESSAGES[message]
