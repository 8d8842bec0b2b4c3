"""Every way to write x + branch: what counts as an addition, and what is seen past on the way to it."""

from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normfree.signal import spp

SCALE = 0.3
SEEN = WeakKeyDictionary()
"""The branch each block has computed last; on the block itself it would be put back after the measurement."""


class Block(nn.Module):
    """x + branch, where the subclass says how."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Linear(64, 64)
        self.scalar = nn.Parameter(torch.tensor(SCALE))
        self.per_channel = nn.Parameter(torch.linspace(0.1, 1, channels))

    def branch(self, x):
        branch = self.conv(torch.relu(x))
        SEEN[self] = branch.detach().clone()
        return branch

    def forward(self, x):
        return x + self.branch(x)


def _by_hand(block):
    return SEEN[block].double().transpose(0, 1).flatten(1).var(1, unbiased=False).mean().item()


def _form(forward):
    """A block whose forward is the given function of itself and its input."""
    return type(forward.__name__, (Block,), {"forward": forward})


def plain(block, x):
    return x + block.branch(x)


def branch_first(block, x):
    return block.branch(x) + x


def in_place_on_shortcut(block, x):
    branch = block.branch(x)
    x += branch
    return x


def in_place_on_branch(block, x):
    return block.branch(x).add_(x)


def alpha(block, x):
    return torch.add(x, block.branch(x), alpha=SCALE)


def alpha_in_place(block, x):
    return x.add_(block.branch(x), alpha=SCALE)


def addcmul_by_parameter(block, x):
    return torch.addcmul(x, block.branch(x), block.per_channel.view(1, -1, 1, 1))


def constant(block, x):
    return x + block.branch(x) * SCALE


def constant_in_place(block, x):
    return x + block.branch(x).mul_(SCALE)


def divided(block, x):
    return x + block.branch(x) / 4


def constant_twice(block, x):
    return x + SCALE * (block.branch(x) * block.scalar)


def parameter(block, x):
    return x + block.scalar * block.branch(x)


def layer_scale(block, x):
    return x + block.per_channel[:, None, None] * block.branch(x)


def layer_scale_after_a_permute(block, x):
    return x + (block.branch(x).permute(0, 2, 3, 1) * block.per_channel).permute(0, 3, 1, 2)


def layer_scale_over_tokens(block, x):
    tokens = block.branch(x).flatten(2).transpose(1, 2)
    return x + (block.per_channel * tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def layer_scale_after_mixing_positions(block, x):
    """A linear layer over positions, as in an MLP for tokens: its output's channels are not where it ends."""
    mixed = block.mix(torch.relu(x).flatten(2))
    SEEN[block] = mixed.detach().clone()
    return x + (block.per_channel * mixed.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def drop_path_without_a_single_survivor(block, x):
    return x + block.branch(x) * torch.zeros(len(x), 1, 1, 1)


def drop_path(block, x):
    return x + block.branch(x).div(0.5) * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)


def folded_into_a_layer_over_transposed_tokens(block, x):
    """A linear layer adds its bias by itself where its input's memory is not in order."""
    tokens = torch.relu(x).flatten(2).transpose(1, 2)
    weight, bias = block.conv.weight[:, :, 1, 1], block.conv.bias
    SEEN[block] = nn.functional.linear(tokens, weight, bias).detach().transpose(1, 2).clone()
    folded = nn.functional.linear(tokens, block.scalar * weight, block.scalar * bias)
    return x + folded.transpose(1, 2).unflatten(2, x.shape[2:])


def parts_scaled_alike(block, x):
    branch, other = block.conv(torch.relu(x)), block.conv(torch.sigmoid(x))
    SEEN[block] = (branch + other).detach().clone()
    return x + (branch * SCALE + SCALE * other)


def scaled_before_an_activation(block, x):
    branch = block.conv(x)
    SEEN[block] = nn.functional.leaky_relu(branch, 0.1).detach().clone()
    return x + nn.functional.leaky_relu(block.scalar * branch, 0.1)


def checkpoint_reentrant(block, x):
    return x + checkpoint(block.branch, x, use_reentrant=True)


def checkpoint_not_reentrant(block, x):
    return checkpoint(plain, block, x, use_reentrant=False)


