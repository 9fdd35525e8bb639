"""A table from one command: every row of a sweep with every seed, then mean and deviation, every run, and curves.

python tools/sweep.py launch_configs/sweeps/demo_remedies.yaml
python tools/sweep.py launch_configs/sweeps/cifar10.yaml data.train=/data/cifar10-mds/train \\
    data.val=/data/cifar10-mds/test

A sweep is a YAML: base (a launch config, relative to it), output, seeds, common (overrides for all), rows (name -> list
of overrides), launcher (default `python`; {port} is a free port, {slot} the number of the job, from 0) and together
(default false; true: rows that may share a pass of the teacher do). More in docs/sweeps.md. Run it again to go on: what
has finished stays, what was killed continues, what failed is tried anew.

Exit status: 0 all runs have finished; 1 some failed; 2 a mistake in the YAML; 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from leap_dist.errors import UserError, one_line
from leap_dist.sweeps.passes import in_company
from leap_dist.sweeps.plan import chosen, read_plan
from leap_dist.sweeps.results import check_columns, draw_curves, write_results
from leap_dist.sweeps.runner import Sweep, check_launcher, sigterm_as_ctrl_c


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="YAML")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all rows; a row's own win")
    parser.add_argument("--out", type=Path, help="folder of the sweep; default: the YAML's output")
    parser.add_argument("--seeds", type=int, nargs="+", help="make these only; the tables are of all")
    parser.add_argument("--student-seeds", type=int, nargs="+", help="the same for seeds of initial weights")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    return parser.parse_intermixed_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Make what is missing, write the tables; return the exit status."""
    args = parse(argv)
    try:
        plan = read_plan(args.sweep, args.out, args.overrides)
        wanted = chosen(plan, args.seeds, args.student_seeds)
        plan = in_company(plan, wanted) if plan.together else plan
        check_columns(plan.show)
        check_launcher(plan.launcher, args.jobs)
        sweep = Sweep(plan, args.jobs, wanted)
        with sigterm_as_ctrl_c():
            sweep.make()
        write_results(plan, sweep.failures)
        draw_curves(plan)
    except UserError as error:
        print(f"sweep: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"{(plan.out / 'results.md').read_text()}\nwritten to {plan.out}")
    return 1 if sweep.failures else 0


if __name__ == "__main__":
    sys.exit(main())
