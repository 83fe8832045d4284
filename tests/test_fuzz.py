"""Broken files of every kind that is read: a `UserError` or success, nothing else, in bounded time and memory.

A valid tiny file is changed by hypothesis: bytes, lengths, keys, types of values. `make fuzz` tries many more cases
than a test run does; see docs/security.md.
"""

import contextlib
import copy
import io
import json
import os
import re
import resource
import struct
import tarfile
import time
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.cli import app
from stagepatch.core import UserError
from stagepatch.data import (
    ArraySource,
    DataConfig,
    FolderSource,
    WebDatasetSource,
    load_dataset,
    make_cache,
    open_cache,
)
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.evaluation.statistics_file import is_statistics, read_statistics
from stagepatch.methods import LoRA, LoRAConfig, WaveletConfig, open_artifact
from stagepatch.methods.wavelet import Wavelet
from stagepatch.models import DiT
from stagepatch.patch import Patch, PatchConfig
from stagepatch.sampling.experts_file import read_schedule
from stagepatch.sampling.limited_loras import read_limited_loras
from stagepatch.training import TrainConfig
from stagepatch.training.checkpoint import TrainingState
from tests.runs import make_model
from tests.tiny_pipelines import PIPELINES

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

CASES = int(os.environ.get("FUZZ_CASES", "20"))
MEMORY = 2**30  # that a case may take beyond what there is, whatever its file says
HUGE = [0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]
ODD = [
    None,
    True,
    -1,
    0,
    1,
    10**9,
    2**63,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../..",
    [],
    {},
    [[]],
    [None],
]
ODD += [{"a": 1}, ["a"], [0.5, "b"], "\0", "ü" * 50, -(2**70)]

_byte_edit = st.tuples(
    st.sampled_from(["flip", "cut", "drop", "insert", "length", "big", "double"]),
    st.integers(0, 2**20),
    st.integers(0, 255),
)
_value_edit = st.tuples(
    st.sampled_from(["value", "rename", "delete", "swap"]), st.integers(0, 2**20), st.sampled_from(ODD)
)
byte_edits = st.lists(_byte_edit, min_size=1, max_size=4)
value_edits = st.lists(_value_edit, min_size=1, max_size=3)


def fuzz(*strategies):
    """A test that is given changes; the same ones each time unless there are many."""
    few = CASES <= 100
    limits = settings(
        max_examples=CASES,
        derandomize=few,
        database=None,
        deadline=timedelta(seconds=20),
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    return lambda test: limits(given(*strategies)(test))


def changed(content: bytes, edits) -> bytes:
    """Bytes after some edits, anywhere but more often near the start, where headers are."""
    data = bytearray(content)
    for kind, number, value in edits:
        if not data:
            break
        place = number % (64 if number % 2 and len(data) > 64 else len(data))
        if kind == "flip":
            data[place] ^= value or 1
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + 1 + value % 16]
        elif kind == "insert":
            data[place:place] = bytes([value]) * (1 + value % 9)
        elif kind == "double":
            data += data[: place + 1]
        else:
            form = "<Q" if kind == "length" else ">I"
            odd = HUGE[value % len(HUGE)] & (2**64 - 1 if kind == "length" else 2**32 - 1)
            data[place : place + struct.calcsize(form)] = struct.pack(form, odd)
    return bytes(data)


def places_of(value, path=()):
    """Paths of everything in nested dicts and lists."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places_of(each, (*path, key))


def edited(value, edits):
    """Nested values after some edits of what is in them."""
    value = copy.deepcopy(value)
    for kind, number, chosen in edits:
        odd = copy.deepcopy(chosen)
        places = list(places_of(value))
        path = places[number % len(places)]
        if not path:
            value = odd if kind == "value" and number % 5 == 0 else value
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if kind == "value" or isinstance(holder, list):
            holder[path[-1]] = odd
        elif kind == "delete":
            del holder[path[-1]]
        elif kind == "rename":
            holder[f"{path[-1]}x"] = holder.pop(path[-1])
        else:
            holder[path[-1]] = [holder[path[-1]]]
    return value


def edited_safetensors(content: bytes, edits) -> bytes:
    """A file whose header is changed and whose length is right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(edited(json.loads(content[8 : 8 + length]), edits)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


@contextlib.contextmanager
def bounded():
    """No more memory than `MEMORY`; warnings of Pillow and others are not shown."""
    size, resident = (int(pages) * resource.getpagesize() for pages in pages_of_process()[:2])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    try:
        with warnings.catch_warnings(), contextlib.suppress(UserError):
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        taken.append(int(peak) * 1024 - resident)


def pages_of_process():
    return Path("/proc/self/statm").read_text().split()


taken = []  # bytes of memory, by each case of this kind


@pytest.fixture(autouse=True)
def kept(request):
    """In the long form, what each kind took goes into runs/fuzz.json."""
    taken.clear()
    since, failed = time.monotonic(), request.session.testsfailed
    yield
    if CASES > 100 and taken and request.session.testsfailed == failed:
        path = Path("runs/fuzz.json")
        found = json.loads(path.read_text()) if path.exists() else {}
        figures = {"cases": CASES, "seconds": round(time.monotonic() - since), "MiB": round(max(taken) / 2**20, 1)}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**found, request.node.name: figures}, indent=1))


