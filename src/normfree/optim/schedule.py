"""The paper's learning-rate schedule: a linear warm-up from zero, then half a cosine.

    lr(t) = peak * t / warmup                                                 t < warmup
    lr(t) = final + (peak - final) * (1 + cos(pi * p)) / 2                    p = (t - warmup) / (steps - warmup)

t       optimizer steps taken so far, from 0; from t = steps on the rate stays at final
peak    the optimizer's own learning rate, of each parameter group
"""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from normfree.common.checks import check_integer, check_number, invalid


def warmup_cosine_factor(step: int, *, steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Return the learning rate at a step as a fraction of the peak: the equation above, with peak 1."""
    if step < warmup_steps:
        return step / warmup_steps
    if step >= steps:
        return final_fraction
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(optimizer: Optimizer, *, steps: int, warmup_steps: int = 0, final_lr: float = 0.0) -> LambdaLR:
    """Return the schedule above; call its ``step()`` once after each optimizer step.

    The rate depends on the number of steps alone, and that is all its ``state_dict()`` needs to resume exactly;
    ``steps`` and the rest come from the call, so that a run can be lengthened.

    Args:
        optimizer: whose learning rates are the peaks.
        steps: optimizer steps of the whole run, at least 1.
        warmup_steps: of them, those of the warm-up; 5 epochs for the paper's ResNets. The first is taken at rate 0.
        final_lr: learning rate at the end; 0 for the paper's ResNets, 0.001 for NF-RegNets.

    Raises:
        ValueError: for a warm-up longer than the run, and a final rate above a group's own.

    Source: Brock, De, Smith, ICLR 2021, section 5 and appendix.
    """
    check_integer("steps", steps, 1)
    if check_integer("warmup_steps", warmup_steps, 0) > steps:
        raise invalid("warmup_steps", warmup_steps, f"must be at most steps={steps}", "warm up for fewer")
    check_number("final_lr", final_lr, 0.0)
    factors = []
    for group in optimizer.param_groups:
        peak = float(group.get("initial_lr", group["lr"]))
        if final_lr > peak:
            rule = f"must be at most the optimizer's learning rate, {peak:g}"
            raise invalid("final_lr", final_lr, rule, "pass a smaller one")
        fraction = final_lr / peak if peak else 0.0
        factor = partial(warmup_cosine_factor, steps=steps, warmup_steps=warmup_steps, final_fraction=fraction)
        factors.append(factor)
    return LambdaLR(optimizer, factors)
