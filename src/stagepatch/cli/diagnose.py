"""Say what limits a model, and what is worth trying, before anything is trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from stagepatch import analysis
from stagepatch.checkpoints import has_vae
from stagepatch.cli import config as configs
from stagepatch.cli.common import load_on_device, say, write_run_config
from stagepatch.core import UserError, processes, write_json
from stagepatch.data import BUNDLED, fit_to_model, load_held_out, load_training_data
from stagepatch.diffusion import Objective
from stagepatch.families import learns_sigma
from stagepatch.report import print_table, provenance, write_page, write_picture


def diagnose(config: configs.DiagnoseConfig, resolved: str) -> None:
    """Measure, advise, and write report.html and diagnosis.json."""
    if processes().num_processes > 1:
        raise UserError("A diagnosis is made by one process: call it without `accelerate launch`.")
    directory = Path(config.output_dir)
    dataset, held_out = _load_images(config)
    model, scheduler = load_on_device(config.model)
    objective = Objective(scheduler, learns_sigma(model))

    def on_part(name: str) -> None:
        say(f"{name} …")

    found = analysis.diagnose(config, model, objective, dataset, held_out, on_part)
    if config.snapshots:
        samples = analysis.Samples(
            held_out, found.timesteps, min(config.images, len(held_out)), seed=config.seed, same_images=True
        )
        found.average = analysis.measure_average(config.model, Path(config.snapshots), model, objective, samples)
    if config.samples and config.data.source in BUNDLED and not has_vae(config.model):
        parts = (config.model, config.data, config.samples, directory / "cache")
        found.free = analysis.measure_free(model, scheduler, *parts, on_way=on_part)
    advice = analysis.give_advice(config, found)
    head = {"model": config.model, "data": config.data.source, "held_out": _held_out_in_words(config)}
    numbers = {**head, **found.numbers(), "advice": [vars(each) for each in advice]}
    write_json(directory / "diagnosis.json", numbers)
    write_run_config(directory, resolved)
    for name, picture in analysis.diagnosis_pictures(found).items():
        write_picture(directory / f"{name}.png", picture.content)
    lead = f"What '{config.model}' is limited by, and what is worth trying. Held out: {head['held_out']}."
    again = provenance(resolved, "stagepatch diagnose --config run.yaml\n")
    write_page(
        directory / "report.html", "stagepatch diagnose", lead, [*analysis.diagnosis_sections(found, advice), *again]
    )
    for line in analysis.diagnosis_in_words(found):
        print(f"- {line}")
    rows = [[each.title, each.evidence, each.command] for each in advice]
    print_table(["advice", "evidence", "command"], rows, "What is worth trying, in order of worth")
    print(f"Report: {directory / 'report.html'}")


def _load_images(config: configs.DiagnoseConfig) -> tuple[Any, Any]:
    """Training images, and those that the model was not trained on."""
    data = fit_to_model(config.data, config.model)
    if data.source not in BUNDLED and not config.held_out and not data.held_out:
        raise UserError(
            f"Which images was '{config.model}' not trained on? Give --held_out, images like '{data.source}'; or "
            f"--data.held_out, the share that was held out in training by the same option."
        )
    dataset = load_training_data(config.model, data, config.cache, config.output_dir)
    if not config.held_out:
        return dataset, load_held_out(data, dataset)
    other = replace(data, source=config.held_out, sources=[], masks="", references="", held_out=0.0)
    return dataset, load_training_data(config.model, other, "", f"{config.output_dir}/held_out")


def _held_out_in_words(config: configs.DiagnoseConfig) -> str:
    if config.held_out:
        return f"'{config.held_out}'"
    if config.data.source in BUNDLED:
        return "the bundled data's own"
    return f"a share of {config.data.held_out:g} of the images, by a hash of their names"
