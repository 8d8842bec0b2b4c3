"""What of Muon's rule for networks without normalizers matters: 200 steps with one thing changed at a time.

``python -m benchmarks.cifar_muon --data DIR [--only NAME] [--quick] [--threads N] [--out results/cifar_muon]`` writes
``cifar_muon.json`` and ``README.md`` after each probe. DIR holds CIFAR-10 as parquet.

Each probe is a whole schedule of 200 steps of 128 images by the product's own loop, with one seed: a quarter of
warm-up, then half a cosine to 0. What it ends at is the mean training loss of its last 20 steps, and how it gets there
that of 20 steps at 80 and 120, when the rate is near its highest. The test accuracy is of 2048 images, good to two
points; losses that differ by less than 0.02 count as equal.

Some probes change what is no option of the product; they are here as patches of it, each with what it would show.
The numbers below were measured with prototypes of these patches, at the same settings; the command has not repeated
them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cifar import LAYOUT, run
from normfree.benchmark import hardware, versions
from normfree.models.resnets import NFBlock
from normfree.nn.centring import move_input_mean
from normfree.nn.scaled_ws import ScaledWSConv2d
from normfree.optim import InputCentring, Muon
from normfree.optim import muon as rule
from normfree.signal import write_atomically
from normfree.train import trainer

STEPS, SHOWN = 200, (80, 120, 200)
Patch = Callable[[], Any]


@contextmanager
def whole_norms() -> Iterator[None]:
    """Each weight keeps its whole norm, not each filter its own, and no part of a step is projected away."""

    def step_matrices(self: Muon, group: dict[str, Any], weights: list[Tensor]) -> None:
        updates = self._look_ahead(group, weights, rule._gradients(weights))
        layout = group["transposed"], group["groups"]
        stacks = self._orthogonalize_across_ranks(
            [rule._matrices(update, *layout) for update in updates], group["ns_steps"]
        )
        for weight, stack in zip(weights, stacks, strict=True):
            rows, columns = stack.shape[-2:]
            before = rule._matrices(weight, *layout)
            norm = self.state[weight].setdefault("whole_norm", before.norm())
            after = before * (norm / before.norm()) - stack * (group["lr"] * math.sqrt(max(1.0, rows / columns)))
            rule._write(weight, rule._from_matrices(after, weight.shape, *layout))

    with mock.patch.object(Muon, "_step_matrices", step_matrices):
        yield


@contextmanager
def free_norms() -> Iterator[None]:
    """Filters grow by their steps, as plain weights do under BatchNorm, so that later steps turn them by less."""
    with mock.patch.object(Muon, "_step_matrices", _growing_step):
        yield


def _growing_step(self: Muon, group: dict[str, Any], weights: list[Tensor]) -> None:
    updates = self._look_ahead(group, weights, rule._gradients(weights))
    layout = group["transposed"], group["groups"]
    stacks = self._orthogonalize_across_ranks(
        [rule._matrices(update, *layout) for update in updates], group["ns_steps"]
    )
    for weight, stack in zip(weights, stacks, strict=True):
        rows, columns = stack.shape[-2:]
        step = stack * (group["lr"] * math.sqrt(max(1.0, rows / columns)))
        before = rule._matrices(weight, *layout)
        centred = before - before.mean(-1, keepdim=True)
        rule._write(weight, rule._from_matrices(centred - rule._off_filters(step, centred), weight.shape, *layout))


@contextmanager
def measured(*, rate: float, share: float) -> Iterator[None]:
    """The input means move at another rate, or are measured on another part of the batch."""
    original = InputCentring.__init__

    def init(self: InputCentring, model: nn.Module, **options: Any) -> None:
        original(self, model, rate, share, **options)

    with mock.patch.object(InputCentring, "__init__", init):
        yield


@contextmanager
def means_of_the_batch() -> Iterator[None]:
    """The means are the batch's own at each step, and the gradient that of these coordinates, as BatchNorm's is.

    dL/dW and dL/dg lose the part (sum of delta) (W d) that a move by d takes into the bias; the function is the same.
    """
    made: list[InputCentring] = []
    init, step = InputCentring.__init__, Muon.step

    def remembered(self: InputCentring, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        made.append(self)

    def moved(self: Muon, closure: Any = None) -> Any:
        for layer in made[-1].layers:
            assert layer.measured_mean is not None
            move = layer.measured_mean[:-1] / layer.measured_mean[-1] - layer.input_mean.detach()  # type: ignore[union-attr]
            with torch.enable_grad():
                part = -(layer.bias.grad * layer.response(layer.scaled_weight(None), move)).sum()
                of_weight, of_gain = torch.autograd.grad(part, [layer.weight, layer.gain])
            layer.weight.grad.add_(of_weight)
            layer.gain.grad.add_(of_gain)  # type: ignore[union-attr]
            move_input_mean(layer, layer.input_mean + move)  # type: ignore[operator]
            layer.measured_mean = None
        return step(self, closure)

    with mock.patch.object(InputCentring, "__init__", remembered), mock.patch.object(Muon, "step", moved):
        yield


@contextmanager
def deviations_kept(*, images: int) -> Iterator[None]:
    """A step of a weight leaves each output channel's deviation as it was: the gain is divided by what it gained.

    The coordinates are (W, g sigma(W)), sigma the deviation of W x over a few images, which is what BatchNorm's
    backward pass is in: dL/dW loses dL/d(ln g) times d(ln sigma)/dW.
    """
    layers: dict[int, ScaledWSConv2d] = {}
    observe, step = ScaledWSConv2d.measure_input, Muon.step

    def remember(self: ScaledWSConv2d, x: Tensor) -> None:
        observe(self, x)
        if self.training:
            self.probe_input = x.detach()[:images]  # type: ignore[assignment]
            layers[id(self)] = self

    def log_deviation(layer: ScaledWSConv2d) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.convolve(layer.probe_input, layer.standardized(layer.weight, None), None)  # type: ignore[arg-type]
        return 0.5 * y.float().var((0, 2, 3), unbiased=False).clamp_min(1e-8).log()

    def kept(self: Muon, closure: Any = None) -> Any:
        before = {}
        for number, layer in layers.items():
            with torch.enable_grad():
                log = log_deviation(layer)
                slope = (log * (layer.gain.grad * layer.gain.detach())).sum()  # type: ignore[operator]
                layer.weight.grad.sub_(torch.autograd.grad(slope, layer.weight)[0])
            before[number] = log.detach(), layer.gain.detach().clone()
        found = step(self, closure)
        with torch.no_grad():
            for number, layer in layers.items():
                log, gain = before[number]
                stepped = layer.gain.detach().clone()
                layer.gain.copy_(gain)
                layer.gain.copy_(stepped * (log - log_deviation(layer)).clamp(-0.2, 0.2).exp())
        return found

    with mock.patch.object(ScaledWSConv2d, "measure_input", remember), mock.patch.object(Muon, "step", kept):
        yield


@contextmanager
def skip_gains_fixed() -> Iterator[None]:
    """Skip gains stay at 1."""
    groups = trainer.muon_groups

    def fixed(model: nn.Module, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
        skips = {id(value) for name, value in model.named_parameters() if name.endswith("skip_gain")}
        made = groups(model, *arguments, **options)
        return [{**group, "params": [value for value in group["params"] if id(value) not in skips]} for group in made]

    with mock.patch.object(trainer, "muon_groups", fixed):
        yield


@contextmanager
def block_biases() -> Iterator[None]:
    """A learnable bias before the first activation of each block, as BatchNorm has one there."""
    init = NFBlock.__init__

    def biased(self: NFBlock, place: Any, planned: Any, style: Any) -> None:
        init(self, place, planned, style)
        self.pre_bias = nn.Parameter(torch.zeros(place.in_channels))

    def forward(self: NFBlock, x: Tensor) -> Tensor:
        activated = self.activation(x + self.pre_bias.to(x.dtype).view(-1, 1, 1))  # type: ignore[operator]
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.stochastic_depth(self.branch(activated))

    with mock.patch.object(NFBlock, "__init__", biased), mock.patch.object(NFBlock, "forward", forward):
        yield


@dataclass(frozen=True)
class Probe:
    """One training.

    Attributes:
        name: of the probe, as the table has it.
        rate: of Muon.
        rest: of what Muon does not step.
        classifier: rate of the classifier, as a share of the rest's.
        network: its overrides; of the BatchNorm twin where there is no alpha.
        patches: what is no option of the product.
        steps: of the schedule.
    """

    name: str
    rate: float = 0.06
    rest: float = 0.1
    classifier: float = 0.3
    network: dict[str, Any] = field(default_factory=lambda: {"alpha": 0.5, "skipinit_gain": 1, "centred": True})
    patches: tuple[Patch, ...] = ()
    steps: int = STEPS


BN: dict[str, Any] = {}
EPOCH = 390
PROBES = (
    Probe("BatchNorm", classifier=1.0, network=BN),
    Probe("BatchNorm, rest 0.01", rest=0.01, classifier=1.0, network=BN),
    Probe("NF centred"),
    Probe("skip gains fixed", patches=(skip_gains_fixed,)),
    Probe("skip gains fixed, deviations kept", patches=(skip_gains_fixed, lambda: deviations_kept(images=32))),
    Probe("deviations kept", patches=(lambda: deviations_kept(images=32),)),
    Probe(
        "rate 0.03, classifier 0.1, skip gains fixed, deviations kept",
        rate=0.03,
        classifier=1.0,
        patches=(skip_gains_fixed, lambda: deviations_kept(images=32)),
    ),
    Probe("rest 0.03", rest=0.03),
    Probe("rest 0.03, deviations kept", rest=0.03, patches=(lambda: deviations_kept(images=16),)),
    Probe("rest 0.03, means of the batch", rest=0.03, patches=(means_of_the_batch,)),
    Probe("rest 0.03, means of the whole batch", rest=0.03, patches=(lambda: measured(rate=0.1, share=1.0),)),
    Probe("rest 0.03, filters grow", rest=0.03, patches=(free_norms,)),
    Probe("rate 0.03, rest 0.03", rate=0.03, rest=0.03),
    Probe(
        "rate 0.03, rest 0.03, slower means of the whole batch",
        rate=0.03,
        rest=0.03,
        patches=(lambda: measured(rate=0.03, share=1.0),),
    ),
    Probe(
        "rate 0.03, rest 0.03, α = 1", rate=0.03, rest=0.03, network={"alpha": 1, "skipinit_gain": 1, "centred": True}
    ),
    Probe("rate 0.03, rest 0.01, classifier 0.01", rate=0.03, rest=0.01, classifier=1.0),
    Probe(
        "rate 0.03, rest 0.01, classifier 0.01, deviations kept",
        rate=0.03,
        rest=0.01,
        classifier=1.0,
        patches=(lambda: deviations_kept(images=16),),
    ),
    Probe(
        "rate 0.03, rest 0.01, classifier 0.01, biases of the blocks",
        rate=0.03,
        rest=0.01,
        classifier=1.0,
        patches=(block_biases,),
    ),
    Probe("one epoch: BatchNorm", classifier=1.0, network=BN, steps=EPOCH),
    Probe("one epoch: NF centred", steps=EPOCH),
    Probe("one epoch: norms of whole weights kept", patches=(whole_norms,), steps=EPOCH),
)
"""In the order of the table; rate 0.06, rest 0.1, classifier 0.03 (BatchNorm 0.1) and α = 0.5 where nothing is said."""


def probed(probe: Probe, source: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Train one; its loss on the way and at the end, and its accuracy."""
    from normfree.train import RECIPES
    from normfree.train.records import read_rows

    recipe = RECIPES["cifar"]()
    name = "".join(letter if letter.isalnum() else "-" for letter in probe.name)
    overrides = "".join(f",{key}={value}" for key, value in probe.network.items())
    config = dataclasses.replace(
        recipe,
        name=name,
        model=f"{'nf_resnet50' if probe.network else 'resnetv2_50'}:{LAYOUT}{overrides}",
        data=dataclasses.replace(recipe.data, source=source),
        optimizer=dataclasses.replace(
            recipe.optimizer,
            rule="muon",
            learning_rate=probe.rate,
            sgd_learning_rate=probe.rest,
            classifier_lr_scale=probe.classifier,
            clip_norm=None,
            warmup_epochs=0.25,
        ),
        epochs=1,
        seed=0,
        signal_every=0,
        limit_train_steps=4 if quick else None,
        limit_eval_steps=1 if quick else 2 if probe.steps < EPOCH else None,
        out=folder / name,
    )
    init = trainer.Trainer.__init__

    def shortened(self: trainer.Trainer, *arguments: Any) -> None:
        init(self, *arguments)
        self.steps_per_epoch = self.total_steps = probe.steps
        self.last_step = min(probe.steps, config.limit_train_steps or probe.steps)

    with ExitStack() as patches:
        for patch in probe.patches:
            patches.enter_context(patch())
        patches.enter_context(mock.patch.object(trainer.Trainer, "__init__", shortened))
        found = run(config)
    if "failed" not in found:
        rows = {row["step"]: row["loss"] for row in read_rows(config.folder / "train.csv")}
        found["losses"] = {str(step): rows.get(step) for step in (*SHOWN, probe.steps)}
    return {"probe": probe.name, "steps": probe.steps, **found}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What of Muon's rule matters without normalizers",
        "",
        *(__doc__ or "").strip().splitlines()[5:],
        "",
        f"{versions(result['hardware'])}; 29 layers, bf16, seed 0. Rate 0.06, rest (gains, biases) 0.1, classifier "
        "0.03 (BatchNorm: 0.1), α = 0.5, skip gain 1, centred, no clipping where nothing else is said. Probes "
        "without numbers were not run.",
        "",
        f"| probe | {' | '.join(f'loss at {step}' for step in SHOWN[:-1])} | last loss | test accuracy, % |",
        "|---|---|---|---|---|",
    ]
    runs = {one["probe"]: one for one in result["runs"]}
    for probe in PROBES:
        one = runs.get(probe.name)
        if one is None:
            cells = ["not run", "", "", ""]
        elif "failed" in one:
            cells = ["diverged", "", "", ""]
        else:
            losses = [one["losses"].get(str(step)) for step in (*SHOWN[:-1], probe.steps)]
            cells = ["" if loss is None else f"{loss:.3f}" for loss in losses] + [f"{100 * one['accuracy']:.1f}"]
        lines.append(f"| {probe.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the probes, and write what came out after each."""
    parser = argparse.ArgumentParser(description="what of Muon's rule matters without normalizers")
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--only", choices=[probe.name for probe in PROBES], metavar="NAME", help="this probe alone")
    parser.add_argument("--quick", action="store_true", help="four steps each: does it run?")
    parser.add_argument("--threads", type=int, help="of the processor; all by default")
    parser.add_argument("--out", type=Path, default=Path("results/cifar_muon"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    written = options.out / "cifar_muon.json"
    kept: dict[str, Any] = json.loads(written.read_text()) if written.exists() else {"runs": []}
    for probe in PROBES:
        if options.only in (None, probe.name):
            found = probed(probe, options.data, options.out / "runs", options.quick)
            kept["runs"] = [one for one in kept["runs"] if one["probe"] != probe.name] + [found]
            result = {"quick": options.quick, "hardware": hardware(), "runs": kept["runs"]}
            write_atomically(written, json.dumps(result, indent=1) + "\n")
            write_atomically(options.out / "README.md", table(result))
            print(found, flush=True)


if __name__ == "__main__":
    main()
