"""Tables that need no training: what a network gains by having no normalizer, BatchNorm beside it; and every γ.

Both networks are pre-activation ResNet-50s at random initialisation, the normalizer-free one with skip gains of 1, in
training mode, without dropout and stochastic depth. Gradients are compared in float64: in float32 one activation that
rounding moves past the kink of its ReLU changes them by 1e-4, whatever else is equal.
"""

from __future__ import annotations

import copy
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from normfree.models import create_model
from normfree.nn import OFFICIAL_GAMMA, fold, gamma
from normfree.paper.tables import Claim, Grid, write_table

BATCH, SIZE, CLASSES, MICRO = 16, 64, 10, 4
NOT_MEASURED = "a property, not a number"
EQUAL = 1e-4
"""Relative: above the rounding of float32 through 50 layers; what lies below it counts as equal."""


@dataclass(frozen=True)
class Twins:
    """The two networks and a batch."""

    nf: nn.Module
    bn: nn.Module
    images: Tensor
    labels: Tensor


def make_properties(out: Path, on_progress: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Measure every property of both networks and write ``properties.md`` and ``properties.json``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nf = create_model("nf_resnet50", num_classes=CLASSES, skipinit_gain=1.0, drop_rate=0, stochdepth_rate=0)
        bn = create_model("resnetv2_50", num_classes=CLASSES)
        images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))
    twins = Twins(nf.train(), bn.train(), images, labels)
    rows: list[dict[str, Any]] = []
    for text, equal, measure in PROPERTIES:
        on_progress(text)
        rows.append({"property": text, "equal": equal, "nf": measure(twins.nf, twins), "bn": measure(twins.bn, twins)})
    claims = [
        Claim(
            text=row["property"],
            paper=NOT_MEASURED,
            ours=f"{row['nf']:.1e} (BatchNorm: {row['bn']:.1e})" if row["equal"] else _ratio(row),
            verdict="agrees" if (row["nf"] <= EQUAL if row["equal"] else row["nf"] < row["bn"]) else "does not agree",
        )
        for row in rows
    ]
    cells = [[row["property"], f"{row['nf']:.3g}", f"{row['bn']:.3g}"] for row in rows]
    return write_table(
        out,
        "properties",
        title="What a network without normalizers gains",
        about=[
            f"NF-ResNet-50 and pre-activation ResNet-50 with BatchNorm, {BATCH} × 3 × {SIZE} × {SIZE} of Gaussian "
            f"noise, seed 0, CPU, float32 (gradients: float64), torch {torch.__version__}. Made by `normfree paper "
            "properties`.",
            "",
            "Differences are the largest, relative to the largest value.",
        ],
        claims=claims,
        grids=[Grid(title="Numbers", columns=("property", "NF", "BatchNorm"), rows=cells)],
        data=rows,
    )


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['nf']:.3g} (BatchNorm: {row['bn']:.3g})"


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def of_other_examples(model: nn.Module, twins: Twins) -> float:
    """How an example's output in training mode changes when all others of its batch do."""
    others = twins.images.clone()
    others[1:] = others[1:].flip(0) * 3
    return difference(copy.deepcopy(model)(others)[:1], copy.deepcopy(model)(twins.images)[:1])


@torch.no_grad()
def of_modes(model: nn.Module, twins: Twins) -> float:
    """How the outputs in evaluation mode, after one batch of training, differ from those in training mode."""
    model = copy.deepcopy(model)
    trained = model(twins.images)
    return difference(model.eval()(twins.images), trained)


def of_micro_batches(model: nn.Module, twins: Twins) -> float:
    """How the gradient changes when it is accumulated over micro-batches of four."""
    images = twins.images.double()
    parts = zip(images.split(MICRO), twins.labels.split(MICRO), strict=True)
    return difference(_gradient(model, parts), _gradient(model, [(images, twins.labels)]))


