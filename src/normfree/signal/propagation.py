"""What measuring a model gives: the signal propagation plot as data, and its JSON, PNG and HTML forms."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from textwrap import indent
from typing import Any, Literal, get_args

from normfree.common.checks import check_choice
from normfree.common.files import write_atomically
from normfree.common.text import short_repr, shortened
from normfree.trace.preserve import Mode

SCHEMA = 1

Severity = Literal["error", "warning", "info"]
"""Of findings, the most serious first."""

SEVERITIES: tuple[Severity, ...] = get_args(Severity)

Kind = Literal[
    "explosion",
    "attenuation",
    "mean_shift",
    "branch_variance",
    "silenced_branch",
    "dead_channels",
    "correlation_collapse",
    "gradient_explosion",
    "gradient_vanishing",
    "zero_layer",
    "non_finite",
    "single_value",
    "variance_plan",
    "softmax_output",
    "uneven_inputs",
]
"""Of findings."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Curve = Literal[
    "avg_channel_sq_mean",
    "avg_channel_var",
    "residual_avg_channel_var",
    "expected_var",
    "input_correlation",
    "own_correlation",
    "avg_sq_gradient",
    "dead_channels",
    "activated_avg_channel_sq_mean",
    "activated_avg_channel_var",
]
"""What is measured at every block: the attributes of :class:`BlockSignal` of that name."""

BESIDE = -1
"""The index, while findings are looked for, of a layer beside the blocks: it is not on the plot's axis."""


