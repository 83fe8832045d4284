"""Tiny pipelines of diffusers' own classes, with random weights: denoiser, text encoders, VAE, scheduler and all."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import diffusers
import torch
import transformers
from diffusers.pipelines.cosmos import pipeline_cosmos2_text2image
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as hunyuan_video
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from diffusers.pipelines.prx import pipeline_prx
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2
from diffusers.pipelines.wan import pipeline_wan_vace
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import T5Gemma2EncoderConfig
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

from tests.tiny import FAMILIES, TEXT_CHANNELS

PROMPT = "a photo of a small red cat"

# Some pipelines cannot do without ftfy, which mends broken Unicode; nothing here is broken.
for module in (pipeline_skyreels_v2, pipeline_wan_vace, pipeline_kandinsky):
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)


@dataclass
class Tiny:
    """A tiny pipeline, and how to call it.

    Args:
        pipeline: its class.
        scheduler: makes it.
        vae: makes it; None where there is none.
        encoders: for each text encoder what makes its tokenizer, and what makes it for a tokenizer.
        changes: of the config of the family's denoiser.
        more: of the pipeline's arguments.
        made: of them, what is made anew.
        pixels: height and width that `call` makes by default, those of the denoiser's own sample size.
        other_pixels: another size, not square; None where the pipeline only makes its own.
        arguments: what a call takes besides size, steps and seed.
        of_several: what a call of several captions takes besides.
        vae_name: of its VAE among the pipeline's parts.
        is_trained: stagepatch trains on what it has; else it is only sampled here.
        sample_size: of the latents of `pixels` before packing, for a denoiser that does not know its own.
        family: key of tests.tiny.FAMILIES.
        references: pictures to edit for each image that it is trained on.
        accumulates: it is trained on so many parts of a batch, one after the other.
        steps: of a call.
    """

    pipeline: Any
    scheduler: Callable[[], Any]
    vae: Callable[[], Any] | None
    encoders: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Callable[[], Any]] = field(default_factory=dict)
    pixels: tuple[int, int] = (32, 32)
    other_pixels: tuple[int, int] | None = (48, 32)
    arguments: dict[str, Any] = field(default_factory=dict)
    of_several: dict[str, Any] = field(default_factory=dict)
    sample_size: list[int] | None = None
    vae_name: str = "vae"
    is_trained: bool = True
    family: str = ""
    references: int = 0
    accumulates: int = 1
    steps: int = 2

    @property
    def is_prompted(self) -> bool:
        return "prompt" in self.arguments

    def build(self, seed: int = 0) -> Any:
        """Everything frozen and in eval mode. The same weights for the same seed; the global generator is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = self._make()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        return pipe

    def _make(self) -> Any:
        parts = self.more | {name: make() for name, make in self.made.items()}
        for (make_tokenizer, make_encoder), number in zip(self.encoders, ("", "_2", "_3", "_4"), strict=False):
            parts[f"tokenizer{number}"] = make_tokenizer()
            parts[f"text_encoder{number}"] = make_encoder(parts[f"tokenizer{number}"])
        denoiser = "unet" if self.family.startswith("UNet") else "transformer"
        parts[denoiser] = FAMILIES[self.family].model(int(torch.randint(2**31, ())), **self.changes)
        if self.vae:
            parts[self.vae_name] = self.vae()
        return self.pipeline(**parts, scheduler=self.scheduler())

    def of(self, captions: list[str]) -> dict[str, Any]:
        """Arguments for an image of each caption, with a negative caption each where the pipeline asks for one."""
        negative = self.arguments.get("negative_prompt")
        negatives = {} if negative is None else {"negative_prompt": [negative] * len(captions)}
        return {"prompt": captions} | negatives | self.of_several

    @staticmethod
    def load(directory: Any) -> Any:
        """A pipeline that was saved. Weights mapped from a file do not lie as memory that torch allocates does, and
        then kernels add in another order; so they are copied, and images are the same bit for bit.
        """
        pipe = diffusers.DiffusionPipeline.from_pretrained(directory, local_files_only=True)
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                for parameter in component.requires_grad_(False).parameters():
                    parameter.data = parameter.data.clone()
        return pipe

    def call(self, pipe: Any, seed: int = 0, steps: int = 0, **more: Any) -> Tensor:
        """Images [B, 3, height, width] in 0…1; videos [B, frames, 3, height, width].

        Args:
            more: further arguments of the pipeline, height and width among them, or others for its own.
        """
        pipe.set_progress_bar_config(disable=True)
        size = dict(zip(("height", "width"), self.pixels, strict=True))
        arguments = {"output_type": "pt", **self.arguments, **size, "num_inference_steps": steps or self.steps, **more}
        # Z-Image's pipeline writes into the list of prompts that it is given.
        arguments = {name: value[:] if isinstance(value, list) else value for name, value in arguments.items()}
        if self.other_pixels is None and (arguments.pop("height"), arguments.pop("width")) != self.pixels:
            raise ValueError(f"{type(pipe).__name__} makes images of {self.pixels} alone.")
        images: Tensor = pipe(generator=torch.Generator().manual_seed(seed), return_dict=False, **arguments)[0]
        return images


# Tokenizers, of the classes that the real pipelines have. Vocabularies are written down here, not learned.

QWEN_SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
LUMINA_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start>"
)
CAPTION_WORDS = (
    "a an the of on in with and photo painting drawing picture digit cat dog house tree red green blue small large "
    "old new one two three four five six seven eight nine zero"
)
WORDS = sorted({word.strip(",.:") for text in (CAPTION_WORDS, QWEN_SYSTEM, LUMINA_SYSTEM) for word in text.split()})


