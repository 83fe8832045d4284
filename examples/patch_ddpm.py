"""A patch for a DDPM U-Net in pixel space (CIFAR-10, LSUN), with prompts at its attentions or its stages.

python examples/patch_ddpm.py --images IMAGES --output runs/ddpm
"""

import argparse
from pathlib import Path

from diffusers import DDPMPipeline

from stagepatch import DataConfig, PatchConfig, Run, SamplingConfig, TrainConfig, TrainingConfig, generate, report

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="google/ddpm-cifar10-32")
parser.add_argument("--images", required=True, help="folder of images")
parser.add_argument("--output", type=Path, default=Path("runs/ddpm"))
parser.add_argument("--image_size", type=int, default=32, help="of the model: 32 for CIFAR-10, 256 for LSUN")
parser.add_argument("--sites", choices=["stages", "attention"], default="stages")
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--batch_size", type=int, default=128)
arguments = parser.parse_args()

directory = Path(arguments.model)
if not directory.is_dir():  # older repositories keep the U-Net beside model_index.json
    directory = arguments.output / "model"
    DDPMPipeline.from_pretrained(arguments.model).save_pretrained(directory)
config = TrainConfig(
    output_dir=str(arguments.output),
    model=str(directory),
    patch=PatchConfig(sites=arguments.sites),
    data=DataConfig(source=arguments.images, image_size=arguments.image_size, horizontal_flip=True),
    training=TrainingConfig(steps=arguments.steps, batch_size=arguments.batch_size),
)
run = Run(config)
run.train()

sampling = SamplingConfig(scheduler="ddim", num_inference_steps=50, num_images=16)
images = generate(run.model, run.scheduler, sampling)  # the patch is on the model
report.image_grid(images, columns=4).save(arguments.output / "samples.png")
print(f"The patch is in '{arguments.output}', with samples.png.")
