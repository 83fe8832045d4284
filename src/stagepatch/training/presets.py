"""Recipes by name: what `stagepatch train --preset NAME` takes for all that is not given; `apply_preset` in Python.

`recommended` is what won on the bench of docs/evidence.md at the model's own cost, in minutes, for samplers that draw
no noise at each step; `stages` gained as much there by the denoising loss alone, in twenty times the steps, and its
gain stays at more sampling steps and under samplers that draw noise; `guide` trains what a model is sampled away from,
which gained more at twice the cost of a sample; `paper` is DMP as it was published (arXiv 2405.17825), the defaults of
the configs.
"""

from dataclasses import fields
from typing import Any

from stagepatch.core import UserError

PRESET_HELP = (
    "where all that is not given comes from: 'paper', DMP as published; 'recommended', what won on the bench of "
    "docs/evidence.md in minutes of training; 'stages', four low-rank maps mixed over the noise level, by the "
    "denoising loss, in hours of it; 'guide', a worse version of the model to sample away from (sampling.guide), that "
    "gained more there at twice the cost of a sample"
)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {
        "method": "lora",
        "objective": "ddo",
        "lora": {"rank": 8},
        "training": {
            "steps": 400,
            "batch_size": 64,
            "learning_rate": 6e-5,
            "lr_scheduler": "linear",
            "ema_decay": 0.998,
            "checkpoint_every": 100,
        },
    },
    "stages": {
        "method": "lora",
        "lora": {"rank": 8, "num_stages": 4, "targets": "all"},
        "training": {
            "steps": 8000,
            "batch_size": 128,
            "learning_rate": 3e-3,
            "lr_scheduler": "linear",
            "ema_decay": 0.998,
            "checkpoint_every": 500,
        },
    },
    "guide": {
        "method": "lora",
        "objective": "samples",
        "lora": {"rank": 8},
        "training": {
            "steps": 1000,
            "batch_size": 128,
            "learning_rate": 3e-3,
            "lr_scheduler": "linear",
            "ema_decay": 0.998,
            "checkpoint_every": 250,
        },
    },
}


def preset_values(name: str) -> dict[str, Any]:
    """A preset's values by dotted key, such as 'training.steps'.

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"preset='{name}' is none of {', '.join(PRESETS)}.")
    values: dict[str, Any] = {}
    for key, value in PRESETS[name].items():
        values |= {f"{key}.{own}": given for own, given in value.items()} if isinstance(value, dict) else {key: value}
    return values


def apply_preset(config: Any, name: str) -> Any:
    """Set a config's fields, and those of its parts, to a preset's values; returns it.

    Raises:
        UserError: no such preset.
    """
    for key, value in preset_values(name).items():
        part, _, own = key.rpartition(".")
        target = getattr(config, part) if part else config
        assert own in {field.name for field in fields(target)}
        setattr(target, own, value)
    return config