@pytest.fixture(scope="module")
def model():
    return make_model(hidden_size=8, num_attention_heads=1, num_layers=1, num_classes=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def files(model, place):
    """Valid directories of what stagepatch writes, by kind."""
    Patch.create(model, PatchConfig(gate_noise=True)).save_pretrained(place / "patch")
    lora = LoRA(LoRAConfig(rank=1, num_stages=2, stage_gate="learned"))
    lora.prepare(copy.deepcopy(model))
    lora.save(place / "lora")
    wavelet = Wavelet(WaveletConfig(hidden_channels=2))
    wavelet.prepare(copy.deepcopy(model))
    wavelet.save(place / "wavelet")
    save_denoiser(model, make_scheduler(ObjectiveConfig(), True), place / "model")
    return {
        name: {
            path: path.read_bytes() for path in (place / name).rglob("*") if path.suffix in (".json", ".safetensors")
        }
        for name in ("patch", "lora", "wavelet", "model")
    }


def try_directory(files, number, byte_changes, value_changes, read):
    """One file of a directory changed, by bytes or by values; then the directory is read, and made whole again."""
    path = sorted(files)[number % len(files)]
    content = files[path]
    if value_changes is None:
        broken = changed(content, byte_changes)
    elif path.suffix == ".json":
        broken = json.dumps(edited(json.loads(content), value_changes)).encode()
    else:
        broken = edited_safetensors(content, value_changes)
    path.write_bytes(broken)
    try:
        with bounded():
            read()
    finally:
        path.write_bytes(content)


directory_edits = (st.integers(0, 7), byte_edits, st.none() | value_edits)


@fuzz(*directory_edits)
def test_patches(files, place, model, number, bytes_, values):
    read = lambda: Patch.from_pretrained(place / "patch").attach(copy.deepcopy(model))  # noqa: E731
    try_directory(files["patch"], number, bytes_, values, read)


@fuzz(*directory_edits)
def test_loras(files, place, model, number, bytes_, values):
    read = lambda: open_artifact(place / "lora").put_on(copy.deepcopy(model))  # noqa: E731
    try_directory(files["lora"], number, bytes_, values, read)


@fuzz(*directory_edits)
def test_wavelet_gates(files, place, model, number, bytes_, values):
    read = lambda: open_artifact(place / "wavelet").put_on(copy.deepcopy(model))  # noqa: E731
    try_directory(files["wavelet"], number, bytes_, values, read)


@fuzz(*directory_edits)
def test_models(files, place, number, bytes_, values):
    try_directory(files["model"], number, bytes_, values, lambda: load_denoiser(place / "model"))


@fuzz(byte_edits, st.none() | value_edits, st.booleans())
def test_checkpoints(place, model, bytes_, values, is_zip):
    state = model.state_dict()
    if values is None:
        buffer = io.BytesIO()
        torch.save({"ema": state}, buffer, _use_new_zipfile_serialization=is_zip)
        path, content = place / "dit.pt", changed(buffer.getvalue(), bytes_)
    else:
        path, content = place / "dit.safetensors", edited_safetensors(save(state), values)
    path.write_bytes(content)
    for read in (lambda: DiT.from_original(path, num_attention_heads=1), lambda: Patch.from_released(path)):
        with bounded():
            read()


@fuzz(byte_edits, st.none() | value_edits)
def test_checkpoints_to_resume_from(place, bytes_, values):
    weights = [torch.nn.Parameter(torch.ones(2, 3))]
    optimizer, scaler = torch.optim.AdamW(weights), torch.amp.GradScaler("cpu")
    weights[0].grad = torch.ones(2, 3)
    optimizer.step()
    path = place / "checkpoint.safetensors"
    state = TrainingState(path, {"model": "digits", "training": {"steps": 5}}, weights, optimizer, None, scaler)
    state.save(3)
    content = path.read_bytes()
    path.write_bytes(changed(content, bytes_) if values is None else edited_safetensors(content, values))
    with bounded():
        state.load()


EXPERTS = [
    {"experts": [{"from": 0, "to": 500, "learned": "x"}, {"from": 500, "to": 1000}]},
    {"experts": [{"name": "a"}], "steps": [{"timestep": 5, "expert": "a"}], "scheduler": "ddim"},
    {"loras": [{"file": "a.safetensors", "from": 0, "to": 1000, "weight": 0.5}]},
]


@fuzz(st.integers(0, 2), byte_edits, st.none() | value_edits)
def test_experts(place, number, bytes_, values):
    content = yaml.safe_dump(
        EXPERTS[number] if values is None else edited(EXPERTS[number], values), allow_unicode=True
    )
    path = place / "experts.yaml"
    path.write_bytes(changed(content.encode(), bytes_) if values is None else content.encode())
    for read in (lambda: open_artifact(path), lambda: read_schedule(path, 1000), lambda: read_limited_loras(path)):
        with bounded():
            read()


@pytest.fixture(scope="module")
def train_parser():
    parser = app._make_parser("train", TrainConfig)
    return parser, yaml.safe_load(parser.dump(parser.get_defaults()))


@fuzz(byte_edits, st.none() | value_edits)
def test_run_configs(train_parser, place, bytes_, values):
    parser, whole = train_parser
    sections = {name: whole[name] for name in ("patch", "lora", "training", "data", "timesteps", "ddo")}
    content = yaml.safe_dump(sections if values is None else edited(sections, values), allow_unicode=True).encode()
    (place / "run.yaml").write_bytes(changed(content, bytes_) if values is None else content)
    with pytest.MonkeyPatch.context() as patched, bounded():
        patched.setattr(app, "_make_parser", lambda *_: parser)
        app._parse("train", ["--config", str(place / "run.yaml")])


def picture(form, mode="RGB", frames=1):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (12, 10, 3), np.uint8)
    image = (
        Image.fromarray(noise).convert(mode) if mode != "I;16" else Image.fromarray(noise[..., 0].astype(np.uint16))
    )
    more = {"save_all": True, "append_images": [image] * (frames - 1)} if frames > 1 else {}
    image.save(buffer, form, **more)
    return buffer.getvalue()