FORMS = [
    *(plain, branch_first, in_place_on_shortcut, in_place_on_branch, alpha, alpha_in_place, addcmul_by_parameter),
    *(constant, constant_in_place, divided, constant_twice, parameter, layer_scale, layer_scale_after_a_permute),
    *(layer_scale_over_tokens, layer_scale_after_mixing_positions, drop_path_without_a_single_survivor, drop_path),
    *(folded_into_a_layer_over_transposed_tokens, parts_scaled_alike, scaled_before_an_activation),
    *(checkpoint_reentrant, checkpoint_not_reentrant),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("forward", FORMS, ids=lambda forward: forward.__name__)
def test_the_branch_is_seen_before_any_scaling(forward):
    torch.manual_seed(0)
    blocks = [_form(forward)() for _ in range(3)]
    signal = spp(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *blocks), torch.randn(4, 3, 8, 8))
    assert [block.name for block in signal.blocks] == ["1", "2", "3"]
    assert {block.channel_axis for block in signal.blocks} == {1}
    measured = [block.residual_avg_channel_var for block in signal.blocks]
    assert measured == pytest.approx([_by_hand(block) for block in blocks], rel=1e-5)


@pytest.mark.parametrize("layout", ["half", "bfloat16", "channels_last"])
def test_precision_and_memory_layout(layout):
    torch.manual_seed(0)
    blocks = [_form(constant)() for _ in range(2)]
    model, batch = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *blocks), torch.randn(4, 3, 8, 8)
    if layout == "channels_last":
        model, batch = model.to(memory_format=torch.channels_last), batch.to(memory_format=torch.channels_last)
    else:
        model, batch = getattr(model, layout)(), getattr(batch, layout)()
    signal = spp(model, batch)
    assert [(block.name, block.channel_axis) for block in signal.blocks] == [("1", 1), ("2", 1)]
    # the scaled branch is rounded to 8 bits once more before it is divided out again
    tolerance = 5e-3 if layout == "bfloat16" else 1e-5
    measured = [block.residual_avg_channel_var for block in signal.blocks]
    assert measured == pytest.approx([_by_hand(block) for block in blocks], rel=tolerance)


def parallel_convolutions(block, x):
    return block.conv(x) + block.conv(-x)


def different_parts(block, x):
    """The hierarchy of Res2Net: a part is added to what was computed from another part."""
    first, second, third = block.conv(x).chunk(3, 1)
    first = torch.conv2d(first, torch.ones(2, 2, 1, 1))
    second = torch.conv2d(first + second, torch.ones(2, 2, 1, 1))
    return torch.cat([first, second, second + third], 1)


def attention_with_bias(block, x):
    """Logits and a position bias, which depends on nothing or on the query."""
    tokens = block.conv(x).flatten(2).transpose(1, 2)
    logits = tokens @ tokens.transpose(1, 2) + block.scalar
    logits = logits + tokens @ block.conv.weight.flatten(1)[:, :1].expand(-1, tokens.shape[1])
    return (logits.softmax(-1) @ tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def fusion_of_streams(block, x):
    """Streams of different depth that have each passed nonlinearities, as in a high-resolution network."""
    return torch.relu(block.conv(x)) + torch.relu(block.conv(torch.relu(block.conv(x))))


@pytest.mark.parametrize("forward", [parallel_convolutions, different_parts, attention_with_bias, fusion_of_streams])
def test_what_is_not_residual(forward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), _form(forward)(), Block(), _form(forward)())
    signal = spp(model, torch.randn(4, 3, 8, 8))
    assert [block.name for block in signal.blocks] == ["2"]


class Language(nn.Module):
    """Words and positions both looked up by the tokens, as in RoBERTa, before an encoder layer."""

    def __init__(self):
        super().__init__()
        self.word, self.position = nn.Embedding(50, 16), nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, tokens):
        return self.layer(self.word(tokens) + self.position(tokens.ne(1).int().cumsum(1)))


def test_embeddings_are_summed_not_residual():
    torch.manual_seed(0)
    signal = spp(Language(), torch.randint(2, 50, (4, 7)))
    assert [(block.name, block.channel_axis) for block in signal.blocks] == [("layer", 2), ("layer#2", 2)]
    assert signal.entry.shape == (4, 7, 16)


