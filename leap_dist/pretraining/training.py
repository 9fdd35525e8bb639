"""Supervised training of a ViT on labelled shards: a teacher of one's own.

OUT/recipe.yaml              the recipe this folder belongs to
OUT/checkpoint.pt            where the training stands; replaced by renaming
OUT/checkpoint.json          its step, recipe, size and hash
OUT/bad_samples.jsonl        training images that cannot be read; absent if there are none
OUT/teacher.safetensors      the average of the weights: backbone, and head.* for the class token
OUT/teacher.json             how to rebuild it, its accuracy at every evaluation, the recipe
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import timm
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from tqdm import tqdm

from leap_dist.config import RANDOM, TeacherConfig, abridged, to_yaml
from leap_dist.data import (
    BadSamples,
    Batch,
    EvalLoader,
    Feed,
    TrainLoader,
    build_eval_loader,
    build_train_loader,
    check_sources,
    resolve,
)
from leap_dist.errors import UserError
from leap_dist.evaluation.held_out import BATCH
from leap_dist.models import outline
from leap_dist.models.records import images_of
from leap_dist.monitoring import bar_interval
from leap_dist.pretraining.initial import initialise
from leap_dist.pretraining.recipe import TeacherRecipe, changes, load_recipe
from leap_dist.pretraining.session import Session
from leap_dist.runtime.distributed import World, uses_gpus
from leap_dist.runtime.files import write_text
from leap_dist.runtime.integrity import write_recorded
from leap_dist.runtime.provenance import provenance
from leap_dist.runtime.reporting import STDERR
from leap_dist.runtime.signals import Interrupt
from leap_dist.teacher.record import CLASSES
from leap_dist.teacher.weights import build_skeleton, open_weights

log = logging.getLogger(__name__)

RECIPE, CHECKPOINT, WEIGHTS = "recipe.yaml", "checkpoint.pt", "teacher.safetensors"
BAD_SAMPLES = "bad_samples.jsonl"


class Source(NamedTuple):
    """Where batches come from, and the list of the samples among them that could not be read."""

    loader: TrainLoader
    feed: Feed
    bad_samples: BadSamples

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """Batches of an epoch, from 0-based `start` on. UserError beyond `data.max_bad_fraction` of bad samples."""
        for batch in self.feed.ahead(self.loader.epoch(number, start)):
            self.bad_samples.note(batch.bad)
            if self.bad_samples.fresh:
                self.bad_samples.share()
            yield batch


def train_on_shards(recipe: TeacherRecipe) -> Optional[float]:
    """Train on `recipe.data.train`, from the start or from where an earlier call was stopped, and write the teacher.

    Returns its accuracy on `recipe.data.val`, 0 to 1, or None if a signal came first: everything is saved then, and the
    same call goes on. One process, one device. Raises UserError for a model, labels or a folder that do not fit, and
    where the loss is not finite or too many images cannot be read (the last checkpoint stays).
    """
    from leap_dist.data.store import class_names  # 3 s to import

    output = Path(recipe.output)
    world = World(0, 1, 0, 1, torch.device("cuda" if uses_gpus() else "cpu"))
    model = build_model(recipe).to(world.device)
    check_sources(recipe.data, world, recipe.classes, option="classes")
    data = resolve(recipe.data, output, world)
    names = class_names(data.train, data)
    loader = build_train_loader(data, seed=recipe.seed, micro_batch=data.global_batch, world=world)
    held_out = build_eval_loader(
        data.val, data, batch=min(BATCH, data.global_batch), world=world, numbered_as=data.train
    )
    _check_recipe(output / RECIPE, recipe)
    provenance()  # of the code that runs, before hours go by
    session = Session(
        recipe, model, len(loader), loader.layout, output / CHECKPOINT, contents=loader.contents, order=loader.order
    )
    session.restore()
    write_text(output / RECIPE, to_yaml(recipe))
    most_bad = int(data.max_bad_fraction * loader.num_samples)
    source = Source(loader, Feed(data, world.device), BadSamples(output / BAD_SAMPLES, most_bad, world))
    source.bad_samples.reopen(resumed=session.step > 0)
    try:
        with _bar(session) as bar, Interrupt() as interrupt:
            while not _is_finished(session):
                if not _finish_epoch(session, source, bar, interrupt):
                    return None
                if _is_evaluation_due(session):
                    session.look_at_loss()  # before spoilt weights become a teacher
                    judged = accuracy(session.average.module, held_out, world.device, tell=not session.history)
                    publish(session, judged, output, names)
                    session.save()
    finally:
        loader.close()
    return session.history[-1]["val_accuracy"]


def build_model(recipe: TeacherRecipe) -> VisionTransformer:
    """timm's model with a classifier on its class token and the recipe's initial weights, on the host."""
    sketch = outline(recipe.model, recipe.kwargs, recipe.data.image_size, side="teacher")
    distilled = isinstance(sketch, VisionTransformerDistilled)  # its second classifier would never be trained
    if not isinstance(sketch, VisionTransformer) or distilled or sketch.global_pool != "token":
        raise UserError(f"model={recipe.model}: not a VisionTransformer with one classifier, on its class token")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = timm.create_model(recipe.model, **_kwargs(recipe))
        initialise(model, recipe)
    if recipe.init != RANDOM:
        _load_backbone(model, recipe)
    model.patch_embed.requires_grad_(not recipe.freeze_patch_embed)
    return model


def _load_backbone(model: VisionTransformer, recipe: TeacherRecipe) -> None:
    """Everything but the classifier, which is new, from timm's hub or a file, fitted to the image size as a teacher's.

    Raises:
        UserError: weights that cannot be reached, read or fitted, in full.
    """
    config = TeacherConfig(model=recipe.model, kwargs=recipe.kwargs, weights=recipe.init)
    skeleton = build_skeleton(config, recipe.data.image_size)
    try:
        read = open_weights(config, skeleton).read(skeleton.state_dict())
    except UserError as error:
        raise UserError(f"init={recipe.init}: {error}") from None
    left = model.load_state_dict(read, strict=False)
    assert set(left.missing_keys) == {"head.weight", "head.bias"} and not left.unexpected_keys, left


def _kwargs(recipe: TeacherRecipe) -> dict[str, Any]:
    """Arguments with which `timm.create_model(recipe.model, ...)` rebuilds the teacher and its classifier."""
    return {"num_classes": recipe.classes, "img_size": recipe.data.image_size, **recipe.kwargs}


def _check_recipe(noted: Path, recipe: TeacherRecipe) -> None:
    """UserError if the folder is that of another training."""
    if noted.is_file():
        changed = changes(load_recipe(noted, [], check=False), recipe)
        if changed:
            raise UserError(f"output={noted.parent}: holds a teacher of another recipe ({abridged(changed)})")


def _bar(session: Session) -> tqdm:
    batch = session.recipe.data.global_batch
    return tqdm(
        total=session.total_steps * batch, initial=session.step * batch, unit=" images", unit_scale=True,
        mininterval=bar_interval(), dynamic_ncols=True, file=STDERR,
    )  # fmt: skip


def _is_finished(session: Session) -> bool:
    """Whether the last step's weights have been evaluated."""
    return bool(session.history) and session.history[-1]["step"] == session.total_steps


