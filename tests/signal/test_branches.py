"""The branch, the sum and the entry are the tensors that hooks written by hand see, family by family."""

from copy import deepcopy

import pytest
import torch
import torchvision
from torch import nn

from normfree.signal import spp


def _timm(name, **options):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'normfree[timm]'")
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def _variance(x, axis):
    return x.double().movedim(axis, 0).flatten(1).var(1, unbiased=False).mean().item()


def _sq_mean(x, axis):
    return x.double().movedim(axis, 0).flatten(1).mean(1).square().mean().item()


def _hooked(model, batch, outputs, *, train=False, last_input=()):
    """Run a copy as ``spp`` does; clones of the outputs of modules, and of the last input some have received."""
    model = deepcopy(model).train(train)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    seen = {}

    def keep(name, tensor):
        seen[name] = (tensor[0] if isinstance(tensor, tuple) else tensor).detach().clone()

    for name in outputs:
        module = model.get_submodule(name)
        if name in last_input:  # before it runs, for it may run in place
            module.register_forward_pre_hook(lambda module, inputs, name=name: keep(name, inputs))
        else:
            module.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
    torch.manual_seed(0)
    with torch.no_grad():
        model(batch)
    return [seen[name] for name in outputs]


def _check(signal, branches, axis):
    """Every block's branch statistic is the variance of the tensor a hook kept for it."""
    measured = [block.residual_avg_channel_var for block in signal.blocks]
    assert measured == pytest.approx([_variance(x, axis) for x in branches], rel=1e-5)


def test_resnet50():
    torch.manual_seed(0)
    model, batch = torchvision.models.resnet50(), torch.randn(2, 3, 64, 64)
    blocks = [f"layer{i}.{j}" for i, depth in enumerate((3, 4, 6, 3), 1) for j in range(depth)]
    for name in blocks:
        nn.init.uniform_(model.get_submodule(f"{name}.bn3").weight)  # gains that tell the channels apart
    signal = spp(model, batch)
    assert [block.name for block in signal.blocks] == blocks
    _check(signal, _hooked(model, batch, [f"{name}.bn3" for name in blocks]), axis=1)
    # the last thing a block's ReLU receives is the sum
    relus = [f"{name}.relu" for name in blocks]
    sums = _hooked(model, batch, relus, last_input=relus)
    assert [block.avg_channel_var for block in signal.blocks] == pytest.approx(
        [_variance(x, 1) for x in sums], rel=1e-5
    )
    measured = [block.avg_channel_sq_mean for block in signal.blocks]
    assert measured == pytest.approx([_sq_mean(x, 1) for x in sums], rel=1e-5)
    (entry,) = _hooked(model, batch, ["maxpool"])
    assert signal.entry.avg_channel_var == pytest.approx(_variance(entry, 1), rel=1e-5)
    assert signal.entry.avg_channel_sq_mean == pytest.approx(_sq_mean(entry, 1), rel=1e-5)


def test_convnext_before_layer_scale():
    torch.manual_seed(0)
    model, batch = torchvision.models.convnext_tiny(), torch.randn(2, 3, 64, 64)
    signal = spp(model, batch)
    branches = _hooked(model, batch, [f"{block.name}.block" for block in signal.blocks])
    _check(signal, branches, axis=1)
    outputs = _hooked(model, batch, [block.name for block in signal.blocks])
    measured = [block.avg_channel_var for block in signal.blocks]
    assert measured == pytest.approx([_variance(x, 1) for x in outputs], rel=1e-5)


def test_vision_transformer_before_layer_scale():
    model = _timm("deit3_small_patch16_224", depth=3, img_size=64, init_values=1e-4)
    batch = torch.randn(2, 3, 64, 64)
    signal = spp(model, batch)
    names = [f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp")]
    _check(signal, _hooked(model, batch, names), axis=2)


def test_swin():
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10)
    batch = torch.randn(2, 3, 64, 64)
    signal = spp(model, batch)
    names = [f"features.{i}.{j}.{part}" for i in (1, 3) for j in range(2) for part in ("attn", "mlp")]
    _check(signal, _hooked(model, batch, names), axis=3)


def test_poolformer_before_layer_scale():
    model, batch = _timm("poolformer_s12"), torch.randn(2, 3, 64, 64)
    signal = spp(model, batch)
    names = [f"{block.name.split('#')[0]}.{('token_mixer', 'mlp')[i % 2]}" for i, block in enumerate(signal.blocks)]
    _check(signal, _hooked(model, batch, names), axis=1)


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_seresnet26", "eca_nfnet_l0", "dm_nfnet_f0", "nf_regnet_b0"])
def test_normalizer_free_before_skip_gain_and_alpha(name):
    """2·gate(x)·x, attention with its gain of 2, belongs to the branch; the gain that starts at zero is woken."""
    model, batch = _timm(name), torch.randn(2, 3, 64, 64)
    signal = spp(model, batch)
    blocks = [block.name for block in signal.blocks]
    # DeepMind's variants start the skip gain at zero, timm's own the gain of the last standardized weight
    silenced = [f"{block}.{'skipinit_gain' if name == 'dm_nfnet_f0' else 'conv3.gain'}" for block in blocks]
    assert [block.woken for block in signal.blocks] == [(parameter,) for parameter in silenced]
    awake = deepcopy(model)
    for parameter in silenced:
        assert not model.get_parameter(parameter).any()
        awake.get_parameter(parameter).data.fill_(1)
    last = [f"{block}.{'conv3' if model.get_submodule(block).attn_last is None else 'attn_last'}" for block in blocks]
    gains = [
        model.get_submodule(block).attn_gain if "attn" in hook else 1 for block, hook in zip(blocks, last, strict=True)
    ]
    branches = _hooked(awake, batch, last)
    _check(signal, [gain * x for gain, x in zip(gains, branches, strict=True)], axis=1)


@pytest.mark.parametrize("probability", [0.2, 0.7])
def test_stochastic_depth_in_train_mode(probability):
    """The branch is taken before the mask over examples, even where it drops them all."""
    torch.manual_seed(0)
    model = torchvision.models.efficientnet_b0(stochastic_depth_prob=probability, dropout=0.0)
    batch = torch.randn(4, 3, 64, 64)
    signal = spp(model, batch, mode="train")
    branches = _hooked(model, batch, [f"{block.name}.block" for block in signal.blocks], train=True)
    _check(signal, branches, axis=1)


def test_drop_path_in_train_mode():
    model = _timm("vit_tiny_patch16_224", depth=4, img_size=64, drop_path_rate=0.6, init_values=0.1)
    batch = torch.randn(4, 3, 64, 64)
    signal = spp(model, batch, mode="train")
    names = [f"blocks.{i}.{part}" for i in range(4) for part in ("attn", "mlp")]
    _check(signal, _hooked(model, batch, names, train=True), axis=2)


def test_cross_attention_of_a_decoder():
    """The branch reads a memory besides its shortcut: self-attention, cross-attention and MLP, 3 a layer."""
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True), 2)
    batch = {"tgt": torch.randn(4, 5, 16), "memory": torch.randn(4, 7, 16)}
    signal = spp(model, batch)
    names = [f"layers.{i}.{part}" for i in range(2) for part in ("dropout1", "dropout2", "dropout3")]
    _check(signal, _hooked(_Keywords(model), batch, [f"model.{name}" for name in names]), axis=2)


class _Keywords(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**batch)