class Nested(Block):
    """A long skip over two blocks."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Block(), Block())

    def forward(self, x):
        return x + self.conv(self.inner(x))


def test_blocks_inside_a_branch():
    torch.manual_seed(0)
    signal = spp(nn.Sequential(nn.Conv2d(3, 6, 1), Nested(), Block()), torch.randn(4, 3, 8, 8))
    found = [(block.name, block.encloses) for block in signal.blocks]
    assert found == [("1.inner.0", 0), ("1.inner.1", 0), ("1", 2), ("2", 0)]


class Conditioned(nn.Module):
    """A block told of something else, a time or a class: the branch depends on it, the shortcut does not."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 1), Block()
        self.projection, self.time = nn.Conv2d(6, 6, 1), nn.Linear(5, 6)

    def forward(self, image, time):
        x = self.stem(image)
        x = x + self.block.branch(x + self.time(time)[:, :, None, None])
        x = self.projection(x) + self.block.branch(self.block.branch(x) * self.time(time)[:, :, None, None])
        return {"features": x, "classes": (x.mean((2, 3)), None)}


def test_two_inputs_and_outputs_of_any_form():
    torch.manual_seed(0)
    model, image, time = Conditioned(), torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    by_position, by_name = spp(model, (image, time)), spp(model, {"time": time, "image": image})
    assert by_position.blocks == by_name.blocks
    assert [(block.name, block.transition) for block in by_name.blocks] == [("", False), ("#2", True)]
    assert by_name.blocks[1].residual_avg_channel_var == pytest.approx(_by_hand(model.block), rel=1e-5)
    assert by_name.entry.shape == (4, 6, 8, 8)


class Silenced(Block):
    """A branch that starts at zero: by a skip gain, a layer scale or the gain of its last norm."""

    def __init__(self, by):
        super().__init__()
        self.by = by
        self.norm = nn.BatchNorm2d(6)
        nn.init.zeros_({"scalar": self.scalar, "per_channel": self.per_channel, "norm.weight": self.norm.weight}[by])

    def forward(self, x):
        branch = self.norm(self.conv(torch.relu(x)))
        if self.by == "scalar":
            return x + self.scalar * branch
        return x + (branch if self.by == "norm.weight" else branch * self.per_channel[:, None, None])


@pytest.mark.parametrize("by", ["scalar", "per_channel", "norm.weight"])
def test_silenced_branches_are_woken_and_put_back(by):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Conv2d(3, 6, 1), Silenced(by), Silenced(by)), torch.randn(4, 3, 8, 8)
    awake, asleep = spp(model, batch), spp(model, batch, wake=False)
    assert [block.woken for block in awake.blocks] == [(f"1.{by}",), (f"2.{by}",)]
    for block in awake.blocks:  # batch-normed, and the norm's epsilon is 1e-5
        assert block.residual_avg_channel_var == pytest.approx(1, abs=1e-3)
        assert block.avg_channel_var > awake.entry.avg_channel_var
    for block in asleep.blocks:  # a zero norm leaves nothing, a zero scaling is seen past
        assert block.woken == ()
        assert block.avg_channel_var == pytest.approx(asleep.entry.avg_channel_var, rel=1e-5)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith(by))


def test_a_compiled_module_is_looked_through():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Conv2d(3, 6, 1), Block(), Block()), torch.randn(4, 3, 8, 8)
    assert spp(torch.compile(model), batch).blocks == spp(model, batch).blocks


def test_a_term_of_zero_that_keeps_a_parameter_in_use_is_no_branch():
    """What distributed training asks for where an output is not used: ``+ 0 * unused.mean()``."""

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())

        def forward(self, x):
            x = x + self.block(x)
            return x + 0 * x.mean()

    torch.manual_seed(0)
    signal = spp(Kept(), torch.randn(4, 3, 8, 8))
    assert len(signal.blocks) == 1


