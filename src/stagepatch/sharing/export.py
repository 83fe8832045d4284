"""LoRAs in the forms of other programs, as plain ones, each with the range of timesteps that it is limited to."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stagepatch.core import UserError, as_user_error, read_json, read_tensors, read_yaml, write_tensors
from stagepatch.families.registry import NUM_TIMESTEPS
from stagepatch.methods import FILE_NAME, Artifact, LoRAConfig, PerDenoiser, open_artifact
from stagepatch.methods.lora import CONFIG_NAME, FACTS, MODEL_CLASS, WEIGHED, read_config
from stagepatch.methods.lora_card import NOISE_LEVELS
from stagepatch.sampling import LimitedLoRA, read_schedule, write_limited_loras
from stagepatch.sampling.limited_loras import read_limited_loras
from stagepatch.sharing.names import FORMS, Layers

_NAME = re.compile(r"(?:transformer|transformer_2|unet)\.(.+)\.lora_([AB])\.weight")
_ALL = (0.0, NUM_TIMESTEPS)
_OTHER_SCALES = ("use_dora", "use_rslora", "alpha_pattern")


@dataclass(frozen=True)
class PlainLoRA:
    """A LoRA without a gate.

    Args:
        layers: see `names`.
        model_class: of the denoiser that it is for; '' where that is not known.
        start, end: timesteps that it is limited to, on a scale of 0, an image, to 1000, noise.
        weight: factor on it.
        label: what tells it from others of one export.
    """

    layers: Layers
    model_class: str = ""
    start: float = 0.0
    end: float = NUM_TIMESTEPS
    weight: float = 1.0
    label: str = ""

    @property
    def is_limited(self) -> bool:
        return (self.start, self.end) != _ALL


def export_lora(path: str | Path, output: str | Path, form: str, model_class: str = "") -> list[Path]:
    """Write LoRAs as other programs read them.

    Args:
        path: a LoRA's directory; stages of LoRAs; a pipeline's several denoisers; or a file of experts that are LoRAs.
        output: directory. One LoRA is a file of its name there. Several, or one that is limited to a range, have the
            range in their names and metadata, and 'experts.yaml' beside them, for `load_limited_loras` and the
            ComfyUI node; those of several denoisers stay apart.
        form: 'diffusers', 'kohya' or 'comfyui'.
        model_class: of the denoiser, such as 'FluxTransformer2DModel', where the files do not say it.

    Returns:
        The LoRAs' files.

    Raises:
        UserError: nothing there that is LoRAs; ranks that are weighed as no plain LoRAs are; or a model that has no
            such form.
    """
    output, groups = Path(output), _groups(Path(path))
    files = []
    for name, loras in groups.items():
        directory, stem = (output / name, f"{output.name}-{name}") if name else (output, output.name)
        files += _write(loras, directory, stem, form, model_class)
    return files


def _write(loras: list[PlainLoRA], directory: Path, stem: str, form: str, model_class: str) -> list[Path]:
    written = []
    for lora in loras:
        lora = replace(lora, model_class=model_class or lora.model_class)
        if not lora.model_class:
            raise UserError("The LoRA does not say which class of model it is for: give --model_class.")
        name = f"{stem}{lora.label}" + (f"-{lora.start:g}-{lora.end:g}" if lora.is_limited else "")
        file = directory / f"{name}.safetensors"
        write_tensors(file, FORMS[form](lora.layers, lora.model_class), _metadata(lora, name))
        written.append(LimitedLoRA(str(file), lora.start, lora.end, lora.weight))
    if len(loras) > 1 or loras[0].is_limited or loras[0].weight != 1.0:
        write_limited_loras(directory / "experts.yaml", written)
    return [Path(each.name) for each in written]


def _metadata(lora: PlainLoRA, name: str) -> dict[str, str]:
    """Keys of Stability AI's model spec, its `timestep_range` among them, and the class, as our own files have it."""
    return {
        "format": "pt",
        MODEL_CLASS: lora.model_class,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.timestep_range": f"{lora.start:g},{lora.end:g}",
    }


def _groups(path: Path) -> dict[str, list[PlainLoRA]]:
    """The LoRAs at a path, by name of the denoiser where there are several."""
    artifact = open_artifact(path)
    path = artifact.path
    if artifact.kind == PerDenoiser.kind:
        # Each is on a model of its own, which acts in its own range alone.
        names = read_json(path / PerDenoiser.marker)
        return {name: _of_directory(PerDenoiser.directory_of(path, name), _ALL) for name in names}
    if artifact.kind == "stages":
        stages = sorted((path / "stages").iterdir(), key=lambda stage: int(stage.name))
        return {"": [lora for stage in stages for lora in _of_directory(stage)]}
    return {"": list(_of_schedule(path)) if artifact.kind == "experts" else _of_directory(path)}


