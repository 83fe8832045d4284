"""A small classifier of digits, whose features the metrics use. Trained on the training digits alone.

Made by `experiments/train_digits_classifier.py`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from stagepatch.core import read_tensors
from stagepatch.data import NUM_CLASSES

ASSET = Path(__file__).parent.parent / "assets" / "digits-classifier"
NUM_FEATURES = 48


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers: images [B, 1, 8, 8] in [−1, 1] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [(1, 32, 1), (32, 64, 2), (64, 64, 1)]  # channels in, channels out, stride
        layers = [(nn.Conv2d(i, o, 3, padding=1, stride=stride), nn.GELU()) for i, o, stride in convolutions]
        features = (nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, NUM_FEATURES), nn.GELU())
        self.body = nn.Sequential(*(layer for pair in layers for layer in pair), *features)
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


def load_classifier(directory: Path = ASSET) -> DigitsClassifier:
    """The classifier of a directory, by default the bundled one."""
    tensors, _ = read_tensors(directory / "model.safetensors")
    model = DigitsClassifier()
    model.load_state_dict(tensors)
    return model.eval()
