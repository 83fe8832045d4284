"""Pipelines whose text encoders cannot be built here, called with text that is encoded, up to their latents."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from PIL import Image

from stagepatch.families import predict
from stagepatch.patch import Patch, PatchConfig
from tests.families.test_family_families import drawn
from tests.tiny import FAMILIES, TEXT, TEXT_CHANNELS
from tests.tiny_pipelines import Unasked, hunyuanvideo_vae, qwen_tokenizer, qwen_vae, qwen_vl

# Of the picture whose layers are made, which would be 640×640.
pipeline_qwenimage_layered.calculate_dimensions = lambda area, ratio: (32, 32)
PICTURE = Image.new("RGB", (32, 32), (200, 30, 90))


class Processor:
    """In place of a tokenizer or a processor, which is not asked."""

    tokenizer = SimpleNamespace(encode=lambda text: [7])

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[1, 2]]


def text(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, TEXT, TEXT_CHANNELS, generator=torch.Generator().manual_seed(5))


def edit() -> tuple[Any, dict[str, Any]]:
    """Qwen-Image-Edit-2511: two pictures to edit."""
    parts = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": qwen_vae().eval(), "text_encoder": None}
    model = FAMILIES["QwenImageTransformer2DModel"].model(zero_cond_t=True)
    pipe = diffusers.QwenImageEditPlusPipeline(**parts, tokenizer=None, processor=None, transformer=model)
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    given = {"image": [PICTURE, PICTURE], "prompt_embeds": text(), "prompt_embeds_mask": mask}
    return pipe, {**given, "height": 32, "width": 32, "true_cfg_scale": 1.0}


def qwenimage21() -> tuple[Any, dict[str, Any]]:
    model = FAMILIES["QwenImage21Transformer2DModel"].model()
    parts = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": None, "text_encoder": None}
    pipe = diffusers.QwenImage21Pipeline(**parts, processor=Processor(), transformer=model)
    return pipe, {"prompt_embeds": text(), "height": 128, "width": 64}


def kandinsky5() -> tuple[Any, dict[str, Any]]:
    model = FAMILIES["Kandinsky5Transformer3DModel"].model()
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": hunyuanvideo_vae()}
    pipe = diffusers.Kandinsky5T2VPipeline(transformer=model, **parts, **dict.fromkeys(names))
    pooled = torch.randn(1, 12, generator=torch.Generator().manual_seed(6))
    lengths = torch.tensor([0, TEXT], dtype=torch.int32)
    given = {"prompt_embeds_qwen": text(), "prompt_embeds_clip": pooled, "prompt_cu_seqlens": lengths}
    return pipe, {**given, "height": 32, "width": 48, "num_frames": 9, "guidance_scale": 1.0}


def cosmos() -> tuple[Any, dict[str, Any]]:
    model = FAMILIES["CosmosTransformer3DModel"].model()
    parts = {"scheduler": diffusers.EDMEulerScheduler(sigma_max=80, sigma_data=0.5), "vae": None}
    others = {"text_encoder": None, "tokenizer": None, "safety_checker": Unasked()}
    pipe = diffusers.CosmosTextToWorldPipeline(transformer=model, **parts, **others)
    return pipe, {"prompt_embeds": text(), "height": 64, "width": 96, "num_frames": 9, "guidance_scale": 1.0}


def layers() -> tuple[Any, dict[str, Any]]:
    """Qwen-Image-Layered: the picture and two layers."""
    model = FAMILIES["QwenImageTransformer2DModel of layers"].model()
    tokenizer = qwen_tokenizer()
    parts = {"text_encoder": qwen_vl(tokenizer).eval(), "tokenizer": tokenizer, "processor": None}
    parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": qwen_vae().eval()}
    pipe = diffusers.QwenImageLayeredPipeline(**parts, transformer=model)
    # It gives no latents (diffusers 0.42).
    return pipe, {"image": PICTURE, "prompt": "a cat", "layers": 2, "true_cfg_scale": 1.0, "output_type": "pt"}


# Each with the grid of what it makes.
MADE = {
    edit: (4, 4),
    qwenimage21: (8, 4),
    kandinsky5: (3, 4, 6),
    cosmos: (2, 4, 6),
    layers: (3, 4, 4),
}
KINDS = {edit: " of edits", layers: " of layers"}


@pytest.mark.parametrize("make", MADE)
def test_patch_on_a_pipeline_reaches_what_it_makes(make, shows):
    pipe, arguments = make()
    pipe.set_progress_bar_config(disable=True)

    def call():
        generator = torch.Generator().manual_seed(0)
        more = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False, **arguments}
        made = pipe(**more, generator=generator)[0]
        return torch.stack(made) if isinstance(made, list) else made

    base = call()
    grid = MADE[make]
    size = [*grid[:-2], 8, 8]
    patch = Patch.create(pipe, PatchConfig(sample_size=size))
    with patch.attach(pipe):
        assert torch.equal(call(), base)
        assert patch.extent.grid == grid
        drawn(patch)
        patched = call()
    assert patched.isfinite().all()
    assert not torch.allclose(patched, base, atol=1e-3)
    assert torch.equal(call(), base)
    shows("pipeline", type(pipe.transformer).__name__ + KINDS.get(make, ""))


def test_qwenimage21_is_called_as_its_own_pipeline_calls_it(monkeypatch):
    pipe, arguments = qwenimage21()
    seen, step = [], type(pipe.scheduler).step

    def noted(self, output, timestep, sample, **kwargs):
        seen.append((output, timestep, sample))
        return step(self, output, timestep, sample, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", noted)
    pipe(**arguments, num_inference_steps=2, output_type="latent", use_kv_cache=False)
    condition = {"encoder_hidden_states": text(), "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool)}
    for output, timestep, sample in seen:
        output, sample = (tokens.transpose(1, 2).unflatten(2, (8, 4)) for tokens in (output, sample))
        ours = predict(pipe.transformer, sample, timestep.expand(1), condition)
        torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)
