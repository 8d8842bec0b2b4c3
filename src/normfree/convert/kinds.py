"""What conversion knows of other people's modules: which are norms, and which layers have a standardised twin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfree import nn as ours
from normfree.nn.fold import attached_to

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ours.ScaledWSConv1d,
    nn.Conv2d: ours.ScaledWSConv2d,
    nn.Conv3d: ours.ScaledWSConv3d,
    nn.ConvTranspose1d: ours.ScaledWSConvTranspose1d,
    nn.ConvTranspose2d: ours.ScaledWSConvTranspose2d,
    nn.ConvTranspose3d: ours.ScaledWSConvTranspose3d,
    nn.Linear: ours.ScaledWSLinear,
}
"""The standardised layer in place of each plain one."""

KEPT_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ours.KeptMeanConv1d,
    nn.Conv2d: ours.KeptMeanConv2d,
    nn.Conv3d: ours.KeptMeanConv3d,
    nn.ConvTranspose1d: ours.KeptMeanConvTranspose1d,
    nn.ConvTranspose2d: ours.KeptMeanConvTranspose2d,
    nn.ConvTranspose3d: ours.KeptMeanConvTranspose3d,
    nn.Linear: ours.KeptMeanLinear,
}
"""The same with a kept mean per filter."""

# Convolutions of other libraries, by class name, and the torch class they are with which padding: what they do
# besides is padding like TensorFlow's, or a standardization of their own that ours replaces in a fresh model.
SAME_PADDED = frozenset({"Conv2dSame", "StdConv2dSame", "ScaledStdConv2dSame"})
STANDARDIZED = frozenset({"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"})

_BATCH = (nn.modules.batchnorm._BatchNorm,)
_INSTANCE = (nn.modules.instancenorm._InstanceNorm,)


def class_name(module: nn.Module) -> str:
    """A module's class, as the record names it."""
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    return type(module).__name__


def is_norm(module: nn.Module) -> bool:
    """Whether a module is of torch's normalization classes; others are recognised by what they compute."""
    return isinstance(module, (*_BATCH, *_INSTANCE, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a norm takes statistics over the examples of a batch."""
    return isinstance(module, _BATCH)


def is_map_norm(module: nn.Module) -> bool:
    """Whether a norm of torch's is one of convolutional networks; a LayerNorm over the last axis: only behind one."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return "2d" in class_name(module).lower()
    return is_norm(module)


def is_removable(module: nn.Module) -> bool:
    """Whether what a norm does beside normalizing is known (an activation and a dropout at most)."""
    return not isinstance(module, (torch.jit.ScriptModule, nn.LocalResponseNorm))


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution, of torch or a subclass."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer, of torch or a subclass."""
    return is_convolution(module) or isinstance(module, nn.Linear)


def base_of(module: nn.Module, *, fresh: bool) -> type[nn.Module] | None:
    """The torch class a layer behaves as; None where a subclass, or a hook, may do what is not known.

    Args:
        module: the layer.
        fresh: its weight is drawn anew, so that a standardization of its own does not matter.
    """
    if attached_to(module):
        return None
    if type(module) in TWINS:
        return type(module)
    if type(module) in (ours.PaddedConv2d, ours.ScaledConv2d) and (fresh or type(module) is ours.PaddedConv2d):
        return nn.Conv2d
    for kind in TWINS:
        if isinstance(module, kind) and "weight" in module._parameters and _computes_as(module, kind):
            return kind
    name = class_name(module)
    if isinstance(module, nn.Conv2d) and (name in SAME_PADDED | STANDARDIZED) and (fresh or name not in STANDARDIZED):
        return nn.Conv2d
    return None


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a subclass leaves alone what its base computes."""
    methods = ("forward", "_conv_forward", "__call__")
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in methods)


def fan_in(module: nn.Module) -> int:
    """Weights that feed one output of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight.numel() // module.out_channels
    return weight[0].numel()


def channels_of(norm: nn.Module) -> int:
    """The channels of a norm with statistics of each: no tensor of its own has more numbers."""
    tensors = (*norm._parameters.values(), *norm._buffers.values())
    sizes = [tensor.numel() for tensor in tensors if tensor is not None]
    return max(sizes) if sizes else int(norm.num_features)  # type: ignore[arg-type]


def activation_in(norm: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules a fused norm runs beside normalizing, in their order: an activation, a dropout, by any name."""
    return [(name, part) for name, part in norm.named_children() if not isinstance(part, nn.Identity)]
