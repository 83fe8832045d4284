"""What must hold in the whole pipelines of diffusers: saved, loaded, patched and called."""

import pytest
import torch
from PIL import Image

from stagepatch.patch import Patch, PatchConfig
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES, PROMPT

WOLVES = "Seven wölves, howling!"

# Reference sizes [latent pixels] other than their own, for pipelines that make images of one size alone.
OTHER_REFERENCE = {"DiTTransformer2DModel": [12, 12], "UNet2DModel": [12, 8], "UNet2DModel of ADM": [12, 8]}


@pytest.fixture(scope="module", params=list(PIPELINES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(name):
    return PIPELINES[name]


@pytest.fixture(scope="module")
def pipe(tiny):
    """Built once: every test leaves it as it was."""
    return tiny.build()


@pytest.fixture(scope="module")
def images(tiny, pipe):
    """What it makes unpatched."""
    return tiny.call(pipe)


def draw(patch):
    """Prompts so large that they can be seen in the images."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for prompts in patch.prompts:
            prompts.copy_(20 * torch.randn(prompts.shape, generator=generator))


def differ(images, others):
    """By more than another order of summation would make them."""
    return not torch.allclose(images, others, rtol=0, atol=1e-3)


def test_seed_and_caption_reach_the_images(tiny, pipe, images):
    assert images.isfinite().all()
    assert images.shape[-2:] == tiny.pixels
    assert torch.equal(tiny.call(pipe), images)
    assert differ(tiny.call(pipe, seed=1), images)
    if tiny.is_prompted:
        assert not torch.allclose(tiny.call(pipe, prompt=WOLVES), images, rtol=0, atol=1e-4)


def test_patch_of_a_pipeline_is_saved_and_put_on_the_loaded_pipeline(name, tiny, pipe, images, tmp_path, shows):
    base = images
    pipe.save_pretrained(tmp_path / "pipeline")
    patch = Patch.create(pipe, PatchConfig(sample_size=tiny.sample_size))
    attachment = patch.attach(pipe)
    assert torch.equal(tiny.call(pipe), base)
    draw(patch)
    patched = tiny.call(pipe)
    assert patched.isfinite().all()
    assert differ(patched, base)
    patch.save_pretrained(tmp_path / "patch")
    attachment.detach()
    assert torch.equal(tiny.call(pipe), base)

    loaded = tiny.load(tmp_path / "pipeline")
    assert type(loaded).__name__ == type(pipe).__name__
    classes, expected = ({key: type(part) for key, part in it.components.items()} for it in (loaded, pipe))
    assert classes == expected
    with Patch.from_pretrained(tmp_path / "patch").attach(loaded):
        assert torch.equal(tiny.call(loaded), patched)
    assert torch.equal(tiny.call(loaded), base)
    shows("pipeline", name)


def test_patch_works_at_another_size_than_its_own(name, tiny, pipe):
    height, width = tiny.other_pixels or tiny.pixels
    base = tiny.call(pipe, height=height, width=width)
    assert base.shape[-2:] == (height, width)
    patch = Patch.create(pipe, PatchConfig(sample_size=OTHER_REFERENCE.get(name, tiny.sample_size)))
    with patch.attach(pipe):
        assert torch.equal(tiny.call(pipe, height=height, width=width), base)
        draw(patch)
        assert differ(tiny.call(pipe, height=height, width=width), base)
    assert torch.equal(tiny.call(pipe, height=height, width=width), base)


def test_captions_of_different_lengths_are_patched_side_by_side(name, tiny, pipe):
    if not tiny.is_prompted or name in ("WanVACETransformer3DModel", "QwenImageTransformer2DModel of edits"):
        pytest.skip("takes no captions, or one")
    captions = tiny.of([PROMPT, WOLVES])
    base = tiny.call(pipe, **captions)
    assert len(base) == 2
    patch = Patch.create(pipe, PatchConfig(sample_size=tiny.sample_size))
    with patch.attach(pipe):
        assert torch.equal(tiny.call(pipe, **captions), base)
        draw(patch)
        patched = tiny.call(pipe, **captions)
    for row in range(2):
        assert differ(patched[row], base[row])


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "Flux2Transformer2DModel of klein"], scope="module")
def test_patch_works_where_images_are_edited(name, tiny, pipe):
    one, other = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (96, 64), "black")
    base = tiny.call(pipe, image=one)
    assert differ(tiny.call(pipe, image=other), base)
    patch = Patch.create(pipe, PatchConfig(sample_size=tiny.sample_size))
    with patch.attach(pipe):
        assert torch.equal(tiny.call(pipe, image=one), base)
        draw(patch)
        assert differ(tiny.call(pipe, image=one), base)


def test_every_family_of_diffusers_has_a_pipeline_here():
    """But where there is none, or it is called with given text alone."""
    without = {
        "DiT",
        "QwenImageTransformer2DModel of layers",
        "UNet2DModel of Fourier features",
    }
    assert set(PIPELINES) == set(FAMILIES) - without


def test_qwenimage_drops_just_the_tokens_of_its_template():
    pipe = PIPELINES["QwenImageTransformer2DModel"].build()
    before, _ = pipe.prompt_template_encode.split("{}")
    assert len(pipe.tokenizer(before).input_ids) == pipe.prompt_template_encode_start_idx
