"""The diagonal Fisher of a model (arXiv 2111.09832), for its denoising loss in a range of timesteps."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.checkpoints import load_denoiser, model_fingerprint
from stagepatch.core import UserError, processes, read_tensors, seed_for, write_tensors
from stagepatch.data import DataConfig
from stagepatch.diffusion import Objective, TimestepSampler, between_levels
from stagepatch.families import learns_sigma
from stagepatch.methods import open_artifact
from stagepatch.training import Conditions, TrainingConfig, draw, load_batches, sample_losses

_FISHER = 202  # first part of the seeds
_FACTS = "fisher"  # the file's metadata


def diagonal_fisher(
    model: nn.Module,
    objective: Objective,
    dataset: Any,
    samples: int,
    seed: int = 0,
    horizontal_flip: bool = False,
    num_workers: int = 0,
    on_sample: Callable[[int], object] = lambda count: None,
) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of the sample's own loss, by name of the parameter.

    The paper's Fisher is of log p(y|x), its y drawn from the model. A denoising loss is −log p of a Gaussian around
    the prediction, up to a factor and a constant; the noise is that which was added, not drawn from the model: the
    empirical Fisher, our reading for diffusion.

    Args:
        objective: its timesteps are those of the samples.
        dataset: see `training.draws.draw` for its items. No image comes again before all had their turn.
        samples: draws of image, noise and timestep; no label and no caption is dropped.
        on_sample: called with 1 after each.

    Returns:
        On the model's device, in float32 or better.

    Raises:
        UserError: no samples, or no images.
    """
    if samples < 1 or len(dataset) == 0:
        raise UserError(f"A Fisher is a mean over samples: {samples} of {len(dataset)} images were to be drawn.")
    model.eval().requires_grad_(True)
    parameters = dict(model.named_parameters())
    fisher = {
        name: torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32), requires_grad=False)
        for name, value in parameters.items()
    }
    config = TrainingConfig(batch_size=1, label_dropout=0.0, seed=seed_for(_FISHER, seed))
    conditions, device = Conditions(model, dataset), next(iter(parameters.values())).device
    loader = load_batches(dataset, 1, 0, samples, config.seed, num_workers)
    for number, batch in enumerate(loader):
        draws = draw(batch, config, objective, conditions, number, horizontal_flip, device)
        loss = sample_losses(model, objective, draws).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(fisher.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.to(total.dtype).square() / samples
        on_sample(1)
    return fisher


def write_fisher(
    path: Path,
    stage: Path,
    dataset: Any,
    data: DataConfig,
    samples: int,
    seed: int = 0,
    on_sample: Callable[[int], object] = lambda count: None,
) -> None:
    """Write `diagonal_fisher` of a stage, over the timesteps of its own range, as a safetensors file.

    A file that is there, of the same weights, data and choices, is left as it is.

    Args:
        stage: a model directory. Where it lacks the range that `stagepatch decouple` writes, it is all timesteps.
        data: what `dataset` is of.

    Raises:
        UserError: see `diagonal_fisher`; a model that cannot be loaded, or a file that cannot be written.
    """
    record = open_artifact(stage, "model").stage
    facts = {"model": model_fingerprint(stage), "samples": samples, "seed": seed, "data": asdict(data)}
    facts["range"] = [record.get("from"), record.get("to")]
    if path.exists() and read_tensors(path)[1].get(_FACTS) == json.dumps(facts):
        on_sample(samples)
        return
    model, scheduler = load_denoiser(stage)
    model = model.to(processes().device)
    objective = Objective(scheduler, learns_sigma(model))
    total = objective.num_train_timesteps
    ends = between_levels(objective.levels, record.get("from", 0) / total, record.get("to", total) / total)
    objective.timesteps = TimestepSampler(total, *ends)
    loading = (data.horizontal_flip, data.num_workers, on_sample)
    fisher = diagonal_fisher(model, objective, dataset, samples, seed, *loading)
    write_tensors(path, fisher, {_FACTS: json.dumps(facts)})
