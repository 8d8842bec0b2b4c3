"""``normfree train``: a recipe, run in a folder that holds everything about it."""

from __future__ import annotations

import functools
import operator
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from normfree.commands.shared import Terminal, check_folder
from normfree.common.checks import invalid, suggestion
from normfree.train.config import RECIPES, TrainConfig, flatten, read_config, to_dict


def _recipes() -> Any:
    """A choice between all recipes, each with its own defaults."""
    choices = [
        Annotated[
            TrainConfig,
            tyro.conf.subcommand(name, default=recipe(), description=(recipe.__doc__ or "").partition("\n")[0]),
        ]
        for name, recipe in RECIPES.items()
    ]
    return functools.reduce(operator.or_, choices)


if TYPE_CHECKING:
    Recipe = TrainConfig
else:
    Recipe = Annotated[_recipes(), tyro.conf.OmitSubcommandPrefixes, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a network by a recipe, or go on with a run that was interrupted: the same command again.

    Every field of a recipe can be changed; `normfree train RECIPE --help` lists them with its values. On several
    devices or hosts: torchrun --nproc-per-node 8 -m normfree train RECIPE. The run's folder (runs/NAME) gets
    config.json, train.csv, eval.csv, tensorboard/ and checkpoints/ as it goes, and model.safetensors, metrics.json
    and report.html at the end. SIGTERM writes a checkpoint and ends the run with code 0 (metrics.json says
    "stopped"); after SIGKILL or a power cut it goes on from the last checkpoint, to the same weights bit for bit.
    """

    recipe: Recipe
    """What to train, how, on what."""
    config: Annotated[
        Path | None, tyro.conf.CascadeSubcommandArgs, tyro.conf.arg(metavar="PATH", help_behavior_hint="")
    ] = None
    """Settings to begin with: a run's folder or config.json, or YAML such as `data: {source: pets}`; other options
    change them. With a model in the file, RECIPE can be left out."""

    lacking: ClassVar[dict[str, Any]] = {}
    """Settings that neither the file nor a recipe says, and their defaults; see ``read_config``."""

    @classmethod
    def apply_config_file(cls, words: Sequence[str]) -> tuple[type[Train], list[str]]:
        """Return the command whose defaults are those of the config file that words ask for, and the words for it.

        Args:
            words: those of the command line, the command's name first.

        Raises:
            ValueError: as of ``read_config``; or there are two files.
        """
        places = [place for place, word in enumerate(words) if word == "--config" or word.startswith("--config=")]
        if not places:
            return cls, list(words)
        if len(places) > 1:
            raise ValueError("config: there are two files; give one")
        file = words[places[0]].partition("=")[2] or next(iter(words[places[0] + 1 :]), None)
        if file is None:
            return cls, list(words)
        rest = [*words[: places[0]], *words[places[0] + 2 - ("=" in words[places[0]]) :]]
        recipe = rest[1] if len(rest) > 1 and not rest[1].startswith("-") else None
        if recipe is not None and recipe not in RECIPES:
            raise invalid("recipe", recipe, "there is no such recipe", suggestion(recipe, RECIPES))
        config, lacking = read_config(file, None if recipe is None else RECIPES[recipe](), code=rest)
        hint = Annotated[TrainConfig, tyro.conf.arg(name="")]
        fields = [("recipe", hint, field(default=config))]
        kind = make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True, kw_only=True)
        settings = flatten(to_dict(config))
        kind.__doc__, kind.lacking = cls.__doc__, {name: settings[name] for name in lacking}
        return kind, [rest[0], "--config", file, *rest[1 if recipe is None else 2 :]]

    def __post_init__(self) -> None:
        check_folder(self.recipe.folder)

    def run(self, console: Terminal) -> None:
        """Train, and say what came of it."""
        from normfree.train.trainer import train

        settings = flatten(to_dict(self.recipe))
        if lacking := [f"{name} {value}" for name, value in self.lacking.items() if settings[name] == value]:
            console.say(f"{self.config} says nothing of these, which are at their defaults: {', '.join(lacking)}")
        network = None
        if self.recipe.is_foreign:
            from normfree.sources import network_factory

            network = network_factory(self.recipe.model, self.recipe.original)
        summary = train(self.recipe, console, network=network)
        metrics = summary.metrics
        if not summary.finished:
            where = f"step {metrics['step']} is in {summary.folder / 'checkpoints'}"
            console.say(f"stopped as asked: {where}; the same command goes on")
            return
        found = metrics["evaluation"]
        top5 = "" if found["top5"] is None else f", top-5 {100 * found['top5']:.2f} %"
        counts = "".join(
            f", {count} {what}"
            for what, count in (("steps skipped", metrics["skipped_steps"]), ("bad images", len(metrics["bad_images"])))
            if count
        )
        accuracy = f"accuracy {100 * found['top1']:.2f} %{top5} of {found['examples']:,} images"
        console.say(f"{accuracy}, {metrics['seconds']:.1f} s of training{counts}")
        if _is_at_chance(found["confusion"]):
            words = ["normfree", "spp", self.recipe.model, "--input", self.recipe.data.source]
            words += ["--original", self.recipe.original] if self.recipe.original else []
            if (size := self.recipe.data.image_size) is not None:
                words += ["--image-size", str(size)]
            console.say(
                f"no better than naming one class always, after {metrics['step']} steps; {shlex.join(words)} shows the "
                "signal it starts with; if it is healthy: more epochs, another --optimizer.learning-rate, other images"
            )
        if summary.repeated:
            console.say(f"{summary.folder} holds this run already: nothing was trained; another --out trains it again")
        else:
            console.say_written([summary.folder])


def _is_at_chance(confusion: Sequence[Sequence[int]]) -> bool:
    """Whether a network is right no more often, within two errors, than by naming the most frequent class always."""
    total, right = sum(map(sum, confusion)), sum(row[index] for index, row in enumerate(confusion))
    share = max(map(sum, confusion)) / max(total, 1)
    return right <= total * share + 2 * (total * share * (1 - share)) ** 0.5