def _is_evaluation_due(session: Session) -> bool:
    epochs = session.step // session.steps_per_epoch
    return epochs % session.recipe.evaluate_every == 0 or session.step == session.total_steps


def _finish_epoch(session: Session, source: Source, bar: tqdm, interrupt: Interrupt) -> bool:
    """Take the steps left of the epoch the session is in; False, with everything saved, if a signal came first."""
    epoch, done = divmod(session.step, session.steps_per_epoch)
    if epoch == session.recipe.epochs:  # stopped between the last step and its evaluation
        return True
    since = time.monotonic()
    for batch in source.epoch(epoch, done):
        session.advance(source.feed.images(batch), batch)
        now = time.monotonic()
        session.seconds, since = session.seconds + now - since, now
        bar.set_postfix(epoch=epoch + 1, loss=_last_loss(session), accuracy=_last_accuracy(session), refresh=False)
        bar.update(len(batch.labels))
        if interrupt.requested or session.is_save_due():
            session.save()
        if interrupt.requested:
            return False
    return True


def _last_loss(session: Session) -> str:
    return "?" if math.isnan(session.loss) else f"{session.loss:.3f}"  # NaN: not looked at yet


def _last_accuracy(session: Session) -> str:
    return f"{session.history[-1]['val_accuracy']:.1%}" if session.history else "?"


@torch.no_grad()
def accuracy(model: nn.Module, loader: EvalLoader, device: torch.device, *, tell: bool = False) -> float:
    """Share of the set that `model`, images (B, 3, S, S) -> logits (B, classes), classifies correctly, 0 to 1.

    Images without a label do not count; tell: say how many there are. UserError if none has one.
    """
    right = total = seen = 0
    for batch in loader:
        predicted = model(batch.images.to(device)).argmax(dim=1).cpu()
        seen += len(batch.labels)
        right, total = right + int((predicted == batch.labels).sum()), total + int((batch.labels >= 0).sum())
    if not total:
        raise UserError(f"{loader.source}: no image has a label, which an accuracy needs")
    if tell and seen > total:
        log.warning("%s: %d images have no label of a class and are left out", loader.source, seen - total)
    return right / total


def publish(session: Session, val_accuracy: float, output: Path, names: Optional[Mapping[str, int]] = None) -> None:
    """Add a row to the history; write the average of the weights and its record.

    names: of the classes, and their outputs.
    """
    batch = session.recipe.data.global_batch
    session.history.append(
        {
            "epoch": session.step // session.steps_per_epoch,
            "step": session.step,
            "val_accuracy": val_accuracy,
            "loss": session.loss,
            "images_per_s": session.step * batch / session.seconds,
        }
    )
    state = {key: value.cpu().contiguous() for key, value in session.average.module.state_dict().items()}
    write_recorded(output / WEIGHTS, lambda partial: save_file(state, partial), _record(session, names))


def _record(session: Session, names: Optional[Mapping[str, int]]) -> dict[str, Any]:
    """What rebuilds the teacher, as of an exported student, its classes if they have names, and how it came about."""
    recipe = session.recipe
    return {
        "model": recipe.model,
        "kwargs": _kwargs(recipe),
        **({} if names is None else {CLASSES: dict(names)}),
        **images_of(recipe.data, recipe.data.image_size),
        "val_accuracy": session.history[-1]["val_accuracy"],
        "finished": _is_finished(session),
        "train_seconds": session.seconds,
        **provenance(),
        "history": session.history,
        "recipe": dataclasses.asdict(recipe),
    }
