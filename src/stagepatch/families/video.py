"""Transformers of videos that differ from Wan: LTX and LTX-2, Cosmos, SkyReels-V2, VACE, Mochi, Motif, Kandinsky 5."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families.base import Extent, patches
from stagepatch.families.packing import split_references
from stagepatch.families.registry import Family, call_by_keywords, of_videos, prompt_encoder
from stagepatch.families.table import call_wan, describe_sana
from stagepatch.families.texts import pad_texts
from stagepatch.families.transformer import Blocks, Transformer, image_extent

# Frames of 480×832 pixels: 81 of them, in latents smaller by 8, and by 4 over time.
WAN_SIZE = (21, 60, 104)


def _last_rows(arguments: dict[str, Any]) -> slice | None:
    """A timestep a frame or token is embedded as rows: a sample's last, which is never given, stands for it."""
    count = int(arguments["timestep"].numel()) // len(arguments["hidden_states"])
    return slice(count - 1, None, count) if count > 1 else None


def ltx_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Frames, height and width are told.

    Raises:
        UserError: only the tokens' positions are, as by `LTXConditionPipeline`.
    """
    grid = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if None in grid:
        raise UserError(
            "This forward of LTX is not told frames, height and width, so it cannot be seen which tokens are the "
            "video's. Take LTXPipeline or LTXImageToVideoPipeline."
        )
    return Extent(tuple(int(length) for length in grid if length is not None), rows=_last_rows(arguments))


@of_videos
def call_ltx(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. Positions are those at the pipeline's 25 frames a second, with LTX's VAE, smaller by 8×32×32."""
    frames, height, width = sample.shape[2:]
    size = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": (8 / 25, 32, 32)}
    tokens = call_by_keywords(model, sample.flatten(2).transpose(1, 2), timesteps, {**condition, **size})
    return tokens.transpose(1, 2).reshape(len(sample), -1, frames, height, width)


@of_videos
def call_ltx2(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. The video alone, as in the pipeline's own forward for `modality_scale`: without attention between
    video and sound, so that the token of sound, which the model cannot do without, is not heard. Positions are those
    at the pipeline's 24 frames a second.
    """
    frames, height, width = sample.shape[2:]
    silence = sample.new_zeros(len(sample), 1, model.config.audio_in_channels)
    text = condition["encoder_hidden_states"]
    # Of LTX-2.3 and later, which has no projections, text of the sound is as wide as the sound.
    audio_width = text.shape[-1] if model.config.use_prompt_embeddings else model.config.audio_cross_attention_dim
    added = {
        "audio_hidden_states": silence,
        "audio_encoder_hidden_states": text.new_zeros(len(sample), 1, audio_width),
        "audio_num_frames": 1,
        "isolate_modalities": True,
        "sigma": timesteps,
        "num_frames": frames,
        "height": height,
        "width": width,
    }
    tokens = call_by_keywords(model, sample.flatten(2).transpose(1, 2), timesteps, {**condition, **added})
    return tokens.transpose(1, 2).reshape(len(sample), -1, frames, height, width)


def encode_for_ltx2(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Through the connectors, which make the video's text of all layers' hidden states."""
    embeds, mask, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, device=pipe.device)
    text, _, mask = pipe.connectors(embeds, mask, padding_side=pipe.tokenizer.padding_side)
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def framewise_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """As `image_extent`, of a model that may be told a timestep a frame."""
    return replace(image_extent(model, arguments), rows=_last_rows(arguments))