PICTURES = {
    "a.png": picture("PNG"),
    "b.jpg": picture("JPEG"),
    "c.webp": picture("WEBP"),
    "d.jpg": picture("JPEG", "CMYK"),
    "e.png": picture("PNG", "I;16"),
    "f.png": picture("PNG", "P"),
    "g.webp": picture("WEBP", frames=3),
    "h.png": picture("PNG", "LA"),
    "i.png": picture("PNG", frames=3),
}


@fuzz(st.sampled_from(sorted(PICTURES)), byte_edits)
def test_images(tmp_path_factory, place, name, edits):
    folder = place / "images"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(changed(PICTURES[name], edits))
    try:
        with bounded():
            dataset = load_dataset(DataConfig(str(folder), image_size=8))
            dataset[0]
    finally:
        (folder / name).unlink()


METADATA = {
    "metadata.jsonl": b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.jpg", "text": ["two", "three"]}\n',
    "metadata.csv": b'file_name,text\na.png,"one, two"\nb.jpg,three\n',
    "captions.json": json.dumps(
        {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "two"}],
        }
    ).encode(),
    "a.txt": "eins\nzwei ü\n".encode(),
}


@fuzz(st.sampled_from(sorted(METADATA)), byte_edits, st.none() | value_edits)
def test_captions(place, name, bytes_, values):
    folder = place / "captions"
    folder.mkdir(exist_ok=True)
    for image in ("a.png", "b.jpg"):
        (folder / image).write_bytes(PICTURES[image])
    content = METADATA[name]
    is_json = name.endswith((".json", ".jsonl"))
    if values is None or not is_json:
        content = changed(content, bytes_)
    else:
        content = "\n".join(json.dumps(edited(json.loads(line), values)) for line in content.splitlines()).encode()
    (folder / name).write_bytes(content)
    try:
        with bounded():
            source = FolderSource(folder)
            assert all(isinstance(caption, str) for index in range(2) for caption in source.captions(index))
    finally:
        (folder / name).unlink()


