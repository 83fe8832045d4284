"""What makes a denoiser's condition of captions, out of a model's directory or out of the Hub."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from stagepatch import models
from stagepatch.checkpoints.layout import DENOISERS, TEXT_PARTS, denoiser_directory, find_model
from stagepatch.checkpoints.loading import UNLOADABLE, build_denoiser, class_of, family_in, load_pipeline
from stagepatch.core import UserError, as_user_error, read_json
from stagepatch.families import takes_text

# What a pipeline does without to encode captions; the last four rewrite prompts.
_HEAVY = {"transformer", "transformer_2", "unconditional_transformer", "unet", "vae", "audio_vae", "vocoder"}
_HEAVY |= {"duration_head", "image_encoder", "feature_extractor", "safety_checker"}
_HEAVY |= {"text_processor", "pe", "prompt_enhancer", "prompt_enhancer_head"}


def load_captioner(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    reads_references: bool = False,
    reads_image: bool = False,
) -> Callable[..., dict[str, Tensor]]:
    """What makes the denoiser's condition of captions: the model's own tokenizers and text encoders.

    Args:
        reads_references: together with the pictures [R, 3, H, W] that each is about, the second argument.
        reads_image: together with the picture [1, 3, H, W] that each is of, the second argument.

    Raises:
        UserError: they cannot be loaded, the family has no way to use them, or reads the picture too and gets none.
    """
    directory = find_model(source, [*DENOISERS, "scheduler", *TEXT_PARTS])
    family = family_in(directory)
    if family.encode_captions is None:
        raise UserError(f"Captions cannot be encoded for '{source}': its family is registered without a way to.")
    if family.reads_image and not reads_image:
        raise UserError(
            f"{family.model_class} is told its captions together with what is read off the picture, and here there is "
            f"a caption alone: sample with the whole pipeline (stagepatch sample), which draws that for itself."
        )
    if (directory / "model_index.json").exists():
        if family.caption_parts:
            directory = find_model(source, [*DENOISERS, "scheduler", *TEXT_PARTS, *family.caption_parts])
        heavy = _HEAVY - set(family.caption_parts)
        absent = {name: None for name in read_json(directory / "model_index.json") if name in heavy}
        pipe: Any = load_pipeline(directory, torch_dtype=dtype, **absent).to(device)
    elif class_of(denoiser_directory(directory)) is models.DiT:
        pipe = _load_clip(directory, "CLIPTextModelWithProjection", dtype, device)
    elif class_of(denoiser_directory(directory)) is diffusers.UNet2DConditionModel:
        clip = _load_clip(directory, "CLIPTextModel", dtype, device)
        pipe = diffusers.StableDiffusionPipeline(
            None, clip.text_encoder, clip.tokenizer, None, None, None, None, requires_safety_checker=False
        )
    else:
        raise UserError(f"'{directory}' is no whole pipeline: it has no model_index.json.")
    encode: Any = family.encode_edits if reads_references else family.encode_captions
    return partial(encode, pipe)


def _load_clip(directory: Path, name: str, dtype: torch.dtype, device: torch.device | str) -> SimpleNamespace:
    """`tokenizer/` and `text_encoder/` of a model directory of ours: CLIP, of that class."""
    import transformers

    with as_user_error(f"The text encoder in '{directory}' cannot be loaded", *UNLOADABLE):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "tokenizer", trust_remote_code=False)
        encoder: Any = getattr(transformers, name).from_pretrained(directory / "text_encoder")
    return SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder.to(device, dtype).eval(), device=device)


def takes_captions(source: str | Path) -> bool:
    """Whether the model's condition is made of captions.

    Raises:
        UserError: it is, but nothing is there to make it with.
    """
    directory = find_model(source, [*DENOISERS, "scheduler", *TEXT_PARTS])
    if not takes_text(build_denoiser(directory)):
        return False
    tokenizers = [*directory.glob("tokenizer*"), *directory.glob("processor*")]
    has_encoder = family_in(directory).embeds_text or any(directory.glob("text_encoder*"))
    if not has_encoder or not tokenizers:
        raise UserError(
            f"The model in '{directory}' takes text, but has no tokenizer/ and text_encoder/ beside it: put those "
            f"there that it was trained with."
        )
    return True


def projection_width(source: str | Path) -> int:
    """Width of the pooled and projected text of the CLIP in `text_encoder/`.

    Raises:
        UserError: none there, or one without its projection.
    """
    what = "a DiT of text needs CLIPTextModelWithProjection, whose output is pooled and projected"
    return int(_clip_config(source, "CLIPTextModelWithProjection", what)["projection_dim"])


def token_width(source: str | Path) -> int:
    """Width of the tokens that the CLIP in `text_encoder/` puts out.

    Raises:
        UserError: none there, or one that puts out pooled text.
    """
    what = "a U-Net of text needs CLIPTextModel, to whose tokens it attends"
    return int(_clip_config(source, "CLIPTextModel", what)["hidden_size"])


def _clip_config(source: str | Path, name: str, what: str) -> dict[str, Any]:
    path = find_model(source, TEXT_PARTS) / "text_encoder" / "config.json"
    config = read_json(path)
    if config.get("architectures") != [name]:
        raise UserError(f"'{path.parent}' is {config.get('architectures')}: {what}.")
    return config
