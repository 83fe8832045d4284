"""Small classifiers of the bundled data, whose features the metrics use. Trained on the training images alone.

Made by `experiments/train_classifiers.py`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from stagepatch.core import UserError, read_tensors
from stagepatch.data import NUM_CLASSES

ASSETS = Path(__file__).parent.parent / "assets"


class Classifier(nn.Module):
    """Images [B, 1, S, S] in [−1, 1] to logits [B, 10]; `body` gives the features [B, F]."""

    size = 8
    num_features = 48
    feature_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = self._make_body()
        self.head = nn.Linear(self.num_features, NUM_CLASSES)
        self.register_buffer("feature_scale", torch.ones(()))

    def _make_body(self) -> nn.Module:
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Activations before the last layer, [B, F], scaled to a root mean square of 1 over the training images.

        Raises:
            UserError: images of another size, or in colour.
        """
        if images.shape[1:] != (1, self.size, self.size):
            fitting = [name for name, kind in CLASSIFIERS.items() if images.shape[1:] == (1, kind.size, kind.size)]
            raise UserError(
                f"These features are of grey images of {self.size}×{self.size} pixels, not {list(images.shape[1:])}. "
                f"Of those images, set extractor to: {' or '.join(fitting or ['inception'])}."
            )
        return self._activations(images) * self.feature_scale

    def _activations(self, images: Tensor) -> Tensor:
        activations: Tensor = self.body(images.clamp(-1.0, 1.0))
        return activations

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self._activations(images))
        return logits


class DigitsClassifier(Classifier):
    """Three convolutions and two linear layers, of the digits' 8×8 pixels."""

    def _make_body(self) -> nn.Module:
        head = (nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, self.num_features), nn.GELU())
        return nn.Sequential(*_convolutions([(1, 32, 1), (32, 64, 2), (64, 64, 1)]), *head)


class FashionClassifier(Classifier):
    """Four convolutions and two linear layers, of Fashion-MNIST's 16×16 pixels."""

    size = 16
    num_features = 128

    def _make_body(self) -> nn.Module:
        head = (nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, self.num_features), nn.GELU())
        return nn.Sequential(*_convolutions([(1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2)]), *head)


class FashionViT(Classifier):
    """A transformer of 4×4 patches, of Fashion-MNIST's 16×16 pixels: a second opinion, without convolutions."""

    size = 16
    num_features = 64

    def _make_body(self) -> nn.Module:
        return PatchTransformer(self.num_features)


class PatchTransformer(nn.Module):
    """Three layers of attention over patches; images [B, 1, 16, 16] to their mean token, [B, D]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, channels, 4, 4)
        self.positions = nn.Parameter(torch.randn(16, channels) * 0.02)
        layer = nn.TransformerEncoderLayer(channels, 4, 128, 0.1, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT + self.positions
        features: Tensor = self.norm(self.layers(tokens)).mean(dim=1)
        return features


def _convolutions(sizes: list[tuple[int, int, int]]) -> list[nn.Module]:
    """3×3 convolutions with GELU, each of channels in, channels out, stride."""
    pairs = [(nn.Conv2d(i, o, 3, padding=1, stride=stride), nn.GELU()) for i, o, stride in sizes]
    return [layer for pair in pairs for layer in pair]


CLASSIFIERS: dict[str, type[Classifier]] = {
    "digits": DigitsClassifier,
    "fashion": FashionClassifier,
    "fashion_vit": FashionViT,
}


def classifier_directory(name: str) -> Path:
    """Where a bundled classifier lies."""
    return ASSETS / f"{name.replace('_', '-')}-classifier"


def load_classifier(name: str, directory: Path | None = None) -> Classifier:
    """A classifier of CLASSIFIERS, by default the bundled one."""
    tensors, _ = read_tensors((directory or classifier_directory(name)) / "model.safetensors")
    model = CLASSIFIERS[name]()
    model.load_state_dict(tensors)
    return model.eval()
