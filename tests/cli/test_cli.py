"""The command line: help, overrides, resolved configs, and a message with exit code 2 for each mistake."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import COMMANDS, main
from stagepatch.cli.app import _parse
from stagepatch.core.tensors import write_tensors
from stagepatch.methods import LoRAConfig, MethodConfig, make_method
from tests.tiny import FAMILIES

TINY_TRAINING = [
    "--training.steps=4",
    "--training.batch_size=8",
    "--training.log_every=2",
    "--training.checkpoint_every=2",
    "--training.tensorboard=false",
]
TINY_MODEL = [
    "--model.sample_size=8",
    "--model.in_channels=1",
    "--model.hidden_size=16",
    "--model.num_layers=2",
    "--model.num_attention_heads=2",
    "--model.num_classes=10",
]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    assert main(["pretrain", f"--output_dir={directory}", *TINY_MODEL, *TINY_TRAINING]) == 0
    return directory


@pytest.fixture(scope="module")
def tiny_patch(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("patch")
    assert main(["train", f"--output_dir={directory}", f"--model={tiny_model}", *TINY_TRAINING]) == 0
    return directory


def fails(capsys, arguments, *expected):
    """The command exits with 2 and its message has what is expected."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("stagepatch")
    for text in expected:
        assert text in message
    assert "Traceback" not in message


def test_pretrains_a_unet_that_is_sampled_and_patched(tmp_path, capsys):
    unet = ["--model.block_out_channels=[16, 32]", "--model.layers_per_block=1", "--model.sample_size=8"]
    plain = ["--model.in_channels=1", "--model.conditioning=none", "--model.learn_sigma=false"]
    training = ["--data.source=digits", "--training.steps=2", "--training.batch_size=8"]
    assert main(["pretrain", f"--output_dir={tmp_path / 'unet'}", *unet, *plain, *training]) == 0
    model, _ = load_denoiser(tmp_path / "unet")
    assert type(model).__name__ == "UNet2DModel"
    assert [type(block).__name__ for block in model.down_blocks] == ["DownBlock2D", "AttnDownBlock2D"]
    sampling = ["--sampling.num_images=2", "--sampling.num_inference_steps=2", f"--output_dir={tmp_path / 'out'}"]
    assert main(["sample", f"--model={tmp_path / 'unet'}", *sampling]) == 0
    assert main(["pretrain", unet[0], f"--output_dir={tmp_path / 'x'}"]) == 2
    assert "are a DiT's" in capsys.readouterr().err
    assert main(["pretrain", "--model.block_out_channels=[8, 8, 8]", "--model.sample_size=6", *plain]) == 2
    assert "cannot be halved 2 times" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("stagepatch 0.")


def test_unknown_command_suggests_the_nearest(capsys):
    fails(capsys, ["trian"], "no command 'trian'", "Did you mean 'train'?")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_key_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    options = capsys.readouterr().out.split("\n  --")[1:]
    keys = [option for option in options if not option.startswith(("config", "print_config"))]
    assert len(keys) >= 1
    for option in keys:
        name, _, text = option.partition(" ")
        if "CONFIG" in text.split("\n")[0] or name.endswith(".help"):
            continue
        assert "default:" in " ".join(text.split()), name
        assert len(text.split("(type:")[0].split()) > 3, f"{name} is not explained"


