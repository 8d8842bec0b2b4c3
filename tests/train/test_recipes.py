"""Recipes: the papers' values, every mistake refused in words, and a config that comes back from its JSON."""

import dataclasses
import json

import pytest

from normfree.data import DataConfig
from normfree.models import create_model
from normfree.train import RECIPES, OptimizerConfig, TrainConfig
from normfree.train.config import FREE, from_dict, nf_regnet_imagenet, nfnet_imagenet, to_dict


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_named_config_that_builds(name):
    recipe = RECIPES[name]()
    assert recipe.name == name == RECIPES[name].__name__
    assert RECIPES[name]() == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 1
    create_model(recipe.model_name, num_classes=2, **recipe.model_overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_comes_back_from_its_json(name):
    recipe = RECIPES[name]()
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_the_papers_values():
    """Section 5 and the appendices, as stated in the papers."""
    nf, bn = RECIPES["nf_resnet_imagenet"](), RECIPES["resnet_imagenet"]()
    for recipe in (nf, bn):
        assert (recipe.epochs, recipe.batch_size, recipe.label_smoothing) == (90, 1024, 0.1)
        assert recipe.optimizer.peak(1024) == pytest.approx(0.4)
        assert (recipe.optimizer.momentum, recipe.optimizer.warmup_epochs) == (0.9, 5)
        assert recipe.optimizer.final_learning_rate == 0
    assert (nf.optimizer.weight_decay, bn.optimizer.weight_decay) == (5e-5, 1e-4)
    regnet = nf_regnet_imagenet(3)
    assert (regnet.epochs, regnet.average_decay, regnet.optimizer.peak(512)) == (360, 0.99999, 0.4)
    assert (regnet.optimizer.final_learning_rate, regnet.optimizer.weight_decay) == (0.001, 8e-5)
    assert (regnet.data.image_size, regnet.evaluation_size) == (288, 320)
    assert (regnet.data.augmentation.mixup, regnet.data.augmentation.cutmix) == (0.2, 1.0)
    nfnet = nfnet_imagenet(0)
    assert (nfnet.epochs, nfnet.batch_size, nfnet.optimizer.weight_decay) == (360, 4096, 2e-5)
    assert (nfnet.optimizer.clip_factor, nfnet.optimizer.clip_eps) == (0.01, 1e-3)
    assert (nfnet.data.augmentation.randaugment_layers, nfnet.data.augmentation.randaugment_magnitude) == (4, 5)
    assert (nfnet.data.image_size, nfnet.evaluation_size) == (192, 256)


MISTAKES = {
    "name": ({"name": "a/b"}, "plain word"),
    "model": ({"model": "nf_resnet51"}, "did you mean nf_resnet50"),
    "override": ({"model": "nf_resnet50:colour=1"}, "it takes .*alpha"),
    "grammar": ({"model": "nf_resnet50:alpha"}, "not NAME=VALUE"),
    "epochs": ({"epochs": 0}, "epochs=0: must be an integer of at least 1"),
    "batch": ({"batch_size": 1.5}, "batch_size=1.5"),
    "smoothing": ({"label_smoothing": 1.0}, "label_smoothing"),
    "decay": ({"average_decay": 1.5}, "average_decay"),
    "precision": ({"precision": "fp8"}, "precision='fp8': unknown choice; choose one of 'auto'"),
    "nonfinite": ({"on_nonfinite": "ignore"}, "on_nonfinite"),
    "limit": ({"limit_train_steps": 0}, "limit_train_steps"),
    "signal": ({"signal_every": -1}, "signal_every"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_with_its_remedy(mistake):
    changes, pattern = MISTAKES[mistake]
    with pytest.raises(ValueError, match=pattern):
        TrainConfig(**{"name": "x", "model": "nf_resnet50", **changes})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "adam"),
        ("learning_rate", 0),
        ("sgd_learning_rate", 0),
        ("reference_batch", 0),
        ("momentum", 0),
        ("momentum", 1),
        ("weight_decay", -1),
        ("warmup_epochs", -1),
        ("final_learning_rate", -0.1),
        ("clip_factor", 0),
        ("clip_eps", 0),
    ],
)
def test_a_mistake_of_the_optimizer_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})


def test_the_batch_is_the_recipes_on_any_number_of_ranks():
    recipe = RECIPES["nf_resnet_imagenet"]()  # 1024 images, at most 128 at once
    for ranks in (1, 2, 8, 16, 64):
        split = recipe.rank_data(ranks).batch_size * recipe.accumulation(ranks) * ranks
        assert split == 1024
        assert recipe.rank_data(ranks).batch_size <= 128
    assert (recipe.accumulation(1), recipe.accumulation(8), recipe.accumulation(64)) == (8, 1, 1)
    with pytest.raises(ValueError, match=r"batch_size=1024: cannot be split evenly over 3 rank"):
        recipe.accumulation(3)


def test_an_unknown_field_of_a_saved_config_is_told():
    values = {**to_dict(RECIPES["digits"]()), "flavour": 1}
    with pytest.raises(ValueError, match="flavour is no field of TrainConfig; give an undamaged one"):
        from_dict(TrainConfig, values)


def test_free_fields_are_fields():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    fields |= {f"data.{field.name}" for field in dataclasses.fields(DataConfig)}
    assert fields >= FREE
