"""Captions of tags, separated by commas: the same tags in other orders, some left out."""

import hashlib

import torch

from stagepatch.core import TAGS, UserError, generator_for
from stagepatch.data.config import TagsConfig


def tag_variants(caption: str, config: TagsConfig) -> list[str]:
    """As many as the config asks for, the first the caption itself; they follow from the caption alone.

    In the others, tags after the first `keep_tokens` are left out with probability `dropout`, each for itself, and
    what stays of them is shuffled. A caption may come more than once, where there are few ways; or be empty.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, others = tags[: config.keep_tokens], tags[config.keep_tokens :]
    digest = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8])
    variants = [caption]
    for number in range(1, config.variants):
        generator = generator_for(torch.device("cpu"), TAGS, number, digest)
        stays = torch.rand(len(others), generator=generator) >= config.dropout
        order = torch.randperm(len(others), generator=generator) if config.shuffle else torch.arange(len(others))
        variants.append(", ".join([*kept, *(others[place] for place in order.tolist() if stays[place])]))
    return variants


def check_tags(config: TagsConfig) -> None:
    """Refuse what makes no sense.

    Raises:
        UserError: it does not.
    """
    if config.variants < 1 or config.keep_tokens < 0 or not 0.0 <= config.dropout <= 1.0:
        raise UserError(
            f"data.tags.variants={config.variants} must be at least 1, keep_tokens={config.keep_tokens} at least 0, "
            f"and dropout={config.dropout} from 0 to 1."
        )
