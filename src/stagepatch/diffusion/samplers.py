"""Samplers by name."""

from __future__ import annotations

from typing import Any

import diffusers

from stagepatch.core.errors import UserError

_NAMES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}


def make_sampler(name: str, trained_with: Any) -> Any:
    """A sampler with the betas and the prediction type of the scheduler that a model was trained with.

    Raises:
        UserError: no such scheduler, or one for another kind of model (flow against diffusion).
    """
    class_name = _NAMES.get(name.lower(), name)
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None or not hasattr(scheduler_class, "set_timesteps"):
        raise UserError(
            f"diffusers has no scheduler '{name}'. Give the name of one of its classes, or one of: "
            f"{', '.join(_NAMES)}."
        )
    is_flow = "FlowMatch" in class_name
    if is_flow != ("FlowMatch" in type(trained_with).__name__):
        raise UserError(f"'{name}' does not fit a model trained with {type(trained_with).__name__}.")
    config = dict(trained_with.config)
    if class_name != "DDPMScheduler":
        # The variance is split off before the sampler; some samplers would split off three channels themselves.
        config.pop("variance_type", None)
    return scheduler_class.from_config(config)
