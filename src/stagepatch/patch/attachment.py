"""A patch on a model, by module hooks alone: the model's parameters, names and files stay as they are."""

import inspect
import sys
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.families import Backbone, Extent, pooled_text
from stagepatch.patch.prepending import PromptedAttention
from stagepatch.patch.prompts import MixtureOfPrompts


class Attachable(Protocol):
    """What is put on a model's sites.

    Attributes:
        condition: which embedding it sees: 't', 't+c', 't+text', as `PatchConfig.condition` says.
        enabled: False leaves the model as if it were detached.
        extent: of the forward that is under way, written by the attachment.
        observed_rows: of the condition in the forward that is under way; set to 0 where a forward begins.
    """

    enabled: bool
    extent: Extent | None
    observed_rows: int

    @property
    def condition(self) -> str | None: ...

    def observe(self, condition: Tensor) -> None:
        """See the condition embedding [B, C], once a forward, before any site."""

    def enter(self, position: int, hidden_states: Tensor) -> Tensor:
        """The hidden states that enter the position-th site's block, changed."""


class Attachment(AbstractContextManager["Attachment"]):
    """Handle of an attached patch; `detach()`, or the end of a `with` block, restores the model.

    A hook on the model reads the image's grid off the arguments. One tap per embedding module hands the condition
    to the gate, before any block runs; so the blocks may be recomputed (gradient checkpointing, non-reentrant) with
    the same weights. One hook per site adds the mixture. Between a forward with gradient checkpointing and its
    backward, run no other forward.
    """

    # Hooks are methods rather than closures, so that copy.deepcopy(model) copies the attached patch with it.

    def __init__(self, patch: Attachable, model: nn.Module, backbone: Backbone) -> None:
        self.patch = patch
        self._read_extent = backbone.begin
        self._reduce = backbone.reduce
        self._names = list(inspect.signature(model.forward).parameters)
        modules = dict(model.named_modules())
        taps = [backbone.time_tap]
        if patch.condition == "t+c":
            taps += backbone.condition_taps
        self._conditions: list[Tensor | None] = [None] * len(taps)
        self._observed = False
        self._sees_text = patch.condition == "t+text"
        self._text: Tensor | None = None
        # Before the first hook is put on: an error leaves the model as it was.
        for name in (*taps, *(site.module for site in backbone.sites)):
            if name not in modules:
                raise UserError(f"The model has no module '{name}', which its description names.")
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for position, name in enumerate(taps):
            self._handles.append(modules[name].register_forward_hook(partial(self._tap, position)))
        prompts = patch if isinstance(patch, MixtureOfPrompts) and patch.config.position == "prepend" else None
        for position, site in enumerate(backbone.sites):
            if prompts and site.attention and prompts.config.is_gated_prepending:
                prompted = PromptedAttention(prompts, position, site.attention, modules)
                self._handles.append(prompted.query.register_forward_hook(prompted.keep_queries))
                self._handles.append(prompted.out.register_forward_pre_hook(prompted.attend))
                continue
            enter = partial(self._enter, position, site.argument)
            self._handles.append(modules[site.module].register_forward_pre_hook(enter, with_kwargs=True))
            if prompts:
                strip = partial(self._strip, prompts, position)
                self._handles.append(modules[site.module].register_forward_hook(strip))
        _forget_compiled()

    def detach(self) -> None:
        """Take the patch off; further calls do nothing."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _forget_compiled()
        self._handles.clear()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the extent; a former forward that broke off between two taps leaves nothing to this one."""
        if not self.patch.enabled:
            return
        self._conditions = [None] * len(self._conditions)
        self._observed = False
        self.patch.observed_rows = 0
        self._text = None
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        try:
            if self._sees_text:
                self._text = pooled_text(arguments)
            if self._read_extent is not None:
                self.patch.extent = self._read_extent(model, arguments)
        except KeyError:
            self.patch.extent = None  # the model will say itself which argument it misses

    def _tap(self, position: int, module: nn.Module, args: Any, output: Tensor) -> None:
        """Show the patch the sum of the taps' outputs when all have come, once a forward."""
        if not self.patch.enabled or self._observed or self._conditions[position] is not None:
            return
        extent = self.patch.extent
        if extent is not None and extent.rows is not None:
            output = output[extent.rows]
        self._conditions[position] = self._reduce(output)
        outputs = [output for output in self._conditions if output is not None]
        if len(outputs) == len(self._conditions):
            self._observed = True
            condition = sum(outputs[1:], start=outputs[0])
            if self._text is not None:
                condition = torch.cat([condition.expand(len(self._text), -1), self._text.to(condition)], dim=1)
            self.patch.observe(condition)

    def _enter(
        self, position: int, argument: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Put the mixture into a block's hidden states."""
        if not self.patch.enabled:
            return None
        if args:
            return (self.patch.enter(position, args[0]), *args[1:]), kwargs
        return args, {**kwargs, argument: self.patch.enter(position, kwargs[argument])}

    def _strip(
        self, prompts: MixtureOfPrompts, position: int, module: nn.Module, args: Any, output: Tensor
    ) -> Tensor | None:
        """Take the prepended prompts off a block's output again."""
        return output[:, prompts.prompts[position].shape[-2] :] if prompts.enabled else None


def attached_to(model: nn.Module) -> list[Attachable]:
    """What is attached to a model, in the order in which it was."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return [owner.patch for owner in owners if isinstance(owner, Attachment)]


def _forget_compiled() -> None:
    """Compiled code does not look for hooks that came since (Dynamo's `skip_nnmodule_hook_guards`)."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
