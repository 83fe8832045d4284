"""The house rule of DESIGN.md, by import-linter: a room imports from the rooms before it, and nothing in a circle."""

import subprocess
import sys
from pathlib import Path

from tests.runs import imported_by

ROOT = Path(__file__).parent.parent


def test_rooms_import_one_way():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_importing_the_package_does_not_import_torch():
    heavy = {"torch", "diffusers", "transformers", "numpy", "sklearn", "matplotlib"}
    assert not imported_by("import stagepatch") & heavy
