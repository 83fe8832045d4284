"""Measure a model, or one source of images against another."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stagepatch.cli import config as configs
from stagepatch.cli.common import (
    RUN_CONFIG,
    bar_over,
    check_scale,
    load_on_device,
    own_share,
    put_on,
    write_run_config,
)
from stagepatch.cli.evaluate_sources import (
    evaluate_sources,
    learned_fingerprint,
    loaded_by,
    shard_size,
    weights_fingerprint,
)
from stagepatch.cli.shown_samples import keep_shown, shown_samples
from stagepatch.core import UserError, alone_in, processes, write_json
from stagepatch.evaluation import (
    Evaluator,
    Measured,
    Shards,
    begin_shards,
    comparison_note,
    comparison_table,
    direction_note,
    finish_shards,
    name_source,
)
from stagepatch.families import num_classes
from stagepatch.methods import open_learned
from stagepatch.report import Table, print_table, provenance, write_page
from stagepatch.sampling import SamplingConfig, attach_guide, load_experts


def evaluate(config: configs.EvaluateConfig, resolved: str) -> None:
    """Measure a model, or A against B."""
    work = evaluate_sources if config.against or config.save_statistics else _evaluate_model
    with alone_in(Path(config.output_dir)):
        work(config, resolved)


def _evaluate_model(config: configs.EvaluateConfig, resolved: str) -> None:
    """A model against its training images; with a patch or a schedule, base and patched (or scheduled) from the same
    noise.
    """
    check_scale(config)
    _check_is_model(config.model)
    directory = Path(config.output_dir)
    cache = Path(config.cache or directory / "cache")
    dtype, source = getattr(torch, config.dtype), config.data.source
    evaluator = Evaluator.load(
        config.model, config.data, config.extractor, cache, config.held_out, "", dtype, config.metrics
    )
    model, scheduler = load_on_device(config.model, dtype, config.memory)
    experts = load_experts(config.schedule, model, scheduler, config.patch) if config.schedule else None
    if config.patch:
        open_learned(Path(config.patch))  # refused before anything is sampled
    attach_guide(model, scheduler, config.sampling)
    kept = directory / "features" / "model"
    settings = {
        "config": config,
        "weights": weights_fingerprint(config.model),
        "learned": "".join(learned_fingerprint(each) for each in (config.patch, config.schedule) if each),
        "extractor": evaluator.extractor.fingerprint,
    }
    begin_shards(kept, settings, ignored=("output_dir", "cache"))
    parts: dict[str, list[Shards]] = {}
    is_compared = bool(config.patch or experts)
    total = own_share(config.sampling.num_images) * len(config.seeds) * (1 + is_compared)
    with bar_over(total) as on_batch:

        def collect(name: str, sampling: SamplingConfig) -> None:
            def shards(seed: int) -> Shards:
                own = replace(sampling, seed=seed)

                def make(numbers: range) -> dict[str, Tensor]:
                    images = evaluator.sample(model, scheduler, own, on_batch, numbers)
                    if is_compared and seed == config.seeds[0] and numbers.start == 0:
                        keep_shown(kept / f"{name}.safetensors", images)
                    return evaluator.collect(images)

                return Shards(kept / f"{name}-{seed}", sampling.num_images, make, shard_size(sampling))

            parts[name] = [shards(seed) for seed in config.seeds]
            for each in parts[name]:
                each.make_own(on_batch)

        if experts is not None:
            with experts.attach(model):
                collect("schedule", experts.sampling(config.sampling))
        collect("base", config.sampling)
        if config.patch and experts is None:
            put_on(config.patch, config.patch_scale, model)
            collect("patched", config.sampling)
    processes().wait_for_everyone()
    if not processes().is_main_process:
        return
    measured = {name: _measured(evaluator, shards) for name, shards in parts.items()}
    write_run_config(directory, resolved)
    name = "patched" if experts is None else "schedule"
    results = {each: measured[each].metrics for each in ("base", name) if each in measured}
    loaded = loaded_by([config.model, source], evaluator.extractors.values())
    write_json(directory / "metrics.json", {"seeds": config.seeds, **loaded, **results})
    columns, rows = comparison_table(measured["base"], measured.get(name), evaluator.extractor.name, name)
    note = f"{comparison_note(measured['base'], name in measured)} {direction_note(results['base'][0])}"
    labels = evaluator.labels(config.sampling.num_images).unique().tolist()
    if num_classes(model) > 1 and len(labels) == 1:
        note += (
            f" The images of '{source}' are of one class, so all samples have label {labels[0]} of the model's "
            f"{num_classes(model)}. Subfolders are classes; '{config.model}' '{source}', as two sources, samples "
            f"all in turn."
        )
    counts = f"{config.sampling.num_images} images a seed, {len(config.seeds)} seeds"
    print_table(columns, rows, counts)
    print(note)
    lead = f"'{config.model}' against the images of '{source}', in the features of '{evaluator.extractor.name}'."
    table = Table("Metrics", columns, rows, f"{counts}. {note}")
    again = provenance(resolved, f"stagepatch evaluate --config {directory / RUN_CONFIG}\n")
    files = kept / "base.safetensors", kept / f"{name}.safetensors"
    samples = shown_samples("Samples", files, ("base", name)) if is_compared else []
    write_page(directory / "report.html", "stagepatch evaluate", lead, [table, *samples, *again])
    finish_shards(kept)
    print(f"Metrics of every seed are in '{directory / 'metrics.json'}'; report: '{directory / 'report.html'}'.")


def _check_is_model(text: str) -> None:
    """Without a second source, the first is a model by itself."""
    try:
        named = name_source(text)
    except UserError:
        return  # whoever loads the model says what is wrong
    if named.learned:
        raise UserError(f"Give --patch {named.learned}, or what '{text}' is measured against, as a second source.")
    if named.kind != "model":
        raise UserError(f"'{text}' is no model: say what its {named.kind} are measured against, as a second source.")


def _measured(evaluator: Evaluator, shards: list[Shards]) -> Measured:
    """Of each seed; of a single one also without some of its images, which gives its interval."""
    metrics, without = [], {}
    for each in shards:
        samples = each.gathered()
        metrics.append(evaluator.measure_collected(samples))
        if len(shards) == 1:
            without = evaluator.measure_left_out(samples)
    return Measured(metrics, torch.empty(0), without)
