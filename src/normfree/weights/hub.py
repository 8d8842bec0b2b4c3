"""A model as a folder, the Hugging Face hub's way, and from and to the hub.

A folder has ``config.json``, ``model.safetensors`` and a model card. The weights file is one of :func:`normfree.save`,
whole by itself, and the only one that is read, so that no two files can be at odds. ``config.json`` repeats, for the
hub and its readers, what ``create_model`` builds. ``huggingface_hub`` is imported where it is used: a folder is read
and written without it.
"""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from normfree.common.checks import invalid, require
from normfree.common.files import Stored, kind_of, read, write_atomically
from normfree.common.text import all_lines, first_line
from normfree.models import Backbone, create_model
from normfree.models.registry import check_backbone
from normfree.weights.checkpoint import NAMED, config_note, load_named, read_config, take_form, write

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"

PLACEHOLDER = "OWNER/NAME"
"""Stands in the card of a folder, whose repository is not known."""

TAGS = ["model_hub_mixin", "normfree", "pytorch", "pytorch_model_hub_mixin"]


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
    note = config_note(model)
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
    config = read_config(stored)
    changed = {key: value for key, value in overrides.items() if value != config.get(key, ...)}
    return _load_changed(stored, config, changed) if changed else load_named(stored)


def _load_changed(stored: Stored, config: dict[str, Any], overrides: dict[str, Any]) -> Backbone:
    """Return a model like the stored one but for some overrides, with its weights."""
    if "name" in overrides:
        raise invalid("name", overrides["name"], f"the weights are of {config['name']}", "leave the name out")
    model = take_form(create_model(**{**config, **overrides}), stored)
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


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    map_location: str = "cpu",
    **overrides: Any,
) -> Backbone:
    """Build a model of the Hugging Face hub, or of a folder, with its weights.

    One file is read, ``model.safetensors``, and no pickle ever.

    Args:
        source: a folder that ``save_pretrained`` wrote, or else a repository's name, such as ``"org/name"``.
        revision: branch, tag or commit of the repository; its main branch by default.
        token: for private repositories; by default the one of ``hf auth login``.
        cache_dir: where downloaded files are kept; the hub's own cache by default.
        force_download: download what the cache has, too.
        local_files_only: take what the cache has, without asking the hub.
        map_location: device the model is moved to.
        overrides: arguments of ``create_model`` in which the model shall differ, such as ``drop_rate=0``. With
            another ``num_classes`` the classifier is a fresh one.

    Returns:
        The model, in evaluation mode and the precision it was saved in.

    Raises:
        ValueError: no such repository or revision; weights missing, damaged or not ours; an override that is unknown
            or that the weights do not fit; no such device.
        ImportError: huggingface_hub is not installed, and the source is no folder.

    Source: the folder's form and the options' names are ``huggingface_hub.PyTorchModelHubMixin``'s.
    """
    folder = Path(source)
    if kind_of(folder) == "file":
        rule = "is a file, and a folder or a repository's name is wanted"
        raise invalid("source", str(source), rule, "read a file of normfree.save with normfree.load")
    if kind_of(folder) != "a folder":
        options = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
        folder = _download(str(source), revision=revision, local_files_only=local_files_only, **options)
    model = load_folder(folder, argument="source", **overrides)
    try:
        return model.to(map_location)
    except (AssertionError, RuntimeError) as error:  # the former: PyTorch was built without it
        rule = f"is no device here ({first_line(error)})"
        raise invalid("map_location", map_location, rule, "pass one such as 'cpu' or 'cuda'") from error


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    model_card_kwargs: dict[str, Any] | None = None,
    **upload_options: Any,
) -> str:
    """Upload a model of :func:`normfree.create_model` to the Hugging Face hub, as one commit.

    Args:
        model: the model.
        repo_id: the repository's name, such as ``"org/name"``; made if there is none.
        commit_message: says what is uploaded.
        private: whether a repository that is made is private; as the owner's settings say by default.
        token: by default the one of ``hf auth login``.
        branch: the repository's main branch by default.
        model_card_kwargs: fields of the model card's metadata, such as ``{"license": "apache-2.0"}``. With them a new
            card takes the place of the repository's; without, a card that is there is kept.
        upload_options: ``create_pr``, ``delete_patterns``, … of ``huggingface_hub.HfApi.upload_folder``.

    Returns:
        The commit's URL.

    Raises:
        ValueError: as :func:`normfree.save`; the hub refuses, or does not answer.
        ImportError: huggingface_hub is not installed.
    """
    api, asked = require_huggingface_hub().HfApi(token=token), f"repo_id={repo_id!r}"
    with tempfile.TemporaryDirectory() as temporary:
        # First, because it also checks the model: no repository is made for one that cannot be saved. What fails on
        # this machine is told as what it is, and only what the hub does as the hub's.
        folder = save_pretrained(model, Path(temporary) / "model", card=False)
        with hub_errors(asked):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            has_card = api.file_exists(repo_id, CARD_FILE, revision=branch)
        if model_card_kwargs or not has_card:
            card = metadata_card(cast("Backbone", model), repo_id, **(model_card_kwargs or {}))
            write_atomically(folder / CARD_FILE, str(card))
        with hub_errors(asked):
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=branch,
                commit_message=commit_message or "Upload the model with normfree",
                **upload_options,
            )
    return str(commit)


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


