"""What each command does, from its config to its files and its printed result."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from torch.utils.data import Dataset

from stagepatch import config as configs
from stagepatch.backbones import find_denoiser, has_vae, learns_sigma, load_denoiser, load_pipeline
from stagepatch.backbones.known import KNOWN, build_known
from stagepatch.backbones.loading import find_model
from stagepatch.comparing.job import is_done
from stagepatch.comparing.launch import launch
from stagepatch.comparing.page import note, short, table, write_results
from stagepatch.comparing.plan import Job, plan_jobs
from stagepatch.comparing.results import collect
from stagepatch.data import CachedLatents, load_dataset, make_cache
from stagepatch.diffusion import Objective, make_scheduler, make_weighting
from stagepatch.errors import UserError
from stagepatch.evaluation import Measured, latent_sampling, load_extractor, load_references, measure
from stagepatch.files import read_json, write_atomically, write_json, write_tensors, write_text
from stagepatch.inspection import describe_path
from stagepatch.merging import Ties, merge_loras, merge_models
from stagepatch.methods import DMP, LoRAConfig, Method, Pretrain, load_learned, make_method
from stagepatch.methods.lora import CONFIG_NAME as LORA_CONFIG
from stagepatch.methods.lora import FILE_NAME as LORA_FILE
from stagepatch.models import DIT_SIZES, DiT
from stagepatch.patch import Patch
from stagepatch.processes import processes
from stagepatch.progress import progress_bar
from stagepatch.report import comparison_table, image_grid, print_table
from stagepatch.sampling import generate, generate_with_pipeline
from stagepatch.training import train as run_training
from stagepatch.training.randomness import GLOBAL, seed_for

RUN_CONFIG = "run.yaml"


def pretrain(config: configs.PretrainConfig, resolved: str) -> None:
    """Train a DiT from scratch and save it as a model directory."""
    directory = Path(config.output_dir)
    dataset = load_dataset(config.data)
    torch.manual_seed(seed_for(GLOBAL, config.training.seed))
    model = _make_model(config.model, config.training.label_dropout)
    scheduler = make_scheduler(config.objective, config.model.learn_sigma)
    objective = Objective(scheduler, config.model.learn_sigma)
    identity = {name: asdict(getattr(config, name)) for name in ("model", "objective", "data")}
    run_training(
        model,
        Pretrain(scheduler),
        objective,
        dataset,
        config.training,
        directory,
        identity,
        config.data.horizontal_flip,
        config.data.num_workers,
        on_start=lambda: write_text(directory / RUN_CONFIG, resolved),
    )
    _say(f"The model is in '{directory}'.")


def _say(text: str) -> None:
    if processes().is_main_process:
        print(text)


def _load(name: str) -> tuple[nn.Module, Any]:
    """A denoiser on this process's device, and its scheduler."""
    model, scheduler = load_denoiser(name)
    return model.to(processes().device), scheduler


def _sampling_bar() -> Progress:
    return progress_bar(disable=not processes().is_main_process)


def _make_model(config: configs.ModelConfig, label_dropout: float) -> DiT:
    options = asdict(config)
    name = options.pop("name")
    if name:
        # A named size sets these itself.
        options = {key: value for key, value in options.items() if key not in DIT_SIZES["DiT-S/2"]}
        model: DiT = DiT.from_name(name, class_dropout_prob=label_dropout, **options)
    else:
        model = DiT(class_dropout_prob=label_dropout, **options)
    return model


def train(config: configs.TrainConfig, resolved: str) -> None:
    """Train a patch, or all weights, on top of a model."""
    directory = Path(config.output_dir)
    facts = {"base model": config.model, "data": config.data.source, "steps": str(config.training.steps)}
    facts |= {name: str(getattr(config.training, name)) for name in ("batch_size", "learning_rate", "seed")}
    method = make_method(config.method, config.patch, config.lora, facts)
    weighting = make_weighting(config.weighting)
    dataset: Dataset[dict[str, Any]]
    if has_vae(config.model):
        cache_dir = Path(config.cache or directory / "cache")
        make_cache(cache_dir, config.model, config.data, config.cache_batch_size, torch.float32)
        dataset = CachedLatents(cache_dir)
    else:
        dataset = load_dataset(config.data)
    model, scheduler = load_denoiser(config.model)
    if config.dtype != "float32" and config.method in ("finetune", "bitfit"):
        raise UserError(
            f"method='{config.method}' trains the model's own weights, which dtype='{config.dtype}' spoils."
        )
    model.to(getattr(torch, config.dtype))
    identity = {
        "model": config.model,
        "method": config.method,
        "dtype": config.dtype,
        "patch": asdict(config.patch),
        "lora": asdict(config.lora),
        "weighting": asdict(config.weighting),
        "data": asdict(config.data),
    }
    run_training(
        model,
        method,
        Objective(scheduler, learns_sigma(model), weighting),
        dataset,
        config.training,
        directory,
        identity,
        config.data.horizontal_flip,
        config.data.num_workers,
        on_start=lambda: write_text(directory / RUN_CONFIG, resolved),
    )
    _say(f"The result is in '{directory}'.")


