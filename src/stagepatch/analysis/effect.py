"""What a patch does to each block's output and to the prediction, by timestep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from stagepatch.analysis.losses import quarters, relative_difference
from stagepatch.analysis.result import Analysis
from stagepatch.analysis.samples import Samples
from stagepatch.diffusion import Objective
from stagepatch.families import Site, describe, find_denoiser, input_dtype, predict
from stagepatch.report import Table
from stagepatch.training import Draws

_NORMAL = 1.96  # standard errors on either side hold 95 %
_MOST_NAMED = 24  # blocks whose names stand beside the heat map


@dataclass
class Effect:
    """How far two models are apart, √(Σ|h' − h|² / Σ|h|²) over samples and numbers; h is the base's.

    Args:
        timesteps: [n].
        sites: names of the L blocks.
        blocks: of each block's output, [L, n].
        prediction: [n]; of a model that learns its variance, without that.
        error: standard error of `prediction` over the samples, [n].
    """

    timesteps: list[int]
    sites: list[str]
    blocks: Tensor
    prediction: Tensor
    error: Tensor


@torch.no_grad()
def measure_effect(base: nn.Module, other: nn.Module, objective: Objective, samples: Samples) -> Effect:
    """Of a model that something was put on, or that was trained on, against its base, from the same images and noise.

    Args:
        base: describes the blocks; those whose inputs a patch changes unless told otherwise.
    """
    backbone = describe(find_denoiser(base))
    sites = [site for site in backbone.sites if site.kind == backbone.sites[0].kind]
    blocks, prediction, error = [], [], []
    with _recorded(base, sites) as own, _recorded(other, sites) as changed:
        for timestep in samples.timesteps:
            sums, pairs = torch.zeros(2, len(sites), dtype=torch.float64), []
            for draws in samples.at(timestep, base, objective):
                outputs = [_predict(model, objective, draws) for model in (base, other)]
                squares = [each.square().flatten(1).sum(dim=1) for each in (outputs[0], outputs[1] - outputs[0])]
                pairs.append(torch.stack(squares).double().cpu())
                for place, site in enumerate(sites):
                    before, after = own.pop(site.name), changed.pop(site.name)
                    sums[0, place] += float(before.square().sum())
                    sums[1, place] += float((after - before).square().sum())
            scale, moved = torch.cat(pairs, dim=1)
            ratio = relative_difference(scale[None], (scale + moved)[None])
            root = math.sqrt(ratio.mean)
            blocks.append((sums[1] / sums[0]).sqrt())
            prediction.append(root)
            error.append(ratio.error / (2.0 * root) if root else 0.0)
    curves = torch.stack(blocks, dim=1), torch.tensor(prediction), torch.tensor(error)
    return Effect([*samples.timesteps], [site.name for site in sites], *curves)


def _predict(model: nn.Module, objective: Objective, draws: Draws) -> Tensor:
    """Without a learned variance."""
    x_t = objective.add_noise(draws.x_start, draws.noise, draws.timesteps).to(input_dtype(model))
    output = predict(model, x_t, objective.model_timesteps(draws.timesteps), draws.condition).float()
    return output.chunk(2, dim=1)[0] if objective.learn_sigma else output


@contextmanager
def _recorded(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """The output of each block of the last forward, by the site's name."""
    found: dict[str, Tensor] = {}

    def record(site: Site) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found[site.name] = _hidden_states(output, args[0] if args else kwargs[site.argument]).float()

        return keep

    denoiser = find_denoiser(model).eval()
    handles = [
        denoiser.get_submodule(site.module).register_forward_hook(record(site), with_kwargs=True) for site in sites
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hidden_states(output: Any, entered: Tensor) -> Tensor:
    """Of what a block puts out, the tensor that is shaped as what entered it, and lies last of several (text comes
    before the image in diffusers' blocks of two streams); the first where none is, as of a U-Net's stage."""
    if isinstance(output, Tensor):
        return output
    tensors = [each for each in output if isinstance(each, Tensor)]
    return [tensors[0], *(each for each in tensors if each.shape == entered.shape)][-1]


def analyze_effect(base: nn.Module, other: nn.Module, objective: Objective, samples: Samples) -> Analysis:
    """`measure_effect` as a curve, a heat map of block and timestep, and tables of quarters of the timesteps."""
    found = measure_effect(base, other, objective, samples)
    groups = quarters(found.timesteps)
    spans = [f"{found.timesteps[group][0]} to {found.timesteps[group][-1]}" for group in groups]
    percent, rows = 100.0 * found.blocks, []
    for span, group in zip(spans, groups, strict=True):
        of_blocks, errors = percent[:, group].mean(dim=1), found.error[group]
        half = _NORMAL * 100.0 * float(errors.square().sum().sqrt()) / len(errors)
        change, most = 100.0 * float(found.prediction[group].mean()), int(of_blocks.argmax())
        cells = [f"{change:.3g} [{change - half:.3g}, {change + half:.3g}] %", f"{float(of_blocks.mean()):.3g} %"]
        rows.append([span, *cells, f"{float(of_blocks.max()):.3g} %", found.sites[most]])
    note = (
        f"Relative change √(Σ|h' − h|² / Σ|h|²) of what the model predicts and of each block's output, all its tokens "
        f"together, from the same {samples.count} draws of image and noise at each timestep; mean over the timesteps. "
        f"In brackets 95% intervals over the draws. A large change is no gain by itself: the loss says (`learned`)."
    )
    by_block = [
        [site, *(f"{float(percent[place, group].mean()):.3g} %" for group in groups)]
        for place, site in enumerate(found.sites)
    ]
    return Analysis(
        "effect",
        "What the patch changes",
        {"samples": samples.count, **vars(found)},
        plot_effect(found),
        "Relative change of the prediction at each timestep (band: two standard errors), and below it that of each "
        "block's output.",
        [Table("Change over timesteps", ["timesteps", "prediction", "blocks, mean", "most", "in"], rows, note)],
        [Table("Change of each block's output", ["block", *spans], by_block)],
    )


def plot_effect(effect: Effect) -> Figure:
    """Above, the prediction's change over timesteps; below, the blocks' as a heat map, the first block at the top."""
    count = len(effect.sites)
    figure = Figure(figsize=(7.6, 4.4 + 0.14 * min(count, _MOST_NAMED)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[2, 3])
    steps = effect.timesteps
    middle, band = (100.0 * effect.prediction).numpy(), (200.0 * effect.error.nan_to_num()).numpy()
    above.plot(steps, middle, color="#1f4e8c", marker="o", markersize=3, linewidth=1.2)
    above.fill_between(steps, middle - band, middle + band, color="#1f4e8c", alpha=0.2, linewidth=0)
    above.set_ylabel("change of the prediction [%]")
    above.set_ylim(bottom=0.0)
    above.grid(alpha=0.25)
    half = (steps[1] - steps[0]) / 2
    extent = (steps[0] - half, steps[-1] + half, count - 0.5, -0.5)
    panel = below.imshow((100.0 * effect.blocks).numpy(), aspect="auto", cmap="viridis", vmin=0.0, extent=extent)
    shown = range(0, count, -(-count // _MOST_NAMED))
    below.set_yticks([*shown], [effect.sites[place] for place in shown], fontsize=7)
    figure.colorbar(panel, ax=below, label="change of a block's output [%]")
    for axes in (above, below):
        axes.set_xlim(steps[0] - half, steps[-1] + half)
        axes.set_xlabel("timestep (0: image, last: noise)")
    return figure
