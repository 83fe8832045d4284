"""Patch: made, put on a model, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from stagepatch.core import UserError, as_user_error
from stagepatch.families import find_denoiser
from stagepatch.patch.attachment import Attachment, attached_to
from stagepatch.patch.config import PatchConfig
from stagepatch.patch.fingerprint import architecture_differences, fingerprint, warn_of_other_weights
from stagepatch.patch.prompts import MixtureOfPrompts
from stagepatch.patch.sites import check_same_sites, describe_for, with_condition
from stagepatch.patch.storage import find_patch, load_patch, load_released, save_patch


class Patch(MixtureOfPrompts, ModelHubMixin):
    """Prompts and gate for a frozen denoiser (DMP, arXiv 2405.17825, Eq. 3).

    It owns what is learned, and nothing of the model that it is attached to. Made by `Patch.create(model, config)` or
    `Patch.from_pretrained(directory)`, put on by `attach`.

    Args:
        config: choices of the method.
        backbone: description of the model it is for, with the sites that the patch takes and no others.

    Attributes:
        scale: factor on the prompts, 1 as trained. With position 'add', 0 is the base model.
        enabled: False leaves the model as if the patch were detached.
        fingerprint: of the model that it was made for.
        facts: how it was trained, in words, for its model card.
    """

    @classmethod
    def create(cls, model: Any, config: PatchConfig | None = None, component: str = "") -> Patch:
        """A fresh patch for a model or pipeline, on the model's device. The model is not touched.

        Args:
            component: the denoiser's name in a pipeline that has several.

        Raises:
            UserError: an unknown model class, or a choice that the model cannot take.
        """
        denoiser = find_denoiser(model, component)
        config = with_condition(config or PatchConfig(), denoiser)
        patch = cls(config, describe_for(denoiser, config))
        patch.made_for(denoiser)
        is_offloaded = any(hasattr(module, "_hf_hook") for module in denoiser.modules())
        return patch if is_offloaded else patch.to(next(denoiser.parameters()).device)

    def made_for(self, model: Any) -> None:
        """Take a denoiser, as it is now, for the one that this patch belongs to."""
        self.fingerprint = fingerprint(model)

    # The mixin's own reads config.json before us, and dies of a broken one with a stack of library frames.
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: str | Path, revision: str | None = None, token: str | None = None, **options: Any
    ) -> Patch:
        """A patch that `save_pretrained` or `push_to_hub` wrote.

        Args:
            source: a directory, or a Hub id such as 'name/patch'.
            revision: branch, tag or commit on the Hub.
            token: for a private repository.
            options: of huggingface_hub's `snapshot_download`, such as `cache_dir` or `local_files_only`.

        Raises:
            UserError: missing, truncated or foreign files.
        """
        return load_patch(cls, find_patch(source, revision=revision, token=token, **options))

    @classmethod
    def from_released(cls, checkpoint: Any, top_k: float = 1.0) -> Patch:
        """A patch out of a checkpoint of the authors' released code, which also holds the DiT.

        Args:
            checkpoint: a file, or a state dict with `prompt_embeddings` [L, N, D], added to the first L blocks, and a
                gate: `gate.weight` [N, D+1], `gate.bias` [N], and of its noise `w_noise` [D, N]. Without a gate it is
                plain prompt tuning.
            top_k: the released code's `topk`, which its checkpoints do not hold: the share of prompts that weigh
                anything, a softmax over these alone; 1 is soft selection.

        Raises:
            UserError: no such file or keys, or shapes that are none of the released code's.
        """
        return load_released(cls, checkpoint, top_k)

    # The mixin's own removes the former config.json first, and so loses a patch where the disk is full.
    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str = "", **options: Any
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and a model card, each whole or not at all.

        Args:
            push_to_hub: put them into a Hub repository too.
            repo_id: its name; by default the directory's.
            options: of `push_to_hub`.
        """
        save_patch(self, Path(save_directory))
        return self.push_to_hub(repo_id or Path(save_directory).name, **options) if push_to_hub else None

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload patch", **options: Any) -> str:
        """Put what `save_pretrained` writes into a Hub repository, made if need be; returns the commit's URL.

        Args:
            repo_id: such as 'name/patch'.
            options: of huggingface_hub's `ModelHubMixin.push_to_hub`, such as `private`, `token`, `branch`.

        Raises:
            UserError: no such namespace, no permission, or the Hub cannot be reached.
        """
        with as_user_error(f"Cannot push to '{repo_id}'", HfHubHTTPError, HFValidationError, OSError):
            return str(super().push_to_hub(repo_id, commit_message=commit_message, **options))

    def attach(self, target: Any, component: str = "") -> Attachment:
        """Put the patch on a model, or on the denoiser of a diffusers pipeline; it follows to the model's device.

        Attaching and detaching make a compiled model compile again; to compare with and without, set `enabled`.
        Several patches on one model add up, each with its own scale.

        Args:
            component: the denoiser's name in a pipeline that has several.

        Returns:
            A handle with `detach()`; as a context manager it detaches at the end.

        Raises:
            UserError: the patch is for another model, or is on this one already.

        Warns:
            UserWarning: the model has the architecture, but other weights than the patch was trained on.
        """
        model = find_denoiser(target, component)
        backbone = describe_for(model, self.config)
        on = fingerprint(model)
        check_same_sites(self.backbone, backbone, architecture_differences(self.fingerprint, on))
        warn_of_other_weights(self.fingerprint, on)
        if any(patch is self for patch in patches_on(model)):
            raise UserError("This patch is attached to that model already: detach it first.")
        device = next(model.parameters()).device
        if device.type != "meta":  # an offloaded model: then the patch follows the hidden states
            self.to(device)
        return Attachment(self, model, backbone)


def patches_on(target: Any, component: str = "") -> list[Patch]:
    """The patches attached to a model, or to a pipeline's denoiser, in the order in which they were.

    To switch them all off: `for patch in patches_on(pipe): patch.enabled = False`.
    """
    return [patch for patch in attached_to(find_denoiser(target, component)) if isinstance(patch, Patch)]
