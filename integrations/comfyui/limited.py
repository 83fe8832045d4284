"""LoRAs on a MODEL, each on in a range of timesteps alone.

ComfyUI lets a function stand between a layer's weight and its use (`ModelPatcher.add_weight_wrapper`). Each LoRA has
one for each of its layers, which adds the LoRA's part while the timestep is in its range; a wrapper around the model's
call (`WrappersMP.APPLY_MODEL`) says before each call what the timestep is. Weights stay as they are, so other LoRAs,
offloading and the order of nodes do not matter. What a LoRA adds is computed by ComfyUI itself
(`comfy.lora.calculate_weight`), for all forms of LoRA that it reads.

Written from ComfyUI's source (comfy/model_patcher.py at 08d0e51, comfy/lora.py at 17358c8, comfy/model_sampling.py at
2fd2083, comfy/ops.py at 0271a46, comfy/patcher_extension.py at 06ce62d); README.md says what of it was run.
"""

from pathlib import Path

import yaml

NUM_TIMESTEPS = 1000.0
KEY = "stagepatch_limited_loras"


def read_schedule(path):
    """Entries of an experts.yaml of LoRAs: (file, from, to, weight), files by their whole paths."""
    path = Path(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "loras" not in content:
        raise ValueError(
            f"'{path}' has no `loras`. Experts of other kinds are turned into these by `stagepatch export`."
        )
    entries = []
    for entry in content["loras"]:
        file = Path(path.parent, entry["file"])
        if not file.is_file():
            raise ValueError(f"'{path}' names '{entry['file']}', which is no file beside it.")
        entries.append((str(file), float(entry["from"]), float(entry["to"]), float(entry.get("weight", 1.0))))
    return entries


def told_timestep(sampling, sigma):
    """The timestep that the model is told at a sigma, on stagepatch's scale of 0, an image, to 1000, noise.

    Args:
        sampling: a model's `model_sampling`.
        sigma: a number or a tensor of one sigma for each sample; the highest counts.
    """
    import comfy.model_sampling
    import torch

    sigma = torch.as_tensor(sigma).flatten().max()
    discrete = comfy.model_sampling.ModelSamplingDiscrete
    if isinstance(sampling, comfy.model_sampling.CONST):  # a flow: its sigma, after any shift
        level = float(sigma)
    elif isinstance(sampling, discrete) and type(sampling).timestep is discrete.timestep:
        level = float(sampling.timestep(sigma)) / sampling.num_timesteps
    else:
        raise ValueError(f"LoRAs are limited on models of timesteps 0 to 1000 or of flows, not on {type(sampling)}.")
    return round(NUM_TIMESTEPS * level, 3)


class Clock:
    """What the timestep is in the call that runs; a wrapper around the model's call."""

    def __init__(self):
        self.timestep = None

    def __call__(self, executor, x, t, *args, **kwargs):
        self.timestep = told_timestep(executor.class_obj.model_sampling, t)
        return executor(x, t, *args, **kwargs)

    def is_within(self, start, end):
        """Whether it is in a range; pure noise is within an end of 1000."""
        told = self.timestep
        return told is not None and start <= told and (told < end or end >= NUM_TIMESTEPS)


class LimitedPart:
    """A LoRA's part in one weight, added while the timestep is in its range.

    Args:
        key: of the weight.
        patch: as `ModelPatcher.add_patches` keeps one: strength, what is added, factor on the weight, offset,
            function.
    """

    def __init__(self, clock, key, patch, start, end):
        self.clock, self.key, self.start, self.end = clock, key, start, end
        self.patch, self.device = patch, None

    def __call__(self, weight):
        import comfy.lora

        if not self.clock.is_within(self.start, self.end):
            return weight
        if self.device != weight.device:
            self.patch, self.device = self._moved(weight.device), weight.device
        # The weight itself may be the model's own: it is not written to.
        return comfy.lora.calculate_weight([self.patch], weight.clone(), self.key, intermediate_dtype=weight.dtype)

    def _moved(self, device):
        """The patch with its maps on the weight's device, so that they are not moved at every call."""
        strength, added, *rest = self.patch
        if hasattr(added, "loaded_keys") and isinstance(getattr(added, "weights", None), tuple):
            maps = tuple(each.to(device) if hasattr(each, "to") else each for each in added.weights)
            added = type(added)(added.loaded_keys, maps)
        return (strength, added, *rest)


def put_on(model, loras):
    """A clone of a MODEL with LoRAs that are limited.

    Args:
        model: a ModelPatcher.
        loras: (file, from, to, strength).
    """
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils
    from comfy.patcher_extension import WrappersMP

    model, clock = model.clone(), Clock()
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    for file, start, end, strength in loras:
        tensors = comfy.utils.load_torch_file(file, safe_load=True)
        if any("weighed_by_timestep" in name for name in tensors):
            raise ValueError(f"The ranks of '{file}' are weighed by the noise level: `stagepatch export` it first.")
        parts = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), names)
        if not parts:
            raise ValueError(f"Nothing in '{file}' is of this model. `stagepatch export --to comfyui` names it alike.")
        for target, added in parts.items():
            key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            patch = (strength, added, 1.0, offset, function)
            model.add_weight_wrapper(key, LimitedPart(clock, key, patch, start, end))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, clock)
    return model
