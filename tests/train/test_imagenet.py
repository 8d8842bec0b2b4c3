"""The paper's recipe on real images of ImageNet, end to end: a few steps, evaluated, folded, exported, used."""

import json

import pytest
import torch
from golden import GOLDEN

import normfree
from normfree.cli import main

IMAGES = GOLDEN.parent / "data" / "imagenet-sample"
SMALL = "nf_resnet50:width=1,depths=(1,1,1,1)"


@pytest.mark.skipif(not IMAGES.is_dir(), reason="no ../shared/data/imagenet-sample beside the repository")
def test_the_imagenet_recipe_runs_end_to_end(tmp_path, capsys):
    run, limits = tmp_path / "run", ["--limit-train-steps", "2", "--limit-eval-steps", "1"]
    data = ["--data.source", str(IMAGES), "--data.evaluation-split", "train", "--data.workers", "1"]
    data += ["--data.cache-folder", str(tmp_path / "cache")]
    small = ["--model", SMALL, "--batch-size", "4", "--data.batch-size", "2", "--signal-every", "0"]
    assert main(["train", "nf_resnet_imagenet", *data, *small, *limits, "--out", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["derived"]["data"]["image_size"], len(config["derived"]["classes"])) == (224, 1000)
    assert config["derived"]["accumulation"] == 2
    assert main(["evaluate", str(run), "--limit-eval-steps", "1", "--batch-size", "2"]) == 0
    network = normfree.load(run / "model.safetensors")
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(normfree.fold(network)(x), network(x), rtol=1e-4, atol=1e-4)
    assert main(["export", str(run), "--image-size", "224", "--out", str(tmp_path / "m.onnx")]) == 0
    capsys.readouterr()
    image = sorted(IMAGES.glob("*/*.JPEG"))[0]
    assert main(["predict", str(tmp_path / "m.onnx"), str(image), "--run", str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert len(found["predictions"]) == 5
    assert {one["class"] for one in found["predictions"]} <= set(config["derived"]["classes"])
