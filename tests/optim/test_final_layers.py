"""Which layers a network's outputs come from."""

import pytest
import torch
from torch import nn

import normfree
from normfree.optim import final_layers


@pytest.mark.parametrize("name", ["nf_resnet50", "fixup_resnet50", "nf_regnet_b0"])  # FixUp registers a bias after it
def test_our_networks_end_in_their_classifier_and_backbones_in_none(name):
    with torch.device("meta"):
        assert final_layers(normfree.create_model(name, num_classes=10)) == ("classifier",)
        assert final_layers(normfree.create_model(name, num_classes=0)) == ()


class Training(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.loss = nn.CrossEntropyLoss()


def heads(**layers):
    return nn.ModuleDict({"trunk": nn.Linear(3, 8), **layers})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), ("2",)),
        (nn.Sequential(nn.Linear(3, 4), nn.Conv1d(1, 1, 3)), ("1",)),
        (nn.Linear(3, 4), ("",)),
        (nn.Conv2d(3, 4, 3), ("",)),
        (nn.ConvTranspose1d(3, 4, 3), ("",)),
        (nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 4)), ()),
        (Training(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), ("net.2",)),
        (nn.Sequential(nn.Linear(3, 4)), ("0",)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)), ("2",)),
        (heads(policy_head=nn.Linear(8, 4), value_head=nn.Linear(8, 1)), ("policy_head", "value_head")),
        (heads(heads=nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])), ("heads.0", "heads.1")),
        (heads(box_head=nn.Linear(8, 6), predictor=nn.Linear(6, 2)), ("predictor",)),  # the one feeds the other
        (
            nn.ModuleDict({"trunk": nn.Linear(3, 8), "score": nn.Linear(8, 4), "box": nn.Linear(8, 16)}),
            ("score", "box"),
        ),
        (nn.ModuleDict({"up": nn.Linear(8, 8), "last": nn.Linear(8, 8)}), ("last",)),
        (heads(head=nn.Identity()), ()),
        (nn.Sequential(nn.Linear(3, 4), normfree.nn.ScaledWSConv2d(4, 4, 3)), ()),  # a standardized layer is no head
    ],
)
def test_final_layers_of_any_network(model, expected):
    assert final_layers(model) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ("fc",)),
        ("vgg11", ("classifier.6",)),
        ("vit_b_32", ("heads.head",)),
        ("squeezenet1_0", ("classifier.1",)),
        ("fcn_resnet50", ("classifier.4",)),
        ("lraspp_mobilenet_v3_large", ("classifier.low_classifier", "classifier.high_classifier")),
        ("retinanet_resnet50_fpn", ("head.classification_head.cls_logits", "head.regression_head.bbox_reg")),
        ("fasterrcnn_resnet50_fpn", tuple(f"roi_heads.box_predictor.{name}" for name in ("cls_score", "bbox_pred"))),
    ],
)
def test_final_layers_of_torchvision(name, expected):
    import torchvision

    backbone = {} if name in ("resnet18", "vgg11", "vit_b_32", "squeezenet1_0") else {"weights_backbone": None}
    with torch.device("meta"):
        assert final_layers(torchvision.models.get_model(name, weights=None, **backbone)) == expected


def test_final_layers_are_found_behind_a_parametrization():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    assert final_layers(nn.Sequential(nn.Linear(3, 4), normed)) == ("1",)