def module_title(name: str) -> str:
    """A module's name as pages and messages show it: what runs in no module of its own runs in "the model".

    Args:
        name: its qualified name, "" for the model as a whole; followed by "#2" for its second addition or call.
    """
    return f"the model{name}" if name[:1] in ("", "#") else name


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Point 0 of the plot: the input of the first block, after stem and pooling.

    Attributes:
        name: module that received it ("" for the model itself).
        shape: shape of the tensor in the first batch.
        channel_axis: axis whose entries are the channels.
        avg_channel_sq_mean: mean over channels of the squared channel mean.
        avg_channel_var: mean over channels of the biased channel variance.
        input_correlation: mean cosine similarity between different examples, or None for one example.
    """

    name: str
    shape: tuple[int, ...]
    channel_axis: int
    avg_channel_sq_mean: float
    avg_channel_var: float
    input_correlation: float | None = None

    @property
    def title(self) -> str:
        """The module's name as it is shown."""
        return module_title(self.name)

    @property
    def values(self) -> int:
        """How many values each channel has in the first batch: over examples and positions."""
        return prod(self.shape) // self.shape[self.channel_axis]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a point lies in the dataflow.

    Attributes:
        name: module that performed the addition; a second addition in one module is ``name#2``.
        kind: "residual", "layer" or "output" (while measuring, "entry" too).
        shape: shape of the activation in the first batch.
        channel_axis: axis whose entries are the channels.
        transition: the shortcut is not the identity: it has weights, or changes the size.
        encloses: how many other residual additions lie inside this one's branch (0 for an ordinary
            block; more for a long skip connection).
        woken: names of the zero parameters that silenced this branch and were measured as one.
        number: position among all weighted layers and residual additions of the model; None where unknown.
        after: number of the point that the signal came through last, by the shortcut or the first operand; None where
            its stream begins.
        entry: where its stream begins, as position in ``entries``; None after another point.
        normalized: a normalizer has acted since ``after`` (or since the entry).
        renewed: a normalizer is what acts on it next.
        averaged: an average pool has acted since ``after``.
        mixed: another signal has been put beside it since ``after``, by a concatenation.
        looked_up: a row of a table, such as an embedding's.
        last: no weighted layer follows: a classifier, a head.
        joined: a sum that goes on, but not as the first operand of what joins it with another signal.
        gate: only gates and the weights of attention are computed from it.
        smaller_term: it is added to another layer's larger output at once (the state's part in a recurrent cell): what
            goes on is the sum, and no step of the signal is from the one to the other.
        weight_gain: root mean square of the layer's weight times the root of its fan-in (He's initialisation: √2);
            None where there is no such weight; of a table 0 where all of it is zero.
        broadcast: the branch has one value for many positions of the sum, as a global context.
        zero_gate: the branch is zero, for a layer with weights of zero computes the gate that multiplies it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    channel_axis: int
    transition: bool = False
    encloses: int = 0
    woken: tuple[str, ...] = ()
    number: int | None = None
    after: int | None = None
    entry: int | None = None
    normalized: bool = False
    renewed: bool = False
    averaged: bool = False
    mixed: bool = False
    looked_up: bool = False
    last: bool = False
    joined: bool = False
    gate: bool = False
    smaller_term: bool = False
    weight_gain: float | None = None
    broadcast: bool = False
    zero_gate: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockSignal(Position):
    """One point: the activation after one residual addition, or after one weighted layer, or an output.

    In post-activation networks the activation that ends a block follows the addition. The plot's numbers are those of
    the sum, as everywhere; the official definition measures such families after that activation, whose numbers are
    ``activated_avg_channel_sq_mean`` and ``activated_avg_channel_var`` (20 to 50 % from those of the sum).

    Attributes:
        index: position among the points of its kind (``blocks``, ``layers`` or ``outputs``), from 0.
        avg_channel_sq_mean: mean over channels of the squared channel mean.
        avg_channel_var: mean over channels of the biased channel variance.
        residual_avg_channel_var: that variance of the branch's output before it is scaled and added;
            None for a layer, or where the scale is zero and was not woken.
        expected_var: the variance the model's own plan predicts for ``avg_channel_var``, if it has one; None of layers
            beside blocks and of outputs.
        input_correlation: mean cosine similarity between different examples' features, if there are two.
        own_correlation: the same number; if it is above 0.9, without the layer's bias, None where that leaves nothing.
        avg_sq_gradient: mean squared gradient of a random projection of the output, if it was measured.
        dead_channels: fraction of channels that are constant over the whole input.
        activated_avg_channel_sq_mean: the squared mean after the activation function that alone reads the sum; None
            where there is none (pre-activation).
        activated_avg_channel_var: the variance there.
    """

    index: int
    avg_channel_sq_mean: float
    avg_channel_var: float
    residual_avg_channel_var: float | None
    expected_var: float | None = None
    input_correlation: float | None = None
    own_correlation: float | None = None
    avg_sq_gradient: float | None = None
    dead_channels: float = 0.0
    activated_avg_channel_sq_mean: float | None = None
    activated_avg_channel_var: float | None = None

    @property
    def title(self) -> str:
        """The module's name as it is shown."""
        return module_title(self.name)

    @property
    def place(self) -> str:
        """How a message names the point."""
        if self.kind == "output":
            return self.name
        return f"layer {self.title}" if self.index == BESIDE else f"{self.unit} {self.index} ({self.title})"

    @property
    def unit(self) -> str:
        """What the point is one of: a block ends with a residual addition."""
        return "layer" if self.kind == "layer" else "block"

    @property
    def values(self) -> int:
        """How many values each channel has in the first batch: over examples and positions."""
        return prod(self.shape) // self.shape[self.channel_axis]

    def __repr__(self) -> str:
        return short_repr(self, f"of {shortened(self.place, 120)}: {self._numbers}")

    @property
    def _numbers(self) -> str:
        branch = self.residual_avg_channel_var
        told = f"squared mean {self.avg_channel_sq_mean:.4g}  variance {self.avg_channel_var:.4g}"
        told += "" if self.expected_var is None else f" (expected {self.expected_var:.4g})"
        return told if branch is None else f"{told}  branch {branch:.4g}"

    @property
    def index_on_plot(self) -> int | None:
        """The index of the point on the plot's axis, None beside it."""
        return None if self.index == BESIDE or self.kind == "output" else self.index


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing worth knowing about the signal, in plain words.

    Attributes:
        kind: one of :data:`Kind`.
        severity: "error" (it will not train as it is), "warning" or "info".
        block: index of the block where it shows first; None for the model as a whole, or where it shows in a layer
            beside the blocks, which the message names.
        message: what was seen and where, with the numbers.
        remedy: what to do about it.
        code: the remedy in Python, to be pasted where ``model`` is the model and ``batch`` its input.
        docs: the place in this project's documentation, page and anchor; `normfree explain KIND` prints it.
    """

    kind: Kind
    severity: Severity
    block: int | None
    message: str
    remedy: str
    code: str = ""
    docs: str = ""

    def __repr__(self) -> str:
        return short_repr(self, f"{self.severity}: {self.kind}: {self.message}")


@dataclass(frozen=True)
class NonFinite:
    """The operation whose result was the first not to be finite.

    Attributes:
        module: the module that ran it.
        operation: its ATen name.
        count: values that are not finite.
        total: values in all.
        largest: largest finite magnitude among its inputs.
    """

    module: str
    operation: str
    count: int
    total: int
    largest: float


@dataclass(frozen=True, kw_only=True)
class SignalPropagation:
    """The signal propagation plot of one model, as measured by :func:`normfree.spp`.

    ``blocks`` is what the plot shows: the residual additions, or every weighted layer where there are none. ``layers``
    are the weighted layers of a residual network that lie in no block (before the first, between blocks, after the
    last, in heads and further streams), ``outputs`` the floating-point tensors it returns, and ``entries`` the places
    where streams begin; the findings look at all of them. ``unmeasured`` are the names of the other layers: no row of
    the batch came to them (an expert, a node type), or they did not run (an auxiliary head in evaluation mode).

    Source: Brock, De, Smith (ICLR 2021), section 3; the definitions of the curves are those of
    :class:`BlockSignal`.
    """

    model: str
    mode: Mode
    input: dict[str, Any]
    entry: Entry
    blocks: tuple[BlockSignal, ...]
    findings: tuple[Finding, ...] = ()
    configuration: dict[str, Any] = field(default_factory=dict)
    layers: tuple[BlockSignal, ...] = ()
    outputs: tuple[BlockSignal, ...] = ()
    entries: tuple[Entry, ...] = ()
    unmeasured: tuple[str, ...] = ()

    @property
    def not_measured(self) -> str:
        """What is not known of the model, in words: "2 layers not measured (…)"; "" where every layer was reached."""
        if not self.unmeasured:
            return ""
        count, named = len(self.unmeasured), ", ".join(map(module_title, self.unmeasured[:3]))
        more = f" and {count - 3} more" if count > 3 else ""
        layers = "1 layer" if count == 1 else f"{count} layers"
        return f"{layers} not measured, for no row of the batch came there, or nothing ran: {named}{more}"

    @property
    def size(self) -> str:
        """How many points the plot has, and what they are: "8 blocks"."""
        unit = "weighted layer" if self.blocks and all(block.kind == "layer" for block in self.blocks) else "block"
        return f"{len(self.blocks)} {unit}{'' if len(self.blocks) == 1 else 's'}"

    @property
    def verdict(self) -> str:
        """What the findings come to: "2 errors, 1 warning", or "healthy" where there is neither."""
        counts = Counter(finding.severity for finding in self.findings if finding.severity != "info")
        told = (f"{counts[one]} {one}{'' if counts[one] == 1 else 's'}" for one in SEVERITIES if counts[one])
        return ", ".join(told) or "healthy"

    def curve(self, name: Curve) -> list[float | None]:
        """One curve as a list: point 0 is the entry (None for what only blocks have), then each block.

        Raises:
            ValueError: if no curve has that name.
        """
        check_choice("name", name, Curve)
        return [getattr(self.entry, name, None), *(getattr(block, name) for block in self.blocks)]

    def renamed(self, model: str) -> SignalPropagation:
        """The same measurement under another model name (legends, JSON)."""
        return replace(self, model=model)

    def to_dict(self) -> dict[str, Any]:
        """This model's entry of ``spp.json``; numbers that are not finite become None."""
        return _finite_or_none(
            {
                "model": self.model,
                "mode": self.mode,
                "input": self.input,
                "entry": asdict(self.entry),
                "blocks": [asdict(block) for block in self.blocks],
                "layers": [asdict(layer) for layer in self.layers],
                "outputs": [asdict(output) for output in self.outputs],
                "entries": [asdict(entry) for entry in self.entries],
                "unmeasured": self.unmeasured,
                "findings": [asdict(finding) for finding in self.findings],
                "configuration": self.configuration,
            }
        )

    def to_json(self, path: str | Path) -> Path:
        """Write ``{"schema": 1, "models": [...]}`` with this model alone; returns the path."""
        return write_json(path, [self])

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the curves in the paper's style; returns the matplotlib figure, and saves it if asked."""
        from normfree.report.plot import plot_signals

        return plot_signals([self], path)

    def to_html(self, path: str | Path) -> Path:
        """Write the interactive report: one file that opens offline; returns the path."""
        from normfree.report.signal_page import write_report

        return write_report([self], path)

    def assert_healthy(self, *, ignore: Iterable[Kind] = ()) -> None:
        """Fail with the findings as message if any is an error; meant for a model's own test suite.

        Args:
            ignore: kinds of findings that are expected of this model.

        Raises:
            ValueError: if ``ignore`` names no kind of finding.
            AssertionError: with one line per finding of severity "error", and each remedy's lines of Python once.
        """
        __tracebackhide__ = True
        ignored = {check_choice("ignore", kind, Kind) for kind in ignore}
        errors = [f for f in self.findings if f.severity == "error" and f.kind not in ignored]
        if errors:
            lines = [f"the signal of {self.model} is not healthy at initialisation:"]
            lines += [f"  {e.kind}: {e.message} Remedy: {e.remedy} See normfree explain {e.kind}." for e in errors]
            for code in dict.fromkeys(error.code for error in errors if error.code):
                kinds = ", ".join(dict.fromkeys(error.kind for error in errors if error.code == code))
                lines += [f"In Python ({kinds}), with your model and its batch:", "", indent(code, "    ")]
            raise AssertionError("\n".join(lines))

    def __repr__(self) -> str:
        kinds = dict.fromkeys(finding.kind for finding in self.findings if finding.severity != "info")
        found = f" ({', '.join(kinds)})" if kinds else ""
        unknown = f", {len(self.unmeasured)} not measured" if self.unmeasured else ""
        return short_repr(self, f"of {shortened(self.model, 60)}: {self.size}{unknown}, {self.verdict}{found}")

    def __str__(self) -> str:
        lines = [f"SignalPropagation of {self.model}: {self.size}, mode {self.mode}"]
        lines += [f"  {block.index:3d} {block.title}: {block._numbers}" for block in self.blocks]
        lines += [f"  {self.not_measured}"] if self.unmeasured else []
        lines += [f"  {f.severity}: {f.message}" for f in self.findings]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from normfree.report.notebook import signal_html

        return signal_html(self)


def write_json(path: str | Path, signals: Iterable[SignalPropagation]) -> Path:
    """Write ``spp.json`` for several models; never leaves a half-written file."""
    document = {"schema": SCHEMA, "models": [signal.to_dict() for signal in signals]}
    return write_atomically(path, json.dumps(document, allow_nan=False) + "\n")


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    return value
