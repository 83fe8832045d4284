"""A patch for a DDPM U-Net in pixel space (CIFAR-10, LSUN), with prompts at its attentions or its stages.

python examples/patch_ddpm.py --images IMAGES --output runs/ddpm
"""

import argparse
from pathlib import Path

from diffusers import DDIMScheduler, DDPMPipeline

from stagepatch import PatchConfig
from stagepatch.checkpoints import load_denoiser
from stagepatch.data import DataConfig, load_dataset
from stagepatch.diffusion import Objective
from stagepatch.methods import DMP
from stagepatch.report import image_grid
from stagepatch.sampling import SamplingConfig, generate
from stagepatch.training import TrainingConfig, train

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="google/ddpm-cifar10-32")
parser.add_argument("--images", required=True, help="folder of images")
parser.add_argument("--output", type=Path, default=Path("runs/ddpm"))
parser.add_argument("--sites", choices=["stages", "attention"], default="stages")
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--batch_size", type=int, default=128)
arguments = parser.parse_args()

directory = Path(arguments.model)
if not directory.is_dir():  # older repositories keep the U-Net beside model_index.json
    directory = arguments.output / "model"
    DDPMPipeline.from_pretrained(arguments.model).save_pretrained(directory)
unet, scheduler = load_denoiser(directory)

data = DataConfig(source=arguments.images, image_size=unet.config.sample_size, horizontal_flip=True)
method = DMP(PatchConfig(sites=arguments.sites), facts={"data": arguments.images})
config = TrainingConfig(steps=arguments.steps, batch_size=arguments.batch_size)
train(unet, method, Objective(scheduler), load_dataset(data), config, arguments.output, horizontal_flip=True)

ddim = DDIMScheduler.from_config(scheduler.config)
images = generate(unet, ddim, SamplingConfig(scheduler="ddim", num_inference_steps=50, num_images=16))
image_grid(images, columns=4).save(arguments.output / "samples.png")
print(f"The patch is in '{arguments.output}', with samples.png.")
