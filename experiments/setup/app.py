"""Runs a binary: flags in, one clear line and exit code 2 for bad input, a report at the end."""

import contextlib
import math
import os
import pathlib
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import jax
from absl import app, flags, logging
from rich.console import Console

from experiments.setup import before_imports, captions, help_text, shared_flags
from experiments.setup.translate import to_flags
from wavg_jax.base import Diverged, SettingsError, Stopped, WavgError, WavgWarning
from wavg_jax.devices import machine, processes
from wavg_jax.storage.rows import read_rows
from wavg_jax.storage.schema import Row

flags.DEFINE_string(
    "compilation_cache",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/wavg_jax"),
    "Folder that caches compiled programs and the --replica_map that auto chose; empty for none. It only grows.",
)
flags.DEFINE_enum(
    "matmul_precision",
    None,
    ["bfloat16", "tensorfloat32", "float32"],
    "Precision of matrix products and convolutions, where the hardware offers several; by default the backend's.",
)
flags.DEFINE_string(
    "coordinator_address",
    None,
    "Several processes: HOST:PORT of process 0. All three flags, or none where SLURM, Open MPI or Kubernetes "
    "starts them; experiments.launch starts the processes of one machine.",
)
flags.DEFINE_integer("num_processes", None, "Several processes: how many.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Several processes: which one this is, from 0.", lower_bound=0)
flags.DEFINE_float(
    "start_timeout", processes.TIMEOUT, "Several processes: seconds in which all must have started.", lower_bound=1
)
flags.DEFINE_float(
    "heartbeat",
    processes.HEARTBEAT,
    "Several processes: seconds of silence after which one counts as frozen, or its machine as lost.",
    lower_bound=1,
)
OWN = [
    *("compilation_cache", "matmul_precision", "coordinator_address", "num_processes", "process_id"),
    *("start_timeout", "heartbeat"),
]
F = flags.FLAGS

Main = Callable[[Sequence[str]], None]


_LARGEST = 2**32 - 1
"""The largest seed; whatever else is counted, no machine holds as many."""


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags and returns the other arguments.

    An unknown flag or value exits with code 2. --help, -h or -? prints the binary's help, --helpfull the flags of all
    libraries; both exit with 0.
    """
    own = argv[1 : argv.index("--")] if "--" in argv else argv[1:]  # what follows is another binary's
    if {"--helpfull", "-helpfull"}.intersection(own):
        app.usage(writeto_stdout=True)  # absl's own would end with 1
        raise SystemExit(0)
    if {"--help", "-help", "--helpshort", "-helpshort", "-h", "-?"}.intersection(own):
        print(help_text.text(sys.modules["__main__"], shared_flags.TOPICS | {"JAX": OWN}, OWN))
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(list(argv))
        for name, value in flags.FLAGS.flag_values_dict().items():
            # absl's bounds let NaN pass: no comparison with it holds.
            if isinstance(value, float) and not math.isfinite(value):
                raise flags.IllegalFlagValueError(f"--{name}={value}: give a finite number")
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise flags.IllegalFlagValueError(f"--{name}={value}: give {_LARGEST} at most")
    except (flags.Error, UnicodeDecodeError) as error:
        print(f"error: {_refusal(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    return rest


def _refusal(error: flags.Error | UnicodeDecodeError) -> str:
    """absl's message in one line; for numbers and booleans in our words, where absl only quotes Python."""
    if isinstance(error, UnicodeDecodeError):
        return f"--flagfile: it is no text in UTF-8 ({error}); give a file of flags, one to a line"
    text = " ".join(str(error).split())
    found = re.match(r"flag --(\w+)=(.*?): ", text)
    parser = flags.FLAGS[found[1]].parser if found and found[1] in flags.FLAGS else None
    if isinstance(parser, flags.IntegerParser | flags.FloatParser):
        wanted = parser.syntactic_help.replace("integer", "whole number")
    elif isinstance(parser, flags.BooleanParser):
        wanted = "true or false"
    else:
        return text
    return f"{text[: found.end()]}it must be {wanted}" if found else text


