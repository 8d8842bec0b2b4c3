"""A model with the methods that users of the Hugging Face hub expect. Imports huggingface_hub; nothing else here does.

``normfree.HubModel`` finds this class, and says what to install where huggingface_hub is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from normfree.models import Backbone
from normfree.models.registry import check_backbone
from normfree.weights.folder import PLACEHOLDER, TAGS, save_pretrained
from normfree.weights.hub import from_pretrained, metadata_card, push_to_hub


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

    def generate_model_card(self, *args: Any, repo_id: str = PLACEHOLDER, **fields: Any) -> ModelCard:
        """Return a model card for a repository, with these fields of metadata besides its own."""
        return metadata_card(self.model, repo_id, **fields)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_pretrained(self.model, save_directory, card=False)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        # The mixin has read config.json, and hands over what the class takes from it: nothing.
        return cls(from_pretrained(model_id, **options))
