"""What was learned, on the Hub."""

import tempfile
from pathlib import Path

from stagepatch.cli import config as configs
from stagepatch.cli.common import say
from stagepatch.core import UserError
from stagepatch.sharing import push_folder, write_folder


def push(config: configs.PushConfig, resolved: str) -> None:
    """Upload what was learned with a card, or write the folder that would be uploaded."""
    if not config.path or not config.repo_id:
        raise UserError("Give what to push and where to: stagepatch push PATH NAME/REPOSITORY")
    extras = (config.repo_id, config.samples, config.evaluation, config.prompt)
    if config.dry_run:
        write_folder(config.path, config.dry_run, *extras)
        say(f"What would be uploaded to '{config.repo_id}' is in '{config.dry_run}'.")
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(config.path, Path(scratch), *extras)
        say(push_folder(Path(scratch), config.repo_id, config.private, config.revision))