def clip_tokenizer(pad_token: str = "<|endoftext|>", length: int = 77) -> Any:
    """A token a letter. The second ones of SDXL and SD3 pad with '!'."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab=_numbered(tokens), merges=[], pad_token=pad_token, model_max_length=length)


def t5_tokenizer() -> Any:
    """A token a word for WORDS, else a token a letter."""
    words = [f"▁{word}" for word in WORDS if len(word) > 1]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -10.0) for letter in ["▁", *_printable()]]
    vocab = [*special, *letters, *((word, -2.0) for word in words)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def gemma_tokenizer(length: int = 8192, words: list[str] = WORDS) -> Any:
    """A token a word, else a token a letter or byte."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bytewise = [f"<0x{byte:02X}>" for byte in range(256)]
    merges, merged = _merges([f"▁{word}" for word in words])
    vocab = _numbered([*special, *bytewise, "▁", "\n", *_printable(), *merged])
    return transformers.GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, model_max_length=length)


def llama_tokenizer(chat_template: str | None = None) -> Any:
    """A token a word for WORDS, else a token a letter or byte."""
    bytewise = [f"<0x{byte:02X}>" for byte in range(256)]
    merges, merged = _merges([f"▁{word}" for word in WORDS])
    vocab = _numbered(["<unk>", "<s>", "</s>", *bytewise, "▁", *_printable(), *merged])
    more = {"pad_token": "</s>", "padding_side": "right", "model_max_length": 512, "chat_template": chat_template}
    return transformers.LlamaTokenizer(vocab=vocab, merges=merges, **more)


CHAT_OF_ROLES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)


def qwen_tokenizer(
    chat_template: str | None = None,
    kind: Any = transformers.Qwen2Tokenizer,
    special: tuple[str, ...] = (),
    words: list[str] = WORDS,
) -> Any:
    """A token a word for WORDS, else a token a byte: Qwen-Image drops the 34 tokens of its template."""
    roles = ["system", "user", "assistant", "Describe"]
    merges, merged = _merges([*(f"Ġ{word}" for word in words), *roles])
    vocab = _numbered([*sorted(pre_tokenizers.ByteLevel.alphabet()), *merged, "<|endoftext|>"])
    marks = ["<|im_start|>", "<|im_end|>", *special]
    more = {"additional_special_tokens": marks, "model_max_length": 2048, "chat_template": chat_template}
    return kind(vocab=vocab, merges=merges, **more)


def _printable() -> list[str]:
    return [letter for letter in string.printable if letter not in string.whitespace]


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _merges(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Merges that build every word from its start, a letter at a time, and the tokens that they make."""
    pairs = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    return list(pairs), [left + right for left, right in pairs]


LLAMA_TEMPLATE = " ".join(hunyuan_video.DEFAULT_PROMPT_TEMPLATE["template"].split())


def hunyuan_tokenizer() -> Any:
    """A token for each word and mark of HunyuanVideo's template and for WORDS, else a token a byte or letter."""
    words = sorted({*WORDS, *re.findall(r"\w+", LLAMA_TEMPLATE)})
    return gemma_tokenizer(words=words)


class TokenizerAsProcessor(transformers.Qwen2Tokenizer):  # type: ignore[misc]
    """In place of Qwen3-VL's processor, which needs torchvision, and does no more for text alone."""

    @property
    def tokenizer(self) -> TokenizerAsProcessor:
        return self

    def apply_chat_template(self, messages: Any, **options: Any) -> list[list[int]]:
        said = [f"<|im_start|>{message['role']}\n{message['content'][0]['text']}<|im_end|>\n" for message in messages]
        return [self("".join(said)).input_ids]


# Pipelines are saved with the library of each part and its name there.
TokenizerAsProcessor.__module__, transformers.TokenizerAsProcessor = "transformers", TokenizerAsProcessor


def qwen3_processor() -> Any:
    """A token a word for WORDS and roles, else a token a byte."""
    return qwen_tokenizer(kind=TokenizerAsProcessor, special=("<|image_pad|>",))


class ProcessorOfPictures(transformers.Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen2-VL's processor without that of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        """Nothing is wanted of the one that is not there."""

    def save_pretrained(self, directory: Any, **options: Any) -> None:
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, directory: Any, **options: Any) -> ProcessorOfPictures:
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(directory)
        return cls(Qwen2VLImageProcessorPil.from_pretrained(directory), tokenizer)


ProcessorOfPictures.__module__, transformers.ProcessorOfPictures = "transformers", ProcessorOfPictures

VISION = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")


def picture_processor(words: list[str] = WORDS) -> Any:
    """Of pictures cut into 4×4 pixels, of which 2×2 are a token."""
    pictures = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    return ProcessorOfPictures(pictures, qwen_tokenizer(special=VISION, words=words))


def film_processor() -> Any:
    """A token for each word of Kandinsky 5's template too, of which the pipeline drops 128."""
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "vae", "scheduler")
    template = diffusers.Kandinsky5T2VPipeline(**dict.fromkeys(names)).prompt_template
    return picture_processor(sorted({*WORDS, *re.findall(r"[a-z]+", template)}))


PLAIN_CHAT = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<|begin_of_image|><|image|><|end_of_image|>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endfor %}"
)
GLM_MARKS = {
    "image_token": "<|image|>",
    "grid_bos_token": "<sop>",
    "grid_eos_token": "<eop>",
    "bos_token": "<|begin_of_image|>",
    "eos_token": "<|end_of_image|>",
}


class GlmProcessor(transformers.GlmImageProcessor):  # type: ignore[misc]
    """GLM-Image's processor with a preview of one token, where 256 would be drawn before the image's own, and with an
    image processor that does not need torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, **options: Any) -> None:
        for name, token in GLM_MARKS.items():
            setattr(tokenizer, name, token)
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, PLAIN_CHAT)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        """Nothing is wanted of the one that needs torchvision."""

    def _get_target_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        return height // 32, width // 32, 1, 1

    def save_pretrained(self, directory: Any, **options: Any) -> None:
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, directory: Any, **options: Any) -> GlmProcessor:
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(directory)
        return cls(GlmImageImageProcessorPil.from_pretrained(directory), tokenizer)


GlmProcessor.__module__, transformers.GlmProcessor = "transformers", GlmProcessor


def glm_processor() -> Any:
    """Of pictures of at least 512 and at most 2048 pixels a side, as GLM-Image's own; 16×16 pixels are a token."""
    bounds = {"shortest_edge": 512 * 512, "longest_edge": 2048 * 2048}
    pictures = GlmImageImageProcessorPil(patch_size=16, merge_size=1, temporal_patch_size=1, size=bounds)
    return GlmProcessor(pictures, qwen_tokenizer(special=tuple(GLM_MARKS.values())))


