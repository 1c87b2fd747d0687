"""Reports of runs that have been, or still are: ``python -m granq_jax.report WORKDIR [WORKDIR ...]``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from granq_jax.errors import InputError, RunError, reading_input
from granq_jax.files.writing import write_text
from granq_jax.report import comparison_page, read_run, run_page
from granq_jax.runs import names
from granq_jax.runtime.compilation_cache import use_compilation_cache
from granq_jax.runtime.devices import check_platforms
from granq_jax.runtime.paths import expanded

COMPARISON = "comparison.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a page. Returns the exit status: 0, 1 for damaged checkpoints, 2 for what is not allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m granq_jax.report",
        description="Makes a run's report from its files, or a page that sets several runs side by side.",
        allow_abbrev=False,
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run")
    parser.add_argument(
        "--output", help=f"the page's path; by default WORKDIR/{names.REPORT}, of several runs {COMPARISON}"
    )
    options = parser.parse_args(argv)  # exits with 2 if they are wrong
    logging.basicConfig(format="%(message)s")
    try:
        with reading_input():
            workdirs = [expanded(workdir, "WORKDIR") for workdir in options.workdirs]
            default = workdirs[0] / names.REPORT if len(workdirs) == 1 else Path(COMPARISON)
            output = expanded(options.output or default, "--output")
            if output.is_dir() or not (output.parent.is_dir() or options.output is None):
                raise InputError(f"--output: got {str(output)!r}, allowed are paths of files in directories that exist")
            use_compilation_cache()
            check_platforms()
            runs = [read_run(workdir) for workdir in workdirs]
            write_text(output, run_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
    except (InputError, RunError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
