"""timm's weights in our models: the same logits where our definition covers theirs, a reason where it does not."""

import pytest
import torch
from torch import nn

from normfree import create_model, load_timm_weights

timm = pytest.importorskip("timm")

DEPTHS = (1, 2, 1, 1)
NFNET = {"depths": DEPTHS, "num_classes": 10, "widths": (256,) * 4}
TIMM_NFNET = {"depths": DEPTHS, "num_classes": 10, "channels": (256,) * 4, "num_features": 512}
# Sizes that timm's rounding to multiples of 8 leaves as they are.
REGNET = {"depths": DEPTHS, "num_classes": 10, "widths": (64, 64, 128, 256), "expansion": 2.0}
TIMM_REGNET = {
    "depths": DEPTHS,
    "num_classes": 10,
    "channels": (64, 64, 128, 256),
    "width_factor": 1.0,
    "bottle_ratio": 2.0,
    "num_features": 1280 * 256 // 440,
}


def theirs(name, seed=0, scale=1.0, **overrides):
    """Return a network of timm's with every parameter drawn anew, weights of `scale` times their usual size."""
    model = timm.create_model(name, **overrides)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if key.endswith("gain"):
                parameter.copy_(1 + 0.2 * drawn)
            else:
                parameter.copy_(drawn * (scale / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1))
    return model.eval()


def distance(model, other, dtype, size=64):
    """Return the largest difference of two models' logits relative to the largest logit."""
    x = torch.randn(2, 3, size, size + 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected = other.to(dtype)(x)
        return ((model.eval()(x) - expected).abs().max() / expected.abs().max()).item()


COVERED = {
    "dm_nfnet_f0": (TIMM_NFNET, "nfnet_f0", NFNET | {"padding": "same", "activation": "gelu_exact"}),
    "nfnet_f0": (TIMM_NFNET, "nfnet_f0", NFNET | {"activation": "gelu_exact"}),
    "nf_regnet_b0": (TIMM_REGNET, "nf_regnet_b0", REGNET),
    "nfnet_f0 with a module": (TIMM_NFNET, "nfnet_f0", NFNET | {"activation": nn.GELU()}),
    "nf_regnet_b0 with relu": (TIMM_REGNET | {"act_layer": "relu"}, "nf_regnet_b0", REGNET | {"activation": nn.ReLU}),
    "nfnet_f0 with silu": (TIMM_NFNET | {"act_layer": "silu"}, "nfnet_f0", NFNET | {"activation": "silu"}),
}


@pytest.mark.parametrize("scale", [1.0, 0.01])  # small weights are where timm's eps and our floor differ most
@pytest.mark.parametrize("name", COVERED)
def test_logits_are_timms(name, scale):
    changes, ours, overrides = COVERED[name]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        other = theirs(name.split(" ")[0], scale=scale, **changes).to(dtype)
        model = create_model(ours, **overrides).to(dtype)
        assert load_timm_weights(model, other.state_dict()) is model
        assert distance(model, other, dtype) < tolerance


@pytest.mark.slow
def test_whole_dm_nfnet_f0():
    other = theirs("dm_nfnet_f0")
    model = create_model("nfnet_f0", padding="same", activation="gelu_exact")
    load_timm_weights(model, other.state_dict())
    assert distance(model, other, torch.float32) < 1e-5
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())


def test_the_tanh_gelu_of_the_authors_is_near_timms():
    other = theirs("dm_nfnet_f0", **TIMM_NFNET)
    model = load_timm_weights(create_model("nfnet_f0", **NFNET, padding="same"), other.state_dict())
    assert 1e-6 < distance(model, other, torch.float32) < 2e-3


def test_official_gains_stay_but_for_timms_eps():
    other = theirs("dm_nfnet_f0", **TIMM_NFNET)
    model = load_timm_weights(create_model("nfnet_f0", **NFNET, padding="same"), other.state_dict())
    block, twin = model.stages[1][1], other.stages[1][1]
    variance = twin.conv2.weight.flatten(1).var(1, correction=0)
    expected = twin.conv2.gain.flatten() * (variance / (variance + 1e-5)).sqrt()
    torch.testing.assert_close(block.conv1.gain, expected)
    assert block.squeeze_excite.skip_gain == twin.skipinit_gain
    assert torch.equal(model.classifier.weight, other.head.fc.weight)


