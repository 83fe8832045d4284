"""What a step of sampling costs with a LoRA of K stages: merged into the weights at every step, through the maps, and
of one stage fused for good.

    python benchmarks/stage_lora.py [--models DiT-S/2 fashion] [--batch 8] [--rank 8] [--stages 4]
        [--targets all] [--rounds 7]

Base, merged and unmerged take turns in one process, each round another one first; a round is a forward without
gradients at a timestep of its own, so that merging is paid each time. Times are medians, ratios are of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch import DiT, load_denoiser
from stagepatch.checkpoints.layout import BUNDLED
from stagepatch.families import predict, sample_shape
from stagepatch.methods import LoRA, LoRAConfig
from stagepatch.sampling import balanced_labels


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    if name in BUNDLED:
        return load_denoiser(name)[0].to(device, dtype).eval().requires_grad_(False)
    torch.manual_seed(0)
    model: Any = DiT.from_name(name)
    for block in model.blocks:  # adaLN-Zero starts as the identity: give every branch something to do
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    model.to(device, dtype).eval().requires_grad_(False)
    return model


def take_turns(runs: dict[str, Callable[[Tensor], Tensor]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, after one warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        timestep = torch.tensor(999 - 997 * number // (rounds + 1), device=device)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name](timestep)
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    base, adapted = build(name, device, dtype), build(name, device, dtype)
    config = LoRAConfig(rank=arguments.rank, num_stages=arguments.stages)
    if arguments.targets == "all":
        config.targets = "all"
    method = LoRA(config)
    for group in method.prepare(adapted):
        for parameter in group["params"]:
            parameter.data = nn.init.normal_(parameter.data, std=0.02).to(dtype)  # as when it is loaded
    sample = torch.randn(arguments.batch, *sample_shape(base)).to(device, dtype)
    labels = balanced_labels(base, arguments.batch).to(device)

    @torch.no_grad()
    def forward(model: nn.Module, timestep: Tensor) -> Tensor:
        return predict(model, sample, timestep.expand(len(sample)), labels)

    def adapted_forward(merged: bool, timestep: Tensor) -> Tensor:
        method.merge(merged)
        return forward(adapted, timestep)

    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "base": lambda timestep: forward(base, timestep),
        "merged": lambda timestep: adapted_forward(True, timestep),
        "unmerged": lambda timestep: adapted_forward(False, timestep),
    }
    if arguments.stages == 1:
        fused, own = LoRA(config), build(name, device, dtype)
        fused.prepare(own)
        fused.fuse()
        runs["fused"] = lambda timestep: forward(own, timestep)
    return take_turns(runs, arguments.rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["DiT-S/2"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--targets", choices=["attention", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}, {arguments.dtype}")
    print(f"batch {arguments.batch}, rank {arguments.rank}, {arguments.stages} stages, targets {arguments.targets}")
    for name in arguments.models:
        seconds = measure(name, arguments)
        line = ", ".join(f"{run} {value:.3f} s ({value / seconds['base']:.3f})" for run, value in seconds.items())
        print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    main()
