"""Models from and to the Hugging Face hub.

``huggingface_hub`` is imported where it is used: a folder is read and written without it.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from normfree.common.checks import invalid
from normfree.common.files import write_atomically
from normfree.common.packages import required
from normfree.common.text import all_lines, first_line
from normfree.models import Backbone
from normfree.weights.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, load_folder, model_card, save_pretrained


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
    if folder.is_file():
        rule = "is a file, and a folder or a repository's name is wanted"
        raise invalid("source", str(source), rule, "read a file of normfree.save with normfree.load")
    if not folder.is_dir():
        options = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
        folder = _downloaded(str(source), revision=revision, local_files_only=local_files_only, **options)
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
            card = metadata_card(cast(Backbone, model), repo_id, **(model_card_kwargs or {}))
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
    return required("huggingface_hub", "the Hugging Face hub")


def hub_model_class() -> Any:
    """Return :class:`normfree.weights.hub_model.HubModel`.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    require_huggingface_hub()
    from normfree.weights.hub_model import HubModel

    return HubModel


def _downloaded(repository: str, **options: Any) -> Path:
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
