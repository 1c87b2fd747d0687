"""What metrics, looks at the state and checkpoints add to the time of a run's steps.

    python benchmarks/run_overhead.py [--steps 500] [--rounds 3]

CIFAR-10 at batch 16 without real images, in turns, each in a process of its own: the bare loop, which takes the same
steps and writes nothing, and a run that writes metrics as by default, and a look and a checkpoint two times within the
steps that are timed. (By default there are 2,000 steps from one look to the next.) Both programs of a step and that of
the looks have been compiled and used before the clock starts; what the first look of a run takes is printed too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("bare", "run")


def take(way, steps, cache):
    """Prints the milliseconds a step of ``steps`` steps, and the seconds of a run's first look."""
    from granq_jax import load_config
    from granq_jax.modes import train
    from granq_jax.runtime.compilation_cache import use_compilation_cache
    from granq_jax.runtime.devices import halve_cpu

    config = load_config("paper/cifar10_w3a3")
    config.eval, config.steps_per_epoch, config.warmup_epochs = "none", steps * 2 // 5, 1
    config.epochs, config.eval_every_epochs, config.checkpoint_every_epochs = 4, 1, 1
    first = config.steps_per_epoch + 2 * config.log_every_steps  # after the first epoch's look and checkpoint
    last = first + steps
    use_compilation_cache(cache)
    halve_cpu([config.batch_size])
    with tempfile.TemporaryDirectory() as workdir:
        if way == "bare":
            print(json.dumps({"ms": bare(config, Path(workdir), first, last)}))
            return
        looks = []
        inspector = train.inspector

        def timed_inspector(*args):
            look = inspector(*args)

            def timed(state):
                start = time.perf_counter()
                inspection = look(state)
                looks.append(time.perf_counter() - start)
                return inspection

            return timed

        train.inspector = timed_inspector
        train.train_and_evaluate(config, workdir)
        lines = map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines())
        seconds = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
        print(json.dumps({"ms": 1e3 * (seconds[last] - seconds[first]) / steps, "first look": looks[0]}))


def bare(config, workdir, first, last):
    import jax

    from granq_jax.config import make_trainer
    from granq_jax.distill.joint_run import JointRun
    from granq_jax.teachers.load import load_teacher

    run = JointRun(make_trainer(config), load_teacher(config, workdir), jax.devices())
    while run.step < last:
        if run.step == first:
            jax.block_until_ready(run.state)
            start = time.perf_counter()
        run.advance(warmup=run.step < config.steps_per_epoch)
        if run.step % config.log_every_steps == 0:
            run.check()
    jax.block_until_ready(run.state)
    return 1e3 * (time.perf_counter() - start) / (last - first)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="that are timed, a multiple of 50")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--take", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.take is not None:
        return take(options.take, options.steps, options.cache)
    print("round | bare, ms a step | run, ms a step | bare / run, % | first look, s")
    ratios = []
    with tempfile.TemporaryDirectory() as cache:
        for number in range(1, options.rounds + 1):
            alone, run = (_in_a_process(way, options.steps, cache) for way in WAYS)
            ratios.append(100 * alone["ms"] / run["ms"])
            values = (alone["ms"], run["ms"], ratios[-1], run["first look"])
            print(" | ".join([str(number), *(f"{value:.1f}" for value in values)]), flush=True)
    print(f"median: a run takes its steps at {statistics.median(ratios):.1f} % of the bare loop's rate")


def _in_a_process(way, steps, cache):
    command = [sys.executable, __file__, f"--steps={steps}", f"--take={way}", f"--cache={cache}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
