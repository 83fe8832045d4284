"""LoRAs in the forms of other programs."""

from stagepatch.cli import config as configs
from stagepatch.cli.common import say
from stagepatch.core import UserError
from stagepatch.sharing import export_lora


def export(config: configs.ExportConfig, resolved: str) -> None:
    """Write LoRAs as other programs read them."""
    if not config.path or not config.output:
        raise UserError("Give what to export and where to: stagepatch export PATH OUTPUT --to diffusers|kohya|comfyui")
    for file in export_lora(config.path, config.output, config.to, config.model_class):
        say(str(file))
