"""The command line: a command is a file."""

from stagepatch.cli.app import COMMANDS as COMMANDS
from stagepatch.cli.app import main as main
