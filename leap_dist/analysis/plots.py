"""The figures of an analysis, in one style: a colour per model, solid for single images, dashed for the whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from leap_dist.analysis import sep
from leap_dist.analysis.blocks import BlockReport
from leap_dist.analysis.results import Analysis, Band, Cka, Model
from leap_dist.analysis.spectra import CENTRINGS, LEVELS
from leap_dist.evaluation.tokens import KINDS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito: told apart by every eye
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.6,
    "savefig.dpi": 110,
}
SHOWN_LEVEL = 1  # of LEVELS: 90 %


def figures(analysis: Analysis) -> Iterator[tuple[str, Figure]]:
    """Name and figure: `overview`, all panels small, then one for each panel."""
    with matplotlib.rc_context(STYLE):
        panels = _panels(analysis)
        columns = 3
        rows = -(-len(panels) // columns)
        overview = Figure(figsize=(4 * columns, 3.3 * rows), layout="constrained")
        for place, draw in enumerate(panels.values(), 1):
            draw(overview.add_subplot(rows, columns, place))
        yield "overview", overview
        for name, draw in panels.items():
            figure = Figure(figsize=(5.6, 4), layout="constrained")
            draw(figure.add_subplot())
            yield name, figure


def write_figures(analysis: Analysis, folder: Path) -> None:
    """Every figure as PNG and PDF, and in TensorBoard's format under `folder`/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer, matplotlib.rc_context(STYLE):
        for name, figure in figures(analysis):
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.pdf")
            writer.add_figure(f"analysis/{name}", figure)


def block_figure(report: BlockReport) -> Figure:
    """Probe and kNN of every block, and how alike the blocks are."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.8), layout="constrained")
        scores, cka = figure.subplots(1, 2)
        blocks = range(1, len(report.cka) + 1)
        for (kind, probe), colour in zip(report.probe.items(), COLOURS, strict=False):
            for values, judge, line in ((probe, "linear probe", "o-"), (report.knn[kind], "kNN", "s--")):
                label = f"{KINDS[kind]}, {judge}"
                scores.plot(blocks, 100 * values, line, color=colour, label=label, markersize=3)
        scores.set(title=f"{report.name}: {report.held_out} images", xlabel="block", ylabel="accuracy, %")
        scores.xaxis.set_major_locator(MaxNLocator(integer=True))
        scores.legend(loc="lower right")
        _cka(cka, Cka(report.name, report.name, report.cka))
    return figure


def _panels(analysis: Analysis) -> dict[str, Callable[[Axes], None]]:
    """Every panel by name, as a function that draws it on given axes."""
    models = list(zip(analysis.models, COLOURS, strict=False))
    panels: dict[str, Callable[[Axes], None]] = {
        f"{name}_{centring}": lambda axes, draw=draw, c=centring: draw(axes, models, c)
        for centring in CENTRINGS
        for name, draw in (("dimensions", _dimensions), ("captured", _captured))
    }
    panels |= {
        "overlap": lambda axes: _overlap(axes, models, analysis.k),
        "angles": lambda axes: _angles(axes, models),
        "sep": lambda axes: _sep(axes, models),
    }
    for index, found in enumerate(analysis.cka, 1):
        name = "cka" if len(analysis.cka) == 1 else f"cka_{index}"
        panels[name] = lambda axes, found=found: _cka(axes, found)
    return panels


Coloured = list[tuple[Model, str]]


def _dimensions(axes: Axes, models: Coloured, centring: str) -> None:
    """Against depth: what one image needs, up to its 99th percentile, and what the whole set needs."""
    for model, colour in models:
        views = [block.views[centring] for block in model.blocks]
        mean, p99 = (np.array([getattr(v.dims, part)[SHOWN_LEVEL] for v in views]) for part in ("mean", "p99"))
        axes.plot(_depth(model), mean, color=colour)
        axes.fill_between(_depth(model), mean, p99, color=colour, alpha=0.15, linewidth=0)
        axes.plot(_depth(model), [v.dataset_dims[SHOWN_LEVEL] for v in views], "--", color=colour)
    level = f"{LEVELS[SHOWN_LEVEL] * 100:.0f} %"
    axes.set(title=f"Dimensions with {level} of the energy, {centring}", ylabel="dimensions", yscale="log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    _depth_axis(axes)
    _legend(axes, models, {"an image (mean to 99th percentile)": "-", "the whole set": "--"})


def _captured(axes: Axes, models: Coloured, centring: str) -> None:
    """Last block: energy in an image's own first directions, and in the directions all images share."""
    for model, colour in models:
        block = model.blocks[-1]
        view = block.views[centring]
        own = np.arange(1, len(view.energy) + 1) / block.width
        axes.plot(own, view.energy, color=colour)
        shared = np.arange(1, block.width + 1) / block.width
        axes.plot(shared, view.captured.mean, "--", color=colour)
        axes.fill_between(shared, view.captured.p10, view.captured.p90, color=colour, alpha=0.15, linewidth=0)
    axes.set(
        title=f"Energy in the first directions, last block, {centring}", xlabel="directions / width",
        ylabel="share of energy", xlim=(0, 1), ylim=(0, 1.02),
    )  # fmt: skip
    _legend(axes, models, {"its own directions": "-", "shared directions": "--"}, "lower right")


