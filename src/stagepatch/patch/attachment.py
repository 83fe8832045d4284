"""A patch on a model, by module hooks alone: the model's parameters, names and files stay as they are."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stagepatch.core.errors import UserError
from stagepatch.families import Backbone, find_denoiser
from stagepatch.families.base import Begin
from stagepatch.patch.prepending import attend_to_prompts

if TYPE_CHECKING:
    from stagepatch.patch.patch import Patch


class Attachment:
    """Handle of an attached patch; `detach()`, or the end of a `with` block, restores the model.

    A hook on the model reads the image's grid off the arguments. One tap per embedding module hands the condition
    to the gate, before any block runs; so the blocks may be recomputed (gradient checkpointing, non-reentrant) with
    the same weights. One hook per site adds the mixture. Between a forward with gradient checkpointing and its
    backward, run no other forward.
    """

    def __init__(self, patch: Patch, model: nn.Module, backbone: Backbone) -> None:
        self.patch = patch
        self._handles: list[RemovableHandle] = []
        modules = dict(model.named_modules())
        taps = [backbone.time_tap]
        if patch.config.condition == "t+c":
            taps += backbone.condition_taps
        # Every module is found before the first hook is put on: an error leaves the model as it was.
        tapped = [_module(modules, name) for name in taps]
        entered = [_module(modules, site.module) for site in backbone.sites]
        condition = _Condition(patch, len(taps))
        begin = _Begin(patch, condition, backbone.begin, model)
        self._handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
        for position, module in enumerate(tapped):
            self._handles.append(module.register_forward_hook(_Tap(condition, position)))
        for position, (site, module) in enumerate(zip(backbone.sites, entered, strict=True)):
            if patch.is_gated_prepending:
                self._handles += attend_to_prompts(patch, position, site.attention, modules)
                continue
            hook = _Site(patch, position, site.argument)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if patch.config.position == "prepend":
                self._handles.append(module.register_forward_hook(_Strip(patch, position)))
        _forget_compiled()

    def detach(self) -> None:
        """Take the patch off; further calls do nothing."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _forget_compiled()
        self._handles.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def patches_on(target: Any, component: str = "") -> list[Patch]:
    """The patches attached to a model, or to a pipeline's denoiser, in the order in which they were.

    To switch them all off: `for patch in patches_on(pipe): patch.enabled = False`.
    """
    hooks = find_denoiser(target, component)._forward_pre_hooks.values()
    return [hook.patch for hook in hooks if isinstance(hook, _Begin)]


# Hooks are objects rather than closures, so that copy.deepcopy(model) copies the patch with it.
class _Condition:
    """Sums the outputs of the taps, and shows the patch the sum when all have come, once a forward."""

    def __init__(self, patch: Patch, taps: int) -> None:
        self.patch = patch
        self.outputs: list[Tensor | None] = [None] * taps
        self.observed = False

    def begin(self) -> None:
        """Forget what came before: a forward that broke off between two taps leaves nothing to the next."""
        self.outputs = [None] * len(self.outputs)
        self.observed = False

    def put(self, tap: int, output: Tensor) -> None:
        if self.observed:
            return
        self.outputs[tap] = output
        outputs = [output for output in self.outputs if output is not None]
        if len(outputs) == len(self.outputs):
            self.observed = True
            self.patch.observe(sum(outputs[1:], start=outputs[0]))


class _Begin:
    def __init__(self, patch: Patch, condition: _Condition, begin: Begin | None, model: nn.Module) -> None:
        self.patch = patch
        self.condition = condition
        self.begin = begin
        self.names = list(inspect.signature(model.forward).parameters)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.patch.enabled or self.begin is None:
            return
        self.condition.begin()
        try:
            self.patch.extent = self.begin(model, dict(zip(self.names, args, strict=False)) | kwargs)
        except KeyError:
            self.patch.extent = None  # the model will say itself which argument it misses


class _Tap:
    def __init__(self, condition: _Condition, tap: int) -> None:
        self.condition = condition
        self.tap = tap

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.condition.patch.enabled:
            self.condition.put(self.tap, output)


class _Site:
    def __init__(self, patch: Patch, position: int, argument: str) -> None:
        self.patch = patch
        self.position = position
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.patch.enabled:
            return None
        if args:
            return (self.patch.enter(self.position, args[0]), *args[1:]), kwargs
        return args, {**kwargs, self.argument: self.patch.enter(self.position, kwargs[self.argument])}


class _Strip:
    """Takes the prepended prompts off a block's output again."""

    def __init__(self, patch: Patch, position: int) -> None:
        self.patch = patch
        self.position = position

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.patch.enabled:
            return None
        return output[:, self.patch.prompts[self.position].shape[-2] :]


def _forget_compiled() -> None:
    """Compiled code does not look for hooks that came since (Dynamo's `skip_nnmodule_hook_guards`)."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _module(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise UserError(f"The model has no module '{name}', which its description names.")
    return modules[name]
