"""Make the bundled classifier of digits, whose features the metrics use: half a minute on one core.

python experiments/train_digits_classifier.py [--output_dir DIR]
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

from stagepatch.core import progress_bar, write_json, write_tensors
from stagepatch.data.digits import load_digits
from stagepatch.evaluation.digits_classifier import ASSET, DigitsClassifier

STEPS, BATCH_SIZE, LEARNING_RATE, NOISE_STD = 1500, 128, 3e-3, 0.1


def train_digits_classifier(seed: int = 0, steps: int = STEPS) -> DigitsClassifier:
    """Train on the training digits with a little noise."""
    torch.manual_seed(seed)
    images, labels = load_digits("train")
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with progress_bar() as progress:
        task = progress.add_task("digits classifier", total=steps, status="")
        for _ in range(steps):
            chosen = torch.randint(0, len(images), (BATCH_SIZE,))
            noisy = images[chosen] + NOISE_STD * torch.randn(BATCH_SIZE, 1, 8, 8)
            loss = F.cross_entropy(model(noisy), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)
    model.eval()
    with torch.no_grad():
        model.feature_scale.copy_(model.features(images).square().mean().rsqrt())
    return model


@torch.no_grad()
def held_out_accuracy(model: DigitsClassifier) -> float:
    """Share of the held-out digits that are classified rightly."""
    images, labels = load_digits("held_out")
    return float((model(images).argmax(dim=1) == labels).float().mean())


def save_classifier(model: DigitsClassifier, directory: Path) -> None:
    """Write `model.safetensors` and, with the held-out accuracy, `config.json`."""
    settings = {"steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "noise_std": NOISE_STD}
    accuracy = held_out_accuracy(model)
    write_tensors(directory / "model.safetensors", model.state_dict())
    write_json(directory / "config.json", {"training": settings, "held_out_accuracy": round(accuracy, 4)})


def main() -> None:
    """Train, save, and print the held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=ASSET, help=f"default: {ASSET}")
    directory = parser.parse_args().output_dir
    model = train_digits_classifier()
    save_classifier(model, directory)
    print(f"Held-out accuracy {held_out_accuracy(model):.4f}; the classifier is in '{directory}'.")


if __name__ == "__main__":
    main()