def cache(config: configs.CacheConfig, resolved: str) -> None:
    """Encode images and captions once."""
    directory = Path(config.output_dir)
    if not config.model or not has_vae(config.model):
        raise UserError(f"model='{config.model}' has no VAE, so there is nothing to cache: give a latent model.")
    make_cache(directory, config.model, config.data, config.batch_size, getattr(torch, config.dtype))
    if processes().is_main_process:
        write_text(directory / RUN_CONFIG, resolved)
    _say(f"The cache of {len(CachedLatents(directory)):,} images is in '{directory}'.")


def sample(config: configs.SampleConfig, resolved: str) -> None:
    """Generate images, and write them as tensors and as a grid."""
    directory = Path(config.output_dir)
    is_latent = has_vae(config.model)
    model, scheduler = (load_pipeline(config.model).to(processes().device), None) if is_latent else _load(config.model)
    if config.patch:
        _put_on(config.patch, config.patch_scale, find_denoiser(model))
    with _sampling_bar() as progress:
        task = progress.add_task("sampling", total=_share(config.sampling.num_images), status="")

        def on_batch(count: int) -> None:
            progress.advance(task, count)

        if is_latent:
            images = generate_with_pipeline(model, config.sampling, config.prompts, on_batch)
        else:
            images = generate(model, scheduler, config.sampling, on_batch=on_batch)
    if not processes().is_main_process:
        return
    write_text(directory / RUN_CONFIG, resolved)
    write_tensors(directory / "samples.safetensors", {"images": images})
    grid = image_grid(images[:100], columns=10)
    write_atomically(directory / "grid.png", lambda path: grid.save(path, format="PNG"))
    print(f"{len(images)} images are in '{directory / 'samples.safetensors'}', a grid in '{directory / 'grid.png'}'.")


def _share(num_images: int) -> int:
    """Images that the main process makes, for its bar."""
    return math.ceil(num_images / int(processes().num_processes))


def _put_on(directory: str, scale: float, model: nn.Module) -> Method:
    """What a method learned, on a model; scaled, if it is a patch."""
    method = load_learned(model, Path(directory))
    if isinstance(method, DMP):
        method.patch.scale = scale
    elif scale != 1.0:
        raise UserError(f"patch_scale={scale} scales a patch; '{directory}' holds what {method.name} learned.")
    return method


def evaluate(config: configs.EvaluateConfig, resolved: str) -> None:
    """Measure a model; with a patch, base and patched from the same noise."""
    latents = None
    if has_vae(config.model):
        cache_dir = Path(config.cache or Path(config.output_dir) / "cache")
        make_cache(cache_dir, config.model, config.data, 8, torch.float32)
        latents = latent_sampling(config.model, CachedLatents(cache_dir))
    model, scheduler = _load(config.model)
    references = load_references(config.data)
    extractor = load_extractor(config.extractor)
    total = _share(config.sampling.num_images) * len(config.seeds) * (2 if config.patch else 1)
    with _sampling_bar() as progress:
        task = progress.add_task("sampling", total=total, status="")

        def measured() -> Measured:
            return measure(
                model,
                scheduler,
                config.sampling,
                config.seeds,
                references,
                extractor,
                lambda count: progress.advance(task, count),
                latents,
            )

        base = measured()
        patched = None
        if config.patch:
            _put_on(config.patch, config.patch_scale, model)
            patched = measured()
    if not processes().is_main_process:
        return
    directory = Path(config.output_dir)
    write_text(directory / RUN_CONFIG, resolved)
    results = {"base": base.metrics} | ({} if patched is None else {"patched": patched.metrics})
    write_json(directory / "metrics.json", {"seeds": config.seeds, **results})
    columns, rows = comparison_table(base, patched, extractor.name)
    print_table(columns, rows, f"{config.sampling.num_images} images a seed, {len(config.seeds)} seeds")
    print(f"Metrics of every seed are in '{directory / 'metrics.json'}'.")


