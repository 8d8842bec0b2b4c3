"""Adaptive gradient clipping around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normfree.common.checks import check_number, invalid
from normfree.optim.clipping import clip_units_
from normfree.optim.units import Parameters, Units, checked_pairs, units_of


class AdaptiveGradientClipping(Optimizer):
    """An optimizer that clips each unit's gradient, see ``clip_grad_adaptive_``, and then steps as another does.

    It stands in for the other everywhere: schedulers, closures, gradient scalers (which unscale first, as they
    must) and checkpoints; its state is the other's, so that a run may start or stop clipping when it resumes.

    Args:
        optimizer: the optimizer that steps.
        parameters: the model, or pairs (name, parameter), that the optimizer's parameters belong to.
        clip_factor, eps, exclude: as ``clip_grad_adaptive_``'s.

    Attributes:
        optimizer: the optimizer that steps.
        clip_fraction: fraction of units clipped in the last step, 0-d, on the gradients' device.

    Raises:
        ValueError: as ``clip_grad_adaptive_``, and if the optimizer has a parameter that ``parameters`` lacks.

    Source: Brock et al. 2021 (arXiv 2102.06171), section 4.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Parameters,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        *,
        exclude: Iterable[str] | None = None,
    ) -> None:
        if not hasattr(optimizer, "param_groups"):
            swapped = hasattr(parameters, "param_groups")
            remedy = "swap the first two arguments" if swapped else "pass the optimizer first and the model second"
            raise invalid("optimizer", type(optimizer).__name__, "must be an optimizer", remedy)
        self.optimizer = optimizer
        self.clip_factor = check_number("clip_factor", clip_factor, 0.0, exclusive=True)
        self.eps = check_number("eps", eps, 0.0, exclusive=True)
        self.parameters = parameters if isinstance(parameters, torch.nn.Module) else list(checked_pairs(parameters))
        self.exclude = exclude if exclude is None or isinstance(exclude, str) else tuple(exclude)
        self.clip_fraction = torch.zeros(())
        # Hooks and profiling as Optimizer's constructor sets them up, but no parameters of its own.
        super().__setstate__({})
        self._find_units()

    def _find_units(self) -> None:
        """Keep the units of what the optimizer steps; frozen parameters and other optimizers' are not its business."""
        stepped = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        self._stepped = stepped
        known = {id(one.parameter) for one in units_of(self.parameters, ())}
        if strangers := len(stepped - known):
            rule = f"has {strangers} parameters that the model does not have"
            remedy = "pass the model whose parameters it steps (after moving or sharding it)"
            raise invalid("optimizer", type(self.optimizer).__name__, rule, remedy)
        clipped = units_of(self.parameters, self.exclude)
        self._units: list[Units] = [one for one in clipped if id(one.parameter) in stepped]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Clip and step; a closure is clipped after each time it is called. Returns what the optimizer returns."""
        if self._stepped != {id(parameter) for group in self.param_groups for parameter in group["params"]}:
            self._find_units()  # a parameter was added or replaced since
        if closure is None:
            self._clip()
            return self.optimizer.step()

        def clipping() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._clip()
            return loss

        return self.optimizer.step(clipping)

    def _clip(self) -> None:
        self.clip_fraction: Tensor = clip_units_(self._units, self.clip_factor, self.eps)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's defaults."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(clip_factor={self.clip_factor}, eps={self.eps}, {self.optimizer!r})"
