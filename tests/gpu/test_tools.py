"""On a GPU the tools see what they see on a CPU: plots, monitor, conversion, checkpoints, training, commands."""

import copy
import dataclasses
import math

import pytest
import torch
import torchvision
from devices import close, images
from tiny_run import tiny

from normfree import SignalMonitor, convert, create_model, load, save, spp
from normfree.cli import main
from normfree.convert import conversion_of
from normfree.export import to_onnx
from normfree.sources import build

pytestmark = pytest.mark.gpu


def residual(name="resnet18"):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=10)


def same_signal(one, other, share=0.02):
    assert [block.name for block in one.blocks] == [block.name for block in other.blocks]
    for mine, theirs in zip(one.blocks, other.blocks, strict=True):
        for quantity in ("avg_channel_sq_mean", "avg_channel_var", "residual_avg_channel_var"):
            one_value, other_value = getattr(mine, quantity), getattr(theirs, quantity)
            assert one_value == other_value or math.isclose(one_value, other_value, rel_tol=share, abs_tol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_plots_agree_with_the_cpu_and_leave_nothing_behind(device, name):
    model = residual(name)
    x = images(16)
    expected = spp(model, x)
    model.to(device)
    torch.manual_seed(3)
    noise = torch.rand(4, device=device)
    torch.manual_seed(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = spp(model, x.to(device))
    assert torch.equal(torch.rand(4, device=device), noise)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    same_signal(found, expected)


def test_gradients_are_measured(device):
    model = residual().to(device)
    measured = spp(model, images(8).to(device), gradient=True)
    expected = spp(residual(), images(8), gradient=True)
    same_signal(measured, expected)
    for mine, theirs in zip(measured.blocks, expected.blocks, strict=True):
        assert math.isclose(mine.avg_sq_gradient, theirs.avg_sq_gradient, rel_tol=0.05)


def test_a_monitor_leaves_training_bit_for_bit(device):
    def trained(watched):
        torch.manual_seed(0)
        model = create_model("nf_resnet50", width=0.25, depths=(1, 2, 1, 1), num_classes=7, drop_rate=0.25).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        torch.manual_seed(1)
        monitor = SignalMonitor(model, images(8).to(device), every=2) if watched else None
        for _ in range(4):
            optimizer.zero_grad()
            model(images(8).to(device)).square().mean().backward()
            optimizer.step()
            if monitor:
                monitor.step()
        return model, monitor

    torch.use_deterministic_algorithms(True)
    try:
        (plain, _), (watched, monitor) = trained(False), trained(True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(monitor.history) >= 3
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "efficientnet_b0", "shufflenet_v2_x0_5"])
def test_conversion_is_the_cpu_s(device, name):
    model = residual(name)
    x = images(8)
    expected = convert(model, x)
    converted = convert(copy.deepcopy(model).to(device), x.to(device))
    for mine, theirs in zip(conversion_of(converted).changes, conversion_of(expected).changes, strict=True):
        scales = mine.input_scale, theirs.input_scale
        assert scales == (None, None) or math.isclose(*scales, rel_tol=1e-3)
        assert dataclasses.replace(mine, input_scale=theirs.input_scale) == theirs
    for (label, mine), theirs in zip(converted.state_dict().items(), expected.state_dict().values(), strict=True):
        assert mine.device.type == device.type, label
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-4, msg=label)
    converted(x.to(device)).square().mean().backward()


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "shufflenet_v2_x0_5"])
def test_pretrained_conversion_keeps_the_function(device, name):
    model = residual(name).to(device)
    with torch.no_grad():
        for _ in range(2):
            model(images(8).to(device))
    model.eval()
    converted = convert(model, images(8).to(device), start="pretrained").eval()
    with torch.no_grad():
        assert close(converted(images(8, 96).to(device)), model(images(8, 96).to(device)), 1e-4)


def test_a_converted_model_goes_to_a_file_and_to_onnx_from_the_gpu(device, tmp_path):
    model = residual()
    converted = convert(model.to(device), images(4).to(device))
    save(converted, tmp_path / "converted.safetensors")
    again = load(tmp_path / "converted.safetensors", original=residual())
    assert close(again.eval()(images(2)), converted.eval()(images(2).to(device)), 1e-4)
    to_onnx(converted, images(2).to(device), tmp_path / "converted.onnx")
    assert (tmp_path / "converted.onnx").stat().st_size > 1e6


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_training_goes_on_where_it_stopped(device, tmp_path, compiled):
    from normfree.train import train

    def steps():
        return [int(float(line.split(",")[0])) for line in (folder / "train.csv").read_text().splitlines()[1:]]

    torch._dynamo.reset()
    options = {"accelerator": device.type, "compile": compiled, "precision": "auto", "signal_every": 10}
    folder = tmp_path / "run"
    train(tiny(folder, limit_train_steps=9, **options))
    assert steps() == list(range(1, 10))
    assert train(tiny(folder, **options)).finished
    assert steps() == list(range(1, 23))


def test_the_plot_command_runs_there(device, tmp_path, capsys):
    words = ["spp", "nf_resnet50", "torchvision:resnet18", "--image-size", "64", "--out", str(tmp_path / "out")]
    assert main([*words, "--device", device.type]) == 0, capsys.readouterr().err
    assert {"spp.json", "spp.png", "report.html"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_the_commands_of_conversion_run_there(device, tmp_path, capsys):
    words = ["torchvision:resnet18", "--image-size", "64", "--device", device.type]
    saved = tmp_path / "converted.safetensors"
    assert main(["convert", *words, "--out", str(saved)]) == 0, capsys.readouterr().err
    assert not conversion_of(build(str(saved)).model).norms_left
    assert main(["doctor", *words, "--out", str(tmp_path / "doctor")]) == 0, capsys.readouterr().err


def test_evaluation_runs_there(device, tmp_path, capsys):
    from normfree.train import train

    train(tiny(tmp_path / "run", accelerator=device.type, limit_train_steps=2))
    assert main(["evaluate", str(tmp_path / "run"), "--accelerator", device.type]) == 0, capsys.readouterr().err
