"""What the README says, done."""

import re
from pathlib import Path

import pytest
import torch

from stagepatch import Patch
from stagepatch.checkpoints import load_denoiser
from stagepatch.methods import LoRA, LoRAConfig

ROOT = Path(__file__).parent.parent
PYTHON = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_on_the_first_screen_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = LoRA(LoRAConfig(rank=2, num_stages=4))
    lora.prepare(load_denoiser("fashion")[0])
    lora.save(Path("runs/demo"))
    names = {}
    exec(PYTHON[0], names)
    assert names["images"].shape == (16, 1, 16, 16)
    assert torch.isfinite(names["images"]).all()


def test_a_run_from_a_script_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in PYTHON if "Run(" in block]
    names = {}
    exec(code.replace("steps=100", "steps=2"), names)
    saved = Patch.from_pretrained("runs/script")
    assert torch.equal(saved.prompts[0], names["patch"].prompts[0])


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not ((ROOT / page).parent / link).exists()]
    assert not missing


def test_what_the_page_of_the_papers_names_is_there():
    """Files, and after a colon a function or class of theirs."""
    page = (ROOT / "docs" / "papers.md").read_text()
    named = re.findall(r"`((?:src|tests|configs|experiments)/[\w/.-]+)(?::(\w+))?`", page)
    assert len(named) > 30
    assert [path for path, _ in named if not (ROOT / path).exists()] == []
    of_code = [(ROOT / path, name) for path, name in named if path.endswith(".py") and path.startswith("src")]
    assert all(name for _, name in of_code)
    assert [name for path, name in of_code if not re.search(rf"^(def|class) {name}\b", path.read_text(), re.M)] == []
