"""What a stage costs to sample with, beside the base: parameters, and floating-point operations of a forward."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stagepatch.analysis import Samples
from stagepatch.checkpoints import load_denoiser
from stagepatch.core import processes
from stagepatch.diffusion import Objective
from stagepatch.families import input_dtype, learns_sigma, predict

Table = tuple[list[str], list[list[str]], str]


def cost_of(model: nn.Module, objective: Objective, dataset: Any) -> dict[str, int]:
    """Parameters, and FLOPs of one forward of one sample, as torch counts them: two for each multiplication and
    addition of matrix products and convolutions, attention's included, and nothing else.

    Args:
        dataset: its first item decides size and condition.
    """
    draws = next(iter(Samples(dataset, [0], 1).at(0, model, objective)))
    # Fused attention is not counted on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predict(model.eval(), draws.x_start.to(input_dtype(model)), draws.timesteps, draws.condition)
    return {"parameters": sum(value.numel() for value in model.parameters()), "flops": counter.get_total_flops()}


def cost_of_model(source: str, dataset: Any) -> dict[str, int]:
    """`cost_of` a model of files."""
    model, scheduler = load_denoiser(source)
    return cost_of(model.to(processes().device), Objective(scheduler, learns_sigma(model)), dataset)


def cost_table(stages: Sequence[Mapping[str, Any]]) -> Table | None:
    """Columns, rows and title; None where no stage differs from the base.

    Args:
        stages: what their files say of each.
    """
    stages = [stage for stage in stages if "cost" in stage]
    if not stages:
        return None
    base = stages[0]["base_cost"]
    named = [("base", base)]
    named += [(f"stage {stage['number']} ({stage['from']:g} to {stage['to']:g})", stage["cost"]) for stage in stages]
    rows = [
        [name, f"{cost['parameters']:,}", f"{cost['flops']:,}", f"{cost['flops'] / base['flops']:.3f}"]
        for name, cost in named
    ]
    lengths = [stage["to"] - stage["from"] for stage in stages]
    mean = sum(length * stage["cost"]["flops"] for length, stage in zip(lengths, stages, strict=True)) / sum(lengths)
    rows.append(["mean over timesteps", "", f"{mean:,.0f}", f"{mean / base['flops']:.3f}"])
    return ["model", "parameters", "FLOPs a sample and step", "of the base's"], rows, "Cost"
