"""Training on cached latents over training with the VAE in the loop, in images per second.

    python benchmarks/latent_cache.py [--models DiT-S/2 DiT-B/2] [--rounds 5] [--batch 8]

The VAE is Stable Diffusion's architecture with random weights; images are 256×256 PNG files. Both ways read their data
from disk, draw, and take a DMP step of the same method; they alternate in one process, and each figure is a median.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from stagepatch import DiT, PatchConfig
from stagepatch.data import CachedLatents, DataConfig, Images, build_cache, encode_images, open_source
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.methods import DMP
from stagepatch.training import TrainingConfig
from stagepatch.training.draws import Conditions, draw
from stagepatch.training.loop import DenoisingLoss

IMAGES = 16


def sd_vae() -> AutoencoderKL:
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        sample_size=512,
    ).eval()


def make_images(directory: Path) -> None:
    directory.mkdir()
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(directory / f"{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["DiT-S/2", "DiT-B/2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {arguments.batch}")
    torch.manual_seed(0)
    vae, accelerator = sd_vae().requires_grad_(False), Accelerator()
    vae.to(accelerator.device)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_images(directory / "images")
        data = DataConfig(source=str(directory / "images"), image_size=256)
        images = Images(open_source(data), data)
        build_cache(directory / "cache", {}, lambda: images, lambda: vae, None, arguments.batch)
        cached = CachedLatents(directory / "cache")
        for name in arguments.models:
            measure(name, vae, images, cached, accelerator, arguments.batch, arguments.rounds)


def measure(
    name: str,
    vae: AutoencoderKL,
    images: Images,
    cached: CachedLatents,
    accelerator: Accelerator,
    batch: int,
    rounds: int,
) -> None:
    model = DiT.from_name(name).to(accelerator.device)
    objective, method = Objective(make_scheduler(ObjectiveConfig(), True), True), DMP(PatchConfig())
    parameters = [parameter for group in method.prepare(model) for parameter in group["params"]]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    step = DenoisingLoss(model, method, objective, torch.nn.ParameterList(parameters))
    config = TrainingConfig(batch_size=batch)

    def take(items: dict[str, Tensor]) -> None:
        draws = draw(items, config, objective, Conditions(model, cached), 0, True, accelerator)
        loss, _ = step(draws.x_start, draws.noise, draws.timesteps, draws.condition)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def with_cache() -> None:
        take(default_collate([cached[index] for index in range(batch)]))

    def with_vae() -> None:
        items = default_collate([images[index] for index in range(batch)])
        mean, std = encode_images(vae, items["image"])
        take({"image": mean, "std": std, "label": items["label"]})

    times: dict[str, list[float]] = {"cache": [], "VAE in the loop": []}
    with_cache()
    for _ in range(rounds):
        times["cache"].append(seconds(with_cache))
        times["VAE in the loop"].append(seconds(with_vae))
    speed = {way: batch / statistics.median(values) for way, values in times.items()}
    ratio = speed["cache"] / speed["VAE in the loop"]
    print(f"{name}: cache {speed['cache']:.2f} images/s, VAE in the loop {speed['VAE in the loop']:.2f}: {ratio:.1f}×")


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
