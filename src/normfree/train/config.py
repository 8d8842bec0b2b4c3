"""How a network is trained: one frozen config, checked when made, its recipes, and its files.

*Recipes*: named functions, each of which returns one frozen config.

The ResNets, NF-RegNets and NFNets are trained as their papers say; what a paper does not say is as in its
ResNets. ``cifar`` and ``digits`` are ours, for two cores and one accelerator: their branches start at gain 1
(docs/training.md tells why).

Sources: Brock, De, Smith, ICLR 2021 (arXiv 2101.08692), section 5 and appendix; Brock et al. 2021 (arXiv
2102.06171), appendix.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from normfree.common.checks import (
    OTHER_NAMES,
    check_choice,
    check_choices,
    check_flag,
    check_integer,
    check_number,
    check_rate,
    check_seed,
    invalid,
    require,
    suggestion,
)
from normfree.common.files import bounded_loader, parse_dataclass, read_bytes, read_json, refused
from normfree.common.text import LONGEST, first_line, quoted, shortened
from normfree.data import AugmentationConfig, DataConfig
from normfree.data.config import check_image_size
from normfree.models.nfnet import NFNET_SIZES
from normfree.models.registry import accepted_overrides, list_models, parse_overrides
from normfree.models.regnets import REGNET_SIZES
from normfree.optim import Rule
from normfree.train.records import version

Config = TypeVar("Config")

Accelerator = Literal["auto", "cpu", "cuda"]
Strategy = Literal["auto", "ddp", "fsdp"]
Precision = Literal["auto", "bf16", "fp32"]
Log = Literal["tensorboard", "wandb", "mlflow"]

LARGEST_SETTING = 1e30
"""Of an optimizer's numbers: float32 holds 3e38, and some are multiplied with each other."""

