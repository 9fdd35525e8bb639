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
from typing import TYPE_CHECKING

from leap_dist.runtime import reporting
from leap_dist.runtime.signals import EVALUATING, UNBEGUN, Interrupt

if TYPE_CHECKING:
    from leap_dist.config import Config


def parse(argv: list[str]) -> Config:
    """Command line -> checked config. Imported here, like all that takes long: a signal is heard from the start."""
    from leap_dist.config.command_line import parse

    return parse(argv, __doc__)


def train(config: Config, interrupt: Interrupt) -> None:
    """One run, from building the parts to the final table."""
    from leap_dist.assembly import build_trainer  # torch and DeepSpeed: seconds, only for a config that holds
    from leap_dist.runtime.distributed import initialise, shutdown
    from leap_dist.runtime.heartbeat import Heartbeat
    from leap_dist.runtime.provenance import provenance
    from leap_dist.runtime.run_lock import Claim
    from leap_dist.wrapup import wrap_up

    world = initialise()
    reporting.report_to_stderr(logging.INFO if world.is_main else logging.WARNING)
    if world.is_main:
        provenance()  # of the code that runs, before hours go by
    claim = Claim(Path(config.output), world)
    with Heartbeat(world, config.engine.silence_s, reporting.give_up, interrupt) as heartbeat, claim:
        config, trainer = build_trainer(config, world, claim)
        heartbeat.step = lambda: trainer.progress.step
        try:
            if trainer.run(interrupt):
                interrupt.let_go(EVALUATING)
                wrap_up(config, world, trainer)
                interrupt.over()
            else:
                interrupt.over()
                if world.is_main:
                    reporting.say_stopped(trainer.progress.step, launched=world.size > 1)
        except Exception as error:
            interrupt.hold()
            heartbeat.explain(error)
            trainer.cohort.ended("failure", str(error))
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

    128 and the signal's number where one came before the first step.
    """
    with Interrupt(UNBEGUN) as interrupt:
        try:
            config = parse(sys.argv[1:] if argv is None else argv)
        except Exception as error:
            reporting.leave_the_word_to_rank_0()
            interrupt.hold()
            return reporting.failed(error)
        try:
            train(config, interrupt)
        except Exception as error:
            interrupt.hold()  # a launcher that ends the other ranks must not cut this one's word short
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