def test_what_a_slice_is_assigned_is_in_the_whole():
    """Circular padding writes its input into slices of an empty tensor, and so do forwards of one's own."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

        def forward(self, x):
            return x + self.conv(x)

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x):
            canvas = x.new_zeros(len(x), 4, 8, 8)
            canvas[:, :3] = x
            return self.blocks(canvas)

    torch.manual_seed(0)
    signal = spp(Placed(), torch.randn(4, 3, 8, 8))
    assert [block.kind for block in signal.blocks] == ["residual", "residual"]


class Context(nn.Module):
    """x + f(pool(x)): a global context, added alike at all positions."""

    def __init__(self, channels=6):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x):
        branch = self.last(torch.relu(self.first(x.mean((2, 3), keepdim=True))))
        SEEN[self] = branch.detach().expand_as(x).clone()
        return x + branch


class TokenContext(nn.Module):
    """What a mean of all tokens says, added to each of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.layer(tokens.mean(1, keepdim=True))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def test_a_broadcast_branch_is_a_block():
    torch.manual_seed(0)
    context = Context()
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Block(), context, TokenContext())
    signal = spp(model, torch.randn(4, 3, 8, 8))
    assert [(block.name, block.broadcast) for block in signal.blocks] == [("1", False), ("2", True), ("3", True)]
    assert signal.blocks[1].residual_avg_channel_var == pytest.approx(_by_hand(context), rel=1e-4)
    assert not {"silenced_branch"} & {finding.kind for finding in spp(model, torch.randn(1, 3, 8, 8)).findings}


def a_condition(block, x, other):
    return x + block.project(other)[:, :, None, None]


def a_mean_taken_off(block, x, other):
    return x - x.mean((2, 3), keepdim=True)


def a_mean_added(block, x, other):
    return x + x.mean((2, 3), keepdim=True)


def a_table_of_positions(block, x, other):
    places = other.new_tensor(range(64)).long().expand(len(x), -1) + (other[:, :1] > 1e9).long()
    return x + block.table.index_select(0, places.flatten()).view(len(x), 8, 8, 6).permute(0, 3, 1, 2)


def a_sinusoid(block, x, other):
    return x + torch.sin(torch.arange(64.0)).view(8, 8).expand_as(x)


def a_sum_for_a_gate(block, x, other):
    deep = torch.relu(block.conv(torch.relu(block.conv(x))))
    return x * torch.sigmoid(block.one(torch.relu(block.conv(x) + block.conv(deep))))


class Apart(Block):
    def __init__(self, way):
        super().__init__()
        self.way, self.project, self.one = way, nn.Linear(5, 6), nn.Conv2d(6, 1, 1)
        self.register_buffer("table", torch.randn(64, 6))

    def forward(self, x, other):
        return self.way(self, x, other)


@pytest.mark.parametrize(
    "way", [a_condition, a_mean_taken_off, a_mean_added, a_table_of_positions, a_sinusoid, a_sum_for_a_gate]
)
def test_what_is_added_and_is_no_branch(way):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.apart, self.block = nn.Conv2d(3, 6, 1), Apart(way), Block()

        def forward(self, x, other):
            return self.block(self.apart(self.stem(x), other))

    torch.manual_seed(0)
    signal = spp(Model(), (torch.randn(4, 3, 8, 8), torch.randn(4, 5)), gradient=True)
    assert [block.name for block in signal.blocks] == ["block"]
    assert signal.blocks[0].avg_sq_gradient > 0


@pytest.mark.parametrize("returned", [False, True])
def test_attention_logits_carried_from_layer_to_layer_are_no_stream(returned):
    """RealFormer: the softmax of each layer reads its own logits plus those of the layer before."""

    class Carried(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.outs = (nn.ModuleList(nn.Linear(8, n) for _ in range(3)) for n in (24, 8))
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))

        def forward(self, x):
            logits = 0.0
            for i, (to_all, to_out, norm) in enumerate(zip(self.maps, self.outs, self.norms, strict=True)):
                queries, keys, values = to_all(norm(x)).chunk(3, -1)
                scores = queries @ keys.transpose(1, 2) / 8**0.5
                logits = scores + logits if i else scores
                x = x + to_out(logits.softmax(-1) @ values)
            return (x, logits) if returned else x

    torch.manual_seed(0)
    signal = spp(Carried(), torch.randn(4, 5, 8))
    assert [block.shape for block in signal.blocks] == [(4, 5, 8)] * 3
    assert signal.entry.shape == (4, 5, 8)


class Quantizer(nn.Module):
    """Code words in place of the vectors they are nearest to, as the subclasses let gradients through."""

    def __init__(self, words=32, width=8):
        super().__init__()
        self.words = nn.Embedding(words, width)

    def nearest(self, x):
        return self.words(torch.cdist(x.flatten(0, -2), self.words.weight).argmin(-1)).view_as(x)

    def forward(self, x):
        """VQ-VAE, Encodec, DAC."""
        return x + (self.nearest(x) - x).detach()


