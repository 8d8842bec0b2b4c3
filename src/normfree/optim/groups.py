"""What is decayed and what is not, and the paper's optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normfree.nn.checks import check_number, check_rate, invalid

# Layers whose weight is a matrix or a stack of filters, also where it has a single row or column.
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
_NORMALIZERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's parameters into those that weight decay is for, and the rest.

    Decayed are the weights of linear layers, embeddings and convolutions, and whatever else has two axes longer
    than one. Not decayed are biases, gains, skip gains, a normalizer's affine parameters, layer scales, and all
    scalars and vectors: decay pulls them to zero without making the function any simpler.

    Args:
        model: the model; frozen parameters are left out, shared ones are named once.
        weight_decay: of the decayed group; 5e-5 for the paper's NF-ResNets, 2e-5 for NFNets.

    Returns:
        Groups for any ``torch.optim`` optimizer, with "name" "decayed" and "undecayed"; one that is empty is absent.

    Raises:
        ValueError: for a negative decay, and a model without trainable parameters.

    Source: Brock et al. 2021, appendix on training ("we do not apply weight decay to the affine parameters").
    """
    check_number("weight_decay", weight_decay, 0.0)
    decayed: dict[int, nn.Parameter] = {}
    undecayed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in decayed and id(parameter) not in undecayed:
                chosen = decayed if _decays(module, name, parameter) else undecayed
                chosen[id(parameter)] = parameter
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay, "name": "decayed"},
        {"params": list(undecayed.values()), "weight_decay": 0.0, "name": "undecayed"},
    ]
    found = [group for group in groups if group["params"]]
    if not found:
        rule = "it has no parameter that requires a gradient"
        raise invalid("model", type(model).__name__, rule, "unfreeze what is to be trained")
    return found


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, _NORMALIZERS) or "bias" in name:
        return False
    if isinstance(module, _WEIGHTED) and name == "weight":
        return True
    return sum(size > 1 for size in parameter.shape) > 1


def nesterov_sgd(
    model: nn.Module, lr: float, *, weight_decay: float = 5e-5, momentum: float = 0.9, **options: Any
) -> torch.optim.SGD:
    """Return the paper's optimizer: SGD with Nesterov momentum, decay on weights alone.

    Args:
        model: the model.
        lr: learning rate; the paper's ResNets take 0.1 * batch size / 256.
        weight_decay: of weights, see :func:`parameter_groups`.
        momentum: above 0 and below 1.
        options: more of ``torch.optim.SGD``'s, such as ``fused=True``.

    Raises:
        ValueError: for a number outside its range, and a model without trainable parameters.

    Source: Brock, De, Smith, ICLR 2021, section 5.
    """
    check_number("lr", lr, 0.0)
    if check_rate("momentum", momentum) == 0:
        raise invalid("momentum", momentum, "Nesterov's look-ahead needs one", "pass 0.9, or use torch.optim.SGD")
    groups = parameter_groups(model, weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, **options)
