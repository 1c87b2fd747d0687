"""The command line.

``python -m granq_jax.main --config FILE [--workdir DIR] [--mode MODE] [--method METHOD]
[--subject SUBJECT] [--overwrite] [--compilation-cache DIR] [--config.KEY=VALUE ...]``; of several processes each with
``--coordinator-address HOST:PORT --num-processes N --process-id I``, or ``--distributed``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from granq_jax.config import check_config, check_setting_exists, load_config, run_name
from granq_jax.distill.methods import METHODS, set_method
from granq_jax.errors import InputError, RunError, reading_input
from granq_jax.modes.evaluate import SUBJECTS, evaluate_run
from granq_jax.modes.export import export_run
from granq_jax.modes.profile import profile
from granq_jax.modes.train import train_and_evaluate
from granq_jax.modes.train_teacher import train_teacher
from granq_jax.runs import names
from granq_jax.runtime import processes
from granq_jax.runtime.compilation_cache import use_compilation_cache
from granq_jax.runtime.devices import check_platforms, halve_cpu
from granq_jax.runtime.paths import expanded
from granq_jax.runtime.stopping import Interrupted, interruptible

MODES: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train_and_evaluate,
    "evaluate": evaluate_run,
    "train_teacher": train_teacher,
    "profile": profile,
    "export": export_run,
}
_OF_A_RUN = ("evaluate", "export")  # with its own config
_BY_METHOD = ("train", "profile")
_WORKDIR_SUFFIXES = {"train_teacher": "_teacher", "profile": "_profile"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one mode.

    Returns:
      The exit status: 0; 2 if what was asked for is not allowed; 1 if a run failed, of which the last
      checkpoint is left; 128 + N if signal N ended it (SIGINT 130, SIGTERM 143).
    """
    logging.basicConfig(format="%(message)s", force=True)  # libraries have made the root logger theirs
    logging.getLogger("granq_jax").setLevel(logging.INFO)
    for noisy in ("absl", "asyncio", "concurrent.futures"):  # Orbax has traces logged of errors that it also raises
        logging.getLogger(noisy).setLevel(logging.CRITICAL + 1)
    try:
        with reading_input():
            mode, config, workdir, arguments = _asked(argv)
        with interruptible():
            result = MODES[mode](config, workdir, **arguments)
    except InputError as error:
        return _end(f"error: {error}", 2)
    except Interrupted as interrupted:
        return _end(str(interrupted), interrupted.exit_status)
    except (RunError, OSError) as error:
        _end(f"error: {error}", 1)
        return processes.leave(1) if jax.distributed.is_initialized() else 1
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exc()
        _end(
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on, perhaps because another one "
            f"has ended; started again with the same --workdir, all of them go on from the last checkpoint: {error}",
            1,
        )
        return processes.leave(1)
    if processes.is_first():
        print(json.dumps(result, indent=2))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises an ``InputError``, where ``argparse`` prints how the command is used and exits."""
        raise InputError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m granq_jax.main",
        description="Zero-shot quantization of an image classifier.",
        epilog="Any setting of the config can be changed with --config.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a config's path or name; a run is evaluated and exported with its own")
    parser.add_argument("--workdir", help="where files go; by default runs/CONFIG_NAME[_teacher|_profile]")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--method", choices=METHODS, help="whose settings to take; by default the config's: GranQ's")
    parser.add_argument(
        "--subject", choices=SUBJECTS, help="what is evaluated; by default the student, if there is one"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where there is a run, and replace it")
    parser.add_argument(
        "--compilation-cache",
        default="",
        metavar="DIR",
        help="where compiled programs are kept for later runs, or 'off'; by default in the user's cache",
    )
    several = parser.add_argument_group("several processes", "Each is started with the same command, but for its id.")
    several.add_argument("--coordinator-address", metavar="HOST:PORT", help="where process 0 is, and a free port there")
    several.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    several.add_argument(
        "--distributed", action="store_true", help="take what is not given of these from the cluster (Slurm, ...)"
    )
    return parser


def _asked(argv: Sequence[str] | None) -> tuple[str, ConfigDict, Path, dict[str, Any]]:
    """The mode, and what it is called with; this process is made one of several if that is asked for."""
    options, overrides = _parser().parse_known_args(argv)
    if options.subject is not None and options.mode != "evaluate":
        raise InputError(f"--subject: got {options.subject!r}, allowed with --mode=evaluate only")
    if options.method is not None and options.mode not in _BY_METHOD:
        raise InputError(f"--method: got {options.method!r}, allowed with --mode={' or '.join(_BY_METHOD)} only")
    if options.overwrite and options.mode != "train":
        raise InputError("--overwrite: allowed with --mode=train only")
    if options.config is None and (options.mode not in _OF_A_RUN or options.workdir is None):
        raise InputError("--config: not given, allowed are a config's path or name (or the --workdir of a run)")
    use_compilation_cache(options.compilation_cache)
    suffix = _WORKDIR_SUFFIXES.get(options.mode, "")
    workdir = expanded(options.workdir or Path("runs") / f"{run_name(options.config)}{suffix}", "--workdir")
    saved = workdir / names.CONFIG
    # A run is evaluated and exported with the settings it was trained with.
    source = saved if options.mode in _OF_A_RUN and os.path.isfile(saved) else options.config
    if source is None:
        raise InputError(f"--workdir: got {str(workdir)!r}, but there is no run in it")
    config = load_config(source)
    if options.method is not None:
        set_method(config, options.method)
    config = _overridden(config, overrides)
    arguments: dict[str, Any] = {}
    if options.mode == "evaluate":
        arguments["subject"] = options.subject or ""
    elif options.mode == "train":
        arguments["overwrite"] = options.overwrite
        arguments["command"] = shlex.join(sys.orig_argv if argv is None else ["granq_jax.main", *argv])
    address = (options.coordinator_address, options.num_processes, options.process_id)
    if options.distributed or any(value is not None for value in address):
        processes.join(*address)
    else:
        check_config(config)
        halve_cpu([config.batch_size, config.eval_batch_size, config.teacher_training.batch_size])
    check_platforms()
    return options.mode, config, workdir, arguments


def _end(line: str, status: int) -> int:
    """Prints a line, its line ends made spaces and what a terminal would obey made visible."""
    line = " ".join(line.split())
    print("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line), file=sys.stderr)
    return status


def _overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """``config`` with ``--config.KEY=VALUE`` arguments applied, each parsed by the setting's type."""
    for argument in overrides:
        key, equals, _ = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise InputError(f"arguments: got {argument!r}, allowed are --config.KEY=VALUE and those of --help")
        check_setting_exists(key)
    values = flags.FlagValues()
    argv = ["main", *overrides]
    try:
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except Exception as error:  # of many kinds: what failed is a value, or a config that leaves the setting out
        raise InputError(f"arguments: {error}") from None
    return holder.value


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # After a failure that it raises, Orbax leaves callbacks behind, each of which would print a trace.
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.unraisablehook = _unraisable
    sys.exit(main())
