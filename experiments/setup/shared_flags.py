"""The flags that the binaries share. A preset is a file of them: `--flagfile=experiments/presets/fashion.flags`.

Every binary declares which ones it reads and refuses the rest: a flag without effect misleads.
"""

import math
from collections.abc import Collection
from typing import Any

from absl import flags

from experiments.setup.choices import DRIFTS, FALLS, FEEDS, OUTERS, PULLS, REDUCES, SCALES, SCHEDULES, SMOOTHINGS
from experiments.setup.weightings import WEIGHTINGS
from wavg_jax.base import SettingsError
from wavg_jax.devices.mapping import MAPS
from wavg_jax.devices.network import WIRES, Link

COMPARED = ("sequential", "sync", "plain", "weighted")
"""The arms that a comparison runs by default."""
DILOCO = {"diloco": "plain", "weighted_diloco": "weighted"}
"""Arms with DiLoCo's outer step, and the arms that they are without it."""
ARMS = (*COMPARED, "accumulate", *DILOCO)
"""All arms; `accumulate` matters where links are slow."""

_STARTS: dict[str, int] = {}


def _topic(title: str) -> None:
    """Starts a group of flags in `--help`."""
    _STARTS[title] = len(flags.FLAGS.flags_by_module_dict().get(__name__, ()))


_topic("Data")
flags.DEFINE_string(
    "dataset",
    "digits",
    "digits (embedded), mnist, fashion_mnist, cifar10, or a .npz file of your own; of text: python_docs (Python's own "
    "help topics), tiny_shakespeare, or a .txt file of your own.",
)
flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of prepared TFDS sets, or of the publishers' files.")
flags.DEFINE_integer("heldout", 200, "Training samples held out for scoring; never trained on.", lower_bound=0)
flags.DEFINE_integer("context", 128, "Texts: bytes or tokens in a window, which is a sample.", lower_bound=1)
flags.DEFINE_string("tokenizer", None, "Texts: a tokenizer.json that cuts them into tokens; by default bytes.")
flags.DEFINE_enum(
    "partition",
    "iid",
    ["iid", "sized", "dirichlet", "contiguous", "interleaved"],
    "How to cut the training data into shards; contiguous: a passage of a text each, interleaved: many.",
)
flags.DEFINE_integer("block", 16, "partition=interleaved: successive samples in a block.", lower_bound=1)
flags.DEFINE_list("proportions", "1,2,3,4", "partition=sized: relative sizes of the shards, repeated as needed.")
flags.DEFINE_float("alpha", 0.3, "partition=dirichlet: concentration; small means few labels per shard.", lower_bound=0)
flags.DEFINE_list(
    "noisy",
    None,
    "How many shards, from the first on, get random labels, or a text's bytes in random order. compare and tune take "
    "several numbers, one per scenario (default: 0 and half of the shards); other commands take one (default: 0).",
)
flags.DEFINE_enum(
    "scale",
    "channel",
    list(SCALES),
    "Which inputs share a mean and a deviation; a vector's features are its channels.",
)
flags.DEFINE_bool("augment", False, "Randomly crop and flip the images, with a random key per replica.")
flags.DEFINE_integer("crop_padding", 4, "--augment: pixels by which crops move, at most.", lower_bound=0)
flags.DEFINE_enum(
    "crop_fill", "zeros", ["zeros", "reflect"], "--augment: what lies beyond the edge: zeros, or the image mirrored."
)

_topic("Network")
flags.DEFINE_enum(
    "model",
    "mlp",
    ["mlp", "cnn", "resnet", "airbench", "transformer"],
    "The network; resnet is ResNet-20, airbench whitens the patches of images first, transformer is for texts.",
)
flags.DEFINE_list("widths", "64,256,256", "model=airbench: channels of each stage, which halves the image.")
flags.DEFINE_bool("mirror", False, "Score and test images by the mean logits of the image and its mirror image.")
flags.DEFINE_integer("layers", 3, "model=transformer: number of layers.", lower_bound=1)
flags.DEFINE_integer("width", 128, "model=transformer: features per byte.", lower_bound=1)
flags.DEFINE_integer("heads", 4, "model=transformer: attention heads; divide half the width.", lower_bound=1)
flags.DEFINE_list("hidden", "128", "model=mlp: widths of the hidden layers.")
flags.DEFINE_bool("batch_norm", False, "model=cnn: use BatchNorm.")
flags.DEFINE_float(
    "dropout", 0.0, "Dropout rate before the last layer, or in the transformer.", lower_bound=0, upper_bound=0.9
)
flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Dtype to compute in; parameters and sums stay float32."
)

