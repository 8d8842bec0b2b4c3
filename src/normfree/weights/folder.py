"""A model as a folder, the Hugging Face hub's way: ``config.json``, ``model.safetensors`` and a model card.

The weights file is one of :func:`normfree.save`, whole by itself; ``config.json`` says once more, for the hub and
its readers, what ``create_model`` builds. Nothing else in a folder is ever read, least of all a pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from torch import nn

from normfree.models import Backbone, create_model
from normfree.nn.checks import invalid
from normfree.nn.fold import fold, has_foldable
from normfree.signal.files import write_atomically
from normfree.weights.checkpoint import load, save

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"

PLACEHOLDER = "OWNER/NAME"
"""Stands in the card of a folder, whose repository is not known."""

TAGS = ["model_hub_mixin", "normfree", "pytorch", "pytorch_model_hub_mixin"]

_CARD = """\
---
library_name: normfree
pipeline_tag: {pipeline_tag}
tags:
{tags}
---

# {name}

An image network of `normfree` with {parameters:,} parameters: {channels} input channels, {outputs}.

```python
import normfree

model = normfree.from_pretrained("{repository}")
```

It was built by `normfree.create_model` with the arguments in `config.json`:

```json
{config}
```

This text was generated with the files. Whoever publishes the model should add what the weights were trained on, how
accurate they are, and their license.
"""


def save_pretrained(model: nn.Module, folder: str | Path, *, card: bool = True) -> Path:
    """Write a model of :func:`normfree.create_model` as a folder that :func:`normfree.from_pretrained` reads.

    Args:
        model: the model.
        folder: where to; made if missing. Files of an older model are replaced, each whole.
        card: whether to write a model card (``README.md``) where there is none; one that is there is kept.

    Returns:
        The folder.

    Raises:
        ValueError: as :func:`normfree.save`; ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise invalid("folder", str(folder), "is a file", "give a folder")
    # First, because it also checks the model: one that cannot be saved leaves an older folder as it was.
    save(model, folder / WEIGHTS_FILE)
    assert isinstance(model, Backbone)
    write_atomically(folder / CONFIG_FILE, json.dumps(model.config, indent=2) + "\n")
    if card and not (folder / CARD_FILE).exists():
        write_atomically(folder / CARD_FILE, model_card(model))
    return folder


def load_folder(folder: str | Path, **overrides: Any) -> Backbone:
    """Rebuild the model of a folder that :func:`save_pretrained` wrote.

    Args:
        folder: the folder.
        overrides: arguments of ``create_model`` in which the model shall differ. With another ``num_classes`` the
            classifier is a fresh one; all other tensors must keep their shapes.

    Returns:
        The model, in evaluation mode and the precision it was saved in.

    Raises:
        ValueError: files missing, damaged, not ours or at odds with each other; an override that is unknown or
            that the weights do not fit.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        rule = f"has no {WEIGHTS_FILE}, and weights in any other form are not read"
        raise invalid("folder", str(folder), rule, "save the model anew")
    model = load(folder / WEIGHTS_FILE)
    described = json.loads(json.dumps(model.config))
    if at_odds := [key for key in {**described, **config} if described.get(key, ...) != config.get(key, ...)]:
        rule = f"{CONFIG_FILE} and {WEIGHTS_FILE} are not of one model, they differ in {', '.join(at_odds[:3])}"
        raise invalid("folder", str(folder), rule, "save the model anew, and give overrides when loading")
    changed = {key: value for key, value in overrides.items() if value != model.config.get(key, ...)}
    return _changed(model, changed) if changed else model


def _read_config(folder: Path) -> dict[str, Any]:
    """Return what the folder's ``config.json`` says, if it looks like one of ours."""
    remedy = "give a folder of normfree.save_pretrained"
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise invalid("folder", str(folder), f"has no {CONFIG_FILE}", remedy)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise invalid("folder", str(folder), f"{CONFIG_FILE} is no sound JSON file ({error})", remedy) from error
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise invalid("folder", str(folder), f"{CONFIG_FILE} does not name a model of normfree", remedy)
    return config


def _changed(model: Backbone, overrides: dict[str, Any]) -> Backbone:
    """Return a model like this one but for some overrides, with its weights."""
    if "name" in overrides:
        raise invalid("name", overrides["name"], f"the weights are of {model.name}", "leave the name out")
    other = create_model(**{**model.config, **overrides})
    if not has_foldable(model):
        other = cast(Backbone, fold(other))
    other.to(next(model.parameters()).dtype)
    state, own = model.state_dict(), other.state_dict()
    if other.num_classes != model.num_classes:
        # The classifier is a fresh one, and so is FixUp's bias before it.
        state = {key: tensor for key, tensor in state.items() if not key.startswith("classifier")}
        state |= {key: tensor for key, tensor in own.items() if key.startswith("classifier")}
    shapes, wanted = ({key: tensor.shape for key, tensor in tensors.items()} for tensors in (state, own))
    misfits = [key for key in {**shapes, **wanted} if shapes.get(key) != wanted.get(key)]
    if misfits:
        given = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
        raise ValueError(f"{given}: {len(misfits)} tensors of the weights do not fit ({misfits[0]}); leave it out")
    other.load_state_dict(state)
    return other.eval()


def model_card(model: Backbone, repository: str = PLACEHOLDER) -> str:
    """Return a model card: what the model is and how to load it, in the hub's Markdown with its metadata."""
    classifies = model.num_classes > 0
    return _CARD.format(
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        tags="\n".join(f"- {tag}" for tag in TAGS),
        name=model.name,
        repository=repository,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        channels=model.config["in_channels"],
        outputs=f"{model.num_classes} classes" if classifies else f"{model.num_features} features",
        config=json.dumps(model.config, indent=2),
    )