def test_help_of_a_command_imports_no_torch():
    code = (
        "import sys; from stagepatch.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_overrides_win_over_the_file_and_the_resolved_config_is_kept(tmp_path, tiny_model):
    (tmp_path / "c.yaml").write_text("training: {steps: 3, batch_size: 8, tensorboard: false}\npatch: {gate: none}\n")
    run = tmp_path / "run"
    given = [f"--config={tmp_path / 'c.yaml'}", f"--output_dir={run}", f"--model={tiny_model}", "--training.steps=2"]
    assert main(["train", *given]) == 0
    resolved = yaml.safe_load((run / "run.yaml").read_text())
    assert resolved["training"]["steps"] == 2
    assert resolved["training"]["batch_size"] == 8
    assert resolved["training"]["learning_rate"] == 1e-4
    assert json.loads((run / "config.json").read_text())["patch"]["gate"] == "none"
    # The resolved config is itself a config.
    assert main(["train", f"--config={run / 'run.yaml'}"]) == 0


def test_train_writes_a_patch_that_sample_and_inspect_take(tiny_model, tiny_patch, tmp_path, capsys):
    assert {"prompts.blocks.0", "prompts.blocks.1", "gate.weight", "gate.bias"} == set(
        load_file(tiny_patch / "model.safetensors")
    )
    out = tmp_path / "samples"
    sampling = ["--sampling.num_images=12", "--sampling.num_inference_steps=2"]
    common = [f"--model={tiny_model}", *sampling]
    assert main(["sample", f"--output_dir={out}", f"--patch={tiny_patch}", *common]) == 0
    assert load_file(out / "samples.safetensors")["images"].shape == (12, 1, 8, 8)
    assert Image.open(out / "grid.png").size[0] > 80
    capsys.readouterr()
    assert main(["inspect", str(tiny_patch)]) == 0
    text = capsys.readouterr().out
    assert "blocks.0 … blocks.1" in text
    assert "checkpoint at iteration 4" in text
    assert main(["inspect", str(tiny_model)]) == 0
    assert main(["inspect", "digits"]) == 0
    assert main(["inspect", str(tiny_patch / "model.safetensors")]) == 0


def test_evaluate_compares_base_and_patched_from_the_same_noise(tiny_model, tiny_patch, tmp_path, capsys):
    # A patch of scale 0 is the base model: every paired difference is exactly zero.
    given = [
        f"--model={tiny_model}",
        f"--patch={tiny_patch}",
        "--patch_scale=0",
        "--seeds=[5,6]",
        "--sampling.num_images=100",
        "--sampling.num_inference_steps=2",
    ]
    assert main(["evaluate", f"--output_dir={tmp_path}", *given]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["seeds"] == [5, 6]
    assert metrics["base"] == metrics["patched"]
    assert metrics["base"][0] != metrics["base"][1]
    assert "FID (digits features)" in capsys.readouterr().out


def test_params_prints_table_1(capsys):
    assert main(["params"]) == 0
    text = capsys.readouterr().out
    for name, base, added, share in [
        ("DiT-B/2", "130,315,808", "2,556,416", "+1.96%"),
        ("DiT-L/2", "457,840,672", "6,554,112", "+1.43%"),
        ("DiT-XL/2", "674,834,720", "8,552,960", "+1.26%"),
    ]:
        row = next(line for line in text.splitlines() if name in line)
        assert all(value in row for value in (base, added, share))


def test_unknown_key(capsys, tmp_path):
    fails(capsys, ["train", "--training.stepz=3"], "stepz")
    (tmp_path / "c.yaml").write_text("patch:\n  gaet: none\n")
    fails(capsys, ["train", f"--config={tmp_path / 'c.yaml'}"], "gaet")


def test_wrong_type(capsys):
    fails(capsys, ["train", "--training.steps=many"], "training.steps", "int", "many")
    fails(capsys, ["train", "--patch.gate=quadratic"], "patch.gate", "quadratic")


def test_options_cannot_be_shortened_or_misspelt(capsys):
    fails(capsys, ["train", "--metod=dmp"], "There is no option --metod. Did you mean --method?")
    fails(capsys, ["decouple", "--num_stage", "3"], "There is no option --num_stage. Did you mean --num_stages?")
    fails(capsys, ["train", "--method=none"], "trains nothing")


@pytest.mark.parametrize(
    ("arguments", "flipped"),
    [
        (["--data.horizontal_flip"], True),
        (["--data.horizontal_flip", "--output_dir", "x"], True),
        (["--output_dir", "x", "--data.horizontal_flip", "false"], False),
        (["--data.horizontal_flip=false"], False),
        ([], False),
    ],
)
def test_a_boolean_is_a_flag(arguments, flipped):
    assert _parse("train", arguments)[0].data.horizontal_flip is flipped
    assert _parse("decouple", [*arguments, "--antithetic"])[0].antithetic is True


def test_missing_files(capsys, tmp_path):
    fails(capsys, ["train", "--config=nowhere.yaml"], "No such config file", "nowhere.yaml")
    fails(capsys, ["train", "--config", "nowhere.yaml"], "No such config file", "nowhere.yaml")
    fails(capsys, ["train", "--model=nowhere", f"--output_dir={tmp_path}"], "No model at 'nowhere'", "digits")
    fails(capsys, ["sample", "--patch=nowhere", f"--output_dir={tmp_path}"], "No patch at 'nowhere'")
    fails(capsys, ["inspect", "nowhere"], "Nothing at 'nowhere'")
    fails(capsys, ["inspect", str(tmp_path)], "holds no patch")


def test_bad_yaml(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("training: {steps: 3\n")
    fails(capsys, ["train", f"--config={tmp_path / 'c.yaml'}"], "c.yaml")


def test_truncated_and_foreign_weights(capsys, tiny_patch, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_patch / name).read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    fails(capsys, ["sample", f"--patch={tmp_path}", f"--output_dir={tmp_path}"], "not a whole safetensors file")
    save_file({"other": load_file(tiny_patch / "model.safetensors")["gate.bias"]}, weights)
    fails(capsys, ["sample", f"--patch={tmp_path}", f"--output_dir={tmp_path}"], "does not hold this patch")


def test_patch_for_another_model(capsys, tiny_patch, tmp_path):
    fails(
        capsys,
        ["sample", "--model=digits", f"--patch={tiny_patch}", f"--output_dir={tmp_path}"],
        "The patch is for another model",
        "sites",
    )


def test_bad_image_folders(capsys, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    given = [f"--data.source={folder}", f"--output_dir={tmp_path / 'run'}"]
    fails(capsys, ["train", *given], "No image in")
    (folder / "broken.png").write_bytes(b"not a picture")
    fails(capsys, ["train", *given], "broken.png")
    fails(capsys, ["train", "--data.source=nowhere", f"--output_dir={tmp_path}"], "No images at 'nowhere'")


def test_nan_loss_stops_with_the_last_good_checkpoint(capsys, tiny_model, tmp_path):
    given = [f"--model={tiny_model}", f"--output_dir={tmp_path}", *TINY_TRAINING, "--training.steps=40"]
    fails(capsys, ["train", *given, "--training.learning_rate=1e37"], "The loss is", "checkpoint")


def test_a_config_that_a_run_cannot_take_is_refused_before_training(capsys, tiny_model, tmp_path):
    given = [f"--model={tiny_model}", f"--output_dir={tmp_path}"]
    fails(capsys, ["train", *given, "--patch.sites=[blocks.7]"], "blocks.7", "blocks.1")
    fails(capsys, ["train", *given, "--training.batch_size=7", "--training.gradient_accumulation_steps=2"], "divide")


def test_another_config_in_the_same_directory_is_refused(capsys, tiny_model, tiny_patch):
    given = [f"--output_dir={tiny_patch}", f"--model={tiny_model}", *TINY_TRAINING]
    before = (tiny_patch / "run.yaml").read_text()
    fails(capsys, ["train", *given, "--training.seed=9"], "other settings", "training.seed was 0, is 9")
    assert (tiny_patch / "run.yaml").read_text() == before


def test_inspect_says_what_methods_caches_and_comparisons_hold(capsys, tmp_path):
    model = FAMILIES["UNet2DConditionModel"].model()
    for name in ("lora", "bitfit"):
        method = make_method(MethodConfig(name, lora=LoRAConfig(rank=3)))
        method.prepare(model)
        method.save(tmp_path / name)
    index = {"file": torch.zeros(5, dtype=torch.long), "caption": torch.tensor([0, 1, 2, 1, 0])}
    write_tensors(tmp_path / "cache" / "index.safetensors", index)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "results.json").write_text("[]")
    for path, expected in [
        ("lora", "LoRA rank"),
        ("bitfit", "trained weights"),
        ("cache", "5 images, 3 captions"),
        ("compare", "table.md"),
    ]:
        assert main(["inspect", str(tmp_path / path)]) == 0
        assert expected in capsys.readouterr().out