class Reversed(Quantizer):
    def forward(self, x):
        return (self.nearest(x) - x).detach() + x


class OfTheInput(Quantizer):
    def forward(self, x):
        return x - x.detach() + self.nearest(x).detach()


class ThroughViews(Quantizer):
    """VQGAN: rows of all positions, and the sum of maps."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        return x.view(rows.shape) + (self.nearest(rows) - rows).detach()


class InStages(Quantizer):
    """Each quantizer takes what the ones before have left over; the code words are added up."""

    def forward(self, x):
        total = 0.0
        for _ in range(3):
            found = x + (self.nearest(x) - x).detach()
            x, total = x - found, total + found
        return total


class InStagesOfSpaces(InStages):
    """DAC: each in a space of its own, between two linear layers."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def nearest(self, x):
        return self.maps[1](super().nearest(self.maps[0](x)))


@pytest.mark.parametrize("kind", [Quantizer, Reversed, OfTheInput, ThroughViews, InStages, InStagesOfSpaces])
def test_quantizers_are_no_blocks(kind):
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
            self.quantizer = kind()

        def forward(self, x):
            for layer in self.encoder:
                x = x + layer(x.relu())
            shape, x = x.shape, self.quantizer(x)
            x = x.view(shape)
            for layer in self.decoder:
                x = x + layer(x.relu())
            return x

    torch.manual_seed(0)
    signal = spp(Coder(), torch.randn(4, 5, 8))
    assert [block.name.split("#")[0] for block in signal.blocks] == [""] * 4


def test_a_difference_of_two_other_signals_is_a_branch():
    class Differential(nn.Module):
        """The difference of two branches, added; nothing of it cancels with the shortcut."""

        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x + (self.one(x.relu()) - self.other(x.relu()))

    assert len(spp(nn.Sequential(Differential(), Differential()), torch.randn(4, 5, 8)).blocks) == 2


class Adapter(nn.Module):
    """A layer and a low-rank update of it; nothing of the update is nonlinear."""

    def __init__(self, layer, *, bent=False):
        super().__init__()
        self.layer, self.bent = layer, bent
        self.down = nn.Parameter(torch.randn(4, layer.in_features) / 4)
        self.up = nn.Parameter(torch.randn(layer.out_features, 4) / 4)

    def forward(self, x):
        low = x @ self.down.T
        return self.layer(x) + 2.0 * ((low.relu() if self.bent else low) @ self.up.T)


class Factorized(nn.Module):
    """A convolution beside a 1×1 and a 3×3 one in a row, each path with its norm, as in re-parametrised blocks."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.other = nn.Sequential(nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16))

    def forward(self, x):
        return (self.one(x) + self.other(x)).relu()


@pytest.mark.parametrize(
    ("part", "size", "blocks"),
    [
        (lambda: Adapter(nn.Linear(16, 16)), (32, 16), 0),
        (lambda: Adapter(nn.Linear(16, 16), bent=True), (32, 16), 3),
        (Factorized, (8, 16, 8, 8), 0),
    ],
)
def test_linear_paths_side_by_side_are_one_layer(part, size, blocks):
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(3) for layer in (part(), nn.ReLU())])
    found = spp(model, torch.randn(*size)).blocks
    assert sum(block.kind == "residual" for block in found) == blocks


@pytest.mark.parametrize("how", ["einsum", "tensordot", "matmul"])
def test_a_weighted_sum_of_layers_keeps_their_channels(how):
    class Mixed(nn.Module):
        """The learned average of an activation and a layer of it."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.shares = nn.Parameter(torch.ones(2) / 2)

        def forward(self, x):
            both = torch.stack([x, self.layer(x)])
            if how == "einsum":
                return torch.einsum("k,knchw->nchw", self.shares, both)
            if how == "tensordot":
                return torch.tensordot(self.shares, both, 1)
            return (self.shares @ both.flatten(1)).view(x.shape)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *[Mixed() for _ in range(4)], nn.Conv2d(16, 3, 1))
    signal = spp(model, torch.randn(8, 3, 16, 16))
    assert signal.verdict == "healthy" and all(point.avg_channel_var > 0.01 for point in signal.blocks)


