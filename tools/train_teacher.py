"""Train the demo teacher, a small ViT on scikit-learn's digits, and write its weights and a .json beside them.

python tools/train_teacher.py --out runs/demo-teacher/teacher.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from leap_dist.pretraining import TeacherTraining, train_teacher


def main() -> None:
    """Command line -> one training run -> its accuracy on stdout."""
    defaults = TeacherTraining()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = parser.parse_args()
    config = TeacherTraining(epochs=options.epochs, lr=options.lr, seed=options.seed)
    accuracy = train_teacher(config, options.out)
    print(f"{options.out}: validation accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
