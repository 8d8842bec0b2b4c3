"""The committed comparisons: what takes part, and what is promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from normfree.benchmark import Contender, Part, Target

# Regularisation off, for the peers have none by default; skip gains awake, so that no branch computes with zeros.
PLAIN = "stochdepth_rate=0,drop_rate=0,skipinit_gain=1"

OURS = Contender(f"nf_resnet50:{PLAIN}", name="NF-ResNet-50")
LIMIT = Contender(OURS.source, ("limit",), name="its limit")
BATCH_NORM = Contender("torchvision:resnet50", name="BN ResNet-50, torchvision")
TIMM = Contender("timm:nf_resnet50", name="nf_resnet50, timm")
FOLDED = Contender(OURS.source, ("folded",), name="NF-ResNet-50, folded")

# Networks for images of 32 px, of 1.5 and 0.2 million parameters.
CIFAR_50 = f"nf_resnet50:{PLAIN},stem=cifar,num_classes=10,widths=(64,128,256,512)"
CIFAR_26 = f"nf_resnet50:{PLAIN},stem=cifar,num_classes=10,widths=(32,64,128,256),depths=(2,2,2,2)"

# Both with the dropout and the stochastic depth that each is trained with.
REGNET = Contender("nf_regnet_b0:skipinit_gain=1", name="NF-RegNet-B0")
REGNET_LIMIT = Contender(REGNET.source, ("limit",), name="its limit")
REGNET_FOLDED = Contender(REGNET.source, ("folded",), name="NF-RegNet-B0, folded")
EFFICIENT = Contender("torchvision:efficientnet_b0", name="EfficientNet-B0, torchvision")
TIMM_REGNET = Contender("timm:nf_regnet_b0", name="nf_regnet_b0, timm")

# Promised ratios of a training step's time, over BatchNorm and over timm's nf_resnet50.
FP32, BF16, GPU = (0.88, 0.84), (0.84, 0.84), (0.80, 0.80)


CPU_REMARKS = """## What limits what is missed

The last column is the ratio with the limit in our place: the same convolutions and activations, and nothing else. Where
it is above the target itself, no other way to standardize would meet it; the convolutions have to become faster.
[Profiles of the step](../step_profile/README.md) (`python -m benchmarks.step_profile`) say where the time goes: with
ResNet-50 mostly into convolutions, and least into standardization.

Over the limit, what remains is that standardization and, for small networks, calls rather than arithmetic: each layer
makes a few more of them in a step, so its own time in the profile is less than the ratio to the limit says. It is one
fused native normalization of the weight, forward and backward, in place of a mean, a variance and elementwise
operations written out. Compiling does not close the gap (below), for it speeds up the limit as well.
"""

GPU_REMARKS = """## What limits what is missed

A large GPU is done with most operations before the next call reaches it, so an uncompiled step of small kernels takes
as long as its calls. Standardization adds one call forward and one backward to each convolution, a kernel each; where
the convolutions are large most of it hides behind them, and where they are small (NF-RegNet-B0, 32 px) nothing does.
Compiled, it is fused with its neighbours, a step is near its limit, and all networks are faster. `normfree train`
compiles on a GPU by itself; fold for inference.
"""


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Parts that are run one after the other, each in its own process.

    Attributes:
        title: of the page.
        parts: in order of importance.
        part_limit: seconds after which a part is given up.
        total_limit: seconds in which all is done: what is left of them bounds a part too, and none starts after.
        remarks: what to say below the targets, in Markdown.
    """

    title: str
    parts: Sequence[Part]
    part_limit: float
    total_limit: float
    remarks: str = ""


def with_steps(contender: Contender, *steps: str) -> Contender:
    """Return a contender to whom more is done."""
    return Contender(contender.source, (*contender.steps, *steps), ", ".join((contender.label, *steps)))


def _target(of: Contender, over: Contender, at_most: float, quantity: Literal["time", "memory"] = "time") -> Target:
    return Target(of=of.label, over=over.label, at_most=at_most, quantity=quantity)