def metadata_card(model: Backbone, repository: str, **fields: Any) -> Any:
    """Return a ``huggingface_hub.ModelCard`` for a repository, with these fields of metadata besides its own."""
    card = require_huggingface_hub().ModelCard(model_card(model, repository))
    for field, value in fields.items():
        setattr(card.data, field, value)
    return card


def require_huggingface_hub() -> ModuleType:
    """Return the module ``huggingface_hub``.

    Raises:
        ImportError: it is not installed.
    """
    return require("huggingface_hub", "the Hugging Face hub")


@functools.cache
def hub_model_class() -> Any:
    """Return the class ``normfree.HubModel``, whose base class needs huggingface_hub.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    require_huggingface_hub()
    from huggingface_hub import PyTorchModelHubMixin

    class HubModel(nn.Module, PyTorchModelHubMixin, library_name="normfree", tags=list(TAGS)):
        """A model of ``create_model`` as a ``PyTorchModelHubMixin``: for code that expects one.

        >>> model = normfree.HubModel.from_pretrained("org/name")  # doctest: +SKIP
        >>> normfree.HubModel(normfree.create_model("nf_resnet50")).push_to_hub("org/name")  # doctest: +SKIP

        Args:
            model: a model of :func:`normfree.create_model`.

        Attributes:
            model: that model, whole; its folder or repository is the one ``normfree.save_pretrained`` writes.

        Raises:
            ValueError: the model is none of ``create_model``'s.

        Source: huggingface_hub's ``ModelHubMixin``.
        """

        def __init__(self, model: Backbone) -> None:
            super().__init__()
            self.model = check_backbone(model)

        def forward(self, x: Tensor) -> Tensor:
            """Return the model's outputs of x [N, in_channels, H, W]."""
            return self.model(x)

        def push_to_hub(self, repo_id: str, **options: Any) -> str:
            """Upload the model as one commit and return its URL: ``normfree.push_to_hub``, with its options."""
            options.pop("config", None)  # which save_pretrained(push_to_hub=True) hands on
            return push_to_hub(self.model, repo_id, **options)

        def generate_model_card(self, *args: Any, repo_id: str = PLACEHOLDER, **fields: Any) -> Any:
            """Return a model card for a repository, with these fields of metadata besides its own."""
            return metadata_card(self.model, repo_id, **fields)

        def _save_pretrained(self, save_directory: Path) -> None:
            save_pretrained(self.model, save_directory, card=False)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
            # The mixin has read config.json, and hands over what the class takes from it: nothing.
            return cls(from_pretrained(model_id, **options))

    HubModel.__module__, HubModel.__qualname__ = "normfree", "HubModel"  # where it is found, also by pickle
    return HubModel


def _download(repository: str, **options: Any) -> Path:
    """Return the folder of the cache with the files of one commit of a repository.

    Raises:
        ValueError: no such repository or revision; the hub does not answer and the cache has nothing.
    """
    with hub_errors(f"source={repository!r}: no folder of that name, and as a repository") as hub:
        # Not file by file: between two downloads the repository could change.
        return Path(hub.snapshot_download(repository, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **options))


@contextmanager
def hub_errors(subject: str) -> Iterator[ModuleType]:
    """Give ``huggingface_hub``, and turn its errors into a ``ValueError`` of one line about the subject.

    Raises:
        ValueError: the hub refuses, or does not answer.
        ImportError: huggingface_hub is not installed.
    """
    hub = require_huggingface_hub()
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        yield hub
    except (errors.HfHubHTTPError, errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise ValueError(f"{subject}: {all_lines(error)}") from error
