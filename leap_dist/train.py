"""Distil a vision transformer with the LEAP curriculum.

    deepspeed --num_gpus 8 leap_dist/train.py --config launch_configs/vitg14/leap_vitg14_vits14_imagenet1k.yaml \\
        data.train=/data/imagenet-mds/train

Also under torchrun, or plain python for one process. With no arguments: the embedded demo.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from leap_dist.config import Config, describe, load, load_demo
from leap_dist.runtime.reporting import failed, give_up, leave_the_word_to_rank_0, report_to_stderr
from leap_dist.runtime.signals import leave_from_now_on

DEMO = Path(__file__).resolve().parents[1] / "launch_configs" / "demo.yaml"


def parse(argv: list[str]) -> Config:
    """Command line -> checked config. No --config means the embedded demo, whose schedule overrides may change."""
    parser = argparse.ArgumentParser(
        prog="leap_dist/train.py",
        usage="%(prog)s [--config YAML] [section.key=value ...]",
        description=__doc__,
        epilog=f"options and their defaults:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="what differs from the defaults; without it: the demo"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the YAML")
    args = parser.parse_intermixed_args(argv)
    if args.config is not None:
        return load(args.config, args.overrides)
    config = load_demo(DEMO, args.overrides)
    if os.environ.get("RANK", "0") == "0":
        print(f"leap_dist: no --config, so the settings are the demo's, of launch_configs/{DEMO.name}", file=sys.stderr)
    return config


def train(config: Config) -> None:
    """One run, from building the parts to the final table."""
    from leap_dist.assembly import build_trainer  # torch and DeepSpeed: seconds, only for a config that holds
    from leap_dist.runtime.distributed import initialise, shutdown
    from leap_dist.runtime.heartbeat import Heartbeat
    from leap_dist.runtime.run_lock import Claim
    from leap_dist.wrapup import wrap_up

    world = initialise()
    report_to_stderr(logging.INFO if world.is_main else logging.WARNING)
    claim = Claim(Path(config.output), world)
    with Heartbeat(world, config.engine.silence_s, give_up) as heartbeat, claim:
        config, trainer = build_trainer(config, world, claim)
        heartbeat.step = lambda: trainer.progress.step
        try:
            if trainer.run():
                leave_from_now_on()
                wrap_up(config, world, trainer)
            elif world.is_main:
                print(stopped(trainer.progress.step, world.size > 1), file=sys.stderr)
        except Exception as error:
            heartbeat.explain(error)
            if " step " not in str(error):
                error.add_note(f"after step {trainer.progress.step}")
            raise
        finally:
            trainer.close()
    shutdown()


def stopped(step: int, launched: bool) -> str:
    """The last line of a run that was told to stop: launchers end with a traceback of their own at Ctrl-C."""
    after = "; a KeyboardInterrupt or SignalException after this line is the launcher's own" if launched else ""
    return f"leap_dist: stopped at step {step}, all is saved; continue with resume=auto{after}"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, or stopped by a signal with everything saved; 2 a user's mistake, one line; 1 a bug."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
    except Exception as error:
        leave_the_word_to_rank_0()
        return failed(error)
    try:
        train(config)
    except Exception as error:
        return failed(error)
    return 0


if __name__ == "__main__":
    # Python puts a script's own folder on the path, where leap_dist/data would pose as a top-level package `data`.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    status = main()
    if status:
        # A rank that failed leaves at once: a loader worker or a collective that hangs must not keep it, or its
        # launcher would never tell the other ranks.
        sys.stdout.flush()
        os._exit(status)
