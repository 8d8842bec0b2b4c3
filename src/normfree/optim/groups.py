"""What is decayed and what is not, and the paper's optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normfree.common.checks import check_number, check_rate, invalid
from normfree.optim.final_layers import final_layers
from normfree.optim.units import original

# Layers whose weight is a matrix or a stack of filters, also where it has a single row or column.
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
_NORMALIZERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, classifier_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Split a model's parameters into those that weight decay is for, and the rest; and those of the classifier.

    Decayed are the weights of linear layers, embeddings and convolutions, and whatever else has two axes longer
    than one. Not decayed are biases, gains, skip gains, a normalizer's affine parameters, layer scales, and all
    scalars and vectors: decay pulls them to zero without making the function any simpler.

    Without a normalizer nothing holds the scale of what the classifier sees, and its weight, unlike the standardized
    ones, is not free of scale either: of all layers it is the one that a large learning rate breaks first. A smaller
    one there lets the others have a larger one (docs/training.md).

    Args:
        model: the model; frozen parameters are left out, shared ones are named once.
        weight_decay: of the decayed group; 5e-5 for the paper's NF-ResNets, 2e-5 for NFNets.
        classifier_lr_scale: learning rate of the final layers as a share of the others', above 0; 1 is the papers'.

    Returns:
        Groups for any ``torch.optim`` optimizer, each with a "name" and an "lr_scale", what to multiply its learning
        rate by: "decayed" and "undecayed", and with another scale for the classifier "classifier decayed" and
        "classifier undecayed". One that is empty is absent.

    Raises:
        ValueError: for a negative decay, a model without trainable parameters, and a scale for the classifier of a
            model that ends in no linear layer or convolution.

    Source: Brock et al. 2021, appendix on training ("we do not apply weight decay to the affine parameters").
    """
    check_number("weight_decay", weight_decay, 0.0)
    check_number("classifier_lr_scale", classifier_lr_scale, 0.0, exclusive=True)
    classifier = _classifier(model) if classifier_lr_scale != 1 else set()
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("decayed", "undecayed", "classifier decayed", "classifier undecayed")
    }
    known = set[int]()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in known:
                known.add(id(parameter))
                part = "classifier " if id(parameter) in classifier else ""
                groups[part + ("decayed" if _decays(module, name, parameter) else "undecayed")].append(parameter)
    if not known:
        rule = "it has no parameter that requires a gradient"
        raise invalid("model", type(model).__name__, rule, "unfreeze what is to be trained")
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if name.endswith("undecayed") else weight_decay,
            "lr_scale": classifier_lr_scale if name.startswith("classifier") else 1.0,
            "name": name,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def _classifier(model: nn.Module) -> set[int]:
    """Identities of the final layers' parameters."""
    network = original(model)
    layers = final_layers(network)
    if not layers:
        rule = "it does not end in a linear layer or convolution, whose learning rate could be scaled"
        raise invalid("model", type(network).__name__, rule, "pass classifier_lr_scale=1")
    return {id(parameter) for name in layers for parameter in network.get_submodule(name).parameters()}


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, _NORMALIZERS) or "bias" in name:
        return False
    if isinstance(module, _WEIGHTED) and name == "weight":
        return True
    return sum(size > 1 for size in parameter.shape) > 1


def nesterov_sgd(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 5e-5,
    momentum: float = 0.9,
    classifier_lr_scale: float = 1.0,
    **options: Any,
) -> torch.optim.SGD:
    """Return the paper's optimizer: SGD with Nesterov momentum, decay on weights alone.

    Args:
        model: the model.
        lr: learning rate; the paper's ResNets take 0.1 * batch size / 256.
        weight_decay: of weights, see :func:`parameter_groups`.
        momentum: above 0 and below 1.
        classifier_lr_scale: learning rate of the final layers as a share of ``lr``, see
            :func:`parameter_groups`.
        options: more of ``torch.optim.SGD``'s, such as ``fused=True``.

    Raises:
        ValueError: for a number outside its range, and a model without trainable parameters.

    Source: Brock, De, Smith, ICLR 2021, section 5.
    """
    check_number("lr", lr, 0.0)
    if check_rate("momentum", momentum) == 0:
        raise invalid("momentum", momentum, "Nesterov's look-ahead needs one", "pass 0.9, or use torch.optim.SGD")
    groups = parameter_groups(model, weight_decay, classifier_lr_scale=classifier_lr_scale)
    groups = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, **options)
