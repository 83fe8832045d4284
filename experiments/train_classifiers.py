"""Make the bundled classifiers, whose features the metrics use: minutes on one core.

python experiments/train_classifiers.py digits fashion fashion_vit [--output_dir DIR]
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

from stagepatch.core import progress_bar, write_json, write_tensors
from stagepatch.data import load_digits, load_fashion
from stagepatch.evaluation.classifiers import CLASSIFIERS, Classifier, classifier_directory

STEPS = {"digits": 1500, "fashion": 2500, "fashion_vit": 3000}
BATCH_SIZE, LEARNING_RATE, NOISE_STD = 128, 3e-3, 0.1


def train_classifier(name: str, seed: int = 0, steps: int = 0) -> Classifier:
    """Train on the training images with a little noise."""
    torch.manual_seed(seed)
    steps = steps or STEPS[name]
    images, labels = load_digits("train") if name == "digits" else load_fashion("train")
    model = CLASSIFIERS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with progress_bar() as progress:
        task = progress.add_task(f"classifier of {name}", total=steps, status="")
        for _ in range(steps):
            chosen = torch.randint(0, len(images), (BATCH_SIZE,))
            noisy = images[chosen] + NOISE_STD * torch.randn(BATCH_SIZE, *images.shape[1:])
            loss = F.cross_entropy(model(noisy), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.features(part) for part in images.split(2000)])
        model.feature_scale.copy_(features.square().mean().rsqrt())
    return model


@torch.no_grad()
def accuracy(name: str, model: Classifier) -> float:
    """Share of images that nothing is trained on, and nothing reported on, that are classified rightly."""
    images, labels = load_digits("held_out") if name == "digits" else load_fashion("tune")
    return float((model(images).argmax(dim=1) == labels).float().mean())


def save_classifier(name: str, model: Classifier, directory: Path) -> None:
    """Write `model.safetensors` and, with the accuracy, `config.json`."""
    settings = {
        "steps": STEPS[name],
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "noise_std": NOISE_STD,
    }
    write_tensors(directory / "model.safetensors", model.state_dict())
    write_json(directory / "config.json", {"training": settings, "held_out_accuracy": round(accuracy(name, model), 4)})


def main() -> None:
    """Train, save, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(CLASSIFIERS))
    parser.add_argument("--output_dir", type=Path, help="takes a directory a classifier; by default the bundled ones")
    arguments = parser.parse_args()
    for name in arguments.names:
        model = train_classifier(name)
        directory = classifier_directory(name)
        directory = arguments.output_dir / directory.name if arguments.output_dir else directory
        save_classifier(name, model, directory)
        print(f"{name}: accuracy {accuracy(name, model):.4f}; it is in '{directory}'.")


if __name__ == "__main__":
    main()
