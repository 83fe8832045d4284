"""A patch on a model, by module hooks alone: the model's parameters, names and files stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stagepatch.errors import UserError

if TYPE_CHECKING:
    from stagepatch.patch.patch import Patch


class Attachment:
    """Handle of an attached patch; `detach()`, or the end of a `with` block, restores the model.

    One tap per embedding module hands the condition to the gate, before any block runs; so the blocks may be
    recomputed (gradient checkpointing, non-reentrant) with the same weights. One hook per site adds the mixture.
    Between a forward with gradient checkpointing and its backward, run no other forward.
    """

    def __init__(self, patch: Patch, model: nn.Module) -> None:
        self.patch = patch
        self._model_id = id(model)
        self._handles: list[RemovableHandle] = []
        modules = dict(model.named_modules())
        backbone = patch.backbone
        taps = [backbone.time_tap]
        if patch.config.condition == "t+c":
            taps += backbone.condition_taps
        condition = _Condition(patch, len(taps))
        for name in taps:
            self._handles.append(_module(modules, name).register_forward_hook(_Tap(condition)))
        for position, site in enumerate(backbone.sites):
            module = _module(modules, site.module)
            hook = _Site(patch, position, site.argument)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if patch.config.position == "prepend":
                self._handles.append(module.register_forward_hook(_Strip(patch, position)))
        patch._attached_to.append(self._model_id)

    def detach(self) -> None:
        """Take the patch off; further calls do nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._model_id in self.patch._attached_to:
            self.patch._attached_to.remove(self._model_id)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


# Hooks are objects rather than closures, so that copy.deepcopy(model) copies the patch with it.
class _Condition:
    """Sums the outputs of the taps, and shows the patch the sum when all have come."""

    def __init__(self, patch: Patch, taps: int) -> None:
        self.patch = patch
        self.taps = taps
        self.seen = 0
        self.total: Tensor | None = None

    def add(self, output: Tensor) -> None:
        self.total = output if self.seen == 0 or self.total is None else self.total + output
        self.seen += 1
        if self.seen == self.taps:
            total, self.total, self.seen = self.total, None, 0
            self.patch.observe(total)


class _Tap:
    def __init__(self, condition: _Condition) -> None:
        self.condition = condition

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.condition.patch.enabled:
            self.condition.add(output)


class _Site:
    def __init__(self, patch: Patch, position: int, argument: str) -> None:
        self.patch = patch
        self.position = position
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.patch.enabled:
            return None
        if args:
            return (self.patch.apply(self.position, args[0]), *args[1:]), kwargs
        return args, {**kwargs, self.argument: self.patch.apply(self.position, kwargs[self.argument])}


class _Strip:
    """Takes the prepended prompts off a block's output again."""

    def __init__(self, patch: Patch, position: int) -> None:
        self.patch = patch
        self.position = position

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.patch.enabled:
            return None
        return output[:, self.patch.prompts[self.position].shape[-2] :]


def _module(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise UserError(f"The model has no module '{name}', which its description names.")
    return modules[name]
