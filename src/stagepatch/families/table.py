"""Transformers that differ from each other by little more than names: a row each, after its functions."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagepatch.families.base import Backbone, Extent, Grid
from stagepatch.families.packing import SAMPLE_SIZE
from stagepatch.families.registry import Describe, Family, call_by_keywords, of_videos, prompt_encoder
from stagepatch.families.texts import pad_texts
from stagepatch.families.transformer import Blocks, Transformer, image_extent


def call_pixart(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """Models that embed resolution and aspect ratio are told the sample's own, as an image of eight times its size."""
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        height, width = (8.0 * length for length in sample.shape[2:])
        added["resolution"] = sample.new_tensor([height, width]).repeat(len(sample), 1)
        added["aspect_ratio"] = sample.new_tensor([height / width]).repeat(len(sample), 1)
    return call_by_keywords(model, sample, timesteps, {**condition, "added_cond_kwargs": added})


def describe_sana(sample_size: Grid | None = None) -> Describe:
    """Of models of that size, by default the config's. One that embeds guidance has its timestep's embedding
    elsewhere, and t+c adds guidance.
    """

    def describe(model: Any, size: Any = None) -> Backbone:
        is_guided = hasattr(model.time_embed, "guidance_embedder")
        time_tap = "time_embed.timestep_embedder" if is_guided else "time_embed.emb.timestep_embedder"
        condition_taps = ("time_embed.guidance_embedder",) if is_guided else ()
        blocks = (Blocks("transformer_blocks"),)
        return Transformer(blocks, time_tap, condition_taps, sample_size=sample_size)(model, size)

    return describe


def call_sana(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """The model has a scale of its own for timesteps."""
    return call_by_keywords(model, sample, timesteps * model.config.timestep_scale, condition)


def lumina2_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """In the joint blocks each sample's image follows its own text, however long."""
    text_lengths = arguments["encoder_attention_mask"].sum(dim=1).long()
    return replace(image_extent(model, arguments), text_lengths=text_lengths)


def call_lumina2(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """The model predicts x_start − noise."""
    return -call_by_keywords(model, sample, timesteps, condition)


call_wan = of_videos(call_by_keywords)


def call_omnigen(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. The mask of text, time and image is made by the pipeline's own collator, of an image of eight times
    the sample's size. The model takes the first sample's positions for all (diffusers 0.42); they are relative, so all
    are counted from the padding on, which is in front of texts. It predicts x_start − noise.
    """
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

    rows = zip(condition["input_ids"], condition["encoder_attention_mask"].bool(), strict=True)
    texts = [{"input_ids": ids[mask].tolist(), "pixel_values": None} for ids, mask in rows]
    size = [8 * length for length in sample.shape[2:]]
    ids, _, mask, *_ = OmniGenCollator().process_mllm_input(texts, [size] * len(texts))
    positions = torch.arange(mask.shape[1]).expand(len(ids), -1)
    added = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    added = {name: value.to(sample.device) for name, value in added.items()}
    added |= {"input_img_latents": [], "input_image_sizes": {}}
    return -call_by_keywords(model, sample, timesteps, added)


def encode_for_omnigen(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Tokens, with the pipeline's instruction around them, which the model embeds itself."""
    inputs = [pipe.multimodal_processor.process_multi_modal_prompt(caption, None) for caption in captions]
    padded = pad_texts([torch.tensor(each["input_ids"]) for each in inputs])
    return {"input_ids": padded["encoder_hidden_states"], "encoder_attention_mask": padded["encoder_attention_mask"]}


FAMILIES = [
    # PixArt-α and PixArt-Σ. Text enters by cross-attention alone, so t+c is t; so it is in Sana and Wan.
    Family(
        "PixArtTransformer2DModel",
        Transformer((Blocks("transformer_blocks", attention="attn1"),), "adaln_single.emb.timestep_embedder"),
        call_pixart,
        prompt_encoder("encoder_hidden_states", "encoder_attention_mask"),
    ),
    # Stable Diffusion 3 and 3.5: only the image's stream is prompted. Prepended prompts are attended to by the image's
    # tokens, not by the text's.
    Family(
        "SD3Transformer2DModel",
        Transformer(
            (Blocks("transformer_blocks", attention="attn"),),
            "time_text_embed.timestep_embedder",
            ("time_text_embed.text_embedder",),
        ),
        encode_captions=prompt_encoder("encoder_hidden_states", "", "pooled_projections"),
        logit_normal=(0.0, 1.0),
    ),
    # In the single blocks the image follows the text and the register tokens. Padding of text is zeroed, not masked.
    Family(
        "AuraFlowTransformer2DModel",
        Transformer(
            (Blocks("joint_transformer_blocks"), Blocks("single_transformer_blocks", "last")), "time_step_proj"
        ),
        encode_captions=prompt_encoder("encoder_hidden_states"),
        timestep_range=(0.0, 1.0),
    ),
    # Captions without the instruction that the pipeline puts before short prompts.
    Family(
        "SanaTransformer2DModel",
        describe_sana(),
        call_sana,
        prompt_encoder("encoder_hidden_states", "encoder_attention_mask"),
    ),
    # Lumina-Image 2.0: refiners of the image, then joint blocks. Time runs from noise to image.
    Family(
        "Lumina2Transformer2DModel",
        Transformer(
            (Blocks("noise_refiner"), Blocks("layers", "after_text")),
            "time_caption_embed.timestep_embedder",
            begin=lumina2_extent,
        ),
        call_lumina2,
        prompt_encoder("encoder_hidden_states", "encoder_attention_mask"),
        timestep_range=(1.0, 0.0),
    ),
    # Wan 2.1, tokens of frames × height × width; the sample size is that of 81 frames of 480×832. As many tokens of
    # text as the pipeline's call makes; its encode_prompt alone would make fewer.
    Family(
        "WanTransformer3DModel",
        Transformer((Blocks("blocks"),), "condition_embedder.time_embedder", sample_size=(21, 60, 104)),
        call_wan,
        prompt_encoder("encoder_hidden_states", max_sequence_length=512),
        sample_size=(60, 104),
    ),
    # OmniGen: text, with images to edit among it, a token of the time, then the image. Time runs from noise to image.
    Family(
        "OmniGenTransformer2DModel",
        Transformer((Blocks("layers", "last"),), "t_embedder", sample_size=SAMPLE_SIZE),
        call_omnigen,
        encode_for_omnigen,
        timestep_range=(1.0, 0.0),
        sample_size=SAMPLE_SIZE,
        embeds_text=True,
    ),
    # PRX, text by attention to other keys and values; the sample size is that of 512×512. PRX-7B embeds sizes.
    Family(
        "PRXTransformer2DModel",
        Transformer((Blocks("blocks"),), "time_in", optional_taps=("resolution_embedder",), sample_size=(64, 64)),
        encode_captions=prompt_encoder("encoder_hidden_states", "attention_mask"),
        timestep_range=(0.0, 1.0),
        sample_size=(64, 64),
    ),
]