_topic("Training")
flags.DEFINE_integer("replicas", 4, "K, the number of replicas and of shards.", lower_bound=1)
flags.DEFINE_integer("local_steps", 10, "H, local steps between two blends.", lower_bound=1)
flags.DEFINE_integer("rounds", 20, "Number of rounds: H local steps each, then a blend.", lower_bound=1)
flags.DEFINE_integer("batch_size", 16, "Samples per replica and local step.", lower_bound=1)
flags.DEFINE_string(
    "inner",
    "sgd",
    "The inner optimizer, any of optax with its arguments: adam, rprop, 'adamw(weight_decay=0.1)', contrib.muon; "
    "momentum is SGD with 0.9, airbench Nesterov's with fast BatchNorm biases.",
)
flags.DEFINE_float(
    "label_smoothing",
    0.0,
    "Share of every label spread over all classes, in the training loss alone.",
    lower_bound=0,
    upper_bound=0.99,
)
flags.DEFINE_float("clip", None, "Largest global norm of a gradient; by default no limit.", lower_bound=0)
flags.DEFINE_integer("warmup", 0, "Local steps in which the learning rate rises from 0.", lower_bound=0)
flags.DEFINE_enum(
    "decay",
    "none",
    list(FALLS),
    "How the learning rate falls from then on, to 0 after the last local step.",
)
RATES = {
    "sequential": (0.4, 0.025),
    "sync": (0.4, 0.1),
    "accumulate": (0.8, 0.8),
    "plain": (0.4, 0.4),
    "weighted": (0.4, 0.4),
    "diloco": (0.4, 0.4),
    "weighted_diloco": (0.4, 0.4),
}
"""Arm -> default learning rate with clean and with noisy shards; experiments/results/tuning/digits.txt."""
for _arm, (_clean, _noisy) in RATES.items():
    _default = f"{_clean}" if _clean == _noisy else f"{_clean} with clean shards and {_noisy} with noisy ones"
    flags.DEFINE_list(
        f"lr_{_arm}",
        None,
        f"Learning rate of the arm {_arm}: one, or one per scenario of --noisy; by default {_default}.",
    )
flags.DEFINE_enum(
    "opt_state_at_sync", "keep", ["keep", "average", "reset"], "How optimizer state carries across a blend."
)
flags.DEFINE_enum(
    "stats_at_sync",
    "average",
    ["average", "keep", "reset", "pull", "reestimate"],
    "How BatchNorm statistics carry across a blend.",
)

flags.DEFINE_enum(
    "drift",
    "none",
    list(DRIFTS),
    "Correction of the local steps of plain and weighted, where shards differ: a proximal term, or control variates.",
)
flags.DEFINE_float("prox_mu", 0.01, "drift=fedprox: weight of the proximal term.", lower_bound=0)