def _gradient(model: nn.Module, parts: Any) -> Tensor:
    """The gradient of the mean loss over all parts, in float64, as one vector."""
    model = copy.deepcopy(model).double()
    for images, labels in parts:
        (F.cross_entropy(model(images), labels, reduction="sum") / BATCH).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def of_ranks(model: nn.Module, twins: Twins) -> float:
    """How the gradient changes when two ranks take half of the batch each (DistributedDataParallel, gloo)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradient.safetensors"
        spawn(_rank, args=(address, model, twins, file), nprocs=2)
        gradient = load_file(file)["gradient"]
    return difference(gradient, _gradient(model, [(twins.images.double(), twins.labels)]))


def _rank(rank: int, address: str, model: nn.Module, twins: Twins, file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    parallel = DistributedDataParallel(copy.deepcopy(model).double())
    count = len(twins.images) // 2
    half = slice(rank * count, (rank + 1) * count)
    F.cross_entropy(parallel(twins.images[half].double()), twins.labels[half]).backward()
    if rank == 0:
        save_file(
            {"gradient": torch.cat([p.grad.flatten() for p in parallel.parameters() if p.grad is not None])}, file
        )
    dist.destroy_process_group()


def of_threads(model: nn.Module, twins: Twins) -> float:
    """How the outputs change with the number of threads."""
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                outputs.append(copy.deepcopy(model)(twins.images))
    finally:
        torch.set_num_threads(before)
    return difference(outputs[0], outputs[1])


def saved_per_image(model: nn.Module, twins: Twins) -> float:
    """MiB of activations that the backward pass keeps of an image: what twice as many images add, over their number."""
    doubled = torch.cat([twins.images, twins.images]), torch.cat([twins.labels, twins.labels])
    return (_saved(model, *doubled) - _saved(model, twins.images, twins.labels)) / BATCH


def _saved(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """MiB that the backward pass keeps of one step, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(copy.deepcopy(model)(images), labels)
    size = sum(kept.values()) / 2**20  # while the loss keeps them alive: an address is that of one storage
    del loss
    return size


@torch.no_grad()
def of_folding(model: nn.Module, twins: Twins) -> float:
    """How the outputs of the plain network that is deployed differ from those in training mode."""
    trained = copy.deepcopy(model)(twins.images)
    return difference(fold(copy.deepcopy(model).eval())(twins.images), trained)


PROPERTIES: tuple[tuple[str, bool, Callable[[nn.Module, Twins], float]], ...] = (
    ("an example's output does not depend on the others of its batch", True, of_other_examples),
    ("training and evaluation compute the same function", True, of_modes),
    ("a batch split into micro-batches gives the same gradient", True, of_micro_batches),
    ("a batch split over ranks gives the same gradient", True, of_ranks),
    ("any number of threads gives the same outputs", True, of_threads),
    ("plain convolutions give the outputs of training", True, of_folding),
    ("less is kept for the backward pass (MiB an image)", False, saved_per_image),
)
"""Each with whether it is a difference that should be rounding, or a size that should be smaller."""


ACTIVATIONS: dict[str, Any] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "log_sigmoid": F.logsigmoid,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "soft_sign": F.softsign,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}
"""The elementwise ones, as the authors' code computes them; "glu" and "log_softmax" mix elements."""

FARTHEST = 2e-3
"""Relative: the authors drew samples, whose mean is that far from the integral at most."""


def make_gamma(out: Path) -> list[Path]:
    """Integrate every constant and write ``gamma.md`` and ``gamma.json``."""
    rows = []
    for name, activation in ACTIVATIONS.items():
        exact, sampled = gamma(activation), OFFICIAL_GAMMA[name]
        rows.append({"activation": name, "exact": exact, "official": sampled, "relative": sampled / exact - 1})
    farthest = max(rows, key=lambda row: abs(row["relative"]))
    agrees = abs(farthest["relative"]) <= FARTHEST
    claim = Claim(
        text="the published constants are 1 / sqrt(Var[act(z)]) of a standard Gaussian",
        paper="sampled",
        ours=f"within {abs(farthest['relative']):.1e} of the integral ({farthest['activation']} is farthest)",
        verdict="agrees" if agrees else "does not agree",
    )
    cells = [
        [row["activation"], f"{row['exact']:.9f}", f"{row['official']:.9f}", f"{row['relative']:+.1e}"] for row in rows
    ]
    return write_table(
        out,
        "gamma",
        title="γ of each activation",
        about=[
            f"Integrated in float64 to a relative 1e-6, torch {torch.__version__}. Made by `normfree paper gamma`. "
            '"glu" and "log_softmax" mix elements: they have a sampled constant alone.'
        ],
        claims=[claim],
        grids=[Grid(title="", columns=("activation", "integral", "official", "difference"), rows=cells)],
        data=rows,
    )