# Text encoders.


def clip(tokenizer: Any, hidden_size: int, projection: int | None = None) -> Any:
    """With `projection` the class with a projected pooled output of that width."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    widths = {"hidden_size": hidden_size, "intermediate_size": 32, "projection_dim": projection or hidden_size}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": tokenizer.model_max_length}
    config = transformers.CLIPTextConfig(vocab_size=len(tokenizer), **ids, **widths, **sizes)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def clip_vision() -> Any:
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, projection_dim=12, image_size=16, patch_size=8)
    return transformers.CLIPVisionModelWithProjection(config)


def picture_reader() -> Any:
    """For `clip_vision`; what transformers makes without torchvision."""
    size = {"shortest_edge": 16}
    return transformers.CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16})


def kandinsky_prior() -> Any:
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    prior = diffusers.PriorTransformer(**heads, embedding_dim=12, num_embeddings=77)
    prior.clip_std.data.fill_(1.0)
    return prior


def t5(tokenizer: Any, kind: str = "T5") -> Any:
    """`kind` is T5 or UMT5."""
    widths = {"vocab_size": len(tokenizer), "d_model": TEXT_CHANNELS, "d_kv": 12, "d_ff": 32}
    layers = {"num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(**widths, **layers))


_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
_WIDTHS = {"hidden_size": TEXT_CHANNELS, "intermediate_size": 32}
_SMALL = {**_HEADS, **_WIDTHS, "num_hidden_layers": 2, "initializer_range": 0.2}
_DEEP = {**_HEADS, "hidden_size": TEXT_CHANNELS // 3, "intermediate_size": 16, "initializer_range": 0.2}


def gemma(tokenizer: Any) -> Any:
    config = transformers.Gemma2Config(vocab_size=len(tokenizer), head_dim=12, query_pre_attn_scalar=12, **_SMALL)
    return transformers.Gemma2Model(config)


def gemma3(tokenizer: Any) -> Any:
    """Of LTX-2, which takes the states of all layers, and never an image."""
    text = {**_SMALL, "vocab_size": len(tokenizer), "head_dim": 12, "query_pre_attn_scalar": 12}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llama(tokenizer: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL, vocab_size=len(tokenizer)))


def _mistral_config(tokenizer: Any, **text: Any) -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), **text},
        vision_config={"model_type": "pixtral", **vision, "image_size": 32, "patch_size": 4},
        image_token_index=len(tokenizer) - 1,
    )


def mistral(tokenizer: Any) -> Any:
    """Of FLUX.2 dev, which takes the states after layers 10, 20 and 30, side by side."""
    config = _mistral_config(tokenizer, **_DEEP, num_hidden_layers=30, head_dim=4)
    return transformers.Mistral3ForConditionalGeneration(config)


def deep_qwen3(tokenizer: Any) -> Any:
    """Of FLUX.2 klein, which takes the states after layers 9, 18 and 27, side by side."""
    config = transformers.Qwen3Config(**_DEEP, num_hidden_layers=27, vocab_size=len(tokenizer), head_dim=4)
    return transformers.Qwen3ForCausalLM(config)


def qwen3(tokenizer: Any) -> Any:
    return transformers.Qwen3Model(transformers.Qwen3Config(**_SMALL, vocab_size=len(tokenizer), head_dim=12))


def smollm3(tokenizer: Any) -> Any:
    """Bria FIBO takes it for granted that 128000 is the token of an empty prompt."""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**_SMALL, **ends, vocab_size=128001))


def small_mistral(tokenizer: Any) -> Any:
    """Of ERNIE-Image, which takes the states before the last layer."""
    return transformers.Mistral3Model(_mistral_config(tokenizer, **_SMALL, head_dim=12))


def t5_gemma(tokenizer: Any) -> Any:
    sizes = {**_SMALL, "vocab_size": len(tokenizer), "head_dim": 12, "query_pre_attn_scalar": 12}
    config = transformers.T5GemmaConfig(encoder=sizes, decoder=sizes, is_encoder_decoder=False)
    return transformers.T5GemmaEncoderModel(config)


def t5_gemma2(tokenizer: Any) -> Any:
    """Without images, which it could read."""
    text = {**_SMALL, "vocab_size": len(tokenizer), "head_dim": 12, "query_pre_attn_scalar": 12, "dropout_rate": 0.0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = {"text_config": text, "vision_config": {**vision, "image_size": 16, "patch_size": 8}}
    return T5Gemma2Encoder(T5Gemma2EncoderConfig(**both, mm_tokens_per_image=4, image_token_index=len(tokenizer) - 1))


def glm(tokenizer: Any) -> Any:
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
    return transformers.GlmModel(transformers.GlmConfig(**ids, **_SMALL, head_dim=12))


def small_qwen3(tokenizer: Any) -> Any:
    """Of Z-Image, which takes the states before the last layer."""
    return transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=len(tokenizer), head_dim=12, **_SMALL))


def hunyuan_llama(tokenizer: Any) -> Any:
    """Hidden states of the last layer but two are taken."""
    small = {**_SMALL, "num_hidden_layers": 3}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=len(tokenizer), **small))


def byt5(tokenizer: Any) -> Any:
    widths = {"vocab_size": 400, "d_model": 20, "d_kv": 10, "d_ff": 32}
    return transformers.T5EncoderModel(transformers.T5Config(**widths, num_layers=1, num_heads=2))


def glm_image_drawer() -> Any:
    """Draws 16 tokens of images, and never the one that ends them."""
    tokenizer = glm_processor().tokenizer
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = {**_SMALL, "vocab_size": len(tokenizer), "vision_vocab_size": 16, "rope_parameters": rope}
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "image_size": 64}
    begin, end, token = (
        tokenizer.convert_tokens_to_ids(GLM_MARKS[name]) for name in ("bos_token", "eos_token", "image_token")
    )
    model = transformers.GlmImageForConditionalGeneration(
        transformers.GlmImageConfig(
            text_config={**text, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id},
            vision_config={**vision, "initializer_range": 0.2},
            vq_config={"embed_dim": 8, "num_embeddings": 16, "latent_channels": 16, "initializer_range": 0.2},
            image_start_token_id=begin,
            image_end_token_id=end,
            image_token_id=token,
        )
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def qwen_vl_text(tokenizer: Any) -> Any:
    config = qwen_vl(tokenizer).config.text_config
    return transformers.Qwen2_5_VLTextModel(config)


def qwen_vl(tokenizer: Any) -> Any:
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    text = {**_SMALL, **ends, "vocab_size": len(tokenizer), "rope_parameters": rope}
    widths = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": TEXT_CHANNELS}
    vision = {**widths, "depth": 1, "num_heads": 2, "patch_size": 4, "fullatt_block_indexes": [0]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = dict.fromkeys(names, len(tokenizer) - 1)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_vl_of_pictures() -> Any:
    """Reads pictures among text, at the tokens of a tokenizer that has some for them."""
    tokenizer = qwen_tokenizer(special=VISION)
    config = qwen_vl(tokenizer).config
    config.image_token_id, config.vision_start_token_id, _, config.video_token_id = (
        tokenizer.convert_tokens_to_ids(token) for token in VISION
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(tokenizer: Any, layers: int = 2, generates: bool = False) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    text = {
        **_SMALL,
        "num_hidden_layers": layers,
        "vocab_size": len(tokenizer),
        "rope_parameters": rope,
        "head_dim": 12,
    }
    widths = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": TEXT_CHANNELS}
    vision = {**widths, "depth": 1, "num_heads": 2, "patch_size": 4, "deepstack_visual_indexes": [0]}
    kind = transformers.Qwen3VLForConditionalGeneration if generates else transformers.Qwen3VLModel
    return kind(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


# VAEs, of 4 latent channels.


def kl(scaling_factor: float, shift_factor: float | None = None, levels: int = 3, channels: int = 4) -> Any:
    """Smaller by 2 to the levels - 1."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    sizes = {"block_out_channels": (8, *(16,) * (levels - 1)), "norm_num_groups": 8, "latent_channels": channels}
    factors = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    quantized = dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), shift_factor is None)
    return diffusers.AutoencoderKL(**blocks, **sizes, **factors, **quantized, sample_size=32)


