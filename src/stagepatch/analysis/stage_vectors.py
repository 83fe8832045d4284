"""Cosines between task vectors, what training on from a base added to it (DeMe, arXiv 2410.06664, Fig. 1)."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagepatch.analysis.result import Analysis, signed
from stagepatch.checkpoints import denoiser_reader
from stagepatch.core import TensorReader, UserError
from stagepatch.merging import ProjectedReader
from stagepatch.methods import FILE_NAME as LORA_FILE
from stagepatch.methods import WEIGHTS_NAME, open_artifact
from stagepatch.report import Table, similarity_heatmaps

_WITH_CONTROL = (
    "A range that was trained again, from other draws, is the control that the paper lacks. As far as its cosines are "
    "low too, task vectors are orthogonal for the noise of their training, not since ranges are at odds."
)
_NO_CONTROL = (
    "No range was trained twice, so there is no control: two trainings of one range may be as far from parallel. Give "
    "the stages of a second `stagepatch decouple` too, of another --training.seed."
)


@dataclass
class TaskVectors:
    """Inner products of task vectors, from which norms and cosines follow.

    Args:
        names: of the stages, [n].
        products: <τ_i, τ_j> of each block of the model, [n, n].
        sizes: weights of each block.
        ranges: timesteps that each was trained on, as its stage.json says; None where it has none.
    """

    names: list[str]
    products: dict[str, Tensor]
    sizes: dict[str, int]
    ranges: list[tuple[float, float] | None]

    def cosine(self, block: str | None = None) -> Tensor:
        """[n, n] of one block, or of all weights; NaN where a task vector is zero."""
        norms = self.norms(block)
        return self._products(block) / (norms.unsqueeze(1) * norms)

    def norms(self, block: str | None = None) -> Tensor:
        """|τ_i| of one block, or of all weights: [n]."""
        return self._products(block).diagonal().sqrt()

    def pairs(self, same_range: bool, of: tuple[float, float] | None = None) -> Tensor:
        """Cosines of the pairs of stages of one range, or of different ranges, as far as ranges are known: [pairs].

        Args:
            of: the pairs that one of this range is in; None for all.
        """
        cosine, known = self.cosine(), [place for place, own in enumerate(self.ranges) if own is not None]
        found = [
            cosine[one, two]
            for one, two in itertools.combinations(known, 2)
            if (self.ranges[one] == self.ranges[two]) == same_range
            and of in (None, self.ranges[one], self.ranges[two])
        ]
        return torch.stack(found) if found else cosine.new_zeros(0)

    def _products(self, block: str | None) -> Tensor:
        return self.products[block] if block is not None else torch.stack(list(self.products.values())).sum(dim=0)


def task_vectors(
    base: Path, stages: Mapping[str, Path], on_tensor: Callable[[int, int], object] = lambda done, total: None
) -> TaskVectors:
    """Compare θ_i − θ, a tensor at a time: at most one tensor of each stage is in memory.

    A channel-wise projection that a stage has and the base has not was the identity in the base.

    Args:
        base: the model directory that the stages were trained on from.
        stages: directories of models, of weights, or of LoRAs (B·A, all ranks on), by name.
        on_tensor: called with the numbers done and to do after each tensor.

    Raises:
        UserError: fewer than two stages, one that is not there or holds no weights, or is of another model, or two of
            one range and seed.
    """
    if len(stages) < 2:
        raise UserError(f"{len(stages)} stages make no pair of task vectors: give two or more.")
    reader, opened = denoiser_reader(base), [_open_stage(path) for path in stages.values()]
    weights = ProjectedReader(reader, [stage.reader for stage in opened])
    for path, stage in zip(stages.values(), opened, strict=True):
        odd = [f"lacks '{name}'" for name in sorted(set(reader.names()) - set(stage.shapes)) if stage.is_whole]
        for name, shape in stage.shapes.items():
            if name not in weights.shapes or weights.shapes[name][0] != shape:
                odd.append(f"holds '{name}' of shape {list(shape)}")
        if odd:
            raise UserError(f"The stage '{path}' is of another model than the base: it {odd[0]}.")
    _check_control(stages, opened)
    names = [name for name, (_, dtype) in weights.shapes.items() if dtype.is_floating_point]
    products: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for done, name in enumerate(names, 1):
        flat = weights.read(name).double().flatten()
        deltas = [stage.delta(name, flat) for stage in opened]
        block = _block_of(name)
        inner = torch.stack([torch.stack([one @ two for two in deltas]) for one in deltas])
        products[block] = products.get(block, 0.0) + inner
        sizes[block] = sizes.get(block, 0) + len(flat)
        on_tensor(done, len(names))
    return TaskVectors(list(stages), products, sizes, [stage.range for stage in opened])


def _check_control(stages: Mapping[str, Path], opened: Sequence["_Stage"]) -> None:
    """That what is of one range is of two trainings."""
    seen: dict[tuple[tuple[float, float], int], Path] = {}
    for path, stage in zip(stages.values(), opened, strict=True):
        if stage.range is None or stage.seed is None:
            continue
        other = seen.setdefault((stage.range, stage.seed), path)
        if other is not path:
            raise UserError(
                f"'{other}' and '{path}' are of one range and one seed, and so of the same draws: for a control train "
                f"the range again with another --training.seed."
            )


def _block_of(name: str) -> str:
    """'blocks.3' of 'blocks.3.attn.qkv.weight'; the first part of a name without a number."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.split(".")[0]


