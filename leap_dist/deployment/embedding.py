"""Features of a folder of images, as one parquet file: what people do first with a backbone.

Images are taken in pieces, in the order of their paths. A piece that is done is a file in OUT.parts, so a run that was
killed goes on; ranks share the pieces. At the end one of them joins all pieces to OUT, and the folder goes away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from leap_dist.data.pixels import open_rgb
from leap_dist.data.sources.walk import walk
from leap_dist.deployment.extras import needed
from leap_dist.deployment.loaded import Distilled
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, barrier, on_main
from leap_dist.runtime.files import require_replaceable, write_json, write_whole
from leap_dist.runtime.reporting import STDERR

PIECE = 4096  # images of a file of OUT.parts
ABOUT = "about.json"


class Plan(NamedTuple):
    """files: paths of all images, in order; parts: folder of the pieces; pieces: how many."""

    files: list[str]
    parts: Path
    pieces: int


class _Images(Dataset):
    """Images by path, ready for the student; None in place of one that cannot be read."""

    def __init__(self, files: list[str], model: Distilled) -> None:
        self._files, self._preprocess = files, model.preprocess

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[str, Optional[Tensor], str]:
        path = self._files[index]
        try:
            return path, self._preprocess(open_rgb(Path(path).read_bytes())), ""
        except Exception as error:  # whatever PIL raises
            return path, None, f"{type(error).__name__}: {error}"


def embed(
    model: Distilled,
    images: Path,
    out: Path,
    world: World,
    *,
    tokens: str = "pooled",
    batch: int = 64,
    workers: int = 0,
) -> tuple[int, int]:
    """Write a row of `path` (relative to `images`) and `features` (float32, D) for every image below `images` to `out`.

    tokens: pooled, cls or logits; see `Outputs`. Collective. Returns how many images were embedded, and how many could
    not be read: those are in OUT.bad.jsonl, with the reason.

    Raises:
        UserError: no image, a student without a classifier asked for logits, or pieces of another embedding beside
            `out`; or `out` is a folder or a device.
    """
    needed("pyarrow")
    if tokens == "logits" and not model.classes:
        raise UserError("the student has no classifier, so there are no logits")
    require_replaceable(out)
    plan = _planned(model, images, out, tokens)
    on_main(lambda: _begin(plan, _identity(model, plan.files, tokens)), world)
    mine = [piece for piece in range(world.rank, plan.pieces, world.size) if not _file(plan, piece).is_file()]
    total = sum(len(_of(plan, piece)) for piece in mine)
    with tqdm(total=total, unit=" images", dynamic_ncols=True, file=STDERR, disable=not world.is_main) as bar:
        for piece in mine:
            _embed_piece(model, plan, piece, images, tokens, batch, workers, bar)
    barrier(world)
    return on_main(lambda: _joined(plan, out), world)


def _planned(model: Distilled, images: Path, out: Path, tokens: str) -> Plan:
    if not images.is_dir():
        raise UserError(f"{images}: no such folder")
    files = [path for path, _ in walk(images).files]
    if not files:
        raise UserError(f"{images}: no image in it")
    return Plan(files, out.with_name(f"{out.name}.parts"), -(-len(files) // PIECE))


def _identity(model: Distilled, files: list[str], tokens: str) -> dict[str, Any]:
    """What the pieces are of: the paths and sizes of the images, the student's weights, and the tokens."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path} {os.path.getsize(path)}\n".encode("utf-8", "surrogateescape"))
    for name, tensor in sorted(model.student.backbone.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return {"images": len(files), "tokens": tokens, "hash": digest.hexdigest()}


def _begin(plan: Plan, identity: dict[str, Any]) -> None:
    noted = plan.parts / ABOUT
    if noted.is_file() and json.loads(noted.read_text()) != identity:
        raise UserError(
            f"{plan.parts}: holds pieces of other images or another student; remove it, or name another --out"
        )
    if not noted.is_file() and any(not path.name.startswith(".") for path in plan.parts.glob("*")):
        raise UserError(f"{plan.parts}: exists and holds no pieces, which go there until they are joined")
    plan.parts.mkdir(parents=True, exist_ok=True)
    write_json(noted, identity)


def _of(plan: Plan, piece: int) -> list[str]:
    return plan.files[piece * PIECE : (piece + 1) * PIECE]


def _file(plan: Plan, piece: int) -> Path:
    return plan.parts / f"{piece:06d}.parquet"


@torch.no_grad()
def _embed_piece(
    model: Distilled, plan: Plan, piece: int, images: Path, tokens: str, batch: int, workers: int, bar: tqdm
) -> None:
    """Write a piece; its images that cannot be read have a reason in place of features."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    device = next(model.parameters()).device
    paths, features, reasons = [], [], []
    loader = DataLoader(_Images(_of(plan, piece), model), batch_size=batch, num_workers=workers, collate_fn=list)
    for items in loader:
        whole = [pixels for _, pixels, _ in items if pixels is not None]
        rows = iter(getattr(model(torch.stack(whole).to(device)), tokens).float().cpu().numpy() if whole else ())
        for path, pixels, reason in items:
            paths.append(os.fsencode(os.path.relpath(path, images)).decode("utf-8", "backslashreplace"))
            features.append(None if pixels is None else next(rows))
            reasons.append(reason)
        bar.update(len(items))
    table = pa.table({"path": paths, "features": pa.array(features, pa.list_(pa.float32())), "reason": reasons})
    write_whole(_file(plan, piece), lambda partial: pq.write_table(table, partial))


def _pieces(plan: Plan) -> Iterator[Any]:
    import pyarrow.parquet as pq

    for piece in range(plan.pieces):
        yield pq.read_table(_file(plan, piece))


def _publish(plan: Plan, path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file among the pieces, with which goes away what a kill leaves of it; then it is put at `path`."""
    whole = plan.parts / path.name
    write_whole(whole, write)
    whole.replace(path)


def _joined(plan: Plan, out: Path) -> tuple[int, int]:
    """One file of the rows that have features, a row group a piece, and the list of those that have none, in place of
    the pieces. Returns how many there are of each.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad: list[dict[str, str]] = []

    def write(partial: Path) -> None:
        schema = pa.schema([("path", pa.string()), ("features", pa.list_(pa.float32()))])
        with pq.ParquetWriter(partial, schema) as writer:
            for table in _pieces(plan):
                known = table["features"].is_valid()
                writer.write_table(table.filter(known).select(schema.names))
                bad.extend(table.filter(table["features"].is_null()).select(["path", "reason"]).to_pylist())

    _publish(plan, out, write)
    listed = out.with_name(f"{out.name}.bad.jsonl")
    listed.unlink(missing_ok=True)
    if bad:
        _publish(plan, listed, lambda partial: partial.write_text("".join(json.dumps(row) + "\n" for row in bad)))
    for path in plan.parts.iterdir():  # what says of whom the pieces are goes last
        if path.name != ABOUT:
            path.unlink()
    shutil.rmtree(plan.parts)
    return len(plan.files) - len(bad), len(bad)