def test_the_models_types_are_kept_and_its_weights_its_own():
    other = theirs("nfnet_f0", **TIMM_NFNET)
    state = other.state_dict()
    model = load_timm_weights(create_model("nfnet_f0", **NFNET).bfloat16(), state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model = load_timm_weights(create_model("nfnet_f0", **NFNET), state)
    pointers = {tensor.data_ptr() for tensor in state.values()}
    assert not pointers & {parameter.data_ptr() for parameter in model.parameters()}
    assert all(block.squeeze_excite.skip_gain == 1 for stage in model.stages for block in stage)


@pytest.mark.parametrize(
    "prefixes", [("module.",), ("_orig_mod.",), ("module.", "_orig_mod."), ("_orig_mod.", "module.")]
)
def test_the_names_of_a_wrapped_model_are_those_of_what_is_wrapped(prefixes):
    network = theirs("nfnet_f0", **TIMM_NFNET)
    state = network.state_dict()
    plain = load_timm_weights(create_model("nfnet_f0", activation="gelu_exact", **NFNET), state)
    wrapped = {"".join(prefixes) + name: tensor for name, tensor in state.items()}
    model = load_timm_weights(create_model("nfnet_f0", activation="gelu_exact", **NFNET), wrapped)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    partly = {**wrapped, "module.stem.conv9.weight": wrapped.pop(f"{''.join(prefixes)}stem.conv1.weight")}
    with pytest.raises(ValueError, match="state_dict"):
        load_timm_weights(model, partly)


def refused(model, state, message):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_timm_weights(model, state)
    assert "\n" not in str(caught.value)
    if not next(model.parameters()).is_meta:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "ours", "overrides", "message"),
    [
        ("nf_resnet50", "nf_resnet50", {}, r"shortcuts halve by a 2x2 average pool \(avg_pool2d\)"),
        ("nf_seresnet50", "nf_resnet50", {"use_se": True}, "average pool"),
        ("nf_ecaresnet50", "nf_resnet50", {}, "gates its branches with ECA"),
        ("eca_nfnet_l0", "nfnet_f0", {}, r"ECA \(stages.0.0.attn_last.conv.weight"),
        ("eca_nfnet_l1", "nfnet_f1", {}, "ECA"),
        (
            "nfnet_l0",
            "nfnet_f0",
            {"expansion": 0.25, "group_size": 64, "se_ratio": 0.25},
            r"has head of 2304 .*ours 3072",
        ),
        ("nf_regnet_b1", "nf_regnet_b0", {}, r"^state_dict: has 20 blocks where nf_regnet_b0 has 16: 52 of 280"),
        ("nf_regnet_b1", "nf_regnet_b1", {}, r"40 80 160 328 channels \(ours 36 78 156 330\).*multiple of 8"),
        ("nf_regnet_b1", "nf_regnet_b1", {"widths": (40, 80, 160, 328)}, r"has branches of 40 88 184 360 736"),
        ("resnet50", "resnet50", {}, "no normalizer-free network of timm's"),
        (
            "dm_nfnet_f1",
            "nfnet_f0",
            {"padding": "same"},
            "has 24 blocks where nfnet_f0 has 12: 204 of 437 are",
        ),
        (
            "dm_nfnet_f0",
            "nfnet_f1",
            {"padding": "same"},
            "has 12 blocks where nfnet_f1 has 24: 204 of 437",
        ),
        ("nfnet_f0", "nfnet_f0_plus", {}, r"stem of 16 32 64 128 channels \(ours 16 32 64 192\)"),
        ("nfnet_f0", "nfnet_f0", {"num_classes": 10}, r"head.fc.weight has shape \[1000, 3072\] .* \[10, 3072\]"),
        ("nfnet_f0", "nfnet_f0", {"in_channels": 1}, r"stem.conv1.weight has shape \[16, 3, 3, 3\] .* \[16, 1, 3, 3\]"),
        ("nfnet_f0", "nfnet_f0", {"use_se": False}, "48 of 221 are left over"),
        ("nfnet_f0", "nfnet_f0", {"group_size": 64}, "conv2.weight has shape .*group_size"),
        ("dm_nfnet_f0", "nfnet_f0", {}, "padding='symmetric': .*skip gains.*pass padding='same'"),
        ("nfnet_f0", "nfnet_f0", {"padding": "same"}, "padding='same': .*no skip gains.*pass padding='symmetric'"),
        ("nfnet_f0", "nfnet_f0", {"alpha": 0.1}, "alpha=0.1: timm's is 0.2"),
        ("nfnet_f0", "nfnet_f0", {"activation": torch.sin}, "timm has no constant for it"),
        ("nfnet_f0", "nf_regnet_b0", {}, "model='NFRegNet': the state dict is of an NFNet"),
        ("nfnet_f0", "nfnet_f0", {}, "meta device"),
    ],
)
def test_what_is_not_covered_is_said(name, ours, overrides, message):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
        model = create_model(ours, **overrides)
    refused(model, state, message)


def test_a_failed_load_changes_nothing():
    state = theirs("nfnet_f0", **TIMM_NFNET).state_dict()
    refused(create_model("nfnet_f0", **NFNET | {"num_classes": 5}), state, "head.fc.weight")
    refused(create_model("nfnet_f0", **NFNET), state | {"extra": torch.ones(1)}, r"1 of 110 are left over \(extra\)")
    del state["final_conv.gain"]
    refused(create_model("nfnet_f0", **NFNET), state, r"1 of 109 arrays are missing \(final_conv.gain\)")
    refused(create_model("nfnet_f0", **NFNET), {"state_dict": state}, "must map names to tensors")
    refused(nn.Linear(1, 1), state, "model='Linear'")
