"""Wavelet gates on a frozen model (Spectral Diffusion, arXiv 2211.17106)."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from stagepatch.core import UserError, as_user_error, check_values, read_json, read_tensors, write_json, write_tensors
from stagepatch.families import Backbone, describe
from stagepatch.methods.base import Method
from stagepatch.methods.config import MethodConfig, WaveletConfig
from stagepatch.methods.wavelet_gates import WaveletGates
from stagepatch.patch import Attachment

FILE_NAME, CONFIG_NAME = "wavelet.safetensors", "wavelet.json"


class Wavelet(Method):
    """Trains gates on the wavelet bands of what enters each block.

    Args:
        facts: how it is trained, in words.
    """

    name = "wavelet"
    kind = "wavelet gates"
    marker = CONFIG_NAME

    def __init__(self, config: WaveletConfig | None = None, facts: dict[str, str] | None = None) -> None:
        self.config = config or WaveletConfig()
        self.facts = facts or {}
        self.gates: WaveletGates
        self._attachment: Attachment | None = None

    @classmethod
    def from_config(cls, config: MethodConfig, facts: dict[str, str]) -> Self:
        return cls(config.wavelet, facts)

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        model.requires_grad_(False).eval()
        self._attach(model)
        return [{"params": list(self.gates.parameters()), "factor": 1.0}]

    def save(self, directory: Path) -> None:
        write_tensors(directory / FILE_NAME, self.gates.state_dict())
        sites = self._sites()
        content = {"wavelet": asdict(self.config), "model_class": self.gates.backbone.model_class, "sites": sites}
        write_json(directory / CONFIG_NAME, {**content, "facts": self.facts})

    def load(self, model: nn.Module, directory: Path) -> None:
        """See `Method`.

        Raises:
            UserError: files that are missing or foreign, or gates for other sites than the model's.
        """
        content = read_json(directory / CONFIG_NAME)
        with as_user_error(f"'{directory / CONFIG_NAME}' is not of wavelet gates", LookupError, TypeError, ValueError):
            check_values(dict(content["wavelet"]), WaveletConfig, "wavelet")
            self.config, sites = WaveletConfig(**content["wavelet"]), list(content["sites"])
        with torch.device("meta"):  # no memory is taken for sizes that the tensors do not have
            self.gates = WaveletGates(self.config, _described(model))
        if self._sites() != sites:
            self._detach()
            raise UserError(
                f"'{directory}' holds wavelet gates for {content.get('model_class')} with {len(sites)} sites, which "
                f"this model has not. Put them on the model that they were trained on."
            )
        self._fill(directory, assign=True)
        self._attach(model)
        self._fill(directory)

    def start_from(self, model: nn.Module, directory: Path) -> None:
        content = read_json(directory / CONFIG_NAME)
        if content.get("wavelet") != asdict(self.config) or content.get("sites") != self._sites():
            raise UserError(f"'{directory}' holds gates of another config: give its 'wavelet' to train on from it.")
        self._fill(directory)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()

    def _fill(self, directory: Path, assign: bool = False) -> None:
        tensors, _ = read_tensors(directory / FILE_NAME)
        with as_user_error(f"'{directory / FILE_NAME}' does not hold these gates", RuntimeError):
            self.gates.load_state_dict(tensors, assign=assign)

    def _sites(self) -> list[list[Any]]:
        return [[site.name, site.channels] for site in self.gates.backbone.sites]

    def _attach(self, model: nn.Module) -> None:
        """Put fresh gates on in place of this method's former ones."""
        self._detach()
        backbone = _described(model)
        self.gates = WaveletGates(self.config, backbone).to(next(model.parameters()).device)
        self._attachment = Attachment(self.gates, model, backbone)


def _described(model: nn.Module) -> Backbone:
    """A model with sites of one kind."""
    found = describe(model)
    return replace(found, sites=tuple(site for site in found.sites if site.kind == found.sites[0].kind))