class _Stage:
    """A model's weights, or those of them that were trained."""

    def __init__(self, reader: TensorReader, record: Mapping[str, Any], is_whole: bool = False) -> None:
        self.reader, self.is_whole = reader, is_whole
        self.range = (float(record["from"]), float(record["to"])) if "from" in record else None
        self.seed = record.get("training", {}).get("seed")
        self.shapes = {name: reader.shape(name) for name in reader.names()}

    def delta(self, name: str, base: Tensor) -> Tensor:
        """τ of one of the base's tensors, in float64, flat."""
        return self.reader.read(name).double().flatten() - base if name in self.shapes else torch.zeros_like(base)


class _LoRA(_Stage):
    """B·A of every layer that has them; alpha equals the rank, so they are not scaled."""

    def __init__(self, reader: TensorReader, record: Mapping[str, Any]) -> None:
        super().__init__(reader, record)
        found = [name.removesuffix(".lora_A.weight") for name in self.shapes if name.endswith(".lora_A.weight")]
        # The first part names the denoiser in its pipeline.
        self.layers = {f"{layer.split('.', 1)[1]}.weight": layer for layer in found}
        self.shapes = {
            name: (reader.shape(f"{layer}.lora_B.weight")[0], *reader.shape(f"{layer}.lora_A.weight")[1:])
            for name, layer in self.layers.items()
        }

    def delta(self, name: str, base: Tensor) -> Tensor:
        if name not in self.shapes:
            return torch.zeros_like(base)
        down, up = (self.reader.read(f"{self.layers[name]}.lora_{side}.weight").double() for side in "AB")
        return (up.flatten(1) @ down.flatten(1)).flatten()


def _open_stage(path: Path) -> _Stage:
    artifact = open_artifact(path)
    if artifact.kind == "patch":
        raise UserError(
            f"'{path}' holds a patch, which changes none of the model's weights and so has no task vector; give "
            f"it as one of `learned`, to see where it changes the loss."
        )
    if artifact.require("model", "weights", "LoRA").kind == "model":
        return _Stage(denoiser_reader(path), artifact.stage, is_whole=True)
    if artifact.kind == "LoRA":
        return _LoRA(TensorReader([path / LORA_FILE]), artifact.stage)
    return _Stage(TensorReader([path / WEIGHTS_NAME]), artifact.stage)


def analyze_task_vectors(
    base: Path, stages: Mapping[str, Path], on_tensor: Callable[[int, int], object] = lambda done, total: None
) -> Analysis:
    """`task_vectors`, shown."""
    found = task_vectors(base, stages, on_tensor)
    names, cosine, norms, total = found.names, found.cosine(), found.norms(), sum(found.sizes.values())
    blocks, by_block, above = {}, [], torch.triu_indices(len(names), len(names), 1)
    for block, size in found.sizes.items():
        blocks[block] = {"weights": size, "norms": found.norms(block), "cosine": found.cosine(block)}
        norms_of_block = [f"{norm:.4g}" for norm in found.norms(block).tolist()]
        mean = float(found.cosine(block)[above[0], above[1]].nanmean())
        by_block.append([block, f"{size:,}", *norms_of_block, signed(mean)])
    rows = [
        [name, f"{float(norm):.4g}", *(signed(value) for value in row.tolist())]
        for name, norm, row in zip(names, norms, cosine, strict=True)
    ]
    note = (
        f"Of θ_i − θ over {total:,} weights; two of independent numbers have a cosine within some "
        f"±{2.0 / math.sqrt(total):.4f}. The paper (arXiv 2410.06664, Fig. 1): nearly orthogonal."
    )
    columns = ["block", "weights", *(f"norm, {name}" for name in names), "mean cosine"]
    return Analysis(
        "task_vectors",
        "Similarity of task vectors",
        {
            "stages": names,
            "ranges": found.ranges,
            "weights": total,
            "norms": norms,
            "cosine": cosine,
            "pairs": {"different_ranges": found.pairs(False), "same_range": found.pairs(True)},
            "blocks": blocks,
        },
        similarity_heatmaps({"cosine between task vectors": cosine}, names, "stage"),
        "Cosine between what training added to the base in each stage.",
        [Table("Cosine between task vectors", ["stage", "norm", *names], rows, note), *_table_of_pairs(found)],
        [Table("Task vectors by block", columns, by_block, "Cosine: mean over pairs of stages.")],
    )


def _table_of_pairs(found: TaskVectors) -> list[Table]:
    """Those of one range beside those of different ranges; nothing where no range is known."""
    again = "the same range, trained again"
    cosines = {"different ranges": found.pairs(False), again: found.pairs(True)}
    has_control = len(cosines[again]) > 0
    for low, high in sorted({own for own in found.ranges if own is not None}) if has_control else ():
        cosines[f"{low:g} to {high - 1:g} and other ranges"] = found.pairs(False, (low, high))
        cosines[f"{low:g} to {high - 1:g}, trained again"] = found.pairs(True, (low, high))
    rows = [
        [name, str(len(of)), *(signed(float(value)) for value in (of.min(), of.mean(), of.max()))]
        for name, of in cosines.items()
        if len(of)
    ]
    note = _WITH_CONTROL if has_control else _NO_CONTROL
    table = Table("Pairs of task vectors", ["pairs of", "pairs", "smallest", "mean", "largest"], rows, note)
    return [table] if rows else []
