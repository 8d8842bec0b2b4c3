"""Parameter groups, the optimizer, the schedule and the average: laws, and values against NumPy."""

import copy
import io

import numpy as np
import optim_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normfree
from normfree.optim import (
    InputCentring,
    WeightAverage,
    nesterov_sgd,
    parameter_groups,
    warmup_cosine,
    warmup_cosine_factor,
)


def names_of(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("name", ["nf_resnet50", "nf_regnet_b0", "fixup_resnet50", "resnet50", "skipinit_resnet50"])
def test_exactly_the_matrices_of_our_networks_are_decayed(name):
    with torch.device("meta"):
        model = normfree.create_model(name, num_classes=1)  # a classifier of one row is decayed too
    decayed, undecayed = parameter_groups(model, 1e-4)
    assert (decayed["name"], decayed["weight_decay"]) == ("decayed", 1e-4)
    assert (undecayed["name"], undecayed["weight_decay"]) == ("undecayed", 0.0)
    expected = {n for n, p in model.named_parameters() if p.dim() > 1}
    assert names_of(model, decayed) == expected
    assert names_of(model, undecayed) == {n for n, _ in model.named_parameters()} - expected


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm([3, 4])  # two axes, and no matrix
        self.layer_scale = nn.Parameter(torch.ones(5, 1, 1))
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)  # one axis longer than 1, and a weight
        self.position_bias = nn.Parameter(torch.ones(2, 2))
        self.table = nn.Parameter(torch.ones(3, 3))
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.table
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)


def test_what_other_networks_have():
    model = Odd()
    decayed, undecayed = parameter_groups(model, 0.1)
    attention = {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert names_of(model, decayed) == {"table", "depthwise.weight", *attention}
    assert {"norm.weight", "norm.bias", "layer_scale", "tied.bias", "position_bias"} < names_of(model, undecayed)
    assert len(decayed["params"]) == 4  # shared once
    assert not any("frozen" in n for n in names_of(model, decayed) | names_of(model, undecayed))
    with pytest.raises(ValueError, match="requires a gradient"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    assert [g["name"] for g in parameter_groups(nn.LayerNorm(3), 0.1)] == ["undecayed"]


def test_the_classifier_has_its_own_rate():
    model = normfree.create_model("nf_resnet50", depths=(1, 1, 1, 1), width=0.25, num_classes=2)
    groups = {group["name"]: group for group in parameter_groups(model, 0.1, classifier_lr_scale=0.3)}
    assert {name: (group["lr_scale"], group["weight_decay"]) for name, group in groups.items()} == {
        "decayed": (1.0, 0.1),
        "undecayed": (1.0, 0.0),
        "classifier decayed": (0.3, 0.1),
        "classifier undecayed": (0.3, 0.0),
    }
    assert names_of(model, groups["classifier decayed"]) == {"classifier.weight"}
    assert names_of(model, groups["classifier undecayed"]) == {"classifier.bias"}
    found = sum(len(group["params"]) for group in groups.values())
    assert found == len(list(model.parameters()))
    optimizer = nesterov_sgd(torch.compile(model), 0.5, classifier_lr_scale=0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.05}
    with pytest.raises(ValueError, match="classifier_lr_scale=1"):
        parameter_groups(nn.Embedding(2, 2), 0.1, classifier_lr_scale=0.3)
    with pytest.raises(ValueError, match=r"classifier_lr_scale=0"):
        parameter_groups(model, 0.1, classifier_lr_scale=0)


def test_gains_and_biases_have_their_own_rate():
    model = normfree.create_model("nf_resnet50", depths=(1, 1, 1, 1), width=0.25, num_classes=2)
    groups = {group["name"]: group for group in parameter_groups(model, 0.1, gain_lr_scale=0.1)}
    scales = {name: group["lr_scale"] for name, group in groups.items()}
    assert scales == {"decayed": 1.0, "undecayed": 0.1, "classifier decayed": 1.0, "classifier undecayed": 1.0}
    slow = {name.rpartition(".")[2] for name in names_of(model, groups["undecayed"])}
    assert slow == {"gain", "bias", "skip_gain"}
    assert names_of(model, groups["classifier undecayed"]) == {"classifier.bias"}
    optimizer = nesterov_sgd(model, 0.5, classifier_lr_scale=0.3, gain_lr_scale=0.1)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.05, 0.15, 0.15, 0.5])
    with pytest.raises(ValueError, match=r"gain_lr_scale=0"):
        parameter_groups(model, 0.1, gain_lr_scale=0)


