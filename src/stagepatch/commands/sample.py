"""Generate images."""

from __future__ import annotations

from pathlib import Path

from stagepatch import config as configs
from stagepatch.backbones import find_denoiser, has_vae, load_pipeline
from stagepatch.commands.common import RUN_CONFIG, load_on_device, own_share, put_on, sampling_bar
from stagepatch.files import write_atomically, write_tensors, write_text
from stagepatch.processes import processes
from stagepatch.report import image_grid
from stagepatch.sampling import generate, generate_with_pipeline


def sample(config: configs.SampleConfig, resolved: str) -> None:
    """Generate images, and write them as tensors and as a grid."""
    directory = Path(config.output_dir)
    is_latent = has_vae(config.model)
    model, scheduler = (
        (load_pipeline(config.model).to(processes().device), None) if is_latent else load_on_device(config.model)
    )
    if config.patch:
        put_on(config.patch, config.patch_scale, find_denoiser(model))
    with sampling_bar() as progress:
        task = progress.add_task("sampling", total=own_share(config.sampling.num_images), status="")

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