def compare(config: configs.CompareConfig, resolved: str) -> None:
    """Train and measure every entry, and write the table."""
    jobs = plan_jobs(config)
    directory = jobs[0].directory.parent.parent
    write_text(directory / RUN_CONFIG, resolved)
    left = [job for job in jobs if not is_done(job)]
    if left and has_vae(config.model):
        make_cache(jobs[0].cache, config.model, config.data, 8, torch.float32)
    print(f"{len(jobs)} jobs, {len(jobs) - len(left)} of them done; logs in '{directory / 'logs'}'.")
    with progress_bar() as progress:
        task = progress.add_task("jobs", total=len(jobs), completed=len(jobs) - len(left), status="")

        def on_done(job: Job) -> None:
            progress.advance(task)
            progress.console.print(f"done: {job.name}, seed {job.training.seed}", highlight=False)

        launch(left, config.launch, directory / "logs", on_done)
    rows = collect(jobs, config.metric)
    write_results(directory, jobs, rows, config.metric, resolved)
    print_table(*short(*table(rows, config.metric, jobs[0].extractor + " features")), note(jobs))
    print(f"Report: {directory / 'report.html'}")


def merge(config: configs.MergeConfig, resolved: str) -> None:
    """Merge stages, a tensor at a time."""
    output, stages = Path(config.output_dir), [Path(stage) for stage in config.stages]
    if not 0.0 <= config.ties_keep <= 1.0:
        raise UserError(f"ties_keep={config.ties_keep} must be a share from 0 to 1.")
    loras = [(stage / LORA_CONFIG).exists() for stage in stages]
    if stages and all(loras):
        if config.ties_keep:
            raise UserError("TIES-merging of LoRAs would not be a LoRA: set ties_keep to 0.")
        merge_loras([stage / LORA_FILE for stage in stages], config.weights, output / LORA_FILE)
        ranks = [LoRAConfig(**read_json(stage / LORA_CONFIG)) for stage in stages]
        merged = replace(ranks[0], rank=sum(lora.rank for lora in ranks), min_rank=0)
        write_json(output / LORA_CONFIG, asdict(merged))
    else:
        ties = Ties(config.ties_keep) if config.ties_keep else None
        merge_models(find_model(config.base), [find_model(stage) for stage in stages], config.weights, output, ties)
    write_text(output / RUN_CONFIG, resolved)
    print(f"The merged {'LoRA' if stages and all(loras) else 'model'} is in '{output}'.")


def params(config: configs.ParamsConfig, resolved: str) -> None:
    """Count base and added parameters on the meta device."""
    rows = []
    for name in config.models:
        model = build_known(name)
        base = sum(value.numel() for value in model.parameters())
        small = config.patch.grid or list(KNOWN[name].grid if name in KNOWN else (16, 16))
        row = [name, f"{base:,}"]
        for grid in (None, small):
            with torch.device("meta"):
                patch = Patch.create(model, replace(config.patch, grid=grid))
            added = patch.num_parameters()
            # Cut to two decimals, not rounded: so Table 1 of arXiv 2405.17825 has 1.2674% as 1.26%.
            share = f"+{math.floor(added / base * 1e4) / 1e2:.2f}%"
            row += ["×".join(map(str, patch.gate_grid)), f"{added:,}", share]
        rows.append(row)
    columns = ["model", "base", "tokens", "added", "share (cut)", "grid", "added", "share (cut)"]
    print_table(columns, rows, "Parameters of a patch: one prompt per token, and a grid of few")


def inspect(config: configs.InspectConfig, resolved: str) -> None:
    """Say what a path holds."""
    print_table(["what", "value"], describe_path(Path(config.path)), str(config.path))


def demo(config: configs.DemoConfig, resolved: str) -> None:
    """Run the demo."""
    from stagepatch.demo import run_demo

    run_demo(Path(config.output_dir), config.quick)
