"""Show where a model has room."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from stagepatch.analysis import (
    LEAST_RELIABILITY,
    Estimate,
    Samples,
    difference,
    estimate,
    even_timesteps,
    find_stages,
    gradient_similarity,
    loss_at_timesteps,
    near_and_far,
    relative_difference,
    task_vectors,
)
from stagepatch.analysis.plots import similarity_heatmaps, timestep_losses
from stagepatch.analysis.tables import loss_table, quarters, signed
from stagepatch.checkpoints import has_vae
from stagepatch.checkpoints.loading import find_model
from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG, load_on_device
from stagepatch.core import TensorReader
from stagepatch.core.errors import UserError
from stagepatch.core.files import write_atomically, write_json, write_text
from stagepatch.core.processes import processes
from stagepatch.core.progress import progress_bar
from stagepatch.data import CachedLatents, load_dataset, make_cache
from stagepatch.diffusion import Objective
from stagepatch.families import learns_sigma
from stagepatch.methods import load_learned
from stagepatch.report import (
    Code,
    KeyValues,
    Picture,
    Section,
    Table,
    environment,
    figure_to_data_uri,
    print_table,
    write_page,
)


@dataclass
class _Part:
    """One analysis: its numbers, its picture, tables for the terminal and the page, and more for the page."""

    name: str
    numbers: dict[str, Any]
    title: str
    figure: Figure
    caption: str
    summary: Sequence[Table]
    more: Sequence[Table] = ()


def analyze(config: configs.AnalyzeConfig, resolved: str) -> None:
    """Compare gradients, task vectors and losses over the timesteps, as far as each was asked for."""
    if not (config.gradients or config.losses or config.stages):
        raise UserError("Nothing to analyse: set gradients or losses to true, or give stages.")
    if config.batch_size < 1 or config.samples < 2:
        raise UserError(f"batch_size={config.batch_size} must be at least 1, and samples={config.samples} 2.")
    if config.seed < 0:
        raise UserError(f"seed={config.seed} must be 0 or more.")
    if config.learned and not config.losses:
        raise UserError("What was learned is compared by its losses: set losses to true, or leave `learned` out.")
    learned, parts = _named(config.learned, "learned"), []
    if "base" in learned:
        raise UserError(f"One of `learned` is called 'base', as the model is: name it, as 'other={learned['base']}'.")
    if config.stages:
        parts.append(_compare_stages(config))
    if config.gradients or config.losses:
        parts += _compare_timesteps(config, learned)
    if not processes().is_main_process:
        return
    directory = Path(config.output_dir)
    write_text(directory / RUN_CONFIG, resolved)
    write_json(directory / "analysis.json", {part.name: part.numbers for part in parts})
    sections: list[Section] = []
    for part in parts:
        _write_figure(directory / f"{part.name}.png", part.figure)
        sections += [Picture(part.title, figure_to_data_uri(part.figure), part.caption), *part.summary, *part.more]
        for table in part.summary:
            print_table(table.columns, table.rows, table.title)
        print(f"{part.summary[-1].note}\n")
    sections += [Code("Config", resolved), KeyValues("Environment", environment())]
    sections.append(Code("Again", "stagepatch analyze --config run.yaml\n"))
    lead = f"Where over the timesteps '{config.model}' has room, and where what was learned used it."
    write_page(directory / "report.html", "stagepatch analyze", lead, sections)
    print(f"Report: {directory / 'report.html'}")


def _write_figure(path: Path, figure: Figure) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight"))


def _named(entries: Sequence[str], field: str) -> dict[str, Path]:
    """Directories by name, of 'directory' or 'name=directory'."""
    named: dict[str, Path] = {}
    for entry in entries:
        name, is_named, directory = ("", "", entry) if Path(entry).is_dir() else entry.partition("=")
        path = Path(directory if is_named else entry)
        if not path.is_dir():
            raise UserError(f"No directory '{path}', given as one of `{field}`.")
        name = name or (path.parent.name if path.name == "learned" else path.name) or entry
        if name in named:
            raise UserError(f"Two of `{field}` are called '{name}': name them, as '{name}-2={path}'.")
        named[name] = path
    return named


@contextmanager
def _bar(description: str, total: int) -> Iterator[Any]:
    with progress_bar(disable=not processes().is_main_process) as progress:
        task = progress.add_task(description, total=total, status="")
        yield lambda count: progress.advance(task, count)


def _compare_timesteps(config: configs.AnalyzeConfig, learned: Mapping[str, Path]) -> list[_Part]:
    datasets = _datasets(config)
    options = (config.batch_size, config.seed, config.data.horizontal_flip, config.data.num_workers)
    samples = {name: Samples(dataset, *options) for name, dataset in datasets.items()}
    model, scheduler = load_on_device(config.model)
    objective = Objective(scheduler, learns_sigma(model))
    timesteps = even_timesteps(objective.num_train_timesteps, config.timesteps)
    parts = []
    if config.gradients:
        parts.append(_compare_gradients(config, model, objective, samples["training images"], timesteps))
    if config.losses:
        parts.append(_compare_losses(config, model, objective, samples, timesteps, learned))
    return parts


def _datasets(config: configs.AnalyzeConfig) -> dict[str, Any]:
    if has_vae(config.model):
        directory = Path(config.cache or Path(config.output_dir) / "cache")
        make_cache(directory, config.model, config.data)
        return {"training images": CachedLatents(directory)}
    datasets = {"training images": load_dataset(config.data)}
    if config.data.source == "digits":
        datasets["held-out images"] = load_dataset(config.data, "held_out")
    return datasets


def _compare_gradients(
    config: configs.AnalyzeConfig, model: nn.Module, objective: Objective, samples: Samples, timesteps: list[int]
) -> _Part:
    with _bar("gradients", len(timesteps) * config.samples) as advance:
        result = gradient_similarity(
            model,
            objective,
            samples,
            timesteps,
            config.samples,
            config.parameters,
            config.projection,
            config.memory_gib,
            advance,
        )
    numbers: dict[str, Any] = {"timesteps": timesteps, "samples": config.samples, "weights": result.num_parameters}
    matrices = {"cosine": result.cosine, "corrected": result.corrected}
    found = {name: near_and_far(matrix) for name, matrix in matrices.items()}
    for name, (near, far, (row, column)) in found.items():
        lowest = {"timesteps": [timesteps[row], timesteps[column]], "cosine": float(matrices[name][row, column])}
        numbers[name] = {"matrix": matrices[name], "neighbours": near, "far": far, "lowest": lowest}
    numbers |= {"reliability": result.reliability, "norms": result.norms, "standard_error": result.error}
    note = (
        f"Mean gradients of {result.num_parameters:,} weights over {config.samples} samples a timestep, images and "
        f"noise drawn anew for each. A cosine's standard error from the draw is some {result.error:.3f} or less (root "
        f"mean square over pairs)"
    )
    if config.projection:
        numbers |= {"projection": config.projection, "projection_error": 1.0 / math.sqrt(config.projection)}
        note += (
            f", and from the projection to {config.projection:,} numbers at most (1 − c²)/√{config.projection} = "
            f"{1.0 / math.sqrt(config.projection):.4f}·(1 − c²)"
        )
    reliable = int((result.reliability >= LEAST_RELIABILITY).sum())
    note += (
        f". Corrected: an estimate for endless samples, between the {reliable} of {len(timesteps)} timesteps whose "
        f"reliability is at least {LEAST_RELIABILITY:g}; more samples make it more of them. The paper (arXiv "
        f"2410.06664, Fig. 1a): similar between neighbours, low or negative far apart."
    )
    gap = timesteps[1] - timesteps[0]
    rows = [
        [f"neighbours, {gap} timesteps apart", *(signed(near) for near, _, _ in found.values())],
        ["at least half of all timesteps apart", *(signed(far) for _, far, _ in found.values())],
        [
            "lowest",
            *(
                f"{signed(float(matrices[name][place]))} (t = {timesteps[place[0]]} and {timesteps[place[1]]})"
                for name, (_, _, place) in found.items()
            ),
        ],
    ]
    on_diagonal = result.cosine.clone()
    on_diagonal.diagonal().copy_(result.reliability)
    panels = {"cosine; diagonal: reliability": on_diagonal, "corrected for noise": result.corrected}
    each = zip(timesteps, result.norms.tolist(), result.reliability.tolist(), strict=True)
    return _Part(
        "gradients",
        _plain(numbers),
        "Similarity of gradients",
        similarity_heatmaps(
            {title: matrix.tolist() for title, matrix in panels.items()}, [str(t) for t in timesteps], "timestep"
        ),
        "Cosine between the mean gradients of two timesteps. Where the diagonal of the left panel is pale, a timestep "
        "hardly agrees with itself, and its row says little; on the right, such rows are grey.",
        [Table("Cosine between gradients", ["timesteps", "as drawn", "corrected"], rows, note)],
        [
            Table(
                "Gradients by timestep",
                ["timestep", "norm", "reliability"],
                [[str(timestep), f"{norm:.4g}", f"{reliability:.3f}"] for timestep, norm, reliability in each],
                "Reliability: what the halves of the samples agree on, as a share; the cosine to expect between two "
                "such gradients of the same timestep.",
            )
        ],
    )


def _compare_losses(
    config: configs.AnalyzeConfig,
    model: nn.Module,
    objective: Objective,
    samples: Mapping[str, Samples],
    timesteps: list[int],
    learned: Mapping[str, Path],
) -> _Part:
    losses: dict[str, dict[str, Tensor]] = {images: {} for images in samples}
    total = len(timesteps) * config.samples * len(samples) * (1 + len(learned))
    with _bar("losses", total) as advance:
        for name, path in [("base", None), *learned.items()]:
            model = model if path is None else _load_with(config.model, path, objective)
            for images, source in samples.items():
                losses[images][name] = loss_at_timesteps(model, objective, source, timesteps, config.samples, advance)
    numbers: dict[str, Any] = {"timesteps": timesteps, "samples": config.samples}
    curves: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for images, found in losses.items():
        base = found["base"]
        curves[images] = {name: _curve([estimate(row) for row in _rows(values)]) for name, values in found.items()}
        apart: dict[str, list[Estimate]] = {}
        share: dict[str, list[Estimate]] = {}
        for name in learned:
            pairs = list(zip(_rows(base), _rows(found[name]), strict=True))
            apart[name] = [difference(*pair) for pair in pairs]
            share[name] = [relative_difference(*pair) for pair in pairs]
        changes[images] = {name: _curve(values) for name, values in share.items()}
        numbers[images] = {
            name: {"loss": curves[images][name]}
            | ({} if name == "base" else {"difference": _curve(apart[name]), "relative": changes[images][name]})
            for name in found
        }
    note = (
        f"Mean loss over {config.samples} draws of image and noise a timestep, by the model's own objective. Changes "
        f"are to the base from the same images, noise and timesteps, ± standard error over these draws; below zero is "
        f"better than the base."
    )
    groups = quarters(timesteps)
    single = [slice(place, place + 1) for place in range(len(timesteps))]
    return _Part(
        "losses",
        _plain(numbers),
        "Loss over timesteps",
        timestep_losses(timesteps, curves, changes),
        "Loss at each timestep"
        + (", and below its change with what was learned; bands: two standard errors." if learned else "."),
        [
            loss_table("Loss", images, found, timesteps, [*groups, slice(None)], note)
            for images, found in losses.items()
        ],
        [loss_table("Loss at each timestep", *item, timesteps, single) for item in losses.items()],
    )


def _load_with(model: str, directory: Path, objective: Objective) -> nn.Module:
    """The base with what was learned on it, or the whole model that lies there."""
    if not any((directory / component).is_dir() for component in ("transformer", "unet")):
        base, _ = load_on_device(model)
        load_learned(base, directory)
        return base
    other, scheduler = load_on_device(str(directory))
    theirs = Objective(scheduler, learns_sigma(other))
    for name in ("prediction_type", "learn_sigma", "num_train_timesteps"):
        if getattr(theirs, name) != getattr(objective, name):
            raise UserError(
                f"The losses of '{directory}' and of '{model}' cannot be compared: {name} is {getattr(theirs, name)}, "
                f"not {getattr(objective, name)}."
            )
    return other


def _rows(losses: Tensor) -> list[Tensor]:
    """One timestep each: n times [1, count]."""
    return list(losses.split(1))


def _curve(estimates: Sequence[Estimate]) -> dict[str, list[float]]:
    return {"mean": [value.mean for value in estimates], "error": [value.error for value in estimates]}


def _compare_stages(config: configs.AnalyzeConfig) -> _Part:
    stages = _named(config.stages, "stages")
    if len(stages) == 1:
        stages = {path.name: path for path in find_stages(next(iter(stages.values())))}
    with progress_bar(disable=not processes().is_main_process) as progress:
        task = progress.add_task("task vectors", total=None, status="")

        def on_tensor(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        result = task_vectors(find_model(config.model), stages, TensorReader, on_tensor)
    cosine, norms, total = result.cosine(), result.norms(), sum(result.sizes.values())
    blocks: dict[str, dict[str, Any]] = {
        block: {"weights": result.sizes[block], "norms": result.norms(block), "cosine": result.cosine(block)}
        for block in result.products
    }
    rows = [
        [name, f"{float(norm):.4g}", *(signed(value) for value in row.tolist())]
        for name, norm, row in zip(result.names, norms, cosine, strict=True)
    ]
    above = torch.triu_indices(len(stages), len(stages), 1)
    by_block = [
        [
            block,
            f"{facts['weights']:,}",
            *(f"{value:.4g}" for value in facts["norms"].tolist()),
            signed(float(facts["cosine"][above[0], above[1]].nanmean())),
        ]
        for block, facts in blocks.items()
    ]
    return _Part(
        "task_vectors",
        _plain({"stages": result.names, "weights": total, "norms": norms, "cosine": cosine, "blocks": blocks}),
        "Similarity of task vectors",
        similarity_heatmaps({"cosine between task vectors": cosine.tolist()}, result.names, "stage"),
        "Cosine between what training added to the base in each stage.",
        [
            Table(
                "Cosine between task vectors",
                ["stage", "norm", *result.names],
                rows,
                f"Of θ_i − θ over {total:,} weights; two of independent numbers have a cosine within some "
                f"±{2.0 / math.sqrt(total):.4f}. The paper (arXiv 2410.06664, Fig. 1): nearly orthogonal.",
            )
        ],
        [
            Table(
                "Task vectors by block",
                ["block", "weights", *(f"norm, {name}" for name in result.names), "mean cosine"],
                by_block,
                "Cosine: mean over pairs of stages.",
            )
        ],
    )


def _plain(value: Any) -> Any:
    """For JSON: lists of numbers, null for NaN."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
