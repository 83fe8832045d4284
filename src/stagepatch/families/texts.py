"""Texts of different lengths, as pipelines hand them around in lists, in tensors with a row per caption."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad_texts(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of tokens [L, …] each: `encoder_hidden_states` [B, N, …], zeros behind, and the mask that tells them apart."""
    lengths = torch.tensor([len(text) for text in texts], device=texts[0].device)
    tokens = pad_sequence(list(texts), batch_first=True)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}


def unpad_texts(condition: dict[str, Tensor]) -> list[Tensor]:
    """The other way."""
    rows = zip(condition["encoder_hidden_states"], condition["encoder_attention_mask"].bool(), strict=True)
    return [tokens[mask] for tokens, mask in rows]