_topic("Averaging")
flags.DEFINE_enum("weighting", "opinion_pool", list(WEIGHTINGS), "Weighting of the arm weighted.")
flags.DEFINE_float("temperature", 0.2, "weighting=softmax_...: temperature of the softmax, in nats.")
flags.DEFINE_float(
    "chance",
    None,
    "weighting=accuracy_above_chance: accuracy of guessing; by default 1 / classes.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_integer(
    "byzantine",
    1,
    "weighting=trimmed_mean, mean_around_median, bulyan, krum or multi_krum: how many broken replicas to tolerate.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "score_samples",
    None,
    "Held-out samples to score per round, a fresh subset each round; by default all.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "score_every",
    1,
    "Rounds between scorings; the rounds in between blend with the last weights.",
    lower_bound=1,
)
flags.DEFINE_float(
    "guard",
    None,
    "Roll back a round whose blend has a held-out loss above so many times the lowest of the last five, and halve the "
    "rate from then on; above 1, by default every blend is kept.",
)
flags.DEFINE_bool("diagnose", False, "Record every score, and what each replica is worth to the blend.")
flags.DEFINE_enum(
    "outer",
    "none",
    list(OUTERS),
    "Outer optimizer of plain and weighted; the arms diloco and weighted_diloco have nesterov.",
)
flags.DEFINE_float("outer_lr", None, "Learning rate of --outer (lookahead's alpha); by default its own.", lower_bound=0)
flags.DEFINE_float("outer_momentum", None, "Momentum of --outer; by default its own.", lower_bound=0, upper_bound=1)
flags.DEFINE_float(
    "outer_tau", None, "outer=fedadagrad, fedyogi or fedadam: degree of adaptivity; by default 0.001.", lower_bound=0
)
flags.DEFINE_bool("delayed", False, "Apply each blend one round late, so that a whole round hides the exchange.")
flags.DEFINE_float(
    "pull",
    1.0,
    "How far to pull the replicas toward the global parameters; 1 replaces them.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_enum(
    "pull_toward",
    "new",
    list(PULLS),
    "Pull toward the global parameters after (new) or before (old) the blend; old gives EASGD, with "
    "--outer=fedavgm --outer_momentum=0 --outer_lr=K*PULL.",
)
flags.DEFINE_enum(
    "wire",
    "float32",
    list(WIRES),
    "What replicas send in: float32 parameters, or changes in bfloat16 or int8, which send less for few replicas; see "
    "wavg_jax/rounds/wire.py.",
)
flags.DEFINE_integer(
    "fragments",
    1,
    "Parts of the parameters that plain and weighted send in turn, each while the next local steps run; divides H.",
    lower_bound=1,
)
flags.DEFINE_enum("reduce", "mean", list(REDUCES), "Reduction that plain and weighted blend with.")
flags.DEFINE_enum("smoothing", "none", list(SMOOTHINGS), "Evaluate an average of the global parameters over rounds.")
flags.DEFINE_float("ema_decay", 0.9, "smoothing=ema: decay per round, between 0 and 1.")
flags.register_validator("ema_decay", lambda decay: 0 < decay < 1, "it must be greater than 0 and less than 1")
flags.DEFINE_integer("swa_start", 0, "smoothing=swa: rounds before the average begins.", lower_bound=0)
flags.DEFINE_integer("lawa_window", 5, "smoothing=lawa: latest rounds in the average.", lower_bound=1)
flags.DEFINE_enum(
    "schedule",
    "fixed",
    list(SCHEDULES),
    "H over the run, up to --local_steps; adacomm starts there and decreases.",
)
flags.DEFINE_integer(
    "schedule_rounds",
    5,
    "schedule=linear: rounds of growth; adacomm: rounds between changes.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "post_local_steps", 5, "schedule=post_local: local steps with H=1 before H rises to --local_steps.", lower_bound=0
)

_topic("The link")
flags.DEFINE_float(
    "link_bandwidth",
    None,
    "Bits per second of each device's link, both ways at once, for what is computed; by default no network.",
    lower_bound=1,
)
flags.DEFINE_float(
    "link_latency",
    None,
    "Seconds from one device to the next, at each step of an exchange; by default none.",
    lower_bound=0,
)
flags.DEFINE_float(
    "link_overhead",
    None,
    "Seconds that each exchange takes beside its bytes and latency; by default none.",
    lower_bound=0,
)

_topic("The run")
flags.DEFINE_list(
    "seeds", "0,1,2,3,4", "Seeds of data split, initial parameters and sample order; at least 3 for a comparison."
)
flags.DEFINE_list("tuning_seeds", "1000,1001", "Seeds to tune on; keep them apart from those you report.")
flags.DEFINE_list("steps", "10,100,500", "The values of H, local steps between two blends, to try.")
flags.DEFINE_string("workdir", None, "Folder for rows, report and checkpoints; by default a new one under runs/.")
flags.DEFINE_bool("resume", False, "Continue from the checkpoints in --workdir.")
flags.DEFINE_integer("checkpoint_every", 10, "Rounds between checkpoints.", lower_bound=1)
flags.DEFINE_integer(
    "devices", None, "Number of devices; by default the most that divide the replicas evenly.", lower_bound=1
)
flags.DEFINE_enum(
    "replica_map",
    "auto",
    ["auto", *MAPS],
    "How to run the replicas of one device: vmapped, one after another, or unrolled; auto times them once. The results "
    "agree up to rounding.",
)
flags.DEFINE_enum(
    "feed",
    "auto",
    list(FEEDS),
    "Keep the training data on the devices, or stream it round by round; auto decides by size.",
)
flags.DEFINE_float(
    "target_accuracy", 0.95, "Test accuracy whose time to reach the report gives.", lower_bound=0, upper_bound=1
)
flags.DEFINE_list(
    "log_to",
    None,
    "Live views of every round: tensorboard:FOLDER, mlflow:URI, wandb:PROJECT, or several.",
)