def test_a_weight_on_the_left_has_channels_in_its_rows():
    class Columns(nn.Module):
        """Examples in columns."""

        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(16, 16) / 4 for _ in range(4))

        def forward(self, x):
            for weight in self.weights:
                x = (weight @ x).relu()
            return x

    torch.manual_seed(0)
    signal = spp(Columns(), torch.randn(16, 64))
    assert [point.channel_axis for point in signal.blocks] == [0] * 4


def test_a_linear_branch_beside_a_projection_is_one_where_all_is_linear():
    """A deep linear network, as in theory."""
    torch.manual_seed(0)
    for activation, blocks in ((nn.Identity, 3), (nn.ReLU, 0)):
        layers = [layer for _ in range(3) for layer in (Adapter(nn.Linear(16, 16)), activation())]
        found = spp(nn.Sequential(*layers, nn.Linear(16, 2)), torch.randn(32, 16)).blocks
        assert sum(block.kind == "residual" for block in found) == blocks


@pytest.mark.parametrize("fused", [True, False])
def test_blocks_that_lead_to_queries_alone_are_blocks_however_attention_is_written(fused):
    class Queries(nn.Module):
        """Two residual blocks make the queries of an attention whose values are another layer's."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            y = x
            for block in self.blocks:
                y = y + block(y)
            query, key, value = self.query(y), self.key(x), self.value(x)
            if fused:
                return nn.functional.scaled_dot_product_attention(query, key, value)
            return (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value

    torch.manual_seed(0)
    blocks = spp(Queries(), torch.randn(4, 5, 8)).blocks
    assert sum(block.kind == "residual" for block in blocks) == 2


class Skips(nn.Module):
    """A layer y = f(u) + gain·u, as of a state space, and how its forward writes it; in a residual block, or alone."""

    def __init__(self, write, gain, residual):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Conv1d(8, 8, 5, padding=2, groups=8)
        self.out, self.write, self.residual = nn.Linear(8, 8), write, residual
        self.gain = nn.Parameter(gain)

    def forward(self, x):
        u = self.norm(x) if self.residual else x
        y = self.out(nn.functional.gelu(self.write(self.gain, u, self.mix(u.transpose(1, 2)).transpose(1, 2))))
        return x + y if self.residual else y


def per_channel(gain, u, y):
    return y + gain * u


def per_channel_in_place(gain, u, y):
    return y.addcmul_(gain, u)


def by_einsum(gain, u, y):
    return y + torch.einsum("blc,c->blc", u, gain)


def by_head(gain, u, y):
    heads = u.unflatten(-1, (4, 2)), y.unflatten(-1, (4, 2))
    return (heads[1] + heads[0] * gain[:4, None]).flatten(-2)


def by_head_and_channel(gain, u, y):
    heads = u.unflatten(-1, (4, 2)), y.unflatten(-1, (4, 2))
    return (heads[1] + heads[0] * gain.view(4, 2)).flatten(-2)


def computed(gain, u, y):
    return y + u * (2 * gain)


WRITTEN = [per_channel, per_channel_in_place, by_einsum, by_head, by_head_and_channel, computed]
NOISE = torch.tensor([1.2, -0.7, 0.4, -1.1, -0.2, 0.9, -1.6, 0.3])


@pytest.mark.parametrize("write", WRITTEN, ids=lambda each: each.__name__)
@pytest.mark.parametrize("gain", [NOISE, torch.ones(8)], ids=["noise", "ones"])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_learned_skip_of_a_layer_inside_a_branch_is_no_block(write, gain, gradient):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(Skips(write, gain, True) for _ in range(3)), nn.Linear(8, 2))
    blocks = spp(model, torch.randn(4, 16, 8), gradient=gradient).blocks
    assert [(block.name, block.encloses) for block in blocks] == [("1", 0), ("2", 0), ("3", 0)]
    assert not gradient or all(block.avg_sq_gradient for block in blocks)


@pytest.mark.parametrize("write", WRITTEN, ids=lambda each: each.__name__)
@pytest.mark.parametrize(("gain", "kind"), [(NOISE, "layer"), (torch.linspace(0.5, 1.5, 8), "residual")])
def test_a_skip_that_keeps_of_each_channel_what_chance_has_drawn_is_no_stream(write, gain, kind):
    """Ones, and what training makes of them, are the residual scale of a stream."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(Skips(write, gain, False) for _ in range(3)), nn.Linear(8, 2))
    assert {block.kind for block in spp(model, torch.randn(4, 16, 8)).blocks} == {kind}