def glm_image_vae() -> Any:
    """Smaller by 8, with statistics of its latents; GLM-Image's pipeline does not ask for its scaling factor."""
    vae = kl(0.5, 0.0, levels=4)
    vae.register_to_config(latents_mean=[0.5, -0.3, 0.1, 0.8], latents_std=[0.7, 1.4, 0.9, 1.2])
    return vae


def flux2_vae() -> Any:
    """Smaller by 4; the statistics of its latents are drawn."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 16, 16), "norm_num_groups": 8, "latent_channels": 4, "sample_size": 32}
    vae = diffusers.AutoencoderKLFlux2(**blocks, **sizes)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def dc() -> Any:
    """Smaller by 8."""
    sides = {
        "block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": (1, 1, 1, 1),
        "qkv_multiscales": ((), (), (), (5,)),
    }
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **both)


_VIDEO_VAE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [-0.7571, 0.1075, 0.9653, 0.4134],
    "latents_std": [2.8184, 1.4541, 1.2196, 0.9],
}


def movq() -> Any:
    """Kandinsky's, smaller by 4."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    codes = {"latent_channels": 4, "vq_embed_dim": 4, "num_vq_embeddings": 12, "norm_type": "spatial"}
    return diffusers.VQModel(**blocks, **codes, block_out_channels=(32, 32, 32), norm_num_groups=32)


# Smaller by 4; that of Wan by 2 over time too.
qwen_vae = partial(diffusers.AutoencoderKLQwenImage, **_VIDEO_VAE)
wan_vae = partial(diffusers.AutoencoderKLWan, **_VIDEO_VAE, scale_factor_temporal=2, scale_factor_spatial=4)

# Smaller by 16, of red, green, blue and alpha.
qwen21_vae = partial(
    diffusers.AutoencoderKLQwenImage21,
    **{**_VIDEO_VAE, "dim_mult": [1, 1, 1, 1, 1], "temperal_downsample": [False, True, True, True]},
    decoder_base_dim=8,
    in_channels=4,
    out_channels=4,
)

# Smaller by 16.
fibo_vae = partial(
    diffusers.AutoencoderKLWan,
    **{**_VIDEO_VAE, "dim_mult": [1, 1, 1, 1, 1], "temperal_downsample": [False] * 4},
    scale_factor_temporal=1,
    scale_factor_spatial=16,
)


def cogvideox_vae() -> Any:
    """Smaller by 4, and by 2 over time."""
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 3, "up_block_types": ("CogVideoXUpBlock3D",) * 3}
    sizes = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return diffusers.AutoencoderKLCogVideoX(**blocks, **sizes, temporal_compression_ratio=2, scaling_factor=0.7)


def hunyuanvideo_vae() -> Any:
    """Smaller by 4, and by 4 over time."""
    blocks = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 3, "up_block_types": ("HunyuanVideoUpBlock3D",) * 3}
    sizes = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return diffusers.AutoencoderKLHunyuanVideo(**blocks, **sizes, spatial_compression_ratio=4)


def hunyuanvideo15_vae() -> Any:
    """Smaller by 4, and by 4 over time."""
    sizes = {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "spatial_compression_ratio": 4}
    vae = diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, **sizes)
    vae.enable_slicing()  # diffusers' mask for its attention fits one video alone
    return vae


def hunyuanimage_vae() -> Any:
    """Smaller by 4."""
    sizes = {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "sample_size": 32}
    return diffusers.AutoencoderKLHunyuanImage(3, 3, 4, **sizes, spatial_compression_ratio=4, scaling_factor=0.75)


