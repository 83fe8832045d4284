"""The nodes."""

from pathlib import Path

from .limited import NUM_TIMESTEPS, put_on, read_schedule
from .prompts import put_patch_on

_STRENGTH = ("FLOAT", {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01})


def _timestep(default):
    return ("FLOAT", {"default": default, "min": 0.0, "max": NUM_TIMESTEPS, "step": 1.0})


class LoadLimitedLoRA:
    """One LoRA, on in a range of timesteps: 1000 is noise, 0 the image."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders/stagepatch"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        import folder_paths

        names = folder_paths.get_filename_list("loras")
        required = {"model": ("MODEL",), "lora_name": (names,), "strength": _STRENGTH}
        return {"required": {**required, "from_timestep": _timestep(0.0), "to_timestep": _timestep(NUM_TIMESTEPS)}}

    def load(self, model, lora_name, strength, from_timestep, to_timestep):
        import folder_paths

        if from_timestep >= to_timestep:
            raise ValueError(f"from_timestep={from_timestep:g} must be less than to_timestep={to_timestep:g}.")
        file = folder_paths.get_full_path_or_raise("loras", lora_name)
        return (put_on(model, [(file, from_timestep, to_timestep, strength)]),)


class LoadLimitedLoRAs:
    """The LoRAs of an experts.yaml, as `stagepatch export` and `stagepatch experts` write it."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders/stagepatch"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {
            "required": {
                "model": ("MODEL",),
                "schedule": ("STRING", {"default": "experts.yaml"}),
                "strength": _STRENGTH,
            }
        }

    @classmethod
    def IS_CHANGED(cls, model, schedule, strength):  # noqa: N802
        return _find(schedule).stat().st_mtime

    def load(self, model, schedule, strength):
        loras = [(file, start, end, weight * strength) for file, start, end, weight in read_schedule(_find(schedule))]
        return (put_on(model, loras),)


class LoadPatch:
    """A patch of prompts for FLUX.1: its directory, or its Hub id."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders/stagepatch"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "patch": ("STRING", {"default": ""}), "scale": _STRENGTH}}

    def load(self, model, patch, scale):
        return (put_patch_on(model, patch, scale),)


def _find(schedule):
    """A whole path, or one within a folder of LoRAs."""
    import folder_paths

    path = Path(schedule)
    return path if path.is_file() else Path(folder_paths.get_full_path_or_raise("loras", schedule))


NODE_CLASS_MAPPINGS = {
    "StagepatchLoadLimitedLoRA": LoadLimitedLoRA,
    "StagepatchLoadLimitedLoRAs": LoadLimitedLoRAs,
    "StagepatchLoadPatch": LoadPatch,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "StagepatchLoadLimitedLoRA": "Load LoRA limited to timesteps",
    "StagepatchLoadLimitedLoRAs": "Load limited LoRAs (experts.yaml)",
    "StagepatchLoadPatch": "Load patch of prompts (FLUX.1)",
}
