"""Measure a model."""

from pathlib import Path

import torch

from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG, bar_over, load_on_device, own_share, put_on
from stagepatch.core import UserError, processes, write_json, write_text
from stagepatch.evaluation import Evaluator, Measured, comparison_table
from stagepatch.report import print_table
from stagepatch.sampling import SamplingConfig, attach_guide, load_experts


def evaluate(config: configs.EvaluateConfig, resolved: str) -> None:
    """Measure a model; with a patch or a schedule, base and patched (or scheduled) from the same noise."""
    if config.patch and config.schedule:
        raise UserError("Give --patch or --schedule: a schedule can name patches itself.")
    directory = Path(config.output_dir)
    cache = Path(config.cache or directory / "cache")
    dtype = getattr(torch, config.dtype)
    evaluator = Evaluator.load(config.model, config.data, config.extractor, cache, config.held_out, text_dtype=dtype)
    model, scheduler = load_on_device(config.model, dtype, config.memory)
    experts = load_experts(config.schedule, model, scheduler) if config.schedule else None
    attach_guide(model, scheduler, config.sampling)
    total = own_share(config.sampling.num_images) * len(config.seeds) * (2 if config.patch or experts else 1)
    with bar_over(total) as on_batch:

        def measure(sampling: SamplingConfig) -> Measured:
            return evaluator.measure(model, scheduler, sampling, config.seeds, on_batch)

        patched = None
        if experts is not None:
            with experts.attach(model):
                patched = measure(experts.sampling(config.sampling))
        base = measure(config.sampling)
        if config.patch:
            put_on(config.patch, config.patch_scale, model)
            patched = measure(config.sampling)
    if not processes().is_main_process:
        return
    write_text(directory / RUN_CONFIG, resolved)
    name = "patched" if experts is None else "schedule"
    results = {"base": base.metrics} | ({} if patched is None else {name: patched.metrics})
    write_json(directory / "metrics.json", {"seeds": config.seeds, **results})
    columns, rows = comparison_table(base, patched, evaluator.extractor.name, name)
    print_table(columns, rows, f"{config.sampling.num_images} images a seed, {len(config.seeds)} seeds")
    print(f"Metrics of every seed are in '{directory / 'metrics.json'}'.")
