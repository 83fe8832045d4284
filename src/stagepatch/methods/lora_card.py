"""The model card of a LoRA."""

import diffusers
from huggingface_hub import ModelCardData

from stagepatch.checkpoints import is_hub_id, pretrained_arguments, split_revision
from stagepatch.methods.config import ROUTERS, LoRAConfig

CARD_NAME = "README.md"
NOISE_LEVELS = "noise levels"  # the fact that says in which part of denoising it was trained


def lora_card(config: LoRAConfig, model_class: str, facts: dict[str, str]) -> str:
    """README.md of a LoRA's directory: what it is for, how to load it, how it was trained.

    Args:
        model_class: of the denoiser that it is for.
        facts: how it was trained, in words; 'base model' and 'noise levels' among them, where they are known.
    """
    base = facts.get("base model", "")
    is_on_hub = is_hub_id(base)
    data = ModelCardData(
        base_model=split_revision(base)[0] if is_on_hub else None,
        library_name="stagepatch" if config.is_weighed or not hasattr(diffusers, model_class) else "diffusers",
        tags=[
            *([f"base_model:adapter:{split_revision(base)[0]}"] if is_on_hub else []),
            *("lora", "template:diffusion-lora", "diffusers", "stagepatch", model_class),
        ],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# A LoRA for {base or model_class}",
        "Low-rank adapters on a diffusion model, made with stagepatch. The model's own weights are not in it, and "
        "stay as they are.",
        f"## Load it\n{_how_to_load(config, base if is_on_hub else 'the base model', facts)}",
        "## What it is\n" + rows(describe_lora(config, model_class, facts)),
        "## How it was trained\n" + rows(facts or {"training": "not recorded"}),
    ]
    return "\n\n".join(parts) + "\n"


def describe_lora(config: LoRAConfig, model_class: str, facts: dict[str, str]) -> dict[str, str]:
    """What a LoRA is, in words."""
    targets = config.targets or "the attention's projections"
    return {
        "base model": facts.get("base model") or "not recorded",
        "architecture": model_class,
        "ranks": _ranks(config),
        "layers": targets if isinstance(targets, str) else ", ".join(targets),
        NOISE_LEVELS: facts.get(NOISE_LEVELS, "all"),
        "scale": "alpha is the rank: the adapters are not scaled",
    }


def _ranks(config: LoRAConfig) -> str:
    if config.stage_gate in ROUTERS:
        return f"{config.num_maps} maps of rank {config.rank}, mixed by a {config.stage_gate}"
    if config.num_stages > 1:
        return f"{config.num_stages} maps of rank {config.rank}, mixed over the noise level by '{config.stage_gate}'"
    if config.is_weighed:
        return f"{config.rank}, of which {config.min_rank} at pure noise and all at the image (T-LoRA)"
    return str(config.rank)


def _how_to_load(config: LoRAConfig, base: str, facts: dict[str, str]) -> str:
    lines = ["from diffusers import DiffusionPipeline"]
    make = f"pipe = DiffusionPipeline.from_pretrained({pretrained_arguments(base)})"
    if config.is_weighed:
        lines += ["from huggingface_hub import snapshot_download", "from stagepatch import open_artifact", "", make]
        lines += ['open_artifact(snapshot_download("its Hub id")).put_on(pipe)  # or its directory']
        return (
            _block(lines)
            + "\n\nIts ranks count by the noise level, which no other loader knows of: run unweighed it is "
            "another LoRA. So diffusers refuses the file; ComfyUI would run it, with no more than a warning of a key "
            "that is not loaded. `stagepatch export` makes plain LoRAs of it where that can be done exactly."
        )
    lines += ["", make, 'pipe.load_lora_weights("this directory or its Hub id", adapter_name="lora")']
    otherwise = (
        "\n\nOn a pipeline that has no `load_lora_weights`, or a single model: "
        "`stagepatch.open_artifact(directory).put_on(pipe)`."
    )
    if NOISE_LEVELS not in facts:
        return _block(lines) + otherwise
    start, end = (1000.0 * float(end) for end in facts[NOISE_LEVELS].split(" to "))
    lines.insert(1, "from stagepatch.sampling import LimitedLoRA, LimitedLoRAs")
    lines += [f'LimitedLoRAs(pipe, [LimitedLoRA("lora", {start:g}, {end:g})])']
    limited = "\n\nIt was trained on those noise levels alone: elsewhere it is off, by the last line."
    return _block(lines) + limited + otherwise


def _block(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def rows(values: dict[str, str]) -> str:
    """A table of names and values."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in values.items())])