def call(main: Main, argv: Sequence[str]) -> None:
    """Calls `main` with the arguments that are no flags, and turns its errors into one line and an exit code."""
    try:
        main(argv[1:])
    except WavgError as error:
        print(f"error: {to_flags(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        # On a CPU the status is INTERNAL; only the text tells.
        if isinstance(error, jax.errors.JaxRuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        print(f"error: {_out_of_memory(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(to_flags(str(stopped)), file=sys.stderr)
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        before_imports.interrupted()
        raise SystemExit(before_imports.INTERRUPTED) from None


_OUT_OF_MEMORY = re.compile("resource_exhausted|out of memory", re.IGNORECASE)


def _out_of_memory(error: BaseException) -> str:
    """How to need less memory, and how much was asked for, where known."""
    asked = re.search(r"allocat\w+ (?:of )?([\d.]+ ?\w*)", str(error))
    amount = f" (asked for {asked[1].replace('. ', ' ').strip()})" if asked else ""
    return (
        f"out of memory{amount}: use fewer --replicas, --local_steps or --heldout samples, a smaller --batch_size or "
        "network (--hidden), more --devices, or --feed=stream"
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints the library's warnings as one line, without a line of code, and mends the compilation cache."""
    damaged, cache = _DAMAGED.search(str(message)), jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if issubclass(category, WavgWarning):
        print(f"warning: {to_flags(str(message))}", file=file or sys.stderr)
    elif damaged and cache:
        # A process killed while writing leaves half a file; JAX warns of it but never rewrites it.
        for path in pathlib.Path(cache).glob(f"{damaged[1]}-*-cache"):
            path.unlink(missing_ok=True)
        print(f"warning: the cached program {damaged[1]} is damaged; compiling it again", file=file or sys.stderr)
    else:
        _python_shows(message, category, filename, lineno, file, line)


_python_shows = warnings.showwarning
_DAMAGED = re.compile(r"persistent compilation cache entry for '(\w+)'")


_MOST_DEVICES = 64
"""Most CPU devices to set up on a machine with fewer cores. 64 take 10 seconds to meet for the first time, 256 take 50;
1,000 never did while we watched."""


def configure() -> None:
    """Configures JAX from the flags; call it before the backend starts.

    Raises:
      SettingsError: --devices asks for more CPU devices than work.
    """
    if F.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(F.compilation_cache).expanduser()))
        # JAX's thresholds suit programs that compile for minutes; a start here waits for many short ones.
        for name, value in (("min_compile_time_secs", 0.0), ("min_entry_size_bytes", -1)):
            if f"JAX_PERSISTENT_CACHE_{name.upper()}" not in os.environ:
                jax.config.update(f"jax_persistent_cache_{name}", value)
    if F.matmul_precision is not None:
        jax.config.update("jax_default_matmul_precision", F.matmul_precision)
    decided = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices < 0 and not decided:  # type: ignore[attr-defined]
        # One device per core: XLA uses few cores for the replicas of one device, and runs devices side by side.
        wanted = (F["devices"].value if "devices" in F else None) or 1
        most = max(machine.cores(), _MOST_DEVICES)
        if wanted > most:
            raise SettingsError(
                f"--devices={wanted}: at most {most} CPU devices work, since more take minutes to meet; give a "
                f"number up to {most} that divides --replicas"
            )
        jax.config.update("jax_num_cpu_devices", max(machine.cores(), wanted))


def run(main: Main) -> None:
    """Runs a binary.

    Exit codes:
      0: done.
      1: a bug, with a traceback.
      2: one line says what is wrong: an unknown flag, a bad value, unusable data or folder, too little memory, or a run
        that diverged.
      130: interrupted by Ctrl-C before the first round, or by a second Ctrl-C.
      3: another process died or failed; see `wavg_jax.devices.processes`.
      143: stopped after a whole round by SIGTERM or the first Ctrl-C, with a checkpoint; or ended by SIGTERM elsewhere.
    """
    warnings.showwarning = _show_warning
    logging.set_verbosity(logging.WARNING)  # at INFO, TFDS and Orbax address their developers

    def configured(rest: Sequence[str]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on Ctrl-C unwinds, see `call`
        configure()
        processes.initialize(
            F.coordinator_address, F.num_processes, F.process_id, timeout=F.start_timeout, heartbeat=F.heartbeat
        )
        if not processes.first():  # one says it for all
            warnings.filterwarnings("ignore", category=WavgWarning)
        with processes.guarded():
            main(rest)

    try:
        app.run(lambda argv: call(configured, argv), flags_parser=parse)
    except SystemExit as ended:
        if ended.code == before_imports.INTERRUPTED:
            os._exit(before_imports.INTERRUPTED)  # a normal exit would wait for compilations
        raise


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises SettingsError if the command line has anything but flags, such as a flag without its `--`."""
    if argv:
        raise SettingsError(f"{argv[0]!r} is not a flag; write every setting as --name=value, see --help")


def console(log_width: int = 100) -> Console:
    """The terminal, without markup; a log is `log_width` columns wide, where rich would fold at 80.

    Of several processes the first alone speaks.
    """
    if not processes.first():
        return Console(quiet=True)
    return Console(width=None if sys.stdout.isatty() else log_width, markup=False, highlight=False)


@contextlib.contextmanager
def reported(folder: pathlib.Path) -> Iterator[None]:
    """Publishes a folder's rows after the block; if a run diverged, before its error prints."""
    try:
        yield
    except Diverged:
        _publish_rows(folder)
        raise
    _publish_rows(folder)


def _publish_rows(folder: pathlib.Path) -> None:
    if processes.first():
        publish(read_rows(folder), folder)


def publish(rows: Sequence[Row], folder: pathlib.Path) -> None:
    """Shows the tables of recorded rows, and writes their report to a folder."""
    # matplotlib and scipy take more than a second to import, and training need not wait for them.
    from wavg_jax import reporting

    caller = reporting.Caller(captions.ARMS, prefix="--", rebuild=captions.REBUILD)
    rows = [{"reference": captions.REFERENCE} | row if row["kind"] == "matrix" else row for row in rows]
    report = reporting.summarise(rows, caller=caller)
    report.write(folder)
    out = console()
    out.print(report)
    out.print(f"wrote {folder / 'report.md'}, report.html and plots/", soft_wrap=True)