def ltx_vae() -> Any:
    """Smaller by 32, and by 8 over time, as LTX's own, which the model's positions take for granted."""
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    }
    vae = diffusers.AutoencoderKLLTXVideo(latent_channels=4, **sizes)
    vae.latents_mean.copy_(torch.tensor([0.5, -0.3, 0.1, 0.8]))
    vae.latents_std.copy_(torch.tensor([0.7, 1.4, 0.9, 1.2]))
    return vae


def ltx2_vae() -> Any:
    """Smaller by 32, and by 8 over time."""
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.copy_(torch.tensor([0.5, -0.3, 0.1, 0.8]))
    vae.latents_std.copy_(torch.tensor([0.7, 1.4, 0.9, 1.2]))
    return vae


def ltx2_audio_vae() -> Any:
    """Of sound in 4 latent channels of 2 bins, 8 numbers a token."""
    sizes: dict[str, Any] = {"base_channels": 8, "ch_mult": (1, 2, 4), "num_res_blocks": 1, "resolution": 32}
    return diffusers.AutoencoderKLLTX2Audio(**sizes, latent_channels=4, mel_bins=8, in_channels=2)


def ltx2_vocoder() -> Any:
    sizes: dict[str, Any] = {"upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2], "hidden_channels": 8}
    resnets: dict[str, Any] = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1]]}
    return LTX2Vocoder(in_channels=16, out_channels=2, **sizes, **resnets)


def ltx2_connectors() -> Any:
    """Of the three hidden states of `gemma3`; padding becomes registers."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "num_learnable_registers": 16}
    both = {f"{of}_connector_{name}": value for of in ("video", "audio") for name, value in heads.items()}
    return LTX2TextConnectors(caption_channels=TEXT_CHANNELS, text_proj_in_factor=3, **both)


def mochi_vae() -> Any:
    """Smaller by 8, and by 6 over time, as Mochi's own, which the pipeline takes for granted."""
    return diffusers.AutoencoderKLMochi(
        in_channels=15,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=None,
        latents_std=None,
        scaling_factor=0.8,
    )


# Pipelines.

if not hasattr(
    pipeline_prx, "ftfy"
):  # which is not installed here; captions without faults of coding stay as they are
    pipeline_prx.ftfy = SimpleNamespace(fix_text=lambda caption: caption)

_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_KANDINSKY_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "variance_type": "learned_range"}
_DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
flow_match = partial(partial, diffusers.FlowMatchEulerDiscreteScheduler)

long_clip_tokenizer = partial(clip_tokenizer, length=248)
second_clip_tokenizer = partial(clip_tokenizer, pad_token="!")
# FLUX.2 dev has a PixtralProcessor around its tokenizer, which only images need.
PARTS = "{% for message in messages %}{{ message.content[0].text }} {% endfor %}"
CHAT_OF_PARTS = (
    "{% for message in messages %}"
    "{{ message.content if message.content is string else message.content[0].text }} {% endfor %}"
)
CHAT = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
chat_tokenizer = partial(qwen_tokenizer, chat_template=CHAT)
T5 = (t5_tokenizer, t5)
UMT5 = (t5_tokenizer, partial(t5, kind="UMT5"))
GEMMA = (gemma_tokenizer, gemma)
OF_13_LAYERS = {"llm_features_dim": 13 * TEXT_CHANNELS}
PLAIN_CAPTION = {"length": 32, "clean_caption": False, "use_resolution_binning": False}


if not hasattr(processor_omnigen, "transforms"):  # torchvision's, which read pictures
    processor_omnigen.transforms = MagicMock()
    pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor


class Unasked(nn.Module):
    """In place of Cosmos' safety checker, which is not installed here, and finds nothing."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


pipeline_cosmos2_text2image.CosmosSafetyChecker = Unasked


class Cosmos2TextToImagePipeline(diffusers.Cosmos2TextToImagePipeline):  # type: ignore[misc]
    """Saves no safety checker; diffusers' own, which then loads it, makes one anew."""

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        checker = self.safety_checker
        self.register_modules(safety_checker=None)
        super().save_pretrained(*args, **options)
        self.register_modules(safety_checker=checker)


def prompted(length: int | None = None, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, **({"max_sequence_length": length} if length else {}), **more}


PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
# Pixels of pictures to edit, which would be 1024×1024, and to read, 384×384.
pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = 32 * 32

