"""What takes part in a comparison: a model, what is done to it first, and the call that is timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.benchmark.limit import limit
from normfree.common.checks import check_choice
from normfree.common.packages import required
from normfree.nn import fold
from normfree.sources import build

STEPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "limit": limit,
    "folded": fold,
    "compiled": lambda model: torch.compile(model),  # type: ignore[dict-item,return-value]
    "onnx": lambda model: model,  # exported when its batch is known
}
"""What may be done to a model, by name."""

LEARNING_RATE = 1e-4
"""Of the timed steps: small enough that no network leaves the numbers it starts with."""

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders of a comparison are given.

    Attributes:
        batch: images [N, C, H, W], in the memory format to be used.
        precision: float32, or bfloat16: autocast in training, the weights' own in inference.
    """

    batch: Tensor
    precision: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the batch is, and the models are to be."""
        return self.batch.device


@dataclass(frozen=True)
class Contender:
    """A model and what is done to it before it is timed.

    Args:
        source: as ``normfree.sources.build`` takes it.
        steps: names of ``STEPS``, in order.
        name: what to call it; made of both by default.

    Raises:
        ValueError: an unknown step.
    """

    source: str
    steps: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for step in self.steps:
            check_choice("steps", step, tuple(STEPS))

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name or ", ".join((self.source, *self.steps))

    def model(self, setting: Setting, seed: int, *, training: bool) -> nn.Module:
        """Return the model, drawn with ``seed``, where the batch is and in its layout, all steps done but ``onnx``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(self.source).model
        model = model.to(setting.device, memory_format=torch.channels_last).train(training)  # type: ignore[call-overload]
        for step in self.steps:
            model = STEPS[step](model)
        return model

    def training(self, setting: Setting, seed: int) -> Call:
        """Return a call that is one training step: forward pass, cross-entropy, backward pass, SGD with momentum."""
        model = self.model(setting, seed, training=True)
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True)
        labels = torch.zeros(len(setting.batch), dtype=torch.long, device=setting.device)
        reduced = setting.precision != torch.float32

        def step() -> None:
            with torch.autocast(setting.device.type, setting.precision, enabled=reduced):
                logits = model(setting.batch)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def inference(self, setting: Setting, seed: int) -> Call:
        """Return a call that is one forward pass in evaluation mode, without gradients."""
        model = self.model(setting, seed, training=False).to(setting.precision)
        batch = setting.batch.to(setting.precision)
        if "onnx" in self.steps:
            return _onnx_call(model, batch)

        def forward() -> Tensor:
            with torch.inference_mode():
                return model(batch)

        return forward


def _onnx_call(model: nn.Module, batch: Tensor) -> Call:
    """Return a call of ONNX Runtime on the CPU, with as many threads as PyTorch has."""
    from normfree.export import to_onnx

    onnxruntime = required("onnxruntime", "timing an ONNX file")

    with tempfile.TemporaryDirectory() as folder:
        written = to_onnx(model, batch, Path(folder) / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(written.path, options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: batch.contiguous().numpy()}
    return lambda: session.run(None, fed)
