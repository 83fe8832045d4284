"""A small classifier of digits, whose features the metrics use. Trained on the training digits alone.

Made by `python -m stagepatch.evaluation.digits_classifier [--output_dir DIR]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.core.files import read_tensors, write_json, write_tensors
from stagepatch.data.digits import NUM_CLASSES, load_digits

ASSET = Path(__file__).parent.parent / "assets" / "digits-classifier"
NUM_FEATURES = 48
STEPS, BATCH_SIZE, LEARNING_RATE, NOISE_STD = 1500, 128, 3e-3, 0.1


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers: images [B, 1, 8, 8] in [−1, 1] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, NUM_FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.feature_scale: Tensor
        self.register_buffer("feature_scale", torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        """Activations before the last layer, [B, 48], scaled to a root mean square of 1 over the training digits."""
        return self._activations(images) * self.feature_scale

    def _activations(self, images: Tensor) -> Tensor:
        activations: Tensor = self.body(images.clamp(-1.0, 1.0))
        return activations

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self._activations(images))
        return logits


def train_digits_classifier(seed: int = 0, steps: int = STEPS) -> DigitsClassifier:
    """Train on the training digits with a little noise; half a minute on one core."""
    from stagepatch.core.progress import progress_bar

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


def load_classifier(directory: Path = ASSET) -> DigitsClassifier:
    """The classifier of a directory, by default the bundled one."""
    tensors, _ = read_tensors(directory / "model.safetensors")
    model = DigitsClassifier()
    model.load_state_dict(tensors)
    return model.eval()


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
