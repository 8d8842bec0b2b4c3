"""``normfree train``: a recipe, run in a folder that holds everything about it."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from normfree.commands.shared import Terminal, check_folder
from normfree.train.config import TrainConfig
from normfree.train.recipes import RECIPES


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

    def __post_init__(self) -> None:
        check_folder(self.recipe.folder)

    def run(self, console: Terminal) -> None:
        """Train, and say what came of it."""
        from normfree.train.trainer import train

        summary = train(self.recipe, console)
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
        if summary.repeated:
            console.say(f"{summary.folder} holds this run already: nothing was trained; another --out trains it again")
        else:
            console.say_written([summary.folder])