@pytest.fixture(scope="module")
def shard():
    buffer = io.BytesIO()
    members = {"0.png": PICTURES["a.png"], "0.txt": b"one", "0.cls": b"3", "1.jpg": PICTURES["b.jpg"]}
    members["1.json"] = b'{"caption": ["two", "three"], "label": 2}'
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"comment": "x"} if name == "0.txt" else {}
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# What stands in a tar header, and where: sizes, types, checksums, names.
HEADER = [("size", 124, 12), ("type", 156, 1), ("name", 0, 100), ("magic", 257, 8), ("checksum", 148, 8)]
SIZES = [b"77777777777\0", b"00000000000\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1         \0"]
TYPES = b"0123456789gxLKSDMVNAX\0"


@fuzz(byte_edits, st.lists(st.tuples(st.integers(0, 20), st.sampled_from(HEADER), st.integers(0, 255)), max_size=3))
def test_shards(place, shard, edits, headers):
    data = bytearray(shard if headers else changed(shard, edits))
    starts = [at for at in range(0, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
    for number, (name, at, length), value in headers if starts else ():
        start = starts[number % len(starts)]
        if name == "type":
            data[start + at] = TYPES[value % len(TYPES)]
        elif name == "size":
            text = [b"77777777777\0", b"00000000000\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1         \0"][
                value % 5
            ]
            data[start + at : start + at + length] = text
        else:
            data[start + at + value % length] = value
        header = bytes(data[start : start + 148]) + b" " * 8 + bytes(data[start + 156 : start + 512])
        if name != "checksum":
            data[start + 148 : start + 156] = b"%06o\0 " % (sum(header) % 0o777777)
    (place / "shard.tar").write_bytes(data)
    with bounded():
        source = WebDatasetSource(place / "shard.tar")
        for index in range(len(source)):
            for read in (source.captions, source.label):
                with contextlib.suppress(UserError):
                    read(index)
        load_dataset(DataConfig(str(place / "shard.tar"), image_size=8))[0]


def array_file(name):
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    buffer = io.BytesIO()
    if name.endswith(".npy"):
        np.save(buffer, images)
    elif name == "packed.npz":
        np.savez_compressed(buffer, image=images, label=np.arange(3))
    elif name.endswith(".npz"):
        np.savez(buffer, image=images, label=np.arange(3))
    else:
        buffer.write(b"\0\0\x08\x03" + struct.pack(">III", 3, 4, 4) + images.tobytes())
    return buffer.getvalue()


ARRAYS = {name: array_file(name) for name in ("a.npy", "packed.npz", "plain.npz", "a-images-idx3-ubyte")}


@fuzz(st.sampled_from(sorted(ARRAYS)), byte_edits)
def test_arrays(place, name, edits):
    (place / name).write_bytes(changed(ARRAYS[name], edits))
    with bounded():
        source = ArraySource(DataConfig(str(place / name)))
        source.load(0)
        source.label(0)


def statistics_file(save):
    buffer = io.BytesIO()
    save(buffer, mu=np.zeros(3), sigma=np.eye(3), count=np.array(5), extractor=np.array("net"))
    return buffer.getvalue()


STATISTICS = [statistics_file(save) for save in (np.savez, np.savez_compressed)]


def edited_members(content, edits):
    """A zip file whose members are changed, and whole again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for number, name in enumerate(old.namelist()):
            new.writestr(name, changed(old.read(name), edits[number::2]))
    return buffer.getvalue()


@fuzz(st.sampled_from(STATISTICS), byte_edits, st.booleans())
def test_statistics(place, content, edits, is_inside):
    path = place / "statistics.npz"
    path.write_bytes(edited_members(content, edits) if is_inside else changed(content, edits))
    with bounded():
        if is_statistics(path):
            read_statistics(path)


@pytest.fixture(scope="module")
def cache(place):
    """A cache of two images, and its files."""
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(place / "pipeline")
    (place / "photos").mkdir()
    for name in ("a.png", "b.jpg"):
        (place / "photos" / name).write_bytes(PICTURES[name])
    data = DataConfig(str(place / "photos"), image_size=16)
    make_cache(place / "cache", str(place / "pipeline"), data, 2, torch.float32)
    return data, {path: path.read_bytes() for path in (place / "cache").rglob("*") if path.is_file()}


@fuzz(*directory_edits)
def test_caches(cache, place, number, bytes_, values):
    data, files = cache
    try_directory(files, number, bytes_, values, lambda: open_cache(place / "cache", data)[0])
