"""Models by the names people know, built from their public configs without weights."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from torch import nn

from stagepatch.core import UserError
from stagepatch.models import DIT_SIZES, DiT

_FILE = Path(__file__).parent.parent / "assets" / "named_models.yaml"
NAMED_MODELS: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
"""`model_class`, `config` and `grid` of each; see the file."""


def build_named(name: str) -> nn.Module:
    """A DiT size or one of NAMED_MODELS, on the meta device.

    Raises:
        UserError: an unknown name.
    """
    if name not in NAMED_MODELS and name not in DIT_SIZES:
        raise UserError(f"No model '{name}' is known by name. Known: {', '.join([*DIT_SIZES, *NAMED_MODELS])}.")
    with torch.device("meta"):
        if name in DIT_SIZES:
            return DiT.from_name(name)  # type: ignore[no-any-return]
        model = NAMED_MODELS[name]
        return getattr(diffusers, model["model_class"])(**model["config"])  # type: ignore[no-any-return]
