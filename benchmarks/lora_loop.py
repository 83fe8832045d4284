"""LoRA training: `stagepatch train`'s loop over what a user would write instead, in time and peak memory.

    python benchmarks/lora_loop.py [--width 64] [--size 32] [--batch 2] [--steps 4] [--rounds 9]

A U-Net of SD 1.5's kind (two of its stages, of `--width` and twice as many channels; 320 is SD 1.5's), LoRA of rank 8
on its attention, AdamW, gradients clipped to norm 1, the same latents and text embeddings out of memory: nothing is
encoded on either side, which diffusers' script does at every step. Beside ours:

- `diffusers`: the steps of train_text_to_image_lora: `unet.add_adapter`, accelerate, a learning rate schedule;
- `peft`: `get_peft_model` and a plain PyTorch loop.

A step is from one batch's first image being asked for to the next one's. Runs alternate in one process; each figure is
the median of the rounds' ratios, seconds of processor time. Peak memory is of a process each, as in patch_cost.py.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from paired import Paired
from patch_cost import process_memory
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from stagepatch import LoRAConfig, TrainingConfig
from stagepatch.diffusion import Objective
from stagepatch.methods import LoRA
from stagepatch.training import train

RANK, RATE, TEXT = 8, 1e-4, 768
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
WAYS = ("ours", "diffusers", "peft")


class Latents:
    """Items {"image": [4, H, W], "condition": {"encoder_hidden_states": [77, E]}} of noise, the same each time.

    Attributes:
        asked: when each batch's first image was asked for, in seconds of processor time.
    """

    def __init__(self, size: int, batch: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch * steps, 4, size, size, generator=generator)
        self.texts = torch.randn(batch * steps, 77, TEXT, generator=generator)
        self.batch, self.count, self.asked = batch, 0, list[float]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, object]:
        if self.count % self.batch == 0:
            self.asked.append(time.process_time())
        self.count += 1
        return {"image": self.images[index], "condition": {"encoder_hidden_states": self.texts[index]}}


def new_unet(width: int, size: int) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    )


def train_ours(unet: nn.Module, data: Latents, batch: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = TrainingConfig(
            steps=steps, batch_size=batch, learning_rate=RATE, max_grad_norm=1.0, ema_decay=0.0, tensorboard=False
        )
        objective = Objective(diffusers.DDPMScheduler(), False)
        train(unet, LoRA(LoRAConfig(rank=RANK)), objective, data, config, Path(directory), progress=False)  # type: ignore[arg-type]


def train_diffusers(unet: nn.Module, data: Latents, batch: int, steps: int) -> None:
    accelerator, noise_scheduler = Accelerator(), diffusers.DDPMScheduler()
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    schedule = get_scheduler("constant", optimizer=optimizer)
    loader = DataLoader(data, batch_size=batch, shuffle=True)  # type: ignore[arg-type]
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    unet.train()
    for items in loader:
        with accelerator.accumulate(unet):
            loss = denoising_loss(unet, noise_scheduler, items)
            accelerator.gather(loss.repeat(batch)).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        loss.detach().item()


def train_peft(unet: nn.Module, data: Latents, batch: int, steps: int) -> None:
    noise_scheduler = diffusers.DDPMScheduler()
    model = get_peft_model(unet, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    for items in DataLoader(data, batch_size=batch, shuffle=True):  # type: ignore[arg-type]
        loss = denoising_loss(model, noise_scheduler, items)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def denoising_loss(model: nn.Module, scheduler: diffusers.DDPMScheduler, items: dict[str, object]) -> Tensor:
    latents, texts = items["image"], items["condition"]["encoder_hidden_states"]  # type: ignore[index]
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = model(noisy, timesteps, texts, return_dict=False)[0]
    return F.mse_loss(predicted.float(), noise.float(), reduction="mean")


def seconds_a_step(way: str, unet: nn.Module, arguments: argparse.Namespace) -> float:
    """Of the second step to the last but one."""
    steps = arguments.steps + 2
    data = Latents(arguments.size, arguments.batch, steps)
    runs = {"ours": train_ours, "diffusers": train_diffusers, "peft": train_peft}
    runs[way](copy.deepcopy(unet), data, arguments.batch, steps)
    return (data.asked[-1] - data.asked[1]) / arguments.steps


def print_peak(way: str, arguments: argparse.Namespace) -> None:
    seconds_a_step(way, new_unet(32, 8), argparse.Namespace(size=8, batch=1, steps=1))  # the libraries load
    before = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds_a_step(way, new_unet(arguments.width, arguments.size), arguments)
    print(process_memory("VmHWM") - before)


def peak_memory(way: str) -> int:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(arguments.peak, arguments)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments}")
    unet = new_unet(arguments.width, arguments.size)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-1, arguments.rounds):
        for way in WAYS if number % 2 else reversed(WAYS):
            each = seconds_a_step(way, unet, arguments)
            if number >= 0:
                taken[way].append(each)
                print(f"round {number}, {way}: {each:.3f} s a step", flush=True)
    for way in WAYS[1:]:
        print(f"a step, ours / {way}: {Paired(taken['ours'], taken[way])}", flush=True)
    peaks = {way: peak_memory(way) for way in WAYS}
    for way in WAYS[1:]:
        sizes = f"{peaks['ours'] / 2**20:.0f} / {peaks[way] / 2**20:.0f} MiB"
        print(f"peak memory, ours / {way}: {peaks['ours'] / peaks[way]:.3f} ({sizes})", flush=True)


if __name__ == "__main__":
    main()
