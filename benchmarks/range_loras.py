"""LoRAs by range of timesteps, over the base: all steps of a sampler, merged once a range and in each forward.

    python benchmarks/range_loras.py [--model fashion] [--batch 500] [--ranges 4] [--rank 8] [--steps 25] [--rounds 15]

LoRAs on all linear layers of the blocks, each in its own range, from a file of experts; forwards alone, without the
sampler's arithmetic. A and B alternate in one process, see paired.py. What finding a step's range takes by itself is
shown apart: there every expert is the base.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from paired import paired
from torch import Tensor, nn

from stagepatch import load_denoiser
from stagepatch.families import predict, sample_shape
from stagepatch.methods import LoRA, LoRAConfig
from stagepatch.sampling import ExpertRange, Experts, balanced_labels, load_experts


def write_experts(directory: Path, base: nn.Module, ranges: int, rank: int) -> Path:
    """A file of LoRAs that are drawn, one for each of equal ranges."""
    entries: list[dict[str, Any]] = []
    for number in range(ranges):
        method = LoRA(LoRAConfig(rank=rank, targets="all"))
        for group in method.prepare(copy.deepcopy(base)):
            for parameter in group["params"]:
                nn.init.normal_(parameter, std=0.02)
        method.save(directory / str(number))
        start, end = (1000 * bound // ranges for bound in (number, number + 1))
        entries.append({"from": start, "to": end, "learned": str(number)})
    path = directory / "experts.yaml"
    path.write_text(yaml.safe_dump({"experts": entries}))
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--ranges", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments}")
    torch.manual_seed(0)
    base, scheduler = load_denoiser(arguments.model)
    base.eval().requires_grad_(False)
    merged, dispatched = copy.deepcopy(base), copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as directory:
        experts = load_experts(
            write_experts(Path(directory), base, arguments.ranges, arguments.rank), merged, scheduler
        )
    experts.attach(merged)
    Experts([ExpertRange(each.start, each.end) for each in experts.ranges]).attach(dispatched)
    sample = torch.randn(arguments.batch, *sample_shape(base))
    labels = balanced_labels(base, arguments.batch)
    scheduler.set_timesteps(arguments.steps)

    def in_each_forward(*inputs: Any) -> Tensor:
        timestep = inputs[1][0]
        chosen = next(each for each in experts.ranges if timestep < each.end)
        return predict(chosen.denoiser, *inputs)

    @torch.no_grad()
    def sampling(forward: Callable[..., Any]) -> None:
        for timestep in scheduler.timesteps:
            forward(sample, timestep.expand(len(sample)), labels)

    runs: dict[str, Callable[..., Any]] = {
        "merged once a range": partial(predict, merged),
        "the base by range": partial(predict, dispatched),
        "merged in each forward": in_each_forward,
    }
    for name, forward in runs.items():
        ratio = paired(partial(sampling, forward), partial(sampling, partial(predict, base)), arguments.rounds)
        print(f"{name} / base: {ratio}", flush=True)


if __name__ == "__main__":
    main()