def resnet_training(
    name: str, title: str, *, beats: tuple[float, float], compiled: bool = False, **setting: Any
) -> Part:
    """Return the comparison of one training step of the four ResNet-50s.

    Args:
        name: of the part.
        title: of the part.
        beats: ratios of the time promised over BatchNorm and over timm's.
        compiled: all of them compiled.
        setting: what else ``Part`` takes.
    """
    four = [with_steps(each, "compiled") if compiled else each for each in (OURS, LIMIT, BATCH_NORM, TIMM)]
    ours, limit, batch_norm, timm = four
    targets = [
        _target(ours, limit, 1.02),
        _target(ours, batch_norm, beats[0]),
        _target(ours, timm, beats[1]),
        _target(ours, batch_norm, 0.60, "memory"),
        _target(ours, timm, 0.75, "memory"),
    ]
    return Part(name=name, title=title, task="training", contenders=four, targets=targets, **setting)


def resnet_inference(batch_size: int, *, precision: str = "float32", onnx: bool, rounds: int, budget: float) -> Part:
    """Return the comparison of inference of the ResNet-50s, folded and not, compiled and by ONNX Runtime."""
    limit, compiled, runtime = LIMIT, with_steps(FOLDED, "compiled"), with_steps(FOLDED, "onnx")
    targets = [_target(FOLDED, limit, 1.01)]
    if batch_size == 1:
        targets += [_target(FOLDED, TIMM, 0.50), _target(runtime if onnx else compiled, FOLDED, 0.80)]
    return Part(
        name=f"resnet50-inference-{batch_size}",
        title=f"Inference, ResNet-50, batch {batch_size}",
        task="inference",
        contenders=[OURS, FOLDED, limit, compiled, *[runtime] * onnx, BATCH_NORM, TIMM],
        targets=targets,
        batch_size=batch_size,
        image_size=224,
        precision=precision,
        rounds=rounds,
        budget=budget,
    )


def regnet_training(**setting: Any) -> Part:
    """Return the comparison of one training step of the small networks."""
    return Part(
        name="regnet-b0-training",
        title=f"Training step, NF-RegNet-B0, batch {setting['batch_size']}",
        task="training",
        contenders=[REGNET, REGNET_LIMIT, EFFICIENT, TIMM_REGNET],
        targets=[_target(REGNET, EFFICIENT, 0.60)],
        **setting,
    )


def regnet_inference(batch_size: int, *, rounds: int, budget: float) -> Part:
    """Return the comparison of inference of the small networks."""
    runtime = with_steps(REGNET_FOLDED, "onnx")
    return Part(
        name=f"regnet-b0-inference-{batch_size}",
        title=f"Inference, NF-RegNet-B0, batch {batch_size}",
        task="inference",
        contenders=[REGNET, REGNET_FOLDED, with_steps(REGNET_FOLDED, "compiled"), runtime, EFFICIENT, TIMM_REGNET],
        targets=[_target(runtime, REGNET_FOLDED, 0.80)],
        batch_size=batch_size,
        image_size=224,
        rounds=rounds,
        budget=budget,
    )


def standardization_share(name: str, title: str, source: str) -> Part:
    """Return the comparison of a small network with its limit, small images and a small batch."""
    ours, limit = Contender(source, name=title), Contender(source, ("limit",), name="its limit")
    return Part(
        name=name,
        title=f"Training step, {title}, 32 px, batch 8",
        task="training",
        contenders=[ours, limit],
        targets=[_target(ours, limit, 1 / 0.95)],  # a share of 5 % of the step
        batch_size=8,
        image_size=32,
        rounds=61,
        budget=10,
    )


