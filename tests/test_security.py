"""What is fetched runs no code, is what was asked for, and takes no token along; see docs/security.md."""

import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import yaml

from stagepatch.checkpoints import hub as layout
from stagepatch.checkpoints import load_denoiser, load_lora, load_pipeline
from stagepatch.checkpoints.captions import _load_clip
from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.data import ArraySource, DataConfig, WebDatasetSource, load_dataset
from stagepatch.methods import open_artifact
from stagepatch.models import DiT
from stagepatch.patch import Patch
from stagepatch.sampling import write_limited_loras
from stagepatch.sampling.limited_loras import LimitedLoRA
from tests.data.reading import encoded
from tests.hub import COMMIT, TAGGED
from tests.runs import options
from tests.tiny_pipelines import PIPELINES

TOKEN = "hf_" + "A1b2C3d4E5f6G7h8" * 2


class Bomb:
    """Makes a directory where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """It goes off where a pickle is loaded; at the end it must not have."""
    yield Bomb(tmp_path / "exploded")
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def pipe():
    return PIPELINES["UNet2DConditionModel"].build()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(directory)
    return directory


def copy_of(saved, directory, *without):
    for path in saved.rglob("*"):
        if path.is_file() and path.name not in without:
            target = directory / path.relative_to(saved)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return directory


def test_the_bomb_is_one(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").is_dir()


@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_checkpoints_are_not_unpickled(tmp_path, bomb, ending, is_zip):
    path = tmp_path / f"dit{ending}"
    torch.save({"ema": {"x_embedder.proj.weight": bomb}}, path, _use_new_zipfile_serialization=is_zip)
    for read in (DiT.from_original, Patch.from_released):
        with pytest.raises(UserError, match="which are not loaded because they can run code"):
            read(path)


def test_arrays_are_not_unpickled(tmp_path, bomb):
    array = np.array([bomb], dtype=object)
    np.savez(tmp_path / "a.npz", image=array)
    np.save(tmp_path / "a.npy", array)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        file.writestr("image.npy", pickle.dumps(bomb))
    for name in ("a.npz", "a.npy", "b.npz"):
        with pytest.raises(UserError, match=r"Cannot read|no array"):
            ArraySource(DataConfig(str(tmp_path / name)))


def test_members_of_shards_are_read_as_images_and_text_alone(tmp_path, bomb):
    members = {"0.png": encoded(10), "0.txt": b"ten", "1.png": pickle.dumps(bomb), "2.json": pickle.dumps(bomb)}
    members |= {"2.png": encoded(20)} | {
        f"0.{ending}": pickle.dumps(bomb) for ending in ("pyd", "pickle", "pth", "npy")
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = WebDatasetSource(tmp_path)
    assert source.captions(0) == ["ten"]
    assert len(load_dataset(DataConfig(str(tmp_path), image_size=8))) == 2  # the pickle is no image
    with pytest.raises(UserError, match="is not"):
        source.captions(2)


def test_nothing_of_a_shard_reaches_the_disk(tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(shards / "a.tar", "w") as tar:
        for name in ("../../up.png", "/root.png", "0.png"):
            info = tarfile.TarInfo(name)
            info.size = len(encoded(10))
            tar.addfile(info, io.BytesIO(encoded(10)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "../secret.txt"
            tar.addfile(info)
            info.name = "0.txt"
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    dataset = load_dataset(DataConfig(str(shards), image_size=8))
    assert [item["caption"] for item in (dataset[0], dataset[1], dataset[2])] == ["", "", ""]
    assert len(dataset) == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_of_models_are_not_unpickled(tmp_path, bomb, saved):
    weights = "diffusion_pytorch_model"
    unet = copy_of(saved, tmp_path / "unet", f"{weights}.safetensors", "model.safetensors")
    torch.save({"conv_in.weight": bomb}, unet / "unet" / f"{weights}.bin")
    with pytest.raises(UserError, match=r"The weights in .* cannot be loaded"):
        load_denoiser(unet)
    torch.save({"text_model.embeddings": bomb}, unet / "text_encoder" / "pytorch_model.bin")
    config = json.loads((unet / "text_encoder" / "config.json").read_text())
    (unet / "text_encoder" / "config.json").write_text(json.dumps({**config, "projection_dim": 8}))
    with pytest.raises(UserError, match=r"The text encoder in .* cannot be loaded"):
        _load_clip(unet, "CLIPTextModelWithProjection", torch.float32, "cpu")


def test_loras_are_not_unpickled(tmp_path, bomb, pipe):
    torch.save({"unet.down.lora_A.weight": bomb}, tmp_path / "pytorch_lora_weights.bin")
    write_limited_loras(tmp_path / "experts.yaml", [LimitedLoRA(str(tmp_path), 0, 1000)])
    from stagepatch.sampling import load_limited_loras

    with pytest.raises(UserError, match="cannot be loaded"):
        load_limited_loras(tmp_path / "experts.yaml", pipe)


def test_code_that_comes_with_a_pipeline_is_not_run(tmp_path, saved):
    code = f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\nclass Own: pass\n"
    for name, value in {"_class_name": ["own", "Own"], "unet": ["own", "Own"]}.items():
        directory = copy_of(saved, tmp_path / name)
        index = json.loads((directory / "model_index.json").read_text())
        (directory / "model_index.json").write_text(json.dumps({**index, name: value}))
        ((directory if name == "_class_name" else directory / name) / "own.py").write_text(code)
        with pytest.raises(UserError, match="wants to run code of its own"):
            load_pipeline(directory)
    tokenizer = copy_of(saved, tmp_path / "tokenizer")
    path = tokenizer / "tokenizer" / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (path.parent / "own.py").write_text(code)
    with pytest.raises(UserError, match=r"The text encoder in .* cannot be loaded"):
        _load_clip(tokenizer, "CLIPTextModelWithProjection", torch.float32, "cpu")
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def revisions(hub, monkeypatch, saved):
    """somebody/model, whose tag v1 has another scheduler; the repository's files by name."""
    monkeypatch.setattr(layout, "_COMMITS", {})
    files = {str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    place = "scheduler/scheduler_config.json"
    tagged = {**files, place: json.dumps({**json.loads(files[place]), "num_train_timesteps": 7}).encode()}
    hub.repos |= {"somebody/model": files, "somebody/model@v1": tagged}
    return hub


def test_a_revision_is_what_is_loaded_and_its_commit_is_kept(revisions):
    _, scheduler = load_denoiser("somebody/model@v1")
    model, latest = load_denoiser("somebody/model")
    assert (scheduler.config.num_train_timesteps, latest.config.num_train_timesteps != 7) == (7, True)
    assert model.config["_name_or_path"] == f"somebody/model@{COMMIT}"
    text = layout.with_commits("model: somebody/model@v1\n")
    assert f"# somebody/model@v1 was somebody/model@{TAGGED}\n" in text
    assert yaml.safe_load(text) == {"model": "somebody/model@v1"}
    assert layout.with_commits("model: digits\n") == "model: digits\n"
    assert load_denoiser(f"somebody/model@{TAGGED}")[1].config.num_train_timesteps == 7
    with pytest.raises(UserError, match="No model at 'somebody/model@v2'"):
        load_denoiser("somebody/model@v2")


def test_the_card_names_the_commit(revisions, tmp_path):
    model, _ = load_denoiser("somebody/model@v1")
    Patch.create(model).save_pretrained(tmp_path / "patch")
    card = (tmp_path / "patch" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "somebody/model"
    assert f'DiffusionPipeline.from_pretrained("somebody/model", revision="{TAGGED}")' in card
    files = {path.name: path.read_bytes() for path in (tmp_path / "patch").iterdir()}
    revisions.repos["somebody/patch@v1"] = files
    assert Patch.from_pretrained("somebody/patch@v1").fingerprint.model_id == f"somebody/model@{TAGGED}"
    assert Patch.from_pretrained("somebody/patch", revision="v1").backbone.model_class == "UNet2DConditionModel"
    with pytest.raises(UserError, match="No patch at 'somebody/patch'"):
        Patch.from_pretrained("somebody/patch")


def test_a_lora_has_a_revision(revisions):
    class Loads:
        def load_lora_weights(self, *given, **options):
            self.given = (given, options)

    revisions.repos["somebody/lora@v1"] = {"README.md": b""}
    pipe = Loads()
    load_lora(pipe, "somebody/lora@v1", "style")
    assert pipe.given == (("somebody/lora",), {"adapter_name": "style", "revision": TAGGED})
    assert layout.pinned("somebody/lora@v1") == f"somebody/lora@{TAGGED}"


def test_a_dataset_has_a_revision(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(layout, "_COMMITS", {})
    asked = []
    rows = datasets.Dataset.from_dict({"image": [{"bytes": encoded(9), "path": None}], "label": [0]})
    rows = rows.cast_column("image", datasets.Image())
    rows.info.download_checksums = {f"hf://datasets/somebody/data@{TAGGED}/a.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: asked.append((given, options)) or rows)
    data = DataConfig(source="somebody/data@v1", format="datasets", image_size=8)
    assert len(load_dataset(data)) == 1
    assert asked == [(("somebody/data",), {"split": "train", "revision": "v1"})]
    assert layout.pinned("somebody/data@v1") == f"somebody/data@{TAGGED}"


def test_run_yaml_names_the_commit(revisions, tmp_path):
    sampling = options("sampling", {"num_images": 1, "num_inference_steps": 1})
    arguments = ["--model=somebody/model@v1", "--prompts=[a cat]", f"--output_dir={tmp_path / 'out'}"]
    assert main(["sample", *arguments, *sampling]) == 0
    text = (tmp_path / "out" / "run.yaml").read_text()
    assert f"# somebody/model@v1 was somebody/model@{TAGGED}" in text
    assert yaml.safe_load(text)["model"] == "somebody/model@v1"


@pytest.mark.parametrize("where", ["argument", "call", "config"])
def test_tokens_are_no_options(tmp_path, capsys, monkeypatch, where):
    key = "0123456789abcdef" * 2
    monkeypatch.setenv("WANDB_API_KEY", key)
    given = {
        "argument": ["--model", f"https://user:{TOKEN}@host/model"],
        "call": [f"--call={{token: {TOKEN}}}"],
        "config": ["--config", str(tmp_path / "config.yaml")],
    }
    (tmp_path / "config.yaml").write_text(f"call: {{api_key: {key}}}\n")
    assert main(["sample", *given[where], f"--output_dir={tmp_path / 'out'}"]) == 2
    message = "".join(capsys.readouterr())
    assert "There is a token among the options" in message
    assert TOKEN not in message
    assert key not in message
    assert not (tmp_path / "out").exists()


def test_tokens_of_the_environment_reach_no_file(hub, tmp_path, capsys, monkeypatch, caplog):
    key = "0123456789abcdef" * 2
    for name, value in {"HF_TOKEN": TOKEN, "WANDB_API_KEY": key, "WANDB_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    training = {"steps": 2, "batch_size": 4, "log_every": 1, "report_every": 0.001, "tensorboard": False}
    run = tmp_path / "run"
    assert main(["train", f"--output_dir={run}", *options("training", training)]) == 0
    assert main(["push", str(run), "somebody/patch", f"--dry_run={tmp_path / 'dry'}"]) == 0
    assert main(["push", str(run), "forbidden/patch"]) == 2  # with the Hub's own message
    assert main(["push", str(run), "somebody/patch"]) == 0
    said = "".join(capsys.readouterr()) + caplog.text
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    written += b"".join(content for files in hub.repos.values() for content in files.values())
    for secret in (TOKEN, key):
        assert secret not in said
        assert secret.encode() not in written
    assert open_artifact(run).kind == "patch"
