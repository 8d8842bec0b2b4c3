"""Models with the methods a user of the Hugging Face hub expects. Imports huggingface_hub; nothing else here does.

``normfree.HubModel`` finds this class, and says what to install where huggingface_hub is missing.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, Self

from huggingface_hub import HfApi, ModelCard, PyTorchModelHubMixin
from torch import nn

from normfree.models import Backbone
from normfree.weights.folder import CARD_FILE, PLACEHOLDER, TAGS, model_card, save_pretrained
from normfree.weights.hub import from_pretrained, hub_errors


class HubModel(Backbone, PyTorchModelHubMixin, library_name="normfree", tags=list(TAGS)):
    """A model of ``create_model`` that is also a ``PyTorchModelHubMixin``.

    >>> model = normfree.HubModel.from_pretrained("org/name")  # doctest: +SKIP
    >>> model.push_to_hub("org/other-name")  # doctest: +SKIP
    >>> normfree.HubModel.of(normfree.create_model("nf_resnet50")).save_pretrained("folder")  # doctest: +SKIP

    It is an instance of its family's class too, with all that has. Not to be constructed: ``from_pretrained`` and
    ``of`` make one.

    Source: huggingface_hub's ``ModelHubMixin``, whose folder has these files.
    """

    _family: type[Backbone]

    @staticmethod
    def of(model: nn.Module) -> HubModel:
        """Give a model of :func:`normfree.create_model` the hub's methods, in place, and return it.

        Raises:
            ValueError: it is no model of ``create_model``.
        """
        if not isinstance(model, Backbone):
            raise ValueError(f"model: {type(model).__name__} was not built by normfree.create_model; pass one that was")
        if not isinstance(model, HubModel):
            model.__class__ = _with_hub(type(model))
        assert isinstance(model, HubModel)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Build a model of the hub, or of a folder, with its weights: ``normfree.from_pretrained``, with its options.

        Raises:
            ValueError: as ``normfree.from_pretrained``; the model is not of this class.
        """
        model = HubModel.of(from_pretrained(pretrained_model_name_or_path, **options))
        if not isinstance(model, cls):
            raise ValueError(f"source={str(pretrained_model_name_or_path)!r}: is a {model.name}, no {cls.__name__}")
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model as a folder: ``normfree.save_pretrained``.

        Args:
            save_directory: the folder.
            config: None; the model's own is written.
            repo_id: repository to push to; the folder's name by default.
            push_to_hub: whether to push, too.
            model_card_kwargs: fields of a new model card's metadata, such as ``{"license": "apache-2.0"}``.
            push_to_hub_kwargs: options of ``push_to_hub``.

        Returns:
            The commit's URL if pushed.

        Raises:
            ValueError: as ``normfree.save_pretrained``; a config.
        """
        if config is not None:
            raise ValueError(
                "config: the model's own is written; leave it out, and give create_model what shall differ"
            )
        new_card = not (Path(save_directory) / CARD_FILE).exists()
        folder = save_pretrained(self, save_directory)
        if new_card and model_card_kwargs:
            self.generate_model_card(**model_card_kwargs).save(folder / CARD_FILE)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **upload_options: Any,
    ) -> str:
        """Upload the model as one commit.

        Args:
            repo_id: the repository, such as ``"org/name"``; made if there is none.
            commit_message: by default it names the model.
            private: whether a repository that is made is private; as the owner's settings say by default.
            token: by default the one of ``hf auth login``.
            branch: the repository's main branch by default.
            model_card_kwargs: fields of the model card's metadata, such as ``{"license": "apache-2.0"}``. With them
                a new card takes the place of the repository's; without, a card that is there is kept.
            upload_options: ``create_pr``, ``allow_patterns``, ``ignore_patterns`` and ``delete_patterns`` of
                ``huggingface_hub.HfApi.upload_folder``.

        Returns:
            The commit's URL.

        Raises:
            ValueError: as ``normfree.save_pretrained``; the hub refuses, or does not answer.
        """
        with tempfile.TemporaryDirectory() as temporary:
            # First, because it also checks the model: no repository is made for one that cannot be saved.
            folder = save_pretrained(self, Path(temporary) / "model")
            with hub_errors(f"repo_id={repo_id!r}"):
                api = HfApi(token=token)
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                self.generate_model_card(repo_id=repo_id, **(model_card_kwargs or {})).save(folder / CARD_FILE)
                if not model_card_kwargs and api.file_exists(repo_id, CARD_FILE, revision=branch):
                    (folder / CARD_FILE).unlink()
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=branch,
                    commit_message=commit_message or f"Upload {self.name}",
                    **upload_options,
                )
        return str(commit)

    def generate_model_card(self, *args: Any, repo_id: str = PLACEHOLDER, **fields: Any) -> ModelCard:
        """Return a model card for a repository, with these fields of metadata besides its own."""
        card = ModelCard(model_card(self, repo_id))
        for field, value in fields.items():
            setattr(card.data, field, value)
        return card

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy are told how, for they could not find it by its name.
        return _bare, (self._family,), self.__dict__


@functools.cache
def _with_hub(family: type[Backbone]) -> type[HubModel]:
    """Return the class of a family's models with the hub's methods."""
    return type(f"Hub{family.__name__}", (HubModel, family), {"_family": family, "__doc__": family.__doc__})


def _bare(family: type[Backbone]) -> HubModel:
    hub_class = _with_hub(family)
    return hub_class.__new__(hub_class)
