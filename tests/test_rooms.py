"""The house rule of DESIGN.md: a room imports from the rooms before it, never from one after it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stagepatch

PACKAGE = Path(stagepatch.__file__).parent
ROOMS = ["models", "backbones", "patch", "diffusion", "data", "methods", "training", "sampling"]
ROOMS += ["evaluation", "analysis", "report", "launching", "scheduling", "merging", "decoupling", "comparing"]
FACE = {"commands"}
FOR_ALL = {"errors", "files", "processes", "progress", "settings"}
NO_ROOMS = {"assets", "__pycache__"}
TOP = len(ROOMS)  # config, demo, cli and whatever else lies beside the rooms


def sources():
    return sorted(
        path
        for pattern in ("*.py", "*.pyi")
        for path in PACKAGE.rglob(pattern)
        if path.relative_to(PACKAGE).parts[0] not in NO_ROOMS
    )


def imports(source, package):
    """(line, dotted names) of every import statement at any depth, relative ones resolved from `package`.

    A bare `import stagepatch` imports nothing by itself, as names load on first use: their uses count.
    """
    tree = ast.parse(source)
    bare = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "stagepatch"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name != "stagepatch")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bare:
            yield node.lineno, f"stagepatch.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def rank(name):
    """Where a module of ours stands: -1 for what all may import, a room's place in the list, or above all rooms."""
    if name in FOR_ALL:
        return -1
    return ROOMS.index(name) if name in ROOMS else TOP


def violations(source, location):
    """Lines of a source file at `location` (its parts below the package) that import from a room after its own."""
    here = rank(Path(location[0]).stem)
    package = ".".join(["stagepatch", *location[:-1]])
    found = []
    for line, name in imports(source, package):
        parts = name.split(".")
        if parts[0] != "stagepatch" or parts[1:] == ["__version__"]:
            continue
        if rank(parts[1]) > here:
            found.append(f"{'/'.join(location)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_come_from_rooms_before_it(path):
    assert violations(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).parts) == []


def test_every_folder_is_a_known_room():
    folders = {path.relative_to(PACKAGE).parts[0] for path in sources() if path.parent != PACKAGE}
    assert folders <= set(ROOMS) | FACE


@pytest.mark.parametrize(
    ("location", "source"),
    [
        (("models", "dit.py"), "from stagepatch.patch import Patch"),
        (("models", "dit.py"), "import stagepatch.cli"),
        (("models", "dit.py"), "import stagepatch\n\nstagepatch.Patch"),
        (("models", "dit.py"), "import stagepatch as s\n\ns.patch.Patch"),
        (("models", "dit.py"), "from stagepatch import DiT"),
        (("models", "dit.py"), "from stagepatch import patch"),
        (("models", "dit.py"), "from ..patch.gate import LinearGate"),
        (("models", "dit.py"), "from .. import training"),
        (("models", "dit.py"), "if TYPE_CHECKING:\n    from stagepatch.backbones import Site"),
        (("models", "dit.py"), "def f():\n    try:\n        from stagepatch.data import x\n    except OSError: ..."),
        (("data", "__init__.pyi"), "from ..methods import DMP as DMP"),
        (("sampling", "deep", "er.py"), "from ...evaluation import fid"),
        (("report", "page.py"), "from stagepatch.config import Config"),
        (("files.py",), "from stagepatch.models import DiT"),
        (("errors.py",), "from . import data"),
    ],
)
def test_rule_finds_an_import_from_a_later_room(location, source):
    assert len(violations(source, location)) == 1


@pytest.mark.parametrize(
    ("location", "source"),
    [
        (("patch", "patch.py"), "from stagepatch.backbones import Site\nfrom stagepatch import models"),
        (("patch", "patch.py"), "from stagepatch.errors import UserError\nfrom ..files import read_json"),
        (("patch", "patch.py"), "from stagepatch.patch.gate import x\nfrom . import balance\nfrom .gate import y"),
        (("models", "dit.py"), "import torch\nfrom stagepatchwork import data\nfrom stagepatch import __version__"),
        (("patch", "storage.py"), "import stagepatch\n\nstagepatch.__version__"),
        (("files.py",), "from stagepatch.errors import UserError"),
        (("cli.py",), "from stagepatch import config, demo\nfrom stagepatch.report import page"),
        (("__init__.pyi",), "from . import models as models\nfrom .patch import Patch as Patch"),
        (("training", "deep", "er.py"), "from ..loop import train\nfrom ...models import DiT"),
    ],
)
def test_rule_allows_what_it_should(location, source):
    assert violations(source, location) == []


def test_importing_the_package_does_not_import_torch():
    script = (
        "import sys, stagepatch\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
