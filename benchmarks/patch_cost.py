"""What a patch costs: forward, training step and peak memory, as ratios against the plain model.

    python benchmarks/patch_cost.py [--models DiT-S/2 DiT-B/2] [--what forward step memory] [--rounds 9]
        [--layers 0] [--batch 8] [--compile] [--profile] [--device cpu]

A and B alternate in one process, see paired.py. `--layers` is of models cut to so many blocks. `--profile` shows where
a training step goes, of fine-tuning and of DMP. Peak memory is of one process per method: on a CPU its resident set,
less what the imports take, with malloc told to return what is freed (else its free lists count too); on an accelerator
the allocator's peak.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from paired import Paired, paired
from torch import nn
from torch.profiler import profile

from stagepatch import DiT, Patch
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.families import predict


def build(name: str, device: str, layers: int = 0) -> DiT:
    torch.manual_seed(0)
    model = DiT.from_name(name, **({"num_layers": layers} if layers else {}))
    for block in model.blocks:  # adaLN-Zero starts as the identity: give every branch something to do
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    return model.to(device).eval()


def inputs(batch: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, 32, 32, generator=generator)
    noise = torch.randn(batch, 4, 32, 32, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    labels = torch.randint(0, 1000, (batch,), generator=generator)
    return tuple(value.to(device) for value in (sample, noise, timesteps, labels))


def make_step(
    name: str, method: str, batch: int, device: str, layers: int = 0, compiled: bool = False
) -> Callable[[], None]:
    """One training step, optimizer included, of 'dmp' or 'finetune'."""
    model = build(name, device, layers)
    objective = Objective(make_scheduler(ObjectiveConfig(), True), True)
    if method == "dmp":
        model.requires_grad_(False)
        patch = Patch.create(model).train()
        patch.attach(model)
        parameters = list(patch.parameters())
    else:
        patch = None
        parameters = list(model.parameters())
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    sample, noise, timesteps, labels = inputs(batch, device)

    def step() -> None:
        x_t = objective.add_noise(sample, noise, timesteps)
        loss = objective.loss(predict(model, x_t, timesteps, labels), sample, noise, timesteps).mean()
        if patch is not None:
            loss = loss + patch.balance_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_ratio(name: str, batch: int, rounds: int, device: str, layers: int) -> Paired:
    model = build(name, device, layers).requires_grad_(False)
    patch = Patch.create(model).eval()
    for parameter in patch.parameters():
        nn.init.normal_(parameter, std=0.02)
    sample, _, timesteps, labels = inputs(batch, device)
    patch.attach(model)

    def run(enabled: bool) -> None:
        patch.enabled = enabled
        with torch.no_grad():
            predict(model, sample, timesteps, labels)

    return paired(lambda: run(True), lambda: run(False), rounds)


def show_profile(name: str, method: str, batch: int, device: str, layers: int, compiled: bool) -> None:
    """Where a training step goes, by operation, of its own time."""
    step = make_step(name, method, batch, device, layers, compiled)
    step()
    with profile() as profiler:
        for _ in range(3):
            step()
    by_own_time = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in by_own_time)
    print(f"{name}, {method}: {total / 3e6:.2f} s a step")
    for event in by_own_time[:16]:
        share = 100 * event.self_cpu_time_total / total
        print(f"{event.key[:60]:<60} {share:5.1f} % {event.count // 3:5} calls", flush=True)


def peak_memory(name: str, method: str, batch: int, device: str) -> int:
    """Peak bytes of two steps in a process of their own."""
    command = [sys.executable, __file__, "--peak", method, "--models", name, "--batch", str(batch), "--device", device]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def print_peak(name: str, method: str, batch: int, device: str) -> None:
    make_step("DiT-S/8", method, 1, device)()  # the libraries load what they need
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = process_memory("VmRSS")
    step = make_step(name, method, batch, device)
    step()
    step()
    print(process_memory("VmHWM") - before if device == "cpu" else torch.cuda.max_memory_allocated())


def process_memory(field: str) -> int:
    """A field of /proc/self/status in bytes (getrusage would carry over the parent's peak)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["DiT-S/2", "DiT-B/2"])
    parser.add_argument("--what", nargs="+", default=["forward", "step", "memory"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="training steps, as training.compile does")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", choices=["dmp", "finetune"])
    arguments = parser.parse_args()
    batch, rounds, device, layers = arguments.batch, arguments.rounds, arguments.device, arguments.layers
    if arguments.peak:
        print_peak(arguments.models[0], arguments.peak, batch, device)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {device}, batch {batch}")
    for name in arguments.models:
        if arguments.profile:
            for method in ("finetune", "dmp"):
                show_profile(name, method, batch, device, layers, arguments.compile)
            continue
        if "forward" in arguments.what:
            print(f"{name}: patched / plain forward {forward_ratio(name, batch, rounds, device, layers)}", flush=True)
        if "step" in arguments.what:
            methods = ("dmp", "finetune")
            steps = [make_step(name, method, batch, device, layers, arguments.compile) for method in methods]
            print(f"{name}: DMP / fine-tuning step {paired(*steps, rounds)}", flush=True)
            del steps
        if "memory" in arguments.what:
            peaks = [peak_memory(name, method, batch, device) for method in ("dmp", "finetune")]
            print(
                f"{name}: DMP / fine-tuning peak memory {peaks[0] / peaks[1]:.3f} "
                f"({peaks[0] / 2**20:.0f} / {peaks[1] / 2**20:.0f} MiB)",
                flush=True,
            )


if __name__ == "__main__":
    main()
