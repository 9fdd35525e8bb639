"""Distil a vision transformer with the LEAP curriculum.

    deepspeed --num_gpus 8 leap_dist/train.py --config launch_configs/vitg14/leap_vitg14_vits14_imagenet1k.yaml \\
        data.train=/data/imagenet-mds/train

Also under torchrun, or plain python for one process. With no arguments: the embedded demo.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from leap_dist.config import Config
from leap_dist.config.command_line import parse
from leap_dist.runtime import reporting, signals


def train(config: Config) -> None:
    """One run, from building the parts to the final table."""
    from leap_dist.assembly import build_trainer  # torch and DeepSpeed: seconds, only for a config that holds
    from leap_dist.runtime.distributed import initialise, shutdown
    from leap_dist.runtime.heartbeat import Heartbeat
    from leap_dist.runtime.run_lock import Claim
    from leap_dist.wrapup import wrap_up

    world = initialise()
    reporting.report_to_stderr(logging.INFO if world.is_main else logging.WARNING)
    claim = Claim(Path(config.output), world)
    with Heartbeat(world, config.engine.silence_s, reporting.give_up) as heartbeat, claim:
        config, trainer = build_trainer(config, world, claim)
        heartbeat.step = lambda: trainer.progress.step
        try:
            if trainer.run():
                signals.leave_from_now_on()
                wrap_up(config, world, trainer)
            else:
                signals.ignore_from_now_on()
                if world.is_main:
                    reporting.say_stopped(trainer.progress.step, launched=world.size > 1)
        except Exception as error:
            heartbeat.explain(error)
            if " step " not in str(error):
                error.add_note(f"after step {trainer.progress.step}")
            raise
        finally:
            trainer.close()
    shutdown()
    trainer.cohort.require_sound()  # last: the others are done, and everything is written


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, or stopped by a signal with everything saved; 2 a user's mistake, or a student of a cohort
    that failed while the others went on, one line; 1 a bug.
    """
    try:
        config = parse(sys.argv[1:] if argv is None else argv, __doc__)
    except Exception as error:
        reporting.leave_the_word_to_rank_0()
        return reporting.failed(error)
    try:
        train(config)
    except Exception as error:
        return reporting.failed(error)
    finally:
        reporting.forget_lost_output()
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