def _of_schedule(path: Path) -> Iterator[PlainLoRA]:
    content = read_yaml(path, "schedule")
    if "loras" in content:
        for number, entry in enumerate(read_limited_loras(path), 1):
            if not Path(entry.name).exists():
                raise UserError(f"'{entry.name}' is not on this disk: fetch it, and name the file in '{path}'.")
            for lora in _of_place(Path(entry.name), (entry.start, entry.end)):
                yield replace(lora, label=f"-{number}", weight=entry.weight)
        return
    experts = read_schedule(path, NUM_TIMESTEPS)
    if experts.fuse:
        raise UserError(f"'{path}' mixes features of its experts, which no file of LoRAs says.")
    for number, expert in enumerate(experts.ranges, 1):
        source: Any = expert.denoiser
        if source.model:
            raise UserError(f"Expert {number} of '{path}' is a model, no LoRA.")
        if source.learned:
            for lora in _of_directory(Path(source.learned), (expert.start, expert.end)):
                yield replace(lora, label=f"-{number}")


def _of_place(place: Path, ends: tuple[float, float]) -> list[PlainLoRA]:
    """A directory of ours, or a file of any origin in diffusers' form."""
    if (place / CONFIG_NAME).exists():
        return _of_directory(place, ends)
    tensors, metadata = read_tensors(place / FILE_NAME if place.is_dir() else place)
    with as_user_error(f"'{place}'", UserError):
        return [PlainLoRA(read_layers(tensors, metadata), metadata.get(MODEL_CLASS, ""), *ends)]


def _of_directory(directory: Path, ends: tuple[float, float] | None = None) -> list[PlainLoRA]:
    """The LoRA of a directory, in pieces where its ranks are on in ranges.

    Args:
        ends: of the range in which it acts; by default that in which it was trained.
    """
    artifact = open_artifact(directory, "LoRA")
    config = read_config(directory)
    tensors, metadata = read_tensors(directory / FILE_NAME)
    start, end = ends or noise_range(artifact, metadata)
    with as_user_error(f"'{directory}'", UserError):
        pieces = _pieces(config)
        layers = read_layers({name: each for name, each in tensors.items() if WEIGHED not in name}, {})
    loras = []
    for ranks, on, off in pieces:
        part = {path: (down[ranks].contiguous(), up[:, ranks].contiguous()) for path, (down, up) in layers.items()}
        loras.append(PlainLoRA(part, metadata.get(MODEL_CLASS, ""), max(start, on), min(end, off)))
    return [lora for lora in loras if lora.start < lora.end]


def noise_range(artifact: Artifact, metadata: dict[str, str]) -> tuple[float, float]:
    """Timesteps that a LoRA was trained on, on a scale of 0 to 1000: of a stage, or as its run was told."""
    if artifact.stage:
        return float(artifact.stage["from"]), float(artifact.stage["to"])
    levels = json.loads(metadata.get(FACTS, "{}")).get(NOISE_LEVELS, "0 to 1")
    start, end = (NUM_TIMESTEPS * float(level) for level in levels.split(" to "))
    return start, end


def _pieces(config: LoRAConfig) -> list[tuple[slice, float, float]]:
    """Ranks that count alike, with the range in which they count; elsewhere they are off.

    Raises:
        UserError: the ranks are weighed by more than on and off.
    """
    rank, least = config.rank, config.min_rank
    if not config.is_weighed:
        return [(slice(None), 0.0, NUM_TIMESTEPS)]
    if config.num_maps > 1:
        if config.stage_gate != "ranges":
            raise UserError(
                f"a LoRA whose maps are mixed over the noise level by '{config.stage_gate}' is no set of plain LoRAs, "
                f"each on in a range: no other program runs it. One of stage_gate 'ranges' is."
            )
        width = NUM_TIMESTEPS / config.num_stages
        stages = range(config.num_stages)
        return [(slice(k * rank, (k + 1) * rank), k * width, (k + 1) * width) for k in stages]
    # T-LoRA: rank j is on while ⌊(1 − t/T)(R − r) + 1e-4⌋ + r ≥ j, as in `active_ranks`.
    off_at = [NUM_TIMESTEPS * (1.0 - (j - least - 1e-4) / (rank - least)) for j in range(least + 1, rank + 1)]
    return [(slice(0, least), 0.0, NUM_TIMESTEPS)] + [
        (slice(least + number, least + number + 1), 0.0, end) for number, end in enumerate(off_at)
    ]


def read_layers(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Layers:
    """The layers of a file in diffusers' form, its alpha worked in.

    Args:
        metadata: of the file; diffusers keeps there how the adapter is scaled.

    Raises:
        UserError: it is of another form, or scaled in a way that is not known here.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    if any(".lora.down." in name for name in tensors):  # diffusers' own names, of before peft's
        tensors = convert_unet_state_dict_to_peft(tensors)
    maps: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"it holds '{name}': only diffusers' form is read, 'transformer.….lora_A.weight'.")
        maps.setdefault(match[1], {})[match[2]] = value
    adapter = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    settings = {key.split(".", 1)[1]: value for key, value in adapter.items() if key.startswith(("trans", "unet"))}
    if odd := [name for name in _OTHER_SCALES if settings.get(name)]:
        raise UserError(f"its adapter has {odd[0]}, which is not exported.")
    layers = {}
    for path, pair in maps.items():
        if len(pair) < 2:
            raise UserError(f"it has half of the maps of '{path}'.")
        down, up = pair["A"], pair["B"]
        layers[path] = (down, up * (settings.get("lora_alpha", len(down)) / len(down)))
    return layers
