"""What CONTRIBUTING.md shows is done here as it stands there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.evaluation import metrics
from stagepatch.methods import METHODS, load_learned, open_artifact
from tests.runs import options

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def blocks(title, language):
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def added(diff):
    return "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+")) + "\n"


def test_additions_are_of_ten_lines_at_most():
    (method,) = blocks("A method", "python")
    assert sum(bool(line.strip()) for line in method.splitlines()) + 1 <= 10
    for title in ("A method", "A metric"):
        assert all(len(added(diff).splitlines()) <= 10 for diff in blocks(title, "diff"))


def test_a_method_is_a_class_and_a_line(monkeypatch, tmp_path, tiny_dit, capsys):
    name, path = re.search(r'"(\w+)": "([\w.:]+)"', added(blocks("A method", "diff")[0])).groups()
    module = types.ModuleType(path.split(":")[0])
    exec(blocks("A method", "python")[0], module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["train", f"--method={name}"]) == 2
    assert f"No method '{name}'" in capsys.readouterr().err
    monkeypatch.setitem(METHODS, name, path)
    training = options("training", {"steps": 1, "batch_size": 4, "tensorboard": False})
    assert main(["train", f"--method={name}", f"--output_dir={tmp_path / 'run'}", "--lora.rank=2", *training]) == 0
    artifact = open_artifact(tmp_path / "run")
    assert artifact.kind == "LoRA"
    model, _ = load_denoiser("digits")
    load_learned(model, artifact.path)
    adapted = {key.split(".lora_")[0] for key in model.state_dict() if ".lora_" in key}
    assert adapted
    assert all(key.endswith("attn.qkv") for key in adapted)


def test_a_metric_is_a_function_and_a_line(monkeypatch):
    function, entry = added(blocks("A metric", "diff")[0]).split("\n\n\n")
    names = {**vars(metrics)}
    exec(function, names)
    key, value = re.fullmatch(r'\s*"(\w+)": (.*),\n', entry).groups()
    monkeypatch.setitem(metrics.METRICS, key, eval(value, names))
    assert "distance of means (digits)" in metrics.metric_names("digits").values()
    found = metrics.METRICS[key].function(torch.ones(3, 4), torch.zeros(5, 4))
    assert found == pytest.approx(2.0)
