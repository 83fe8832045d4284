"""Snapshots of one training into one: by post-hoc EMA (arXiv 2312.02696), or by weights as stages are."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stagepatch.checkpoints import encoder_directories, weights_fingerprint
from stagepatch.core import TensorReader, UserError, copy_file, read_yaml, write_stream
from stagepatch.merging.config import SUM, MergeMethod, check_weights
from stagepatch.merging.models import PIECE, combine, merge_models
from stagepatch.methods import open_artifact
from stagepatch.training import POSTHOC_EMA, RUN_CONFIG, SNAPSHOTS, posthoc_weights

_LEARNED = ("patch", "LoRA", "wavelet gates", "weights")


def merge_posthoc(run: Path, sigma_rel: float, output: Path) -> float:
    """The average of a length that was not kept, as of the last step that was saved; see `training.posthoc_ema`.

    It is what the training saves: a model directory, a patch, a LoRA, or weights. Its numbers are a linear
    combination of all averages that were saved.

    Args:
        run: directory of a training with `training.posthoc_ema`.
        sigma_rel: length of the wanted average.
        output: its directory.

    Returns:
        How far the profile that is made is from the wanted one: the norm of their difference over the latter's.

    Raises:
        UserError: the run has no averages, or a sigma_rel that cannot be.
    """
    found = [path for path in run.glob(f"{POSTHOC_EMA}/*/*") if path.name.isdecimal() and _is_whole(path)]
    if not found:
        raise UserError(f"'{run}' has no averages for post-hoc EMA{_way_out(run)}")
    found.sort(key=lambda path: (int(path.name), path.parent.name))
    steps, sigmas = [int(path.name) for path in found], [float(path.parent.name) for path in found]
    weights, difference = posthoc_weights(steps, sigmas, steps[-1], sigma_rel)
    *others, last = found
    combine_directories(last, others, weights[:-1], output)
    if open_artifact(last).kind == "model":
        for name, directory in encoder_directories(run).items():
            shutil.copytree(directory, output / name, copy_function=copy_file, dirs_exist_ok=True)
    return difference


def combine_directories(base: Path, others: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """base + Σ w_i (other_i − base) of every tensor in directories of the same files, a piece at a time.

    Args:
        base: a directory of a model or of what a method learned; what is no tensor is its own.
        others: snapshots of the same training; their files are those that are written.
        weights: w_i, one a snapshot.

    Raises:
        UserError: directories whose tensors have other names or shapes.
    """
    names = _files([*others, base][0])
    for name in names:
        if name.suffix == ".safetensors":
            _combine_files([directory / name for directory in (base, *others)], weights, output / name)
    for name in names:  # last: the file that marks what was learned as whole may be among them
        if name.suffix != ".safetensors":
            copy_file(base / name, output / name)


def _combine_files(paths: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    readers = [TensorReader([path]) for path in paths]
    shapes = {name: (readers[0].shape(name), readers[0].dtype(name)) for name in readers[0].names()}
    for path, reader in zip(paths, readers, strict=True):
        if {name: reader.shape(name) for name in reader.names()} != {name: shapes[name][0] for name in shapes}:
            raise UserError(f"'{path}' is of another model than '{paths[0]}': are both of one training?")

    def combined(name: str) -> Iterator[Tensor]:
        for piece, *others in zip(*(reader.pieces(name, PIECE) for reader in readers), strict=True):
            yield combine(piece, others, weights)

    write_stream(output, shapes, combined)


@dataclass(frozen=True)
class Snapshots:
    """Snapshots of one training, to be merged as `Stages` are: into its result, which is the base.

    Args:
        run: directory of the training, with its result.
        directories: of snapshots of other weights than the result's, in order of time.
        model: that a patch, LoRA or weights were learned on; empty where the run trains a model of its own.
    """

    run: Path
    directories: tuple[Path, ...]
    model: str = ""
    are_loras: bool = False

    @property
    def base(self) -> str:
        """The model that is merged into, or that what was learned belongs to."""
        return self.model or str(self.run)

    def merge(self, weights: Sequence[float], output: Path, method: MergeMethod = SUM) -> None:
        """Weights of all snapshots and the result sum to one: the result has what is left by those that are given.

        Raises:
            UserError: other than one weight a snapshot, or a method that they cannot be merged by.
        """
        self.check_method(method)
        if not self.model:
            merge_models(self.run, self.directories, weights, output, method)
            return
        check_weights(self.directories, weights)
        combine_directories(self.run, self.directories, weights, output)

    def check_method(self, method: MergeMethod) -> None:
        """Refuse all but the sum for what was learned, and Fisher merging."""
        if method.kind == "fisher" or (self.model and method.kind != "sum"):
            raise UserError(
                f"Snapshots are not merged by '{method.kind}': those of models can be, by sum, ties or dare(_ties), "
                f"those of what was learned by sum alone."
            )

    def fingerprint(self, directory: Path) -> str:
        """Of the weights in the run's directory, or in a snapshot's."""
        names = [name for name in _files(self.directories[0]) if name.suffix == ".safetensors"]
        return weights_fingerprint(TensorReader([directory / name for name in names]))


def find_snapshots(run: str | Path, base: str = "") -> Snapshots:
    """The snapshots of a training that is done.

    Args:
        run: its directory.
        base: the model that it started from, where the run's config does not say so; not for pretraining.

    Raises:
        UserError: no such directory, no result in it, or no snapshots.
    """
    run = Path(run)
    kind = open_artifact(run, "model", *_LEARNED).kind
    found = [path for path in run.glob(f"{SNAPSHOTS}/*") if path.name.isdecimal() and _is_whole(path)]
    found.sort(key=lambda path: int(path.name))
    model = ""
    if kind == "model" and base:
        raise UserError(f"'{run}' trained a model of its own, which is the base: leave out base.")
    if kind in _LEARNED:
        config = read_yaml(run / RUN_CONFIG) if (run / RUN_CONFIG).exists() else {}
        model = base or str(config.get("model", ""))
        if not model:
            raise UserError(f"'{run}' does not say which model it was trained on: give base.")
    if found:
        snapshots = Snapshots(run, tuple(found), model)
        if snapshots.fingerprint(found[-1]) == snapshots.fingerprint(run):  # one of the last step is the result
            found.pop()
    if not found:
        raise UserError(f"'{run}' has no snapshots besides its result: train with training.snapshot_every.")
    return Snapshots(run, tuple(found), model)


def _is_whole(directory: Path) -> bool:
    try:
        return open_artifact(directory).kind in ("model", *_LEARNED)
    except UserError:
        return False


def _files(directory: Path) -> list[Path]:
    """Names of a directory's files, at any depth, without what a killed run left half written."""
    found = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return [path for path in found if not path.name.startswith(".")]


def _way_out(run: Path) -> str:
    count = len([path for path in run.glob(f"{SNAPSHOTS}/*") if path.name.isdecimal()])
    kept = (
        f" Of its {count} plain snapshots a mean can be made, or any sum of given weights: "
        f"stagepatch merge --run {run} --weights '[…]'."
        if count
        else ""
    )
    return f": train with training.posthoc_ema=[0.05, 0.1] and training.snapshot_every.{kept}"
