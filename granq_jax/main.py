"""The command line.

``python -m granq_jax.main --config FILE [--workdir DIR] [--mode MODE] [--subject SUBJECT]
[--compilation-cache DIR] [--config.KEY=VALUE ...]``
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from granq_jax.compilation_cache import use_compilation_cache
from granq_jax.config import check_setting_exists, load_config
from granq_jax.evaluate import SUBJECTS, evaluate_run
from granq_jax.profiling import profile
from granq_jax.train import train_and_evaluate
from granq_jax.train_teacher import train_teacher

MODES = {"train": train_and_evaluate, "evaluate": evaluate_run, "train_teacher": train_teacher, "profile": profile}
_WORKDIR_SUFFIXES = {"train_teacher": "_teacher", "profile": "_profile"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one mode. Returns the exit status: 0, or 2 if what was asked for is not allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m granq_jax.main",
        description="Zero-shot quantization of an image classifier.",
        epilog="Any setting of the config can be changed with --config.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a config's path or name; a run is evaluated with its own")
    parser.add_argument("--workdir", type=Path, help="where files go; by default runs/CONFIG_NAME[_teacher|_profile]")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument(
        "--subject", choices=SUBJECTS, help="what is evaluated; by default the student, if there is one"
    )
    parser.add_argument(
        "--compilation-cache",
        default="",
        metavar="DIR",
        help="where compiled programs are kept for later runs, or 'off'; by default in the user's cache",
    )
    options, overrides = parser.parse_known_args(argv)  # exits with 2 if they are wrong
    logging.basicConfig(format="%(message)s")
    logging.getLogger("granq_jax").setLevel(logging.INFO)
    try:
        if options.subject is not None and options.mode != "evaluate":
            raise ValueError(f"--subject: got {options.subject!r}, allowed with --mode=evaluate only")
        if options.config is None and (options.mode != "evaluate" or options.workdir is None):
            raise ValueError("--config: not given, allowed are a config's path or name (or --mode=evaluate --workdir)")
        use_compilation_cache(options.compilation_cache)
        suffix = _WORKDIR_SUFFIXES.get(options.mode, "")
        workdir = options.workdir or Path("runs") / f"{Path(options.config).stem}{suffix}"
        saved = workdir / "config.json"
        # A run is evaluated with the settings it was trained with.
        source = saved if options.mode == "evaluate" and saved.is_file() else options.config
        if source is None:
            raise ValueError(f"--workdir: got {str(workdir)!r}, but there is no run in it")
        config = _overridden(load_config(source), overrides)
        extra = {}
        if options.mode == "evaluate":
            extra = {"subject": options.subject or ""}
        elif options.mode == "train":
            extra = {"command": shlex.join(sys.orig_argv if argv is None else ["granq_jax.main", *argv])}
        result = MODES[options.mode](config, workdir, **extra)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    return 0


def _overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """``config`` with ``--config.KEY=VALUE`` arguments applied, each parsed by the setting's type."""
    for argument in overrides:
        key, equals, _ = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise ValueError(f"arguments: got {argument!r}, allowed are --config.KEY=VALUE and those of --help")
        check_setting_exists(key)
    values = flags.FlagValues()
    argv = ["main", *overrides]
    try:
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, KeyError) as error:  # KeyError: a config file that leaves the setting out
        raise ValueError(f"arguments: {error}") from None
    return holder.value


if __name__ == "__main__":
    sys.exit(main())
