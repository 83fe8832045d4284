"""`stagepatch merge`."""

import pytest
import torch
from safetensors.torch import load_file

from stagepatch.backbones import load_denoiser
from stagepatch.cli import main
from stagepatch.methods import LoRAConfig, load_learned, make_method
from stagepatch.patch import PatchConfig
from tests.tiny_pipelines import PIPELINES

TINY = PIPELINES["UNet2DConditionModel"]


def test_merged_model_is_a_pipeline(tmp_path, capsys):
    for seed, name in enumerate(("base", "one", "two")):
        TINY.build(seed=seed).save_pretrained(tmp_path / name)
    stages = f"--stages=['{tmp_path / 'one'}', '{tmp_path / 'two'}']"
    given = [f"--base={tmp_path / 'base'}", stages, f"--output_dir={tmp_path / 'out'}"]
    assert main(["merge", *given, "--weights=[0.0, 1.0]"]) == 0
    assert "The merged model is in" in capsys.readouterr().out
    merged, expected = (load_denoiser(tmp_path / name)[0] for name in ("out", "two"))
    for ours, theirs in zip(merged.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert TINY.call(TINY.load(tmp_path / "out")).isfinite().all()
    assert main(["merge", *given, "--weights=[0.5, 0.5]", "--ties_keep=0.3"]) == 0
    assert main(["merge", *given, "--weights=[0.5]"]) == 2
    assert "1 weights for 2 stages" in capsys.readouterr().err
    assert main(["merge", *given, "--weights=[0.5, 0.5]", "--ties_keep=3"]) == 2
    assert main(["merge", "--base=nowhere/at/all", stages, "--weights=[1, 1]"]) == 2
    assert "No model at" in capsys.readouterr().err


def test_merged_lora_is_the_weighted_sum_of_the_stages(tmp_path, capsys):
    pipe = TINY.build()
    directories = []
    for number in range(2):
        method = make_method("lora", PatchConfig(), LoRAConfig(rank=2))
        (group,) = method.prepare(TINY.build().unet)
        with torch.no_grad():
            for parameter in group["params"]:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        directories.append(tmp_path / str(number))
        method.save(directories[-1])
    stages = f"--stages=['{directories[0]}', '{directories[1]}']"
    assert main(["merge", stages, "--weights=[1.0, 0.0]", f"--output_dir={tmp_path / 'out'}"]) == 0
    assert "The merged LoRA" in capsys.readouterr().out
    shapes = {value.shape for name, value in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors").items()}
    assert any(4 in shape for shape in shapes)
    load_learned(pipe.unet, tmp_path / "out")
    first = TINY.build()
    load_learned(first.unet, directories[0])
    torch.testing.assert_close(TINY.call(pipe), TINY.call(first), rtol=1e-4, atol=1e-5)
    ties = [stages, "--weights=[1.0, 0.0]", "--ties_keep=0.5", f"--output_dir={tmp_path / 'ties'}"]
    assert main(["merge", *ties]) == 2
    assert "would not be a LoRA" in capsys.readouterr().err


@pytest.mark.parametrize("stages", ["[]", "['nowhere']"])
def test_missing_stages_are_named(tmp_path, capsys, stages):
    TINY.build().save_pretrained(tmp_path / "base")
    given = [f"--base={tmp_path / 'base'}", f"--stages={stages}", "--weights=[]", f"--output_dir={tmp_path / 'out'}"]
    assert main(["merge", *given]) == 2
    assert "stagepatch merge:" in capsys.readouterr().err