_ORDER = [flag.name for flag in flags.FLAGS.flags_by_module_dict()[__name__]]
_ENDS = [*list(_STARTS.values())[1:], None]
TOPICS = {title: _ORDER[start:end] for (title, start), end in zip(_STARTS.items(), _ENDS, strict=True)}
"""Topic -> names of its flags."""
NAMES = frozenset(_ORDER)
DATA = ("dataset", "heldout", "augment", "crop_padding", "crop_fill", "scale")
SHARDS = ("partition", "alpha", "proportions", "block", "noisy")
NETWORK = ("model", "hidden", "widths", "batch_norm", "dropout", "compute_dtype", "mirror", "label_smoothing")
WEIGHTING = ("temperature", "chance", "byzantine")
"""Flags that a weighting reads; see `experiments.setup.weightings`."""
LINK = ("link_bandwidth", "link_latency", "link_overhead")
"""Flags of the network that is computed with; without any there is none."""
_BOOKKEEPING = (
    "tuning_seeds",
    "workdir",
    "resume",
    "checkpoint_every",
    "devices",
    "feed",
    "data_dir",
    "rounds",
    "seeds",
    "steps",
    "log_to",
)
"""Flags that may differ when a run resumes."""
RUN = NAMES.difference(_BOOKKEEPING)
"""Flags that must agree when a run resumes."""


def refuse_unused(reads: Collection[str]) -> None:
    """Raises SettingsError if the command line gives a shared flag that is not in `reads`."""
    for name in sorted(NAMES.difference(reads)):
        if flags.FLAGS[name].present:
            raise SettingsError(f"--{name} has no effect here; leave it out, --help lists the flags that have one")


def read_link() -> Link | None:
    """The link that the flags describe, of unlimited bandwidth unless given; None, no network, without any of them."""
    given: dict[str, Any] = {name.removeprefix("link_"): flags.FLAGS[name].value for name in LINK}
    given = {field: value for field, value in given.items() if value is not None}
    return Link(**given) if given else None


def read_seeds() -> tuple[int, ...]:
    """Reads --seeds.

    Raises:
      SettingsError: one is not a number below 2**32, or is given twice.
    """
    seeds = numbers("seeds", int, least=0)
    if len(set(seeds)) < len(seeds) or max(seeds) >= 2**32:
        raise SettingsError(f"--seeds={','.join(map(str, seeds))}: give each seed once, and below 2**32")
    return seeds


def names(flag: str, allowed: Collection[str]) -> tuple[str, ...]:
    """Reads a list flag whose entries are among `allowed`.

    Raises:
      SettingsError: one is not, or is given twice, or there is none.
    """
    given = tuple(flags.FLAGS[flag].value or ())
    if not given or set(given) - set(allowed) or len(set(given)) < len(given):
        raise SettingsError(f"--{flag}={','.join(given)}: choose from {', '.join(allowed)}, each once")
    return given


def numbers(name: str, kind: type, least: float = 1e-9) -> tuple:
    """Reads a list flag as numbers not below `least`.

    Raises:
      SettingsError: one is not.
    """
    texts = list(flags.FLAGS[name].value or ())
    try:
        values = tuple(kind(text) for text in texts)
    except ValueError:
        values = ()
    wanted = f"{'positive' if least > 0 else 'non-negative'}{' whole' if kind is int else ''}"
    if not values or not all(least <= value < math.inf for value in values):
        raise SettingsError(f"--{name}={','.join(texts)}: give {wanted} numbers, such as 1,2,4")
    return values
