"""README's table of models, and docs/models.md, from what the tests that ran have shown.

After a run of all tests, `python -m tests.models_table` writes them; with `--check` it fails where they say
something else.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from stagepatch.families import describe
from tests.families.test_family_families import SIZES
from tests.tiny import FAMILIES

ROOT = Path(__file__).parents[1]
SHOWN = ROOT / ".pytest_cache" / "v" / "models" / "shown"
KINDS = ("identity", "gradients", "sizes", "saving", "pipeline", "training")
BEGIN, END = "<!-- of tests that ran: python -m tests.models_table -->\n", "<!-- end -->\n"


def title(name: str) -> str:
    model_class, *rest = name.split(" ", 1)
    return " ".join([f"`{model_class}`", *(["(ours)"] if model_class == "DiT" else []), *rest])


def sites(name: str) -> str:
    """Modules before which prompts are added."""
    backbone = describe(FAMILIES[name].model(), SIZES.get(name))
    first = backbone.sites[0].kind
    return ", ".join(dict.fromkeys(f"`{site.module.split('.')[0]}`" for site in backbone.sites if site.kind == first))


def tables(shown: set[str]) -> dict[Path, str]:
    """The text between the marks, of each page."""
    seen = {name: [kind for kind in KINDS if f"{kind}: {name}" in shown] for name in FAMILIES}
    alike = defaultdict(list)
    for name, kinds in seen.items():
        alike[", ".join(kinds)].append(title(name))
    groups = sorted(alike.items(), key=lambda group: -group[0].count(","))
    short = ["| seen to hold | of models |", "| --- | --- |"]
    short += [f"| {kinds or 'nothing'} | {', '.join(names)} |" for kinds, names in groups]
    long = [f"| model | prompts before each of | {' | '.join(KINDS)} |", f"| --- | --- |{' :-: |' * len(KINDS)}"]
    for name, kinds in seen.items():
        marks = " | ".join("✓" if kind in kinds else "" for kind in KINDS)
        long.append(f"| {title(name)} | {sites(name)} | {marks} |")
    return {ROOT / "README.md": "\n".join(short) + "\n", ROOT / "docs" / "models.md": "\n".join(long) + "\n"}


def main() -> int:
    if not SHOWN.exists():
        print("Run all tests first: pytest", file=sys.stderr)
        return 2
    for page, table in tables(set(json.loads(SHOWN.read_text()))).items():
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        new = f"{before}{BEGIN}{table}{END}{rest.split(END)[1]}"
        if "--check" in sys.argv and new != text:
            print(
                f"{page.name} says something else of models than the tests that ran: python -m tests.models_table",
                file=sys.stderr,
            )
            return 1
        if new != text:
            page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
