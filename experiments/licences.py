"""Write docs/licences.md: the licences of what stagepatch is installed with, as their own metadata say.

python experiments/licences.py
"""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("datasets", "video", "optimizers", "pruning", "wandb", "trackio", "quantization", "search")


def requirements(found: Distribution, extras: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of what a distribution needs, with some of its extras."""
    for text in found.requires or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        if extra is None or extra[1] in extras:
            yield re.split(r"[^\w.-]", text, maxsplit=1)[0].lower().replace("_", "-")


def licence(found: Distribution) -> str:
    """In SPDX's words where the metadata have them, else as the classifiers or the first line say."""
    metadata = found.metadata
    if spdx := metadata.get("License-Expression"):
        return str(spdx)
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if "License ::" in line]
    text = (metadata.get("License") or "").strip().split("\n")[0]
    return " / ".join(classifiers) if classifiers else text[:80] or "see its files"


def main() -> None:
    """Every distribution that is reached from stagepatch's own requirements and is installed here."""
    todo, rows, absent = list(requirements(distribution("stagepatch"), EXTRAS)), {}, set()
    while todo:
        name = todo.pop()
        if name in rows or name in absent:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            absent.add(name)
            continue
        rows[name] = licence(found)
        todo += requirements(found)
    table = "\n".join(f"| {name} | {rows[name]} |" for name in sorted(rows))
    (ROOT / "docs" / "licences.md").write_text(
        "# Licences\n\nstagepatch itself is Apache-2.0. What it is installed with, extras included where they are "
        "installed, has the licences below, as each one's own metadata say; `python experiments/licences.py` writes "
        f"this page anew.\n\n| package | licence |\n| --- | --- |\n{table}\n"
    )


if __name__ == "__main__":
    main()
