"""The rows of a comparison that finds its own: the base, what is free, controls, and methods."""

from dataclasses import fields, replace
from typing import Any

from stagepatch.checkpoints import build_denoiser, load_scheduler, takes_captions
from stagepatch.diffusion import sampler_fits
from stagepatch.families import null_label
from stagepatch.studies.compare_config import ITSELF, CompareConfig, EntryConfig
from stagepatch.training import PRESETS

RECIPE = PRESETS["recommended"]
RANK = int(RECIPE.get("lora", {}).get("rank", 8))
MAPS = PRESETS["stages"]["lora"]
STAGES = int(MAPS["num_stages"])
# Without stages, of as many parameters.
ONE_MAP = {"rank": MAPS["rank"] * STAGES, "targets": MAPS["targets"]}
# Of a rate that falls to zero, weights averaged: what any further training may gain.
AVERAGED = {"lr_scheduler": "linear", "ema_decay": RECIPE["training"].get("ema_decay", 0.998)}
# Shares of the rate that the model was trained with; of copies and LoRAs, what gained on the bench (docs/evidence.md).
FINETUNE_SHARES, COPIES_SHARE, LORA_SHARE = (0.1, 0.3, 1.0), 0.5, 1.5
PROMPT_RATE, PAPER_RATE = 1e-2, 1e-4  # of a prompt, which starts at zero, whatever the model's was
GUIDE_SCALE = 2.0
FAKES_PER_IMAGE = 3  # samples that DDO learns from, for each that is measured


def default_entries(config: CompareConfig, steps: int, num_images: int) -> list[EntryConfig]:
    """The rows: base, free wins, controls, methods. `config.training.learning_rate` stands for the rate that the model
    was trained with.

    Raises:
        UserError: there is no such model.
    """
    trained_with = load_scheduler(config.model)
    warm = {**AVERAGED, "warmup_steps": steps // 20}
    entries = [EntryConfig("base", "none")]
    for name, changes in _free_wins(config, trained_with).items():
        entries.append(EntryConfig(f"free: {name}", "none", sampling=changes, control="free"))
    *finetune_rates, copies_rate, lora_rate = _rates(config)
    for rate in finetune_rates:
        training = {**warm, "learning_rate": rate}
        entries.append(EntryConfig(f"fine-tuning, averaged, {rate:g}", "finetune", training=training, control="steps"))
    lora, prompts = {**warm, "learning_rate": lora_rate}, {**warm, "learning_rate": PROMPT_RATE}
    recommended = _recommended(config, steps, num_images, sampler_fits("ddim", trained_with))
    entries += [
        EntryConfig(f"LoRA, rank {RANK}", "lora", lora={"rank": RANK}, training=lora, control="parameters"),
        EntryConfig(
            f"LoRA, rank {ONE_MAP['rank']}, all layers", "lora", lora=ONE_MAP, training=lora, control="parameters"
        ),
        EntryConfig(
            "prompt tuning", "prompt_tuning", patch={"matched_step": True}, training=prompts, control="parameters"
        ),
        EntryConfig("DMP as in the paper", "dmp", training={"learning_rate": PAPER_RATE}),
        EntryConfig("stage LoRA", "lora", lora=MAPS, training=lora),
        # Of as many steps in all as the others.
        EntryConfig(
            "LoRAs by range",
            "lora",
            lora={"rank": MAPS["rank"], "targets": MAPS["targets"]},
            training={**lora, **_share(steps)},
            num_stages=STAGES,
        ),
        EntryConfig(
            "copies by range",
            "finetune",
            training={**warm, **_share(steps), "learning_rate": copies_rate},
            num_stages=STAGES,
        ),
        recommended,
        replace(recommended, name="stage LoRA, then recommended", lora=MAPS, after="stage LoRA"),
        replace(
            recommended,
            name="guide, twice the calls",
            objective="samples",
            lora=PRESETS["guide"]["lora"],
            training=lora,
            sampling={"guide": ITSELF, "guide_scale": GUIDE_SCALE},
        ),
    ]
    doubled = {"num_inference_steps": 2 * config.sampling.num_inference_steps}
    if doubled in [entry.sampling for entry in entries]:  # do they bear more steps, and add to them?
        best = ("stage LoRA", "recommended", "stage LoRA, then recommended")
        more = [entry for entry in entries if entry.name in best]
        entries += [replace(entry, name=f"{entry.name}, 2 times the steps", sampling=doubled) for entry in more]
    return entries


def _rates(config: CompareConfig) -> list[float]:
    shares = (*FINETUNE_SHARES, COPIES_SHARE, LORA_SHARE)
    return [float(f"{share * config.training.learning_rate:g}") for share in shares]


def _share(steps: int) -> dict[str, int]:
    """Of a stage."""
    own = max(1, steps // STAGES)
    return {"steps": own, "warmup_steps": own // 20}


def _free_wins(config: CompareConfig, trained_with: Any) -> dict[str, dict[str, Any]]:
    base = config.sampling
    wins: dict[str, dict[str, Any]] = {}
    for factor in (2, 4):
        if factor * base.num_inference_steps <= trained_with.config.num_train_timesteps:
            wins[f"{factor} times the steps"] = {"num_inference_steps": factor * base.num_inference_steps}
    solver = "dpmsolver++" if base.scheduler != "dpmsolver++" else "ddim"
    if sampler_fits(solver, trained_with):
        wins[solver] = {"scheduler": solver}
    spacing = base.timestep_spacing or getattr(trained_with.config, "timestep_spacing", "trailing")
    if spacing != "trailing" and sampler_fits(base.scheduler, trained_with, "trailing"):
        wins["trailing timesteps"] = {"timestep_spacing": "trailing"}
    if base.scheduler != "ddpm" and "4 times the steps" in wins and sampler_fits("ddpm", trained_with):
        wins["ddpm, 4 times the steps"] = {**wins["4 times the steps"], "scheduler": "ddpm"}
    takes_guidance = null_label(build_denoiser(config.model)) is not None or takes_captions(config.model)
    if takes_guidance and base.guidance_scale != 1.5:
        wins["guidance 1.5"] = {"guidance_scale": 1.5}
    return wins


def _recommended(config: CompareConfig, steps: int, num_images: int, has_ddim: bool) -> EntryConfig:
    """The recipe, for its own number of steps or the budget's; at the comparison's batch size."""
    known = {field.name for field in fields(EntryConfig)} - {"training", "ddo"}
    own = {name: value for name, value in RECIPE.items() if name in known}
    training = {name: value for name, value in RECIPE["training"].items() if name != "batch_size"}
    training["steps"] = min(steps, training["steps"])
    ddo = {**RECIPE.get("ddo", {}), "sampling": {"num_images": FAKES_PER_IMAGE * num_images}}
    ddo["sampling"] |= {"batch_size": config.sampling.batch_size}
    if not has_ddim:
        ddo["sampling"] |= {"scheduler": config.sampling.scheduler}
    return EntryConfig("recommended", **own, training=training, ddo=ddo)
