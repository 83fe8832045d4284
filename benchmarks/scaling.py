"""Training on several devices: on paper for 1 to 64, and measured for two processes here.

    python benchmarks/scaling.py paper
    python benchmarks/scaling.py measured [--processes 2] [--hidden 192 --layers 4] [--batch 32] [--steps 8]
        [--rounds 3]

`paper`: parameters, and operations of a forward, are counted on the real models, which are not allocated. A step
computes 3 forwards to train all weights and 2 to train what is added to frozen ones; then a ring all-reduces the
gradients: each device sends 2(N − 1)/N of their bytes, in buckets of 25 MiB with 2(N − 1) hops each.

`measured`: DMP and fine-tuning of a DiT by the training loop, in one process and in several that share the batch
(gloo, a thread each). In turns; a process's own processor time a step, and images a second of it and of the wall.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stagepatch import DiT, LoRAConfig, PatchConfig, TrainingConfig
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.families import predict
from stagepatch.methods import DMP, Finetune, LoRA, Method
from stagepatch.training import train

# What is assumed: operations a second that a device computes (an A100's 312e12 in bfloat16, 40 % of it used), samples
# a device and step, bytes a gradient (all weights in bfloat16; what is added is kept in float32), and of the link
# between devices its bytes a second and seconds a hop.
SPEED, BATCH = 0.4 * 312e12, 8
ALL_BYTES, ADDED_BYTES, BUCKET = 2, 4, 25 * 2**20
LINKS = {"NVLink, 300 GB/s": (300e9, 5e-6), "100 Gbit/s": (12.5e9, 20e-6), "10 Gbit/s": (1.25e9, 50e-6)}
DEVICES = (2, 8, 16, 32, 64)
DIT, SD15, FLUX = "DiT-XL/2, 256×256", "SD 1.5, 512×512", "FLUX.1, 1024×1024"


@dataclass
class Model:
    """One on the meta device, its latents [1, ...] and its condition."""

    build: Callable[[], nn.Module]
    latents: tuple[int, ...]
    condition: dict[str, tuple[int, ...]]
    patch: PatchConfig


MODELS = {
    DIT: Model(lambda: DiT.from_name("DiT-XL/2"), (1, 4, 32, 32), {}, PatchConfig()),
    SD15: Model(
        lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        (1, 4, 64, 64),
        {"encoder_hidden_states": (1, 77, 768)},
        PatchConfig(grid=[16, 16]),
    ),
    FLUX: Model(
        lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        (1, 16, 128, 128),
        {"encoder_hidden_states": (1, 512, 4096), "pooled_projections": (1, 768)},
        PatchConfig(grid=[16, 16], sample_size=128),
    ),
}


def on_paper() -> None:
    print("| model | operations of a forward | trained | parameters | share | bytes a step |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    found: dict[str, list[tuple[str, int, float]]] = {}
    for name, model in MODELS.items():
        operations, counts = counted(model)
        for method, count in counts.items():
            is_all = method == "all weights"
            size = count * (ALL_BYTES if is_all else ADDED_BYTES)
            computing = BATCH * operations * (3 if is_all else 2) / SPEED
            found.setdefault(name, []).append((method, size, computing))
            share = f"{100 * count / counts['all weights']:.2f} %"
            print(f"| {name} | {operations:.2e} | {method} | {count:,} | {share} | {size / 1e6:,.0f} MB |", flush=True)
    for link, (bandwidth, hop) in LINKS.items():
        print(f"\n| {link}: share of a step that is computing |" + "".join(f" {count} |" for count in DEVICES))
        print("| --- |" + " ---: |" * len(DEVICES))
        for name, methods in found.items():
            for method, size, computing in methods:
                shares = [
                    f" {100 * computing / (computing + all_reduce(size, count, bandwidth, hop)):.1f} % |"
                    for count in DEVICES
                ]
                print(f"| {name}, {method} ({1e3 * computing:.0f} ms) |{''.join(shares)}")


def all_reduce(size: float, devices: int, bandwidth: float, hop: float) -> float:
    """Seconds of a ring."""
    buckets = math.ceil(size / BUCKET)
    return 2 * (devices - 1) * (size / devices / bandwidth + buckets * hop)


def counted(model: Model) -> tuple[int, dict[str, int]]:
    """Operations of a forward of one sample, and parameters of what can be trained."""
    with torch.device("meta"):
        plain = model.build().to("meta").requires_grad_(False).eval()  # a buffer is made on the CPU
        latents, timesteps = torch.empty(model.latents), torch.empty(1)
        condition: Any = {name: torch.empty(shape) for name, shape in model.condition.items()}
        condition = condition or torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            predict(plain, latents, timesteps, condition)
        counts = {"all weights": sum(parameter.numel() for parameter in plain.parameters())}
        for name, method in (("LoRA of rank 16", LoRA(LoRAConfig(rank=16))), ("DMP", DMP(model.patch))):
            groups = method.prepare(model.build().to("meta"))
            counts[name] = sum(parameter.numel() for group in groups for parameter in group["params"])
    return counter.get_total_flops(), counts


class Images:
    """Items {"image": [4, 16, 16], "label"} of noise; when each batch's first was asked for is kept."""

    def __init__(self, count: int, batch: int) -> None:
        self.images = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        self.batch, self.count, self.asked = batch, 0, list[tuple[float, float]]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.count % self.batch == 0:
            self.asked.append((time.process_time(), time.perf_counter()))
        self.count += 1
        return {"image": self.images[index], "label": index % 10}


