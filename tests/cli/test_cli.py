"""The command line: help, overrides, resolved configs, and a message with exit code 2 for each mistake."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import COMMANDS, main
from stagepatch.cli.app import _parse
from stagepatch.core.tensors import write_tensors
from tests.runs import MODEL, imported_by, options
from tests.search.searches import save_learned
from tests.tiny import FAMILIES
from tests.training.test_train_on_pipelines import draw_images

TINY_TRAINING = options(
    "training", {"steps": 4, "batch_size": 8, "log_every": 2, "checkpoint_every": 2, "tensorboard": False}
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    assert main(["pretrain", f"--output_dir={directory}", *options("model", MODEL), *TINY_TRAINING]) == 0
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
    assert all(text in message for text in expected), message
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
    fails(capsys, ["pretrain", *unet, "--model.name=DiT-S/2", f"--output_dir={tmp_path / 'x'}"], "are a DiT's")
    uneven = ["--model.block_out_channels=[8, 8, 8]", "--model.sample_size=6"]
    fails(capsys, ["pretrain", *uneven, *plain], "cannot be halved 2 times")


def test_pretrains_a_unet_of_classes_that_learns_its_variance(tmp_path, capsys):
    unet = ["--model.block_out_channels=[8, 16]", "--model.layers_per_block=1", "--model.sample_size=8"]
    kind = ["--model.in_channels=1", "--model.conditioning=class", "--model.num_classes=10", "--data.source=digits"]
    place = [f"--output_dir={tmp_path / 'unet'}", "--training.steps=2", "--training.batch_size=8"]
    assert main(["pretrain", *unet, *kind, *place]) == 0
    model, scheduler = load_denoiser(tmp_path / "unet")
    assert (model.config.num_class_embeds, model.config.out_channels) == (10, 2)
    assert scheduler.config.variance_type == "learned_range"
    sampling = ["--sampling.num_images=2", "--sampling.num_inference_steps=2", f"--output_dir={tmp_path / 'out'}"]
    assert main(["sample", f"--model={tmp_path / 'unet'}", "--classes=[7]", *sampling]) == 0
    text = ["--model.conditioning=text", f"--output_dir={tmp_path / 'text'}", "--data.source=digits"]
    fails(capsys, ["pretrain", *unet, *text], "give --parts")


def test_a_folder_without_classes_is_said_to_be_of_one(tmp_path, capsys):
    draw_images(tmp_path / "images", size=(8, 8), captions=False)
    few = [
        "--sampling.num_images=4",
        "--sampling.num_inference_steps=1",
        "--seeds=[0]",
        "--metrics=[nearest_train]",
        "--extractor=digits",
    ]
    data = [f"--data.source={tmp_path / 'images'}", "--data.image_size=8", f"--output_dir={tmp_path / 'out'}"]
    assert main(["evaluate", "--model=digits", *data, *few]) == 0
    assert "all samples have label 0 of the model's 10" in " ".join(capsys.readouterr().out.split())


def test_help_lists_every_command(capsys):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("stagepatch 0.")


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


@pytest.mark.parametrize("command", ["train", "analyze"])
def test_help_of_a_command_imports_no_torch(command):
    assert "torch" not in imported_by(f"from stagepatch.cli import main; main(['{command}', '--help'])")


def test_overrides_win_over_the_file_and_the_resolved_config_is_kept(tmp_path, tiny_model):
    (tmp_path / "c.yaml").write_text("training: {steps: 3, batch_size: 8, tensorboard: false}\npatch: {gate: none}\n")
    run = tmp_path / "run"
    given = [f"--config={tmp_path / 'c.yaml'}", f"--output_dir={run}", f"--model={tiny_model}", "--training.steps=2"]
    assert main(["train", *given]) == 0
    resolved = yaml.safe_load((run / "run.yaml").read_text())
    assert {"steps": 2, "batch_size": 8, "learning_rate": 1e-4}.items() <= resolved["training"].items()
    assert json.loads((run / "config.json").read_text())["patch"]["gate"] == "none"
    # The resolved config is itself a config.
    assert main(["train", f"--config={run / 'run.yaml'}"]) == 0


def test_train_writes_a_patch_that_sample_and_inspect_take(tiny_model, tiny_patch, tmp_path, capsys, shows):
    tensors = load_file(tiny_patch / "model.safetensors")
    assert set(tensors) == {"prompts.blocks.0", "prompts.blocks.1", "gate.weight", "gate.bias"}
    given = [f"--model={tiny_model}", f"--patch={tiny_patch}", f"--output_dir={tmp_path}"]
    assert main(["sample", *given, "--sampling.num_images=12", "--sampling.num_inference_steps=2"]) == 0
    assert load_file(tmp_path / "samples.safetensors")["images"].shape == (12, 1, 8, 8)
    assert Image.open(tmp_path / "grid.png").size[0] > 80
    capsys.readouterr()
    assert main(["inspect", str(tiny_patch)]) == 0
    text = capsys.readouterr().out
    assert "blocks.0 … blocks.1" in text
    assert "checkpoint at iteration 4" in text
    for path in (tiny_model, "digits", tiny_patch / "model.safetensors"):
        assert main(["inspect", str(path)]) == 0
    shows("training", "DiT")


def test_evaluate_compares_base_and_patched_from_the_same_noise(tiny_model, tiny_patch, tmp_path, capsys):
    # A patch of scale 0 is the base model: every paired difference is exactly zero.
    given = [f"--model={tiny_model}", f"--patch={tiny_patch}", "--patch_scale=0", f"--output_dir={tmp_path}"]
    sampling = ["--seeds=[5,6]", "--sampling.num_images=100", "--sampling.num_inference_steps=2"]
    assert main(["evaluate", *given, *sampling]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["seeds"] == [5, 6]
    assert metrics["base"] == metrics["patched"]
    assert metrics["base"][0] != metrics["base"][1]
    assert "FID (digits" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("trian", ["no command 'trian'", "Did you mean 'train'?"]),
        ("train --training.stepz=3", ["stepz"]),
        ("train --training.steps=many", ["training.steps", "int", "many"]),
        ("train --patch.gate=quadratic", ["patch.gate", "quadratic"]),
        ("train --metod=dmp", ["There is no option --metod. Did you mean --method?"]),
        ("decouple --num_stage 3", ["There is no option --num_stage. Did you mean --num_stages?"]),
        ("train --method=none", ["trains nothing"]),
        ("train --config=nowhere.yaml", ["No such config file", "nowhere.yaml"]),
        ("train --config nowhere.yaml", ["No such config file", "nowhere.yaml"]),
        ("train --model=nowhere --output_dir=HERE", ["No model at 'nowhere'", "digits"]),
        ("train --data.source=nowhere --output_dir=HERE", ["No images at 'nowhere'"]),
        ("sample --patch=nowhere --output_dir=HERE", ["No patch at 'nowhere'"]),
        ("inspect nowhere", ["Nothing at 'nowhere'"]),
        ("inspect HERE", ["holds no patch"]),
    ],
)
def test_what_is_misspelt_or_missing_is_named(capsys, tmp_path, command, expected):
    fails(capsys, command.replace("HERE", str(tmp_path)).split(), *expected)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("patch:\n  gaet: none\n", "gaet"),
        ("training: {steps: 3\n", "c.yaml"),
        ('patch: "\\0"\n', "null byte"),  # a text that is looked for as a file
    ],
)
def test_mistakes_of_a_config_file_are_named(capsys, tmp_path, text, named):
    (tmp_path / "c.yaml").write_text(text)
    fails(capsys, ["train", f"--config={tmp_path / 'c.yaml'}"], named)


FLIPPED = ["--data.horizontal_flip", "--data.horizontal_flip --output_dir x"]
PLAIN = ["--output_dir x --data.horizontal_flip false", "--data.horizontal_flip=false", ""]


@pytest.mark.parametrize("arguments", FLIPPED + PLAIN)
def test_a_boolean_is_a_flag(arguments):
    assert _parse("train", arguments.split())[0].data.horizontal_flip is (arguments in FLIPPED)
    assert _parse("decouple", [*arguments.split(), "--antithetic"])[0].antithetic is True


def test_weights_that_are_truncated_or_of_another_model_are_named(capsys, tiny_patch, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_patch / name).read_bytes())
    weights, sample = tmp_path / "model.safetensors", ["sample", f"--patch={tmp_path}", f"--output_dir={tmp_path}"]
    weights.write_bytes(weights.read_bytes()[:100])
    fails(capsys, sample, "not a whole safetensors file")
    save_file({"other": load_file(tiny_patch / "model.safetensors")["gate.bias"]}, weights)
    fails(capsys, sample, "does not hold this patch")
    given = ["--model=digits", f"--patch={tiny_patch}", f"--output_dir={tmp_path}"]
    fails(capsys, ["sample", *given], "The patch is for another model", "sites")


def test_bad_image_folders(capsys, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    given = [f"--data.source={folder}", f"--output_dir={tmp_path / 'run'}"]
    fails(capsys, ["train", *given], "No image in")
    (folder / "broken.png").write_bytes(b"not a picture")
    fails(capsys, ["train", *given], "broken.png")


def test_nan_loss_stops_with_the_last_good_checkpoint(capsys, tiny_model, tmp_path):
    given = [f"--model={tiny_model}", f"--output_dir={tmp_path}", *TINY_TRAINING, "--training.steps=40"]
    fails(capsys, ["train", *given, "--training.learning_rate=9e18"], "The loss is", "checkpoint")


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
        save_learned(name, model, tmp_path / name)
    index = {"file": torch.zeros(5, dtype=torch.long), "caption": torch.tensor([0, 1, 2, 1, 0])}
    write_tensors(tmp_path / "cache" / "index.safetensors", index)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "results.json").write_text("[]")
    contents = {"lora": "LoRA rank", "bitfit": "trained weights", "cache": "5 images, 3 captions"}
    for name, expected in {**contents, "compare": "table.md"}.items():
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert expected in capsys.readouterr().out