@of_videos
def call_skyreels(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. A model that is told frames a second knows two choices of them; 1 stands for 24."""
    added = {"fps": [1] * len(sample)} if model.config.inject_sample_info else {}
    return call_by_keywords(model, sample, timesteps, {**condition, **added})


@of_videos
def call_vace(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. What controls the video is told as the pipeline tells it: what is to stay, which is nothing; what is
    made anew, which is as blank or follows the given video; and a mask of ones for all that is made anew.

    Raises:
        UserError: none are there, or several that control one.
    """
    given, others = split_references(condition)
    if not 1 <= len(given) <= 2:
        raise UserError(
            f"Wan VACE is told reference_latents [B, R, C, F, H, W], a blank video and at most one that controls what "
            f"is made, and got {len(given)}."
        )
    stays, changes = (each if each.ndim == 5 else each.unsqueeze(2) for each in (given[0], given[-1]))
    channels = model.config.vace_in_channels - stays.shape[1] - changes.shape[1]
    mask = torch.ones_like(stays[:, :1]).expand(-1, channels, -1, -1, -1)
    control = torch.cat([stays, changes, mask], dim=1)
    return call_by_keywords(model, sample, timesteps, {**others, "control_hidden_states": control})


@of_videos
def call_mochi(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. The model predicts x_start − noise."""
    return -call_by_keywords(model, sample, timesteps, condition)


@of_videos
def call_cosmos(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`; nothing of a sample is padding, which is told in pixels."""
    mask = sample.new_zeros(1, 1, 8 * sample.shape[3], 8 * sample.shape[4])
    return call_by_keywords(model, sample, timesteps, {**condition, "padding_mask": mask})


@of_videos
def call_motif(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. No frame is given: zeros in their place, and for the mask that would tell which are."""
    given = torch.zeros_like(sample)
    return call_by_keywords(model, torch.cat([sample, given, given[:, :1]], dim=1), timesteps, condition)


def kandinsky5_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """The model takes videos with channels last, [B, F, H, W, C].

    Raises:
        UserError: tokens in the order of sparse attention (NABLA), which is not that of the grid.
    """
    if (arguments.get("sparse_params") or {}).get("to_fractal"):
        raise UserError(
            "A Kandinsky 5 with sparse attention orders its tokens by blocks of 8×8: it cannot be patched."
        )
    return Extent(patches(arguments["hidden_states"].shape[1:4], model.config.patch_size))


@of_videos
def call_kandinsky5(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. Text has no mask, so it is told without padding, as the pipeline does of one caption. Positions are
    scaled by the size in pixels, of which a latent is 8×8; those of text-to-image are not.

    Raises:
        UserError: texts of several lengths, or sparse attention.
    """
    if model.config.attention_type != "regular":
        raise UserError(
            f"A Kandinsky 5 with attention_type='{model.config.attention_type}' orders its tokens by blocks of 8×8: "
            f"it cannot be patched, nor trained."
        )
    lengths = condition["encoder_attention_mask"].sum(dim=1).tolist()
    if min(lengths) < max(lengths):
        raise UserError(
            f"Kandinsky 5 has no mask for text, and captions of {min(lengths)} and {max(lengths)} tokens do not go "
            f"side by side: take one at a time, by training.gradient_accumulation_steps as large as batch_size."
        )
    video = sample.permute(0, 2, 3, 4, 1)
    if model.visual_cond:  # no frame is given
        video = torch.cat([video, torch.zeros_like(video), torch.zeros_like(video[..., :1])], dim=-1)
    size = patches(sample.shape[2:], model.config.patch_size)
    is_between = all(480 <= 8 * length <= 854 for length in sample.shape[3:])
    scale = 1.0 if bool(condition["of_pictures"].any()) else 2.0 if is_between else 3.16
    output: Tensor = model(
        video,
        encoder_hidden_states=condition["encoder_hidden_states"][:, : lengths[0]],
        timestep=timesteps,
        pooled_projections=condition["pooled_projections"],
        visual_rope_pos=[torch.arange(length, device=sample.device) for length in size],
        text_rope_pos=torch.arange(lengths[0], device=sample.device),
        scale_factor=(1.0, scale, scale),
        return_dict=False,
    )
    return output.permute(0, 4, 1, 2, 3)


def encode_for_kandinsky5(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. One by one: the text encoder has no mask either."""
    encoded = [pipe.encode_prompt(caption, device=pipe.device) for caption in captions]
    is_of_pictures = type(pipe).__name__ == "Kandinsky5T2IPipeline"
    return {
        **pad_texts([text[0] for text, *_ in encoded]),
        "pooled_projections": torch.cat([pooled for _, pooled, _ in encoded]),
        "of_pictures": torch.full((len(captions), 1), is_of_pictures, device=pipe.device),
    }


FAMILIES = [
    # LTX-Video: latents are tokens; the sample size is that of 161 frames of 512×704.
    Family(
        "LTXVideoTransformer3DModel",
        Transformer(
            (Blocks("transformer_blocks"),),
            "time_embed.emb.timestep_embedder",
            sample_size=(21, 16, 22),
            begin=ltx_extent,
        ),
        call_ltx,
        prompt_encoder("encoder_hidden_states", "encoder_attention_mask"),
        sample_size=(16, 22),
    ),
    # LTX-2: the video's stream alone is prompted and trained, not that of its sound; 121 frames of 512×768.
    Family(
        "LTX2VideoTransformer3DModel",
        Transformer(
            (Blocks("transformer_blocks"),),
            "time_embed.emb.timestep_embedder",
            sample_size=(16, 16, 24),
            begin=ltx_extent,
        ),
        call_ltx2,
        encode_for_ltx2,
        sample_size=(16, 24),
    ),
    # Cosmos: 121 frames of 704×1280. Predict2's pipelines scale by EDM's factors at σ and tell t = σ/(σ + 1); written
    # out, x_t = (1 − t)·x_start + t·noise and the output is noise − x_start: a flow over t from 0 to 1. Cosmos 1.0 is
    # told ln(σ)/4, and its scheduler is refused in training.
    Family(
        "CosmosTransformer3DModel",
        Transformer(
            (Blocks("transformer_blocks"),),
            "time_embed.t_embedder",
            sample_size=(16, 88, 160),
            begin=framewise_extent,
        ),
        call_cosmos,
        prompt_encoder("encoder_hidden_states"),
        timestep_range=(0.0, 1.0),
        sample_size=(88, 160),
    ),
    # SkyReels-V2: 97 frames of 544×960.
    Family(
        "SkyReelsV2Transformer3DModel",
        Transformer((Blocks("blocks"),), "condition_embedder.time_embedder", sample_size=(25, 68, 120)),
        call_skyreels,
        prompt_encoder("encoder_hidden_states", max_sequence_length=512),
        sample_size=(68, 120),
    ),
    # Wan VACE: the blocks of the video, not those of what controls it.
    Family(
        "WanVACETransformer3DModel",
        Transformer((Blocks("blocks"),), "condition_embedder.time_embedder", sample_size=WAN_SIZE),
        call_vace,
        prompt_encoder("encoder_hidden_states", max_sequence_length=512),
        sample_size=WAN_SIZE[1:],
        takes_references=True,
        has_blank_reference=True,
    ),
    # Mochi: 19 frames of 480×848. Time runs from noise to image.
    Family(
        "MochiTransformer3DModel",
        Transformer(
            (Blocks("transformer_blocks"),),
            "time_embed.timestep_embedder",
            ("time_embed.pooler",),
            sample_size=(4, 60, 106),
        ),
        call_mochi,
        prompt_encoder("encoder_hidden_states", "encoder_attention_mask"),
        timestep_range=(1000.0, 0.0),
        sample_size=(60, 106),
    ),
    # Motif-Video: 121 frames of 736×1280. A sample has half of the channels that the model takes.
    Family(
        "MotifVideoTransformer3DModel",
        Transformer(
            (Blocks("transformer_blocks"), Blocks("single_transformer_blocks")),
            "time_text_embed.timestep_embedder",
            sample_size=(31, 92, 160),
        ),
        call_motif,
        prompt_encoder("encoder_hidden_states", "", "encoder_attention_mask"),
        sample_size=(92, 160),
        channels="out_channels",
    ),
    # Kandinsky 5: 121 frames of 512×768.
    Family(
        "Kandinsky5Transformer3DModel",
        Transformer(
            (Blocks("visual_transformer_blocks"),),
            "time_embeddings",
            ("pooled_text_embeddings",),
            sample_size=(31, 64, 96),
            begin=kandinsky5_extent,
        ),
        call_kandinsky5,
        encode_for_kandinsky5,
        sample_size=(64, 96),
        channels="in_visual_dim",
    ),
    Family(
        "SanaVideoTransformer3DModel",
        describe_sana(WAN_SIZE),
        call_wan,
        prompt_encoder("encoder_hidden_states", "encoder_attention_mask"),
    ),
]
