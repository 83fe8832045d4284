"""Show where a model has room, and what a patch does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch import analysis
from stagepatch.analysis import Analysis, Samples
from stagepatch.checkpoints import find_model, has_vae, takes_captions
from stagepatch.cli import config as configs
from stagepatch.cli.common import bar_over, load_on_device, own_share, put_on, write_run_config
from stagepatch.core import UserError, processes, progress_bar, write_json, write_tensors
from stagepatch.data import BUNDLED, cache_directory, load_dataset, load_held_out, load_training_data
from stagepatch.diffusion import Objective
from stagepatch.families import learns_sigma, num_classes
from stagepatch.merging import numbered_stages
from stagepatch.methods import open_learned
from stagepatch.patch import Patch
from stagepatch.report import Picture, Section, print_table, provenance, write_page, write_picture
from stagepatch.sampling import LatentSampling, attach_guide, generate, latent_sampling, prompted_latents, spread


def analyze(config: configs.AnalyzeConfig, resolved: str) -> None:
    """Gradients and losses over the timesteps, task vectors, a patch and its gate, likeness of samples: what was asked
    for.
    """
    if config.patch and not (config.gate or config.effect or config.structure_samples):
        raise UserError("Nothing to show of the patch: set gate or effect to true, or give structure_samples.")
    if config.effect and not config.patch:
        raise UserError("effect is of what was learned: give it as `patch`.")
    shows_gate = bool(config.patch and config.gate)
    of_timesteps = config.gradients or config.losses or config.effect
    if not (of_timesteps or config.stages or shows_gate or config.structure_samples):
        raise UserError(
            "Nothing to analyse: set gradients or losses to true, or give stages, a patch or structure_samples."
        )
    if config.structure_samples == 1:
        raise UserError("structure_samples=1 must be at least 2, or 0 for none.")
    if config.learned and not config.losses:
        raise UserError("What was learned is compared by its losses: set losses to true, or leave `learned` out.")
    if config.snapshots and not (config.gradients or shows_gate):
        raise UserError(
            "Snapshots are compared by their gradients, or of a patch by its gate: set gradients to true, give a "
            "patch, or leave `snapshots` out."
        )
    learned, analyses = _by_name(config.learned, "learned"), []
    if "base" in learned:
        raise UserError(f"One of `learned` is called 'base', as the model is: name it, as 'other={learned['base']}'.")
    if config.stages:
        analyses.append(_analyze_stages(config))
    if of_timesteps:
        analyses += _analyze_timesteps(config, learned)
    if shows_gate or config.structure_samples:
        analyses += _analyze_patch(config)
    if processes().is_main_process:
        write_run_config(config.output_dir, resolved)
        _write(config, resolved, analyses)


def _by_name(entries: Sequence[str], field: str) -> dict[str, Path]:
    """Directories by name, of 'directory' or 'name=directory'."""
    by_name: dict[str, Path] = {}
    for entry in entries:
        name, is_named, directory = ("", "", entry) if Path(entry).is_dir() else entry.partition("=")
        path = Path(directory if is_named else entry)
        if not path.is_dir():
            raise UserError(f"No directory '{path}', given as one of `{field}`.")
        name = name or (path.parent.name if path.name == "learned" else path.name) or entry
        if name in by_name:
            raise UserError(f"Two of `{field}` are called '{name}': name them, as '{name}-2={path}'.")
        by_name[name] = path
    return by_name


def _analyze_stages(config: configs.AnalyzeConfig) -> Analysis:
    given, stages = _by_name(config.stages, "stages"), {}
    for name, path in given.items():
        if len(given) == 1:
            stages = {stage.name: stage for stage in numbered_stages(path)}
        elif (path / "stages").is_dir():
            stages |= {f"{name}/{stage.name}": stage for stage in numbered_stages(path)}
        else:
            stages[name] = path
    with progress_bar(disable=not processes().is_main_process) as progress:
        task = progress.add_task("task vectors", total=None, status="")
        return analysis.analyze_task_vectors(
            find_model(config.model), stages, lambda done, total: progress.update(task, completed=done, total=total)
        )


def _analyze_timesteps(config: configs.AnalyzeConfig, learned: Mapping[str, Path]) -> list[Analysis]:
    data = config.data
    datasets = {"training images": load_training_data(config.model, data, config.cache, config.output_dir)}
    if data.source in BUNDLED and not has_vae(config.model):
        datasets["held-out images"] = load_dataset(data, "held_out")
    elif data.held_out:
        datasets["held-out images"] = load_held_out(data, datasets["training images"])
    model, scheduler = load_on_device(config.model)
    objective = Objective(scheduler, learns_sigma(model))
    timesteps = analysis.even_timesteps(objective.num_train_timesteps, config.timesteps)
    of_gradients = len(analysis.find_snapshots(Path(config.snapshots))) if config.snapshots else 1
    of_losses = len(datasets) * (1 + len(learned))
    measures = config.gradients * of_gradients + config.losses * of_losses + config.effect
    with bar_over(measures * len(timesteps) * config.samples, "samples") as on_batch:
        options = (config.batch_size, config.seed, data.horizontal_flip, data.num_workers)
        samples = {
            images: Samples(dataset, timesteps, config.samples, *options, on_batch)
            for images, dataset in datasets.items()
        }
        analyses = []
        if config.gradients and config.snapshots:
            analyses.append(analysis.analyze_snapshots(config, objective, samples["training images"]))
        elif config.gradients:
            analyses.append(analysis.analyze_gradients(config, model, objective, samples["training images"]))
        if config.losses:
            analyses.append(analysis.analyze_losses(config.model, learned, model, objective, samples))
        if config.effect:
            other, _ = load_on_device(config.model)
            put_on(config.patch, 1.0, other)
            analyses.append(analysis.analyze_effect(model, other, objective, samples["training images"]))
    return analyses


def _analyze_patch(config: configs.AnalyzeConfig) -> list[Analysis]:
    """The patch's gate, and samples of the model without and with the patch."""
    if config.patch and config.gate:
        open_learned(Path(config.patch)).require("patch")
    model, scheduler = load_on_device(config.model)
    latents, analyses = _latents(config, model), []
    if config.patch and config.gate:
        analyses += _analyze_gate(config, model, scheduler, latents)
    if config.structure_samples:
        attach_guide(model, scheduler, config.sampling)
        samples = {"base": _samples(config, model, scheduler, latents, "base")}
        if config.patch:
            put_on(config.patch, 1.0, model)
            samples["patched"] = _samples(config, model, scheduler, latents, "patched")
        analyses.append(analysis.analyze_structure(samples, "images" if latents is None else "latents"))
    return analyses


