"""A model as a folder, the Hugging Face hub's way: ``config.json``, ``model.safetensors`` and a model card.

The weights file is one of :func:`normfree.save`, whole by itself, and the only one that is read, so that no two files
can be at odds. ``config.json`` says once more, for the hub and its readers, what ``create_model`` builds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from normfree.common.checks import invalid
from normfree.common.files import write_atomically
from normfree.common.safetensors_file import Stored, read
from normfree.models import Backbone, create_model
from normfree.models.registry import check_backbone
from normfree.weights.checkpoint import NAMED, checked_config, named, named_note
from normfree.weights.stored import alike, write

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
    model = check_backbone(model)
    note = named_note(model)
    if note is None:
        raise invalid("model", type(model).__name__, "has no config", "build it with normfree.create_model")
    write(model, folder / WEIGHTS_FILE, {NAMED: note})
    write_atomically(folder / CONFIG_FILE, json.dumps(model.config, indent=2) + "\n")
    if card and not (folder / CARD_FILE).exists():
        write_atomically(folder / CARD_FILE, model_card(model))
    return folder


def load_folder(folder: str | Path, *, argument: str = "folder", **overrides: Any) -> Backbone:
    """Rebuild the model of a folder that :func:`save_pretrained` wrote, from its weights file alone.

    Args:
        folder: the folder.
        argument: what named it, for messages.
        overrides: arguments of ``create_model`` in which the model shall differ. With another ``num_classes`` the
            classifier is a fresh one; all other tensors must keep their shapes.

    Returns:
        The model, in evaluation mode and the precision it was saved in.

    Raises:
        ValueError: no weights file, or one that is damaged or not ours; an override that is unknown or that the
            weights do not fit.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        rule = f"has no {WEIGHTS_FILE}, and weights in any other form are not read"
        raise invalid(argument, str(folder), rule, "give a folder of normfree.save_pretrained")
    stored = read(folder / WEIGHTS_FILE, argument)
    config = checked_config(stored)
    changed = {key: value for key, value in overrides.items() if value != config.get(key, ...)}
    return _changed(stored, config, changed) if changed else named(stored)


def _changed(stored: Stored, config: dict[str, Any], overrides: dict[str, Any]) -> Backbone:
    """Return a model like the stored one but for some overrides, with its weights."""
    if "name" in overrides:
        raise invalid("name", overrides["name"], f"the weights are of {config['name']}", "leave the name out")
    model = alike(create_model(**{**config, **overrides}), stored)
    own, tensors = model.state_dict(), dict(stored.tensors)
    if model.num_classes != config["num_classes"]:
        # The classifier is a fresh one, and so is FixUp's bias before it.
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("classifier")}
        tensors |= {key: tensor for key, tensor in own.items() if key.startswith("classifier")}
    shapes, wanted = ({key: tensor.shape for key, tensor in some.items()} for some in (tensors, own))
    misfits = [key for key in {**shapes, **wanted} if shapes.get(key) != wanted.get(key)]
    if misfits:
        argument, *others = overrides
        rule = f"{len(misfits)} tensors of the weights do not fit ({misfits[0]})"
        raise invalid(argument, overrides[argument], rule, f"leave {' and '.join([argument, *others])} out")
    model.load_state_dict(tensors)
    return model.eval()


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
