"""What was learned, as the folder that goes on the Hub: its files, and a card with samples, config and figures."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from stagepatch.checkpoints import is_hub_id, pretrained_arguments, split_revision
from stagepatch.core import UserError, copy_file, read_json, read_tensors, read_yaml, write_text
from stagepatch.families.registry import NUM_TIMESTEPS
from stagepatch.methods import FILE_NAME, Artifact, LoRAConfig, PerDenoiser, open_artifact
from stagepatch.methods.lora import CONFIG_NAME as LORA_CONFIG
from stagepatch.methods.lora import FACTS, MODEL_CLASS
from stagepatch.methods.lora_card import CARD_NAME, NOISE_LEVELS, lora_card, rows
from stagepatch.patch import Patch
from stagepatch.patch.card import model_card
from stagepatch.patch.storage import CONFIG_NAME, WEIGHTS_NAME
from stagepatch.report import image_grid, write_picture
from stagepatch.sampling import read_schedule
from stagepatch.sampling.experts_file import whole_path
from stagepatch.sampling.limited_loras import read_limited_loras
from stagepatch.sharing.card import Extras, Figures, extended_card
from stagepatch.sharing.export import noise_range
from stagepatch.training import RUN_CONFIG
from stagepatch.training.validation import VALIDATION

SCHEDULE = "experts.yaml"
METRICS, REPORT = "metrics.json", "report.html"
_MOST_SAMPLES = 8


def write_folder(
    path: str | Path, folder: str | Path, title: str, samples: str = "", evaluation: str = "", prompt: str = ""
) -> None:
    """Write the files of what was learned, and its card, into a folder that is new or empty.

    The run's config, last picture of validation, metrics and report are taken along where they lie beside it.

    Args:
        path: directory of a patch, of a LoRA, or of several denoisers' ones; or a file of experts, with what it
            names.
        title: of the repository, such as 'name/patch'.
        samples: output of `stagepatch sample`, for the card's widget.
        evaluation: output of `stagepatch evaluate`, for its figures; by default what lies in `path`.
        prompt: words that call up what was learned.

    Raises:
        UserError: nothing there that can be shared; or the folder is not empty.
    """
    artifact, folder = open_artifact(path), Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty: give a folder that is new.")
    if artifact.kind not in _WRITERS:
        raise UserError(f"'{path}' is not shared: it is {artifact.description} Shared are: {', '.join(_WRITERS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    card = _WRITERS[artifact.kind](artifact, folder)
    run = artifact.path if artifact.path.is_dir() else artifact.path.parent
    extras = Extras(
        title=title,
        prompt=prompt,
        samples=_write_samples(Path(samples), folder) if samples else (),
        pictures=_copy_validation(run, folder),
        files=_copy_files(run, folder),
        figures=_figures(Path(evaluation)) if evaluation else _figures(run) if (run / METRICS).exists() else None,
    )
    write_text(folder / CARD_NAME, extended_card(card, extras))


def _write_patch(artifact: Artifact, folder: Path) -> str:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        copy_file(artifact.path / name, folder / name)
    return model_card(Patch.from_pretrained(artifact.path))


def _write_lora(artifact: Artifact, folder: Path) -> str:
    for name in (LORA_CONFIG, FILE_NAME):
        copy_file(artifact.path / name, folder / name)
    _, metadata = read_tensors(artifact.path / FILE_NAME)
    facts = json.loads(metadata.get(FACTS, "{}"))
    if artifact.stage:
        start, end = noise_range(artifact, metadata)
        facts[NOISE_LEVELS] = f"{start / NUM_TIMESTEPS:g} to {end / NUM_TIMESTEPS:g}"
    return lora_card(
        LoRAConfig(**read_json(artifact.path / LORA_CONFIG)), metadata.get(MODEL_CLASS, "not recorded"), facts
    )


def _write_denoisers(artifact: Artifact, folder: Path) -> str:
    copy_file(artifact.path / PerDenoiser.marker, folder / PerDenoiser.marker)
    kinds = {}
    for name, facts in read_json(artifact.path / PerDenoiser.marker).items():
        own = open_artifact(PerDenoiser.directory_of(artifact.path, name), "patch", "LoRA")
        place = PerDenoiser.directory_of(folder, name)
        place.mkdir(parents=True)
        write_text(place / CARD_NAME, _WRITERS[own.kind](own, place))
        low, high = facts["range"]
        kinds[name] = f"a {own.kind}, for noise levels {low:g} to {high:g}"
    load = [
        "from diffusers import DiffusionPipeline",
        "from huggingface_hub import snapshot_download",
        "from stagepatch import open_artifact",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({_arguments(artifact.path)})",
        'open_artifact(snapshot_download("its Hub id")).put_on(pipe)',
    ]
    return _card(artifact.path, "Learned for each denoiser of", load, {"denoiser": "what it has", **kinds})


def _write_experts(artifact: Artifact, folder: Path) -> str:
    """The file, with what it names beside it."""
    path, content = artifact.path, read_yaml(artifact.path, "schedule")
    if "loras" in content:
        places = [lora.name for lora in read_limited_loras(path)]
        names = [_beside(place, folder, number) for number, place in enumerate(places, 1)]
        content["loras"] = [{**entry, "file": name} for entry, name in zip(content["loras"], names, strict=True)]
        load = ["from stagepatch.sampling import load_limited_loras"]
        put = f'load_limited_loras(snapshot_download("its Hub id") + "/{SCHEDULE}", pipe)'
        kinds = {lora["file"]: f"timesteps {lora['from']:g} to {lora['to']:g}" for lora in content["loras"]}
    else:
        read_schedule(path, max((entry.get("to", 0) for entry in content["experts"]), default=0) or NUM_TIMESTEPS)
        kinds = {}
        for number, entry in enumerate(content["experts"], 1):
            if Path(whole_path(entry.get("model", ""), path.parent)).is_absolute():
                raise UserError(
                    f"'{path}' names a model on this disk, '{entry['model']}': push that, and name its Hub id."
                )
            if place := entry.get("learned", ""):
                entry["learned"] = _beside(whole_path(place, path.parent), folder, number)
                kinds[entry["learned"]] = (
                    f"timesteps {entry['from']:g} to {entry['to']:g}" if "to" in entry else "by step"
                )
        load = ["from stagepatch.sampling import load_experts"]
        put = f'file = snapshot_download("its Hub id") + "/{SCHEDULE}"\n'
        put += "load_experts(file, pipe.transformer, pipe.scheduler).attach(pipe)  # or pipe.unet"
    write_text(
        folder / SCHEDULE, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)
    )
    head = ["from diffusers import DiffusionPipeline", "from huggingface_hub import snapshot_download"]
    make = f"pipe = DiffusionPipeline.from_pretrained({_arguments(path.parent)})"
    kinds = {"file": "where it acts", **kinds}
    return _card(path.parent, "Experts by timestep for", [*head, *load, "", make, put], kinds)


def _beside(place: str, folder: Path, number: int) -> str:
    """Copy a file or a directory of what was learned into the folder; its name there. A Hub id stays."""
    source, name = Path(place), f"{number}-{Path(place).name}"
    if not source.exists():
        return place
    if source.is_file():
        copy_file(source, folder / name)
        return name
    (folder / name).mkdir()
    if (source / FILE_NAME).exists() and not (source / LORA_CONFIG).exists():  # as diffusers wrote it
        copy_file(source / FILE_NAME, folder / name / FILE_NAME)
        return name
    own = open_artifact(source, "patch", "LoRA")
    write_text(folder / name / CARD_NAME, _WRITERS[own.kind](own, folder / name))
    return name


def _arguments(run: Path) -> str:
    return pretrained_arguments(_base(run) or "the base model")


def _base(run: Path) -> str:
    """The base model's Hub id, as a run's config has it."""
    config = read_yaml(run / RUN_CONFIG) if (run / RUN_CONFIG).exists() else {}
    model = str(config.get("model", ""))
    return model if is_hub_id(model) else ""


def _card(run: Path, what: str, load: list[str], table: dict[str, str]) -> str:
    base = _base(run)
    data = ModelCardData(
        base_model=split_revision(base)[0] or None, library_name="stagepatch", tags=["diffusers", "stagepatch"]
    )
    code = "\n".join(load)
    return "\n\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {what} {base or 'a diffusion model'}",
            "Made with stagepatch. The model's own weights are not in it, and stay as they are.",
            f"## Load it\n```python\n{code}\n```",
            f"## What it is\n{rows(table)}",
        ]
    )


def _write_samples(directory: Path, folder: Path) -> list[tuple[str, str]]:
    images = read_tensors(directory / "samples.safetensors")[0]["images"]
    config = read_yaml(directory / RUN_CONFIG) if (directory / RUN_CONFIG).exists() else {}
    frames = max(1, len(images) // config.get("sampling", {}).get("num_images", len(images)))
    images = images[::frames][:_MOST_SAMPLES]  # the first of each video
    prompts = config.get("prompts") or [""]
    written = []
    for number, image in enumerate(images):
        name = f"samples/{number}.png"
        write_picture(folder / name, image_grid(image[None], columns=1))
        written.append((name, prompts[number % len(prompts)]))
    return written


def _copy_validation(run: Path, folder: Path) -> list[tuple[str, str]]:
    pictures = sorted((run / VALIDATION).glob("*.png"))
    if not pictures:
        return []
    copy_file(pictures[-1], folder / "validation.png")
    steps = int(pictures[-1].stem)
    return [
        ("validation.png", f"Left the base, right with what was learned, from the same noise, after {steps} steps")
    ]


def _copy_files(run: Path, folder: Path) -> dict[str, str]:
    words = {RUN_CONFIG: "the run's config: `stagepatch train --config`", REPORT: "the run's report"}
    there = {name: text for name, text in words.items() if (run / name).is_file()}
    for name in there:
        copy_file(run / name, folder / name)
    return there


def _figures(directory: Path) -> Figures:
    metrics = read_json(directory / METRICS)
    names = [name for name in metrics if name not in ("seeds", "base")]
    if "base" not in metrics or not names:
        raise UserError(f"'{directory / METRICS}' compares nothing with the base: `stagepatch evaluate --patch` does.")
    config = read_yaml(directory / RUN_CONFIG) if (directory / RUN_CONFIG).exists() else {}
    data = str(config.get("data", {}).get("source", "its data"))
    return Figures(metrics["base"], metrics[names[0]], data, str(config.get("extractor", "its extractor")))


_WRITERS: dict[str, Callable[[Artifact, Path], str]] = {
    "patch": _write_patch,
    "LoRA": _write_lora,
    PerDenoiser.kind: _write_denoisers,
    "experts": _write_experts,
}
