"""Which placement a teacher needs on a cluster, at every target block, by `leap_dist.models.placement_plan`.

python tools/plan_cluster.py --cluster 4x8-h100 --teacher vit-7b --batch 32
python tools/plan_cluster.py --cluster 8x-l40s --config launch_configs/vit7b/leap_vit7b_vitb16_imagenet1k_pipelined.yaml

Bandwidths and peaks are the vendors'. The share of the peak that a ViT reaches (--mfu) is yours to measure. Bytes are
tested against small runs. No table has been compared with a run on such a cluster.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from leap_dist.config import TeacherConfig, load_without_files
from leap_dist.errors import UserError
from leap_dist.models import teacher_costs, teacher_flops
from leap_dist.models.placement_plan import GIB, Cluster, TeacherCosts, choose, cost

CLUSTERS = {
    "1x8-h100": Cluster(nodes=1, gpus=8, memory=80, inside=450, between=50, tflops=989, mfu=0.4),
    "4x8-h100": Cluster(nodes=4, gpus=8, memory=80, inside=450, between=50, tflops=989, mfu=0.4),
    "8x-a100-40gb": Cluster(nodes=1, gpus=8, memory=40, inside=300, between=25, tflops=312, mfu=0.4),
    "8x-l40s": Cluster(nodes=1, gpus=8, memory=48, inside=32, between=12.5, tflops=362, mfu=0.4),
}
# ViT-22B (arXiv 2302.05442) on paper: its shape, in timm's terms.
VIT_22B = {"patch_size": 14, "embed_dim": 6144, "depth": 48, "num_heads": 48}
TEACHERS = {
    "vit-g14": TeacherConfig(model="vit_giant_patch14_reg4_dinov2", weights="random", dtype="bf16"),
    "vit-7b": TeacherConfig(model="vit_7b_patch16_dinov3", weights="random", dtype="bf16"),
    "vit-22b": TeacherConfig(model="vit_base_patch16_224", kwargs=VIT_22B, weights="random", dtype="bf16"),
}
SHARE_FOR_TEACHER = 0.5  # of a GPU's memory; the student's states and activations need the rest


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", choices=CLUSTERS, default="1x8-h100")
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument("--teacher", choices=TEACHERS, default="vit-7b")
    teacher.add_argument("--config", type=Path, help="take the teacher, its stages and micro-batches from a run's YAML")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=32, help="images per GPU and pass")
    parser.add_argument("--mfu", type=float, help="share of the peak that the teacher reaches")
    parser.add_argument("--budget", type=float, help="GiB of teacher weights per GPU; default: half its memory")
    return parser.parse_args(argv)


def rows(costs: TeacherCosts, cluster: Cluster, config: TeacherConfig, batch: int, budget: float) -> list[str]:
    """A line per target block and placement, the choice marked."""
    stages = config.stages or cluster.gpus
    parts = config.microbatches if config.microbatches > 1 else 4 * stages
    lines = []
    depth = len(costs.block_flops)
    for block in sorted({1, *range(depth // 8, depth + 1, max(1, depth // 8)), depth} - {0}):
        chosen = choose(costs, block, budget=budget * GIB, stages=stages, ranks=cluster.ranks).placement
        for placement in ("replicated", "pipelined", "sharded"):
            found = cost(costs, cluster, placement, block, batch=batch, stages=stages, parts=parts)
            mark = "<- choice" if placement == chosen else ""
            sizes = (
                f"{found.resident / GIB:10.2f}{found.sent / GIB:10.3f}{found.seconds * 1e3:10.1f}{found.bubble:8.0%}"
            )
            rate = cluster.ranks * batch / found.seconds
            lines.append(f"{block:5} {placement:11}{sizes}{rate:11.0f}  {mark}".rstrip())
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    args = parse(argv)
    cluster = CLUSTERS[args.cluster] if args.mfu is None else replace(CLUSTERS[args.cluster], mfu=args.mfu)
    budget = args.budget or SHARE_FOR_TEACHER * cluster.memory
    try:
        run = None if args.config is None else load_without_files(args.config)
        config, image_size = (run.teacher, run.data.image_size) if run else (TEACHERS[args.teacher], args.image_size)
        costs = teacher_costs(config, image_size, teacher_flops(config, image_size))
        table = rows(costs, cluster, config, args.batch, budget)
    except UserError as error:
        print(f"plan_cluster: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{config.model} {config.dtype} at {image_size} pixels on {args.cluster}, {args.batch} images per GPU, ", end=""
    )
    print(f"{budget:g} GiB for the teacher")
    print(f"{'block':>5} {'placement':11}{'GiB held':>10}{'GiB sent':>10}{'ms':>10}{'bubble':>8}{'images/s':>11}")
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