def test_the_papers_optimizer_by_hand():
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0), model.bias.fill_(1.0)
    optimizer = nesterov_sgd(model, 0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Gradient 1 + 0.5 * 2 (none on the bias); the first buffer is the gradient; the step is g + 0.9 * buffer.
    assert model.weight.item() == pytest.approx(2 - 0.1 * 2 * 1.9) and model.bias.item() == pytest.approx(1 - 0.19)
    with pytest.raises(ValueError, match="momentum=0"):
        nesterov_sgd(model, 0.1, momentum=0.0)


@pytest.mark.parametrize(("steps", "warmup", "final"), [(10, 3, 0.0), (7, 0, 0.001), (5, 5, 0.1), (1, 0, 0.0)])
def test_the_schedule_equals_numpy(steps, warmup, final):
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 0.4}, {"params": parameters[1:], "lr": 0.8}])
    schedule = warmup_cosine(optimizer, steps=steps, warmup_steps=warmup, final_lr=final)
    for step in range(steps + 3):
        for peak, group in zip((0.4, 0.8), optimizer.param_groups, strict=True):
            expected = optim_reference.learning_rate(step, peak, steps, warmup, final)
            assert group["lr"] == pytest.approx(expected, rel=1e-12, abs=1e-15)
        optimizer.step()
        schedule.step()


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 10**6), warmup=st.floats(0, 1), final=st.floats(0, 1), at=st.floats(0, 1.2))
def test_the_schedule_stays_between_its_ends(steps, warmup, final, at):
    options = {"steps": steps, "warmup_steps": int(steps * warmup), "final_fraction": final}
    step = int(steps * at)
    now, then = (warmup_cosine_factor(t, **options) for t in (step, step + 1))
    assert 0 <= now <= 1 + 1e-12
    assert then >= now - 1e-12 if step < options["warmup_steps"] else then <= now + 1e-12
    assert warmup_cosine_factor(steps, **options) == final


def test_the_schedule_resumes_exactly_and_can_be_lengthened():
    def build(steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        return optimizer, warmup_cosine(optimizer, steps=steps, warmup_steps=2)

    def run(optimizer, schedule, count):
        rates = []
        for _ in range(count):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole = run(*build(9), 9)
    optimizer, schedule = build(9)
    run(optimizer, schedule, 4)
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    for steps in (9, 20):
        optimizer, schedule = build(steps)
        optimizer.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])
        assert run(optimizer, schedule, 5) == (whole if steps == 9 else run(*build(20), 9))[4:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 3, "warmup_steps": 4}, "warmup_steps=4.*steps=3"),
        ({"steps": 3, "final_lr": 1.0}, "final_lr=1.0.*0.5"),
    ],
)
def test_schedules_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5), **options)


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


@pytest.mark.parametrize("decay", [0.99999, 0.3])
def test_the_average_equals_numpy_and_copies_buffers(decay):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = WeightAverage(model, decay)
    values = [model[0].weight.detach().numpy().copy()]
    for step in range(6):
        randomize(model)
        model[1].running_mean.fill_(step)
        values.append(model[0].weight.detach().numpy().copy())
        assert average.next_decay() == min(decay, (1 + step) / (10 + step))
        average.update()
    np.testing.assert_allclose(average.module[0].weight.numpy(), optim_reference.average(values, decay), rtol=1e-13)
    assert bool((average.module[1].running_mean == 5).all()) and not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_half_precision_weights_are_averaged_in_float32():
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    average = WeightAverage(model, 0.99999)
    average.updates = 10**7
    start = average.module.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(10):
        average.update()
    moved = (average.module.weight - start).mean()  # less than bfloat16's spacing at most of the values
    assert average.module.weight.dtype == torch.float32 and moved == pytest.approx(1e-4, rel=0.02)


def test_the_averages_are_put_in_and_taken_out_bit_for_bit():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(torch.compile(model), 0.5)
    randomize(model)
    average.update()
    own = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def evaluate():
        with average.applied() as swapped:
            assert swapped is model and torch.is_grad_enabled()
            assert torch.equal(model[0].weight, average.module[0].weight)
            assert model[0].weight is optimizer.param_groups[0]["params"][0]
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_the_average_resumes_exactly():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = WeightAverage(model)
    randomize(model)
    average.update()
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    other = WeightAverage(copy.deepcopy(model))
    other.load_state_dict(torch.load(file, weights_only=True))
    randomize(model)
    other.model.load_state_dict(model.state_dict())
    average.update(), other.update()
    assert other.updates == 2 and torch.equal(average.module.weight, other.module.weight)
    with pytest.raises(ValueError, match=r"state=.*module"):
        other.load_state_dict({"module": {}})
    with pytest.raises(ValueError, match="state='module'"):
        other.load_state_dict({"module": nn.Linear(4, 2).state_dict(), "updates": 1})
    with pytest.raises(ValueError, match="decay=1"):
        WeightAverage(model, 1.0)


def test_a_module_to_hold_the_averages_can_be_given():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    average = WeightAverage(model, module=other)
    assert average.module is other and torch.equal(other.weight, model.weight)
    with pytest.raises(ValueError, match=r"module='Linear'.*built"):
        WeightAverage(model, module=nn.Linear(2, 2))


@pytest.mark.parametrize("function", [nesterov_sgd, parameter_groups, normfree.optim.final_layers])
def test_parameters_in_the_models_place_are_told_apart(function):
    with pytest.raises(ValueError, match=r"^model='generator'.*the model itself, not its parameters"):
        function(nn.Linear(2, 2).parameters(), *([] if function is normfree.optim.final_layers else [0.1]))


def test_an_average_of_a_model_that_has_grown_since_is_one_line():
    model = normfree.create_model("nf_resnet50", depths=(1, 1, 1, 1), width=0.25, num_classes=2)
    average = WeightAverage(model, 0.9)
    InputCentring(model)
    with pytest.raises(ValueError, match=r"parameters, and had .* when the average was made; .*after InputCentring"):
        average.update()
    with pytest.raises(ValueError, match="centred=True"):
        normfree.save(model, "net.safetensors")