def _samples(
    config: configs.AnalyzeConfig, model: nn.Module, scheduler: Any, latents: LatentSampling | None, name: str
) -> Tensor:
    """Of a model with a VAE latents: they are not decoded."""
    sampling = replace(config.sampling, num_images=config.structure_samples)
    how: dict[str, Any] = {} if latents is None else {"shape": latents.shape, "captions": latents.captions}
    with bar_over(own_share(sampling.num_images), f"sampling, {name}") as on_batch:
        return generate(model, scheduler, sampling, on_batch=on_batch, **how)


def _latents(config: configs.AnalyzeConfig, model: nn.Module) -> LatentSampling | None:
    """How the model is sampled: captions as given, or those of the data."""
    if takes_captions(config.model) and not config.prompts:
        if config.data.source in BUNDLED:
            raise UserError(
                f"'{config.model}' takes captions: give --prompts '[\"a caption\", …]', or --data.source, images with "
                f"captions."
            )
        return latent_sampling(config.model, config.data, cache_directory(config.cache, config.output_dir))
    return prompted_latents(config.model, model, config.prompts)


def _analyze_gate(
    config: configs.AnalyzeConfig, model: nn.Module, scheduler: Any, latents: LatentSampling | None
) -> list[Analysis]:
    """Of the patch, and over its training where snapshots of that are given."""
    patch = Patch.from_pretrained(config.patch)
    snapshots = analysis.find_snapshots(Path(config.snapshots)) if config.snapshots else {}
    objective = Objective(scheduler, learns_sigma(model))
    every = objective.num_train_timesteps
    chosen = analysis.even_timesteps(every, config.gate_timesteps or every, "gate_timesteps")
    timesteps = objective.model_timesteps(torch.tensor(chosen))
    sees, captions, count = patch.config.condition, latents.captions if latents else None, config.gate_conditions
    conditions: Sequence[analysis.Condition]
    if captions is not None:
        count = 1 if sees == "t" else min(count, len(config.prompts) or count)
        conditions = [captions.of([number]) for number in range(count)]
    else:
        classes = num_classes(model) if sees != "t" else 0
        conditions = spread(classes, min(count, classes)).tolist() if classes else [0]
    with bar_over((1 + len(snapshots)) * len(conditions) * len(timesteps), "gate") as on_batch:
        shape = None if latents is None else latents.shape
        how = (timesteps, conditions, config.batch_size, on_batch, shape)
        with patch.attach(model):
            found = analysis.analyze_gate(model, patch, *how)
        return [*found, analysis.analyze_gate_training(model, snapshots, *how)] if snapshots else found


def _write(config: configs.AnalyzeConfig, resolved: str, analyses: Sequence[Analysis]) -> None:
    """analysis.json, a picture each, and report.html; the tables that sum it up are printed."""
    directory = Path(config.output_dir)
    write_json(directory / "analysis.json", {each.name: analysis.as_plain(each.numbers) for each in analyses})
    sections: list[Section] = []
    for each in analyses:
        write_picture(directory / f"{each.name}.png", each.figure)
        if each.tensors:
            write_tensors(directory / f"{each.name}.safetensors", each.tensors)
        sections += [Picture(each.title, each.figure, each.caption), *each.samples, *each.summary, *each.details]
        for table in each.summary:
            print_table(table.columns, table.rows, table.title)
        print(f"{each.summary[-1].note}\n" if each.summary else "", end="")
    sections += provenance(resolved, "stagepatch analyze --config run.yaml\n")
    lead = f"Where over the timesteps '{config.model}' has room, and where what was learned used it."
    write_page(directory / "report.html", "stagepatch analyze", lead, sections)
    print(f"Report: {directory / 'report.html'}")
