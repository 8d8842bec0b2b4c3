"""Time, cost and memory of a recipe on 1, 8 and 64 accelerators, from one measured step.

``python -m benchmarks.scaling MEASURED.json [--price 2.5] [--bandwidth 400] [--hosts-bandwidth 50]`` prints the
table of docs/scaling.md. MEASURED.json says for each recipe what was measured on one accelerator::

    {"nf_resnet_imagenet": {"images_per_second": ..., "parameters": 25557048, "images": 1281167, "epochs": 90,
                            "batch_size": 1024, "activation_bytes_per_image": ..., "accelerator": "..."}}

    t_step(n)  = max(b / r, t_comm(n))            b = batch / n images a device, r images per second of one device
    t_comm(n)  = 2 (n - 1) / n · 4 P / B(n)       a ring all-reduce of fp32 gradients of P parameters
    t_run      = epochs · images / batch · t_step

The all-reduce overlaps the backward pass, of which it can hide behind two thirds of a step (backward is twice the
forward pass); what is longer is added. B is the slowest link of the ring: within a host up to 8 devices, between
hosts beyond.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

PER_HOST = 8
BACKWARD = 2 / 3
"""Part of a step's computation that communication can hide behind."""
BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One recipe on one accelerator; an attribute of the file each."""

    images_per_second: float
    parameters: int
    images: int
    epochs: int
    batch_size: int
    activation_bytes_per_image: float = 0.0
    accelerator: str = "unnamed"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes on a number of accelerators."""

    devices: int
    step_seconds: float
    communication_seconds: float
    hours: float
    cost: float
    efficiency: float
    memory_gibibytes: float
    accumulation: int


def planned(measured: Measured, devices: int, *, price: float, links: tuple[float, float], memory: float) -> Plan:
    """Return time, cost and memory on some accelerators.

    Args:
        measured: on one.
        devices: how many.
        price: of one accelerator for an hour.
        links: gigabytes per second of the ring within a host, and between hosts.
        memory: of one accelerator, in GiB: more than that is accumulated.
    """
    share = measured.batch_size / devices
    compute = share / measured.images_per_second
    bandwidth = links[0 if devices <= PER_HOST else 1] * 1e9
    communication = 2 * (devices - 1) / devices * BYTES * measured.parameters / bandwidth
    step = compute + max(0.0, communication - BACKWARD * compute)
    steps = measured.epochs * measured.images / measured.batch_size
    hours = steps * step / 3600
    fixed = 3 * BYTES * measured.parameters  # weights, gradients, momentum
    room = memory * 2**30 - fixed
    accumulation = 1
    while share / accumulation * measured.activation_bytes_per_image > room and accumulation < share:
        accumulation *= 2
    used = fixed + share / accumulation * measured.activation_bytes_per_image
    return Plan(
        devices=devices,
        step_seconds=step,
        communication_seconds=communication,
        hours=hours,
        cost=hours * devices * price,
        efficiency=compute / step,
        memory_gibibytes=used / 2**30,
        accumulation=accumulation,
    )


def table(recipes: dict[str, Measured], *, price: float, links: tuple[float, float], memory: float) -> str:
    """The plans as Markdown."""
    lines = [
        f"Price {price:g} an accelerator hour; {links[0]:g} GB/s within a host, {links[1]:g} GB/s between hosts.",
        "",
        "| recipe | measured on | devices | step, ms | all-reduce, ms | efficiency | hours | cost | memory, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in recipes.items():
        for devices in (1, 8, 64):
            plan = planned(measured, devices, price=price, links=links, memory=memory)
            times = f"{1e3 * plan.step_seconds:.1f} | {1e3 * plan.communication_seconds:.1f} | {plan.efficiency:.2f}"
            spent = f"{plan.hours:,.1f} | {plan.cost:,.0f}"
            held = f"{plan.memory_gibibytes:.1f}" + (f" × {plan.accumulation}" if plan.accumulation > 1 else "")
            lines.append(f"| {name} | {measured.accelerator} | {devices} | {times} | {spent} | {held} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, help="JSON file of measurements on one accelerator")
    parser.add_argument("--price", type=float, default=2.5, help="of one accelerator for an hour, in any currency")
    parser.add_argument("--bandwidth", type=float, default=400, help="GB/s of the ring within a host")
    parser.add_argument("--hosts-bandwidth", type=float, default=50, help="GB/s of the ring between hosts")
    parser.add_argument("--memory", type=float, default=80, help="GiB of one accelerator")
    options = parser.parse_args()
    recipes = {name: Measured(**values) for name, values in json.loads(options.measured.read_text()).items()}
    links = (options.bandwidth, options.hosts_bandwidth)
    print(table(recipes, price=options.price, links=links, memory=options.memory))


if __name__ == "__main__":
    main()
