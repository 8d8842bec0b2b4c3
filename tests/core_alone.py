"""Run where the core alone is installed: what works there, and what each command says that needs more, as JSON.

``python core_alone.py`` writes files into the folder it is started in. Run by ``test_package.py``.
"""

import contextlib
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import normfree
from normfree.cli import main
from normfree.common.checks import EXTRAS
from normfree.export import to_program

SMALL = "depths=(1,1,1,1),widths=(8,8,16,16),stem=cifar,num_classes=4"
SIZE = ("--image-size", "16", "--batch-size", "2")


def answer(*words):
    """Exit code, output and error output of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def works():
    """What the core does."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    model = normfree.create_model("nf_resnet50", depths=(1, 1, 1, 1), widths=(8, 8, 16, 16), num_classes=4).eval()
    plain = normfree.fold(model)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)
    normfree.save(model, "model.safetensors")
    assert torch.equal(normfree.load("model.safetensors").eval()(images), model(images))
    normfree.save_pretrained(model, "folder")
    assert torch.equal(normfree.from_pretrained("folder").eval()(images), model(images))
    signal = normfree.spp(model, images)
    signal.assert_healthy()
    signal.to_json("signal.json")
    signal.to_html("signal.html")
    monitor = normfree.SignalMonitor(model, images)
    monitor.step(0)
    monitor.history.to_html("monitor.html")
    torch_model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    assert normfree.convert(torch_model, images).conversion is not None
    to_program(plain, images, "model.pt2")


works()
Path("never.py").write_text("raise RuntimeError('the package is to be missed before a model is built')")
answers = {
    "spp": answer("spp", f"nf_resnet50:{SMALL}", *SIZE, "--out", "spp"),
    "doctor": answer("doctor", f"resnetv2_50:{SMALL}", *SIZE, "--out", "doctor"),
    "convert": answer("convert", f"resnetv2_50:{SMALL}", *SIZE, "--out", "converted.safetensors"),
    "spp converted.safetensors": answer("spp", "converted.safetensors", *SIZE, "--out", "spp_converted"),
}
written = sorted(path.as_posix() for path in Path().rglob("*"))
refused = {
    "vision": [
        ("spp", f"nf_resnet50:{SMALL}", "torchvision:resnet18", "--out", "none"),
        ("spp", f"nf_resnet50:{SMALL}", "--input", "photos", "--out", "none"),
        ("predict", "model.safetensors", "spp"),
    ],
    "timm": [("spp", "timm:resnet18", "--out", "none"), ("doctor", "timm:resnet18", "--out", "none")],
    "train": [
        ("train", "digits", "--out", "none"),
        ("evaluate", "model.safetensors", "--source", "digits"),
        ("paper", "table1", "--out", "none"),
    ],
    "export": [
        ("export", "model.safetensors", "--format", "onnx", "--out", "none.onnx"),
        ("benchmark", "never.py:build", "--task", "inference", "--onnx", "--device", "cpu", "--out", "none"),
    ],
    "plot": [("paper", "figure1", "--scale", "quick", "--out", "none"), ("demo", "--out", "none")],
}
json.dump(
    {
        "home": normfree.__file__,
        "importable": [name for names in EXTRAS.values() for name in names if find_spec(name)],
        "answers": answers,
        "written": written,
        "refused": [(extra, words, answer(*words)) for extra, lines in refused.items() for words in lines],
        "left": sorted(path.as_posix() for path in Path().rglob("*")),
    },
    sys.stdout,
)