STEPS = 4
"""Steps of an epoch, at least, where the batch is made smaller."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with Nesterov momentum, or Muon with it, a warm-up from zero, and half a cosine.

    Biases, gains, skip gains and a normalizer's parameters are not decayed.
    """

    rule: Rule = "sgd"
    """sgd: Nesterov SGD for all parameters. muon: orthogonalized steps (normfree.optim.Muon) for the weights of
    convolutions and linear layers but the final ones, Nesterov SGD for the rest."""
    learning_rate: float = 0.1
    """Highest learning rate, for a batch of `--optimizer.reference-batch` images."""
    sgd_learning_rate: float = 0.1
    """With `--optimizer.rule muon`, the highest learning rate of what Muon does not step, at the same batch."""
    reference_batch: int | None = 256
    """The batch that learning rates and `--optimizer.clip-norm` are stated for: rates grow linearly with the batch, and
    the bound of the norm with one over its root where it is smaller; None: all are the same at every batch."""
    momentum: float = 0.9
    """Of both rules, above 0."""
    weight_decay: float = 5e-5
    """Of weights; the paper takes 5e-5 for NF-ResNets and 1e-4 for their twins with BatchNorm. With
    `--optimizer.rule muon`, of the final layers and embeddings, and decoupled of matrices that are not standardized."""
    warmup_epochs: float = 5
    """Epochs in which the learning rate grows from 0; of a run less than twice as long, a quarter."""
    final_learning_rate: float = 0.0
    """Where the cosine ends."""
    clip_factor: float | None = None
    """Adaptive gradient clipping's lambda, 0.01 for NFNets: a unit's gradient is at most this share of its weight;
    None: no clipping."""
    clip_eps: float = 1e-3
    """Smallest norm a unit's weight counts with."""
    clip_norm: float | None = None
    """Largest Euclidean norm of the whole gradient, before adaptive clipping, for a batch of
    `--optimizer.reference-batch` images; None: any."""
    classifier_lr_scale: float = 1.0
    """Learning rate of the final layers as a share of the others'."""
    gain_lr_scale: float = 1.0
    """Learning rate of gains, skip gains and biases as a share of the weights'; with `--optimizer.rule muon` they have
    `--optimizer.sgd-learning-rate` instead."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("learning_rate", "sgd_learning_rate"):
            check_number(name, getattr(self, name), 0, exclusive=True)
        if self.reference_batch is not None:
            check_integer("reference_batch", self.reference_batch, 1)
        if check_rate("momentum", self.momentum) == 0:
            raise invalid("momentum", self.momentum, "Nesterov's look-ahead needs one", "pass 0.9")
        for name in ("weight_decay", "warmup_epochs", "final_learning_rate"):
            check_number(name, getattr(self, name), 0)
        for name in ("clip_factor", "clip_norm"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, exclusive=True)
        for name in ("clip_eps", "classifier_lr_scale", "gain_lr_scale"):
            check_number(name, getattr(self, name), 0, exclusive=True)
        if self.rule == "muon" and self.gain_lr_scale != 1:
            rule = "gains and biases have a learning rate of their own with rule='muon'"
            raise invalid("gain_lr_scale", self.gain_lr_scale, rule, "set sgd_learning_rate, and leave it out")
        for one in dataclasses.fields(self):
            if isinstance(value := getattr(self, one.name), (int, float)) and value > LARGEST_SETTING:
                raise invalid(one.name, value, f"must be at most {LARGEST_SETTING:g}", "pass a smaller one")

    def peak(self, batch_size: int) -> float:
        """Return the highest learning rate for a batch: ``learning_rate * batch_size / reference_batch``."""
        return self.learning_rate * self._share(batch_size)

    def largest_norm(self, batch_size: int) -> float | None:
        """Return the bound of the gradient's norm for a batch: ``clip_norm * (reference_batch / batch_size) ** 0.5``.

        What is clipped of small batches is mostly noise, whose norm goes with one over the root of the batch. Of a
        batch larger than the reference it is not, and the bound is ``clip_norm``.
        """
        return None if self.clip_norm is None else self.clip_norm / min(self._share(batch_size), 1) ** 0.5

    def describe(self, batch_size: int) -> str:
        """Return in words the learning rate and the bounds of the gradient that a batch is trained with."""
        share, reference = self._share(batch_size), self.reference_batch
        parts = [f"learning rate {self.peak(batch_size):.3g}"]
        parts[0] += f" ({self.learning_rate:g} × {batch_size} / {reference})" if share != 1 else ""
        if self.rule == "muon":
            parts += [f"{self.sgd_learning_rate * share:.3g} of what Muon does not step"]
        if (bound := self.largest_norm(batch_size)) is not None:
            formula = f" ({self.clip_norm:g} × √({reference} / {batch_size}))" if share < 1 else ""
            parts += [f"the gradient's norm at most {bound:.3g}{formula}"]
        if self.clip_factor is not None:
            parts += [f"each unit's at most {self.clip_factor:g} of its weight's at any batch"]
        if self.clip_norm is None and self.clip_factor is None:
            parts += ["gradients not clipped"]
        return f"batch {batch_size}: {', '.join(parts)}"

    def _share(self, batch_size: int) -> float:
        """A batch over the reference batch; 1 if there is none."""
        return batch_size / self.reference_batch if self.reference_batch else 1.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run.

    The batch is the recipe's on any number of ranks: each takes at most `--data.batch-size` images at once, and
    gradients are accumulated over as many of those as the batch needs. The same command again goes on where the
    run was interrupted.
    """

    name: str
    """Of the run, whose folder is runs/NAME unless `--out` says otherwise."""
    model: str
    """A name of `normfree models`, overrides after a colon: nf_resnet50:width=1,skipinit_gain=1. Or any other network:
    torchvision:NAME, timm:NAME, FILE.py:FACTORY, a converted or trained .safetensors."""
    original: str | None = None
    """Of a model that is a converted .safetensors: what builds the one it was converted from."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and augmentation."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer, schedule and clipping."""
    epochs: int = 90
    """Passes over the training images."""
    batch_size: int = 1024
    """Images per optimizer step, over all ranks; where there are fewer to train on, as many as give four steps."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    average_decay: float | None = None
    """Decay of the weights' exponential moving average, which is then what is evaluated; None: no average."""
    seed: int = 0
    """Of initialisation, order, augmentation and dropout."""
    accelerator: Accelerator = "auto"
    """auto: GPUs if there are any."""
    strategy: Strategy = "auto"
    """auto: one process, or DistributedDataParallel under torchrun; fsdp shards weights, gradients and optimizer."""
    precision: Precision = "auto"
    """auto: bf16 (mixed with fp32) where the hardware multiplies it natively, recent CPUs too; else fp32."""
    channels_last: bool = True
    """Keep images and filters with channels last, which convolutions are faster with."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the network (torch.compile): a minute or more at the start, faster steps. auto: on a GPU, unless that
    fails there, which is said, or the network is sharded."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """What a loss that is not finite does: stop the run and name the module it began in, or skip that step."""
    on_changed: Literal["error", "continue"] = "error"
    """What a run does that would go on with another torch, precision, device, number of threads, other images or
    classes than it began with, or other settings than its checkpoint was made with: stop and name them, or go on, to
    other bits than without the interruption."""
    signal_every: int | None = None
    """Steps between signal propagation plots of the network in training; None: as often as a hundredth of the
    time allows; 0: none."""
    log_every: int = 20
    """Steps between rows of train.csv and TensorBoard, of which each epoch has one at least."""
    log: tuple[Log, ...] = ("tensorboard",)
    """Where the curves go besides train.csv and eval.csv: TensorBoard, Weights & Biases, MLflow."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, beside those at the end of each epoch; None: these alone."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best."""
    evaluation_size: int | None = None
    """Height and width of evaluated images; those of training by default."""
    limit_train_steps: int | None = None
    """Stop after so many steps in all, on the whole run's schedule: a smoke run. None: all."""
    limit_eval_steps: int | None = None
    """Evaluate on so many batches only; None: all."""
    out: Path | None = None
    """Folder of the run; runs/NAME by default."""

    def __post_init__(self) -> None:
        __tracebackhide__ = True
        if not self.name or Path(self.name).name != self.name:
            raise invalid("name", self.name, "must be a plain word", "name the run after its recipe, or use --out")
        self._check_model()
        for name in ("epochs", "batch_size", "log_every", "evaluate_every", "keep"):
            check_integer(name, getattr(self, name), 1)
        if self.signal_every is not None:
            check_integer("signal_every", self.signal_every, 0)
        for name in ("checkpoint_every", "evaluation_size", "limit_train_steps", "limit_eval_steps"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_image_size("evaluation_size", self.evaluation_size)
        check_seed(self.seed)
        check_rate("label_smoothing", self.label_smoothing)
        if self.average_decay is not None:
            check_rate("average_decay", self.average_decay)
        check_flag("channels_last", self.channels_last)
        check_choices(self)
        if not isinstance(self.log, tuple) or len(set(self.log)) < len(self.log):
            raise invalid("log", self.log, "must be a tuple of different loggers", "name each once")
        for name in self.log:
            check_choice("log", name, Log)

    def _check_model(self) -> None:
        __tracebackhide__ = True
        if self.is_foreign:
            return
        if self.original is not None:
            rule = f"{quoted(self.model_name)} is one of normfree's own networks, which has none"
            raise invalid("original", self.original, rule, "leave it out")
        if self.model_name not in list_models():
            rule = f"there is no {quoted(self.model_name)}"
            remedy = (
                f"{suggestion(self.model_name, list_models())} Or pass torchvision:NAME, timm:NAME, FILE.py:FACTORY"
            )
            raise invalid("model", self.model, rule, remedy)
        accepted = accepted_overrides(self.model_name)
        for override in self.model_overrides:
            if override not in accepted:
                rule = f"{self.model_name} has no override {override}"
                raise invalid("model", self.model, rule, f"it takes {', '.join(accepted)}")

    @property
    def is_foreign(self) -> bool:
        """Whether ``model`` is the word for a network that is none of ours, or for a file."""
        name = self.model_name
        return name not in list_models() and (name in ("torchvision", "timm") or any(mark in name for mark in "/\\."))

    @property
    def model_name(self) -> str:
        """What stands before the colon of ``model``."""
        return self.model.partition(":")[0]

    @property
    def model_overrides(self) -> dict[str, Any]:
        """What stands after the colon of ``model``, for a network of ours."""
        return {} if self.is_foreign else parse_overrides(self.model.partition(":")[2])

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return self.out if self.out is not None else Path("runs") / self.name

    def fit_to_data(self, examples: int, world_size: int) -> TrainConfig:
        """Return the config with a batch that the images fill, and a warm-up that leaves time to train.

        A batch of more images than there are is halved until an epoch has four steps; a warm-up of more than half of
        the run takes a quarter of it.

        Args:
            examples: to train on.
            world_size: number of ranks, of which the batch stays a multiple.
        """
        batch_size, warmup = self.batch_size, self.optimizer.warmup_epochs
        if batch_size > examples:
            while batch_size > world_size and STEPS * batch_size > examples:
                batch_size = max(batch_size // 2 // world_size, 1) * world_size
        if 2 * warmup > self.epochs:
            warmup = self.epochs / 4
        optimizer = dataclasses.replace(self.optimizer, warmup_epochs=warmup)
        return dataclasses.replace(self, batch_size=batch_size, optimizer=optimizer)

    def accumulation(self, world_size: int) -> int:
        """Return how many batches of each rank make one optimizer step.

        Args:
            world_size: number of ranks.

        Raises:
            ValueError: if the batch cannot be split evenly.
        """
        batches = math.ceil(self.batch_size / (world_size * self.data.batch_size))
        if self.batch_size % (world_size * batches):
            rule = f"cannot be split evenly over {world_size} rank(s) and {batches} batch(es) each"
            remedy = f"pass a multiple of {world_size * batches}, or another --data.batch-size"
            raise invalid("batch_size", self.batch_size, rule, remedy)
        return batches

    def rank_data(self, world_size: int) -> DataConfig:
        """Return the data of one rank: its share of a batch, drawn from the run's seed."""
        batch_size = self.batch_size // (world_size * self.accumulation(world_size))
        return dataclasses.replace(self.data, batch_size=batch_size, seed=self.seed)


FREE = frozenset(
    {
        "out",
        "name",
        "accelerator",
        "on_nonfinite",
        "on_changed",
        "signal_every",
        "log",
        "compile",
        "log_every",
        "evaluate_every",
    }
    | {"checkpoint_every", "keep", "limit_train_steps", "limit_eval_steps"}
    | {"data.workers", "data.prefetch", "data.cache_folder", "data.on_bad_image"}
)
"""Fields that may change when a run goes on: none of them decides what is learned from whole images."""


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain values that JSON keeps."""
    return {
        one.name: to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        for one in dataclasses.fields(config)
        for value in [getattr(config, one.name)]
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings, by their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Return the config that :func:`to_dict` gave.

    Args:
        kind: its class.
        values: what was given.

    Raises:
        ValueError: if a value breaks its rule, or a field is not the class's.
    """
    try:
        return parse_dataclass(kind, values)
    except ValueError as error:
        raise ValueError(f"config: {first_line(error)}; give an undamaged one of this version") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


# --- settings from a file: the config.json of another run, or YAML that somebody wrote --------------------------------


YAML_BYTES = 2**20
"""Bytes of YAML that are read at most."""


def read_config(
    path: str | Path, base: TrainConfig | None = None, *, code: Collection[str] = ()
) -> tuple[TrainConfig, list[str]]:
    """Read a run's settings from a file.

    ``.json`` is the ``config.json`` of a run, or an object of settings; ``.yaml`` and ``.yml`` are settings. Those of
    data, augmentation and optimizer are nested or dotted: ``data: {source: pets}`` or ``data.source: pets``.

    Args:
        path: of the file, or of a run's folder.
        base: has what the file does not say; the defaults of the fields otherwise, and the file's own name.
        code: words of a person, such as those of the command line: FILE.py:FACTORYs that may be run, addresses that may
            be opened, folders that may be written to; none other is because a file names it. Nor is one that an
            option among them (``--data.source``) takes the place of.

    Returns:
        The settings, and the names of those that are at the fields' defaults because nothing says them: all that a
        run's config.json lacks, because an older version wrote it; of another file those that the recipes differ in.

    Raises:
        ValueError: naming the file, and a setting that is unknown, with the nearest known ones, or has a wrong value.
        ImportError: for YAML, if PyYAML is not installed.
    """
    path = Path(path)
    if path.is_dir():  # a run's
        path = path / "config.json"
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise refused("config", path, "is neither .json nor .yaml", "give a run's config.json, or YAML")
    document = read_json(path, "config") if path.suffix == ".json" else _read_yaml(path)
    described = isinstance(document.get("config"), Mapping) and isinstance(document.get("derived"), Mapping)
    spelled = list(_settings(document["config"] if described else document))
    values = dict(spelled)
    if len(values) < len(spelled):
        twice = Counter(name for name, _ in spelled).most_common(1)[0][0]
        raise refused("config", path, f"has {shortened(twice, 80)} twice, in two spellings", "say it once")
    if base is None and "model" not in values:
        remedy = f"name a recipe to begin with: normfree train cifar --config {path}"
        raise refused("config", path, "says no model", remedy)
    alone = base is None
    if base is None:
        base = TrainConfig(name=re.sub(r"\W+", "_", path.stem), model="nf_resnet50")
    defaults = flatten(to_dict(base))
    for name in values:
        if name not in defaults:
            raise refused("config", path, *_unknown(name, defaults, document if described else None))
    try:
        config = parse_dataclass(TrainConfig, _nested({**defaults, **values}))
    except ValueError as error:
        said = re.sub(r"^TrainConfig[.:] ?", "", first_line(error, LONGEST))
        raise ValueError(shortened(f"config={str(path)!r}: {said}")) from error
    given = {*code, *(part for word in code for part in word.split("=", 1))}
    for option, (is_followed, rule) in _FOLLOWED.items():
        word = values.get(option)
        if (
            isinstance(word, str)
            and not {word, f"--{option.replace('_', '-')}"} & given
            and not is_followed(word, path)
        ):
            remedy = f"name it yourself: --{option.replace('_', '-')} {shortened(word, 80)}"
            raise refused("config", path, f"its {option} is {quoted(word)}, and {rule} because a file names it", remedy)
    decided = set(defaults) if described else _recipes_differ_in() if alone else set[str]()
    return config, [name for name in defaults if name in decided and name not in values]


def _recipes_differ_in() -> set[str]:
    """The settings that a recipe chooses, but for its name and those that do not decide what is learned."""
    recipes = [flatten(to_dict(recipe())) for recipe in RECIPES.values()]
    return {name for name in recipes[0] if any(one[name] != recipes[0][name] for one in recipes)} - FREE


def _is_place(word: str, path: Path) -> bool:
    """Whether a folder that a settings file names may be written to: one below the current folder, or a run's own.

    A link on the way, which may be of who wrote the file, is followed: where it ends counts.
    """
    folder = Path(word)
    below = not (folder.is_absolute() or ".." in folder.parts) and folder.resolve().is_relative_to(Path.cwd())
    return below or folder.resolve() == path.parent.resolve()


_CODE = (lambda word, path: ".py" not in word, "no code is run")
_FOLDER = (_is_place, "no folder outside the current one is written to")
_FOLLOWED: dict[str, tuple[Callable[[str, Path], bool], str]] = {
    "model": _CODE,
    "original": _CODE,
    "data.source": (lambda word, path: "://" not in word, "no address is opened"),
    "data.cache_folder": _FOLDER,
    "out": _FOLDER,
}
"""Settings that a file gives only where what they name is harmless: the test, and what is not done otherwise."""


def _settings(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a document by their dotted names, with the underscores of Python; empty sections are left out."""
    for name, value in document.items():
        spelled = f"{prefix}{name}".replace("-", "_")
        if isinstance(value, Mapping):
            yield from _settings(value, f"{spelled}.")
        else:
            yield spelled, value


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping whose leaves have these dotted names."""
    document: dict[str, Any] = {}
    for name, value in leaves.items():
        *sections, last = name.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return document


def _unknown(name: str, known: Mapping[str, Any], written: Mapping[str, Any] | None) -> tuple[str, str]:
    """Rule and remedy of a setting that is unknown; ``written`` is the run's whole file, which says by what version."""
    if inside := [one for one in known if one.startswith(f"{name}.")]:
        return f"{name} is a section", f"give settings in it, such as {inside[0]}"
    rule = f"{shortened(name, 80)} is no setting"
    versions = (written or {}).get("versions")
    theirs, ours = versions.get("normfree") if isinstance(versions, Mapping) else None, version("normfree")
    if theirs not in (None, ours):
        rule += f" of normfree {ours}, and normfree {theirs} wrote the file"
    last = name.rpartition(".")[2]
    same = [one for one in known if one.rpartition(".")[2] in (last, *OTHER_NAMES.get(last, ()))]
    return rule, f"did you mean {', '.join(same)}?" if same else suggestion(name, known)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file of YAML.

    Raises:
        ValueError: it is none, or :func:`bounded_loader` refuses it.
    """
    yaml: Any = require("yaml", "a YAML config")

    class Loader(bounded_loader("a YAML config")):
        """Takes 1e-4 for a number and None for nothing, as the command line does, and no number that it reads so."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            node = super().compose_node(parent, index)
            kind = str(node.tag).rpartition(":")[2]
            if kind in ("int", "float") and re.match(r"[-+]?(0\d|.*:)" if kind == "int" else ".*:", str(node.value)):
                raise yaml.YAMLError(f"{quoted(node.value)} is another number in YAML: 010 is 8, and 1:30 is 90")
            return node

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])
    content = read_bytes(path, "config", most=YAML_BYTES)
    try:
        document = yaml.load(content, Loader)
    except Exception as error:  # PyYAML's own kind, and what its constructors make of a tag's wrong value
        told = (
            " ".join(str(error).split())
            .replace('in "<byte string>", ', "at ")
            .replace('in "<unicode string>", ', "at ")
        )
        rule = f"is no YAML of settings ({told or type(error).__name__})"
        raise refused("config", path, shortened(rule, 240), "mend it") from error
    if not isinstance(document, dict):
        raise refused("config", path, f"holds {type(document).__name__}, no settings", "write name: value")
    return document


# --- recipes ----------------------------------------------------------------------------------------------------------


IMAGENET = "hub:ILSVRC/imagenet-1k"
CIFAR10 = "hub:uoft-cs/cifar10"

IMAGENET_STEPS = 1000
"""Steps between checkpoints: a few minutes of one accelerator."""


def resnet_imagenet() -> TrainConfig:
    """ResNet-50 with BatchNorm on ImageNet, 90 epochs: the paper's baseline, unregularised."""
    return TrainConfig(
        name="resnet_imagenet",
        model="resnetv2_50",
        data=DataConfig(source=IMAGENET, image_size=224, workers=8),
        optimizer=OptimizerConfig(weight_decay=1e-4),
        checkpoint_every=IMAGENET_STEPS,
    )


def nf_resnet_imagenet() -> TrainConfig:
    """NF-ResNet-50 on ImageNet, 90 epochs, with the paper's dropout and stochastic depth."""
    return TrainConfig(
        name="nf_resnet_imagenet",
        model="nf_resnet50",
        data=DataConfig(source=IMAGENET, image_size=224, workers=8),
        optimizer=OptimizerConfig(weight_decay=5e-5),
        checkpoint_every=IMAGENET_STEPS,
    )


def nf_regnet_imagenet(level: int = 0) -> TrainConfig:
    """NF-RegNet-B0 on ImageNet, 360 epochs: MixUp, CutMix, weight averaging, a rate that ends at 0.001.

    Args:
        level: k of Bk, 0 to 8, which sets image sizes and weight decay.
    """
    *_, train_size, test_size, _ = REGNET_SIZES[level]
    return TrainConfig(
        name="nf_regnet_imagenet",
        model=f"nf_regnet_b{level}",
        data=DataConfig(
            source=IMAGENET,
            image_size=train_size,
            workers=8,
            augmentation=AugmentationConfig(mixup=0.2, cutmix=1.0),
        ),
        evaluation_size=test_size,
        optimizer=OptimizerConfig(
            learning_rate=0.4,
            reference_batch=None,
            final_learning_rate=0.001,
            weight_decay=round(5e-5 + 1e-5 * level, 6),
        ),
        epochs=360,
        average_decay=0.99999,
        checkpoint_every=IMAGENET_STEPS,
    )


def nfnet_imagenet(size: int = 0) -> TrainConfig:
    """NFNet-F0 on ImageNet, 360 epochs at batch 4096: adaptive gradient clipping, RandAugment, MixUp, CutMix.

    Args:
        size: k of Fk, 0 to 7, which sets image sizes and the strength of RandAugment.
    """
    train_size, test_size, _ = NFNET_SIZES[size]
    return TrainConfig(
        name="nfnet_imagenet",
        model=f"nfnet_f{size}",
        data=DataConfig(
            source=IMAGENET,
            image_size=train_size,
            workers=8,
            augmentation=AugmentationConfig(
                mixup=0.2, cutmix=1.0, randaugment_layers=4, randaugment_magnitude=5 if size == 0 else 10
            ),
        ),
        evaluation_size=test_size,
        optimizer=OptimizerConfig(weight_decay=2e-5, clip_factor=0.01),
        epochs=360,
        batch_size=4096,
        average_decay=0.99999,
        checkpoint_every=IMAGENET_STEPS,
    )


def cifar() -> TrainConfig:
    """NF-ResNet of 29 layers on CIFAR-10 (or any set of small images in memory), 30 epochs."""
    return TrainConfig(
        name="cifar",
        model="nf_resnet50:depths=(2,2,2,3),widths=(64,128,256,256),stem=cifar,alpha=0.5,skipinit_gain=1,"
        "drop_rate=0,stochdepth_rate=0",
        data=DataConfig(
            source=CIFAR10, batch_size=1024, augmentation=AugmentationConfig(crop="shift", shift=4, flip=True)
        ),
        optimizer=OptimizerConfig(
            learning_rate=0.2,
            reference_batch=128,
            weight_decay=5e-4,
            warmup_epochs=1,
            clip_norm=1.0,
            classifier_lr_scale=0.3,
        ),
        epochs=30,
        batch_size=128,
        label_smoothing=0.0,
    )


def digits() -> TrainConfig:
    """NF-ResNet of 14 layers on scikit-learn's 8x8 digits: no download, under a minute on two cores."""
    return TrainConfig(
        name="digits",
        model="nf_resnet50:depths=(1,1,1,1),widths=(64,128,256,256),stem=cifar,alpha=0.5,skipinit_gain=1,"
        "drop_rate=0,stochdepth_rate=0",
        data=DataConfig(
            source="digits", batch_size=1024, augmentation=AugmentationConfig(crop="shift", shift=1, flip=False)
        ),
        optimizer=OptimizerConfig(
            learning_rate=0.03, reference_batch=64, weight_decay=5e-4, warmup_epochs=2, clip_norm=4.0
        ),
        epochs=30,
        batch_size=64,
        label_smoothing=0.0,
        evaluate_every=5,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (digits, cifar, resnet_imagenet, nf_resnet_imagenet, nf_regnet_imagenet, nfnet_imagenet)
}
"""By name, as ``normfree train`` knows them."""