def cpu() -> Comparisons:
    """Return the comparisons for a CPU of a few cores."""
    large, small = {"batch_size": 16, "image_size": 224}, {"batch_size": 64, "image_size": 96}
    times = {"rounds": 9, "budget": 60.0}
    parts = [
        resnet_training("resnet50-fp32-16", "Training step, ResNet-50, fp32, batch 16", beats=FP32, **large, **times),
        resnet_training(
            "resnet50-bf16-16",
            "Training step, ResNet-50, bf16, batch 16",
            beats=BF16,
            precision="bfloat16",
            **large,
            **times,
        ),
        resnet_inference(1, onnx=True, rounds=31, budget=40),
        resnet_inference(16, onnx=True, rounds=7, budget=40),
        regnet_training(batch_size=16, image_size=192, rounds=11, budget=45),
        standardization_share("cifar-nf-resnet50", "NF-ResNet-50 for CIFAR", CIFAR_50),
        standardization_share("cifar-nf-resnet26", "NF-ResNet-26 for CIFAR", CIFAR_26),
        resnet_training("resnet50-fp32-64", "Training step, ResNet-50, fp32, batch 64", beats=FP32, **small, **times),
        resnet_training(
            "resnet50-bf16-64",
            "Training step, ResNet-50, bf16, batch 64",
            beats=BF16,
            precision="bfloat16",
            **small,
            **times,
        ),
        regnet_inference(1, rounds=31, budget=20),
        resnet_training(
            "resnet50-compiled",
            "Training step, ResNet-50, fp32, batch 16, compiled",
            beats=FP32,
            compiled=True,
            batch_size=16,
            image_size=128,
            rounds=7,
            budget=30,
        ),
    ]
    return Comparisons(
        title="Networks side by side, on a CPU", parts=parts, part_limit=240, total_limit=900, remarks=CPU_REMARKS
    )


def gpu() -> Comparisons:
    """Return the comparisons for one large GPU."""
    large = {"batch_size": 256, "image_size": 224, "precision": "bfloat16", "beats": GPU, "rounds": 21, "budget": 25.0}
    parts = [
        resnet_training("resnet50-bf16-256", "Training step, ResNet-50, bf16, batch 256", **large),
        resnet_training(
            "resnet50-bf16-256-compiled", "Training step, ResNet-50, bf16, batch 256, compiled", compiled=True, **large
        ),
        resnet_inference(1, precision="bfloat16", onnx=False, rounds=51, budget=10),
        resnet_inference(256, precision="bfloat16", onnx=False, rounds=21, budget=10),
        regnet_training(batch_size=256, image_size=192, precision="bfloat16", rounds=21, budget=15),
        standardization_share("cifar-nf-resnet50", "NF-ResNet-50 for CIFAR", CIFAR_50),
    ]
    return Comparisons(
        title="Networks side by side, on a GPU", parts=parts, part_limit=200, total_limit=520, remarks=GPU_REMARKS
    )


# Networks of the same kinds that take no time.
STAND_INS = {
    OURS.source: f"{OURS.source},width=0.5,depths=(1,1,1,1)",
    REGNET.source: f"{REGNET.source},width=0.25,depths=(1,1,1,1)",
    BATCH_NORM.source: "torchvision:resnet18",
    TIMM.source: "timm:nf_resnet26",
    EFFICIENT.source: "torchvision:shufflenet_v2_x0_5",
}


def quick(comparisons: Comparisons) -> Comparisons:
    """Return the same at a size that only tells whether it runs: small networks, nothing compiled or exported."""

    def shrunk(part: Part) -> Part:
        named = [each for each in part.contenders if not {"compiled", "onnx"} & set(each.steps)]
        labels = {each.label for each in named}
        contenders = [Contender(STAND_INS.get(each.source, each.source), each.steps, each.label) for each in named]
        targets = [target for target in part.targets if {target.of, target.over} <= labels]
        sizes: dict[str, Any] = {"batch_size": 2, "image_size": 32, "rounds": 1, "budget": 0.0}
        return replace(part, contenders=contenders, targets=targets, **sizes)

    parts = [shrunk(part) for part in comparisons.parts if "compiled" not in part.name]
    return replace(comparisons, title=f"A rehearsal, no measurement: {comparisons.title}", parts=parts)


SETS = {"cpu": cpu, "gpu": gpu}