PIPELINES: dict[str, Tiny] = {
    "DiTTransformer2DModel": Tiny(
        diffusers.DiTPipeline,
        partial(diffusers.DDIMScheduler, clip_sample=False),
        partial(kl, 0.18215),
        # The pipeline's null label is 1000, whatever the model; like the real one, the model predicts variances.
        changes={"num_embeds_ada_norm": 1000, "out_channels": 8},
        other_pixels=None,
        arguments={"class_labels": [3]},
    ),
    "UNet2DModel": Tiny(
        diffusers.DDPMPipeline,
        partial(diffusers.DDPMScheduler, variance_type="fixed_large"),
        None,
        changes={"in_channels": 3, "out_channels": 3, "sample_size": 16},
        pixels=(16, 16),
        other_pixels=None,
    ),
    "UNet2DConditionModel": Tiny(
        diffusers.StableDiffusionPipeline,
        partial(diffusers.PNDMScheduler, **_SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        partial(kl, 0.18215),
        [(clip_tokenizer, partial(clip, hidden_size=TEXT_CHANNELS))],
        more={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        arguments=prompted(),
    ),
    "UNet2DConditionModel of SDXL": Tiny(
        diffusers.StableDiffusionXLPipeline,
        partial(diffusers.EulerDiscreteScheduler, **_SD_BETAS, timestep_spacing="leading"),
        partial(kl, 0.13025),
        [
            (clip_tokenizer, partial(clip, hidden_size=12)),
            (second_clip_tokenizer, partial(clip, hidden_size=12, projection=12)),
        ],
        arguments=prompted(),
    ),
    "PixArtTransformer2DModel": Tiny(
        diffusers.PixArtSigmaPipeline,
        partial(diffusers.DPMSolverMultistepScheduler, beta_schedule="linear"),
        partial(kl, 0.13025),
        [T5],
        arguments=prompted(**PLAIN_CAPTION),
    ),
    "SD3Transformer2DModel": Tiny(
        diffusers.StableDiffusion3Pipeline,
        flow_match(shift=3.0),
        partial(kl, 1.5305, 0.0609),
        [
            (clip_tokenizer, partial(clip, hidden_size=8, projection=4)),
            (second_clip_tokenizer, partial(clip, hidden_size=12, projection=8)),
            T5,
        ],
        arguments=prompted(32),
    ),
    "FluxTransformer2DModel": Tiny(
        diffusers.FluxPipeline,
        flow_match(**_DYNAMIC, shift=3.0, max_shift=1.15),
        partial(kl, 0.3611, 0.1159),
        [(clip_tokenizer, partial(clip, hidden_size=12)), T5],
        arguments=prompted(32),
        sample_size=[8, 8],
    ),
    "SanaTransformer2DModel": Tiny(
        diffusers.SanaPipeline,
        partial(diffusers.DPMSolverMultistepScheduler, **_FLOW),
        dc,
        [GEMMA],
        other_pixels=(64, 32),
        arguments=prompted(**PLAIN_CAPTION, complex_human_instruction=None),
    ),
    "Lumina2Transformer2DModel": Tiny(
        diffusers.Lumina2Pipeline,
        flow_match(shift=6.0),
        partial(kl, 0.3611, 0.1159, levels=4),  # the pipeline takes it for granted that images get smaller by 8
        [GEMMA],
        changes={"axes_lens": (300, 32, 32)},
        pixels=(64, 64),
        other_pixels=(96, 64),
        arguments=prompted(64),
    ),
    "AuraFlowTransformer2DModel": Tiny(
        diffusers.AuraFlowPipeline, flow_match(shift=1.73), partial(kl, 0.13025), [UMT5], arguments=prompted(32)
    ),
    "QwenImageTransformer2DModel": Tiny(
        diffusers.QwenImagePipeline,
        flow_match(**_DYNAMIC, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        qwen_vae,
        [(qwen_tokenizer, qwen_vl)],
        arguments=prompted(64, negative_prompt=" "),
        sample_size=[8, 8],
    ),
    "QwenImageTransformer2DModel of edits": Tiny(
        diffusers.QwenImageEditPlusPipeline,
        flow_match(**_DYNAMIC, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        qwen_vae,
        made={
            "tokenizer": partial(qwen_tokenizer, special=VISION),
            "processor": picture_processor,
            "text_encoder": qwen_vl_of_pictures,
        },
        arguments=prompted(64, image=[PICTURE], true_cfg_scale=1.0),
        sample_size=[8, 8],
        references=1,
    ),
    "QwenImage21Transformer2DModel": Tiny(
        diffusers.QwenImage21Pipeline,
        flow_match(**_DYNAMIC, max_shift=0.9, max_image_seq_len=8192),
        qwen21_vae,
        made={"processor": qwen3_processor, "text_encoder": lambda: qwen3_vl(qwen3_processor(), generates=True)},
        pixels=(64, 64),
        other_pixels=(96, 64),
        arguments=prompted(),
        sample_size=[4, 4],
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        diffusers.NucleusMoEImagePipeline,
        flow_match(**_DYNAMIC, max_shift=1.15),
        qwen_vae,
        made={
            "processor": partial(qwen_tokenizer, CHAT_OF_PARTS),
            "text_encoder": lambda: qwen3_vl(qwen_tokenizer(), layers=8, generates=True),
        },
        arguments=prompted(),
        sample_size=[8, 8],
    ),
    "WanTransformer3DModel": Tiny(
        diffusers.WanPipeline,
        partial(diffusers.UniPCMultistepScheduler, **_FLOW),
        wan_vae,
        [UMT5],
        arguments=prompted(32, num_frames=5),
        sample_size=[3, 8, 8],
    ),
    "Flux2Transformer2DModel": Tiny(
        diffusers.Flux2Pipeline,
        flow_match(**_DYNAMIC, shift=3.0, max_shift=1.15),
        flux2_vae,
        [(partial(llama_tokenizer, PARTS), mistral)],
        arguments=prompted(300),  # the system's message is in front
        sample_size=[8, 8],
    ),
    "Flux2Transformer2DModel of klein": Tiny(
        diffusers.Flux2KleinPipeline,
        flow_match(**_DYNAMIC, shift=3.0, max_shift=1.15),
        flux2_vae,
        [(chat_tokenizer, deep_qwen3)],
        arguments=prompted(32),
        sample_size=[8, 8],
    ),
    "ChromaTransformer2DModel": Tiny(
        diffusers.ChromaPipeline,
        flow_match(**_DYNAMIC, shift=3.0, max_shift=1.15),
        partial(kl, 0.3611, 0.1159),
        [T5],
        arguments=prompted(32),
        sample_size=[8, 8],
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        diffusers.HiDreamImagePipeline,
        flow_match(shift=3.0),
        partial(kl, 0.3611, 0.1159, levels=1),  # the pipeline makes images of 128×128 latent pixels, whatever is asked
        [
            (long_clip_tokenizer, partial(clip, hidden_size=8, projection=4)),
            (long_clip_tokenizer, partial(clip, hidden_size=12, projection=8)),
            T5,
            (llama_tokenizer, llama),
        ],
        changes={"max_resolution": (128, 128)},
        pixels=(128, 128),
        other_pixels=(256, 64),
        arguments=prompted(32),
        steps=1,
    ),
    "OvisImageTransformer2DModel": Tiny(
        diffusers.OvisImagePipeline,
        flow_match(**_DYNAMIC, shift=3.0, max_shift=1.15),
        partial(kl, 0.3611, 0.1159),
        [(chat_tokenizer, qwen3)],
        arguments=prompted(64),
        sample_size=[8, 8],
    ),
    "LongCatImageTransformer2DModel": Tiny(
        diffusers.LongCatImagePipeline,
        flow_match(**_DYNAMIC, shift=3.0, max_shift=1.15),
        partial(kl, 0.3611, 0.1159, channels=16),  # the pipeline takes it for granted that there are 16
        [(qwen_tokenizer, qwen_vl)],
        changes={"in_channels": 64},
        more={"text_processor": qwen_tokenizer()},  # in place of a Qwen2VLProcessor, which only rewriting needs
        arguments=prompted(negative_prompt=" ", enable_prompt_rewrite=False),
        sample_size=[8, 8],
    ),
    "BriaTransformer2DModel": Tiny(
        diffusers.BriaPipeline,
        flow_match(**_DYNAMIC, shift=3.0, max_shift=1.15),
        partial(kl, 0.3611, 0.1159),
        [T5],
        arguments=prompted(32),
        sample_size=[8, 8],
    ),
    "BriaFiboTransformer2DModel": Tiny(
        diffusers.BriaFiboPipeline,
        flow_match(**_DYNAMIC, shift=3.0, max_shift=1.15),
        fibo_vae,
        [(llama_tokenizer, smollm3)],
        pixels=(128, 128),
        other_pixels=(192, 128),
        arguments=prompted(64),
        sample_size=[8, 8],
    ),
    "ZImageTransformer2DModel": Tiny(
        diffusers.ZImagePipeline,
        flow_match(shift=3.0),
        partial(kl, 0.3611, 0.1159),
        [(chat_tokenizer, small_qwen3)],
        arguments=prompted(64),
        sample_size=[8, 8],
    ),
    "Krea2Transformer2DModel": Tiny(
        diffusers.Krea2Pipeline,
        flow_match(**_DYNAMIC, max_shift=1.15, max_image_seq_len=6400),
        qwen_vae,
        [(qwen_tokenizer, qwen3_vl)],
        more={"text_encoder_select_layers": (1, 2)},
        arguments=prompted(64),
        sample_size=[8, 8],
    ),
    "ErnieImageTransformer2DModel": Tiny(
        diffusers.ErnieImagePipeline,
        flow_match(shift=3.0),
        flux2_vae,
        [(llama_tokenizer, small_mistral)],
        arguments=prompted(),
        sample_size=[8, 8],
    ),
    "Ideogram4Transformer2DModel": Tiny(
        diffusers.Ideogram4Pipeline,
        flow_match(shift=1.0),
        flux2_vae,
        [(partial(qwen_tokenizer, PARTS), partial(qwen3_vl, layers=36))],
        changes=OF_13_LAYERS,
        made={
            "unconditional_transformer": lambda: FAMILIES["Ideogram4Transformer2DModel"].model(
                7, llm_features_dim=13 * TEXT_CHANNELS
            )
        },
        arguments=prompted(64, guidance_scale=3.0, guidance_schedule=None),
        sample_size=[8, 8],
    ),
    "CogView4Transformer2DModel": Tiny(
        diffusers.CogView4Pipeline,
        flow_match(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        partial(kl, 1.0, 0.0, levels=4),  # the sizes of images are eight times those of latents
        [(gemma_tokenizer, glm)],
        pixels=(64, 64),
        other_pixels=(96, 64),
        arguments=prompted(64),
    ),
    "GlmImageTransformer2DModel": Tiny(
        diffusers.GlmImagePipeline,
        flow_match(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
        glm_image_vae,
        [(partial(transformers.ByT5Tokenizer, model_max_length=64), byt5)],
        changes={"text_embed_dim": 20},
        made={"processor": glm_processor, "vision_language_encoder": glm_image_drawer},
        pixels=(64, 64),
        other_pixels=(96, 64),
        arguments=prompted(64),
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        diffusers.CogView3PlusPipeline,
        partial(
            diffusers.CogVideoXDDIMScheduler,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=4.0,
            timestep_spacing="trailing",
        ),
        partial(kl, 0.13025, levels=4),
        [T5],
        pixels=(64, 64),
        other_pixels=(96, 64),
        arguments=prompted(32),
    ),
    "PRXTransformer2DModel": Tiny(
        diffusers.PRXPipeline,
        flow_match(shift=3.0),
        partial(kl, 0.3611, 0.1159),
        [(partial(gemma_tokenizer, 32), t5_gemma)],
        arguments=prompted(use_resolution_binning=False),
        of_several={"guidance_scale": 1.0},  # guided, its pipeline takes one caption (diffusers 0.42)
        sample_size=[8, 8],
    ),
    "OmniGenTransformer2DModel": Tiny(
        diffusers.OmniGenPipeline,
        flow_match(invert_sigmas=True, num_train_timesteps=1),
        partial(kl, 0.13025, levels=4),  # the pipeline takes it for granted that images get smaller by 8
        changes={"vocab_size": len(llama_tokenizer())},
        made={"tokenizer": llama_tokenizer},
        pixels=(64, 64),
        other_pixels=(96, 64),
        arguments=prompted(),
        sample_size=[8, 8],
    ),
    # What was distilled of ADM, with its classes; it predicts no variances.
    "UNet2DModel of ADM": Tiny(
        diffusers.ConsistencyModelPipeline,
        diffusers.CMStochasticIterativeScheduler,
        None,
        changes={"in_channels": 3, "out_channels": 3, "sample_size": 16},
        pixels=(16, 16),
        other_pixels=None,
        arguments={"class_labels": [3]},
        is_trained=False,
    ),
    # With its prior, which makes an image's embedding of a caption.
    "UNet2DConditionModel of Kandinsky 2.2": Tiny(
        diffusers.KandinskyV22CombinedPipeline,
        partial(diffusers.DDPMScheduler, **_KANDINSKY_BETAS),
        movq,
        made={
            "prior_prior": kandinsky_prior,
            "prior_scheduler": partial(diffusers.UnCLIPScheduler, prediction_type="sample", clip_sample_range=5.0),
            "prior_tokenizer": clip_tokenizer,
            "prior_text_encoder": lambda: clip(clip_tokenizer(), hidden_size=12, projection=12),
            "prior_image_encoder": clip_vision,
            "prior_image_processor": picture_reader,
        },
        arguments=prompted(prior_num_inference_steps=2),
        vae_name="movq",
    ),
    "UNet2DConditionModel of DeepFloyd IF": Tiny(
        diffusers.IFPipeline,
        partial(diffusers.DDPMScheduler, beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        None,
        [T5],
        changes={"in_channels": 3, "out_channels": 6, "sample_size": 16},
        more={
            "safety_checker": None,
            "feature_extractor": None,
            "watermarker": None,
            "requires_safety_checker": False,
        },
        pixels=(16, 16),
        other_pixels=(24, 16),
        arguments=prompted(clean_caption=False),
    ),
}
PIPELINES |= {
    "CogVideoXTransformer3DModel": Tiny(
        diffusers.CogVideoXPipeline,
        partial(diffusers.CogVideoXDDIMScheduler, **_SD_BETAS, prediction_type="v_prediction", snr_shift_scale=3.0),
        cogvideox_vae,
        [T5],
        changes={"use_rotary_positional_embeddings": True},
        arguments=prompted(32, num_frames=5),
        sample_size=[3, 8, 8],
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        diffusers.HunyuanVideoPipeline,
        flow_match(shift=7.0),
        hunyuanvideo_vae,
        [(hunyuan_tokenizer, hunyuan_llama), (clip_tokenizer, partial(clip, hidden_size=12))],
        arguments=prompted(64, num_frames=9),
        sample_size=[3, 8, 8],
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        diffusers.HunyuanVideo15Pipeline,
        flow_match(shift=5.0),
        hunyuanvideo15_vae,
        [(partial(qwen_tokenizer, chat_template=CHAT_OF_ROLES), qwen_vl_text), (transformers.ByT5Tokenizer, byt5)],
        more={"guider": diffusers.ClassifierFreeGuidance(enabled=False)},
        arguments=prompted(num_frames=9),
        sample_size=[3, 8, 8],
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        diffusers.HunyuanImagePipeline,
        flow_match(shift=5.0),
        hunyuanimage_vae,
        [(qwen_tokenizer, qwen_vl), (transformers.ByT5Tokenizer, byt5)],
        more={"guider": None, "ocr_guider": None},
        arguments=prompted(),
        sample_size=[8, 8],
    ),
}
# LTX-2 is guided by captions, by perturbed attention and by what it makes without sound, of video and sound apart.
UNGUIDED = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0}
UNGUIDED |= {"modality_scale": 1.0, "audio_modality_scale": 1.0}
PIPELINES |= {
    "LTXVideoTransformer3DModel": Tiny(
        diffusers.LTXPipeline,
        flow_match(**_DYNAMIC, max_shift=2.05, shift_terminal=0.1),
        ltx_vae,
        [T5],
        pixels=(128, 128),
        other_pixels=(192, 128),
        arguments=prompted(32, num_frames=9),
        sample_size=[2, 4, 4],
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        diffusers.LTX2Pipeline,
        flow_match(**_DYNAMIC, max_shift=2.05, shift_terminal=0.1),
        ltx2_vae,
        [(gemma_tokenizer, gemma3)],
        changes={"audio_in_channels": 8, "audio_out_channels": 8},
        made={"audio_vae": ltx2_audio_vae, "vocoder": ltx2_vocoder, "connectors": ltx2_connectors},
        pixels=(128, 128),
        other_pixels=(192, 128),
        arguments=prompted(32, num_frames=9, **UNGUIDED),
        sample_size=[2, 4, 4],
    ),
    "SkyReelsV2Transformer3DModel": Tiny(
        diffusers.SkyReelsV2Pipeline,
        partial(diffusers.UniPCMultistepScheduler, **_FLOW),
        wan_vae,
        [UMT5],
        arguments=prompted(32, num_frames=5),
        sample_size=[3, 8, 8],
    ),
    "WanVACETransformer3DModel": Tiny(
        diffusers.WanVACEPipeline,
        partial(diffusers.UniPCMultistepScheduler, **_FLOW),
        wan_vae,
        [UMT5],
        changes={"vace_in_channels": 4 + 4 + 16},  # what is kept, what is made anew, and the mask
        more={"transformer_2": None},
        arguments=prompted(32, num_frames=5),
        sample_size=[3, 8, 8],
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        diffusers.Kandinsky5T2VPipeline,
        flow_match(shift=5.0),
        hunyuanvideo_vae,
        changes={"in_text_dim2": 12},
        made={
            "tokenizer": film_processor,
            "text_encoder": lambda: qwen_vl(film_processor().tokenizer),
            "tokenizer_2": clip_tokenizer,
            "text_encoder_2": lambda: clip(clip_tokenizer(), hidden_size=12),
        },
        arguments=prompted(512, num_frames=9),
        sample_size=[3, 8, 8],
        accumulates=2,
    ),
    "CosmosTransformer3DModel": Tiny(
        Cosmos2TextToImagePipeline,
        flow_match(use_karras_sigmas=True),
        wan_vae,
        [T5],
        arguments=prompted(32),
        sample_size=[1, 8, 8],
    ),
    "MochiTransformer3DModel": Tiny(
        diffusers.MochiPipeline,
        flow_match(invert_sigmas=True),
        mochi_vae,
        [T5],
        pixels=(64, 64),
        other_pixels=(96, 64),
        arguments=prompted(32, num_frames=7),
        sample_size=[2, 8, 8],
    ),
    "MotifVideoTransformer3DModel": Tiny(
        diffusers.MotifVideoPipeline,
        flow_match(**_DYNAMIC, max_shift=1.15),
        wan_vae,
        [(gemma_tokenizer, t5_gemma2)],
        more={"guider": diffusers.ClassifierFreeGuidance(enabled=False)},
        arguments=prompted(32, num_frames=5),
        sample_size=[3, 8, 8],
    ),
    "SanaVideoTransformer3DModel": Tiny(
        diffusers.SanaVideoPipeline,
        partial(diffusers.DPMSolverMultistepScheduler, **_FLOW),
        wan_vae,
        [GEMMA],
        other_pixels=(64, 32),
        arguments=prompted(32, frames=5, use_resolution_binning=False, complex_human_instruction=None),
        sample_size=[3, 8, 8],
    ),
}
for name, tiny in PIPELINES.items():
    tiny.family = name