def show_own_time(arguments: argparse.Namespace) -> None:
    """Of one process: seconds a step of the processor and of the wall."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = {"hidden_size": arguments.hidden, "num_layers": arguments.layers, "num_attention_heads": 6}
    model = DiT(16, 2, 4, **size, num_classes=10, learn_sigma=False)
    method: Method = DMP(PatchConfig()) if arguments.method == "dmp" else Finetune()
    config = TrainingConfig(steps=arguments.steps + 2, batch_size=arguments.batch, tensorboard=False)
    data = Images(arguments.batch * config.steps, arguments.batch // int(os.environ.get("WORLD_SIZE", "1")))
    objective = Objective(make_scheduler(ObjectiveConfig(), False), False)
    with tempfile.TemporaryDirectory() as directory:
        train(model, method, objective, data, config, Path(directory), progress=False)  # type: ignore[arg-type]
    first, last = data.asked[1], data.asked[-1]
    print(json.dumps([(after - before) / arguments.steps for before, after in zip(first, last, strict=True)]))


def own_times(method: str, processes: int) -> list[list[float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(processes)}
    command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
    started = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} if processes > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **ranks}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    printed = [process.communicate()[0] for process in started]
    return [json.loads(text.splitlines()[-1]) for text in printed]


def measured(arguments: argparse.Namespace) -> None:
    for method in ("dmp", "finetune"):
        found: dict[int, list[tuple[float, float]]] = {1: [], arguments.processes: []}
        for _ in range(arguments.rounds):
            for processes, times in found.items():
                each = own_times(method, processes)
                times.append((max(cpu for cpu, _ in each), max(wall for _, wall in each)))
        speeds: dict[int, list[float]] = {}
        for processes, times in found.items():
            cpu, wall = (statistics.median(column) for column in zip(*times, strict=True))
            own = speeds[processes] = [arguments.batch / cpu, arguments.batch / wall]
            of_both = f"{own[0]:.1f} images a second of processor time ({own[1]:.1f} of the wall)"
            print(f"{method}, {processes} process(es): {of_both}", flush=True)
        of_cpu, of_wall = (many / one for many, one in zip(speeds[arguments.processes], speeds[1], strict=True))
        print(f"{method}: {of_cpu:.2f} times as many ({of_wall:.2f} of the wall)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["paper", "measured"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=["dmp", "finetune"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "paper":
        on_paper()
    elif arguments.method:
        show_own_time(arguments)
    else:
        measured(arguments)


if __name__ == "__main__":
    main()