def _overlap(axes: Axes, models: Coloured, k: int) -> None:
    """Against depth: how much of a top-k subspace is in another image's, and in the shared one."""
    for model, colour in models:
        views = [block.views["centred"] for block in model.blocks]
        axes.plot(_depth(model), [v.pair_overlap for v in views], color=colour)
        axes.plot(_depth(model), [v.shared_overlap for v in views], "--", color=colour)
        axes.plot(_depth(model), [k / block.width for block in model.blocks], ":", color=colour, linewidth=1.2)
    axes.set(title=f"Overlap of top-{k} subspaces, centred", ylabel="mean squared cosine", ylim=(0, 1))
    _depth_axis(axes)
    _legend(axes, models, {"two images": "-", "an image and the whole set": "--", "random subspaces": ":"})


def _angles(axes: Axes, models: Coloured) -> None:
    """Last block: principal angles, sorted, with the middle 80 % of pairs or images."""
    for model, colour in models:
        view = model.blocks[-1].views["centred"]
        _band(axes, view.pair_angles, "-", colour)
        _band(axes, view.shared_angles, "--", colour)
    axes.set(title="Principal angles, last block, centred", xlabel="angle number", ylabel="degrees", ylim=(0, 92))
    axes.set_yticks([0, 30, 60, 90])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, models, {"two images": "-", "an image and the whole set": "--"}, "upper left")


def _band(axes: Axes, band: Band, line: str, colour: str) -> None:
    numbers = np.arange(1, len(band.mean) + 1)
    axes.plot(numbers, band.mean, line, color=colour)
    axes.fill_between(numbers, band.p10, band.p90, color=colour, alpha=0.12, linewidth=0)


def _sep(axes: Axes, models: Coloured) -> None:
    """Last block: how far the SEP curve is from white noise's diagonal, as it is and with channels permuted."""
    for model, colour in models:
        view = model.blocks[-1].views["uncentred"]
        share = np.arange(1, len(view.sep_curve) + 1) / len(view.sep_curve)
        axes.plot(share, view.sep_curve, color=colour)
        axes.plot(view.sep_permuted.mean(0), sep.LEVELS, "x", color=colour)
    axes.plot([0, 1], [0, 1], ":", color="0.3", linewidth=1.2)
    axes.set(
        title="Spectral energy pattern of tokens, last block", xlabel="d/D, bins in frequency order",
        ylabel="share of energy", xlim=(0, 1), ylim=(0, 1),
    )  # fmt: skip
    _legend(axes, models, {"tokens": "-", "channels permuted": "x", "white noise": ":"}, "lower right")


def _cka(axes: Axes, found: Cka) -> None:
    """Every block of the student against every block of the teacher."""
    students, teachers = found.matrix.shape
    image = axes.imshow(found.matrix, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="linear CKA")
    axes.set(title=f"CKA: {found.student} with {found.teacher}", xlabel=f"block of {found.teacher}")
    axes.set_ylabel(f"block of {found.student}")
    for ticks, count in ((axes.set_xticks, teachers), (axes.set_yticks, students)):
        shown = range(0, count, -(-count // 12))
        ticks(list(shown), [str(i + 1) for i in shown])
    axes.grid(False)


def _depth(model: Model) -> np.ndarray:
    """Blocks of models of different depth on one axis: 1 is the last."""
    return np.arange(1, len(model.blocks) + 1) / len(model.blocks)


def _depth_axis(axes: Axes) -> None:
    axes.set(xlabel="depth (block / number of blocks)", xlim=(0, 1.02))


def _legend(axes: Axes, models: Coloured, styles: dict[str, str], place: str = "best") -> None:
    """A colour for each model, then in grey what each kind of line stands for."""
    colours = [Line2D([], [], color=colour, linewidth=3, label=model.name) for model, colour in models]
    kinds = [
        Line2D([], [], color="0.4", label=label, **({"marker": "x", "linestyle": ""} if kind == "x" else {"ls": kind}))
        for label, kind in styles.items()
    ]
    axes.legend(handles=[*colours, *kinds], loc=place)
