"""A LoRA that was trained on a model, put into the weights of each of its copies by range.

python experiments/add_lora.py runs/ddo runs/copies/experts.yaml runs/copies-with-ddo

Writes models and an experts.yaml, for `stagepatch evaluate --schedule` or a row of `stagepatch compare`.
"""

import argparse
from pathlib import Path

import yaml

from stagepatch import load_denoiser, open_artifact
from stagepatch.checkpoints import save_denoiser


def add_lora(lora: str, experts: Path, output: Path) -> None:
    """Write the copies with the LoRA in their weights."""
    ranges = yaml.safe_load(experts.read_text())["experts"]
    for number, each in enumerate(ranges):
        model, scheduler = load_denoiser(experts.parent / each["model"])
        open_artifact(lora).put_on(model).fuse()
        save_denoiser(model, scheduler, output / f"{number}")
        each["model"] = f"{number}"
    (output / experts.name).write_text(yaml.safe_dump({"experts": ranges}, sort_keys=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lora")
    parser.add_argument("experts", type=Path)
    parser.add_argument("output", type=Path)
    add_lora(**vars(parser.parse_args()))
