"""The gallery of the site: signal propagation plots of thirty architectures at random initialisation.

``python -m benchmarks.gallery [--only PATTERN ...] [--out docs]`` writes ``gallery.md`` and ``images/gallery/*.png``.
Gaussian noise, eight images of the size that each model suggests (at most 224), seed 0, without the gradient.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from normfree.signal import SignalPropagation, input_shape, spp, write_atomically
from normfree.sources import build

MODELS = {
    "Residual networks": (
        "torchvision:resnet18",
        "torchvision:resnet50",
        "torchvision:resnext50_32x4d",
        "torchvision:wide_resnet50_2",
        "timm:resnetv2_50",
        "timm:seresnet50",
        "torchvision:regnet_y_400mf",
        "torchvision:densenet121",
    ),
    "Without normalizers": (
        "nf_resnet50",
        "nf_resnet101",
        "nf_regnet_b0",
        "nfnet_f0",
        "skipinit_resnet50",
        "fixup_resnet50",
        "resnetv2_50:norm=None",
    ),
    "Mobile networks": (
        "torchvision:mobilenet_v2",
        "torchvision:mobilenet_v3_small",
        "torchvision:efficientnet_b0",
        "torchvision:shufflenet_v2_x1_0",
        "torchvision:mnasnet1_0",
        "timm:ghostnet_100",
    ),
    "Chains": ("torchvision:alexnet", "torchvision:vgg16", "torchvision:vgg16_bn", "torchvision:squeezenet1_1"),
    "Attention and tokens": (
        "torchvision:vit_b_16",
        "torchvision:swin_t",
        "timm:deit_tiny_patch16_224",
        "timm:mixer_b16_224",
        "timm:convnext_tiny",
    ),
}
"""By section; resnetv2_50 without a norm is the paper's network that does not train."""

BATCH, LARGEST = 8, 224


def measure(name: str) -> SignalPropagation:
    """The plot of one model."""
    torch.manual_seed(0)
    model = build(name).model
    shape = input_shape(model)
    size = min(LARGEST, shape[-1])
    batch = torch.randn(BATCH, shape[-3], size, size, generator=torch.Generator().manual_seed(0))
    return spp(model, batch, name=name, gradient=False)


def sentence(signal: SignalPropagation) -> str:
    """What the plot shows, in words: the range of the variance, then each finding."""
    variances = [block.avg_channel_var for block in signal.blocks]
    kind = "blocks" if any(block.kind == "residual" for block in signal.blocks) else "layers"
    shown = [
        f"Variance from {signal.entry.avg_channel_var:.3g} at the entry to {variances[-1]:.3g} after "
        f"{len(variances)} {kind} (largest {max(variances):.3g})."
    ]
    for finding in signal.findings:
        message = finding.message[0].upper() + finding.message[1:].rstrip(".")
        shown.append(f"**{finding.kind}** ({finding.severity}): {message}.")
    return " ".join(shown if signal.findings else [*shown, "No finding."])


def shrink(path: Path) -> None:
    """Rewrite a picture with 64 colours, at most 1,000 pixels wide: a quarter of its bytes."""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((1000, 4000), Image.Resampling.LANCZOS)
    picture.quantize(64).save(path, optimize=True)


def page(sections: dict[str, list[dict[str, Any]]]) -> str:
    """The Markdown page."""
    lines = [
        "# Gallery",
        "",
        "Signal propagation plots at random initialisation, measured on eight images of Gaussian noise (seed 0), and",
        "what `normfree spp` finds in each. `python -m benchmarks.gallery` makes this page.",
    ]
    for section, rows in sections.items():
        lines += ["", f"## {section}"]
        for row in rows:
            lines += ["", f"### {row['model']}", "", row["sentence"], "", f"![{row['model']}]({row['image']})"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is asked for, keep the other rows, write the page."""
    parser = argparse.ArgumentParser(description="Write the site's gallery.")
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of the models' names")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    stored = arguments.out / "images" / "gallery" / "gallery.json"
    rows: dict[str, dict[str, Any]] = json.loads(stored.read_text()) if stored.exists() else {}
    for name in (name for names in MODELS.values() for name in names):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only):
            continue
        signal = measure(name)
        file = "".join(letter if letter.isalnum() else "_" for letter in name) + ".png"
        signal.plot(stored.parent / file)
        shrink(stored.parent / file)
        rows[name] = {"model": name, "image": f"images/gallery/{file}", "sentence": sentence(signal)}
        write_atomically(stored, json.dumps(rows, indent=1) + "\n")
        print(name, rows[name]["sentence"], flush=True)
    sections = {title: [rows[name] for name in names if name in rows] for title, names in MODELS.items()}
    write_atomically(arguments.out / "gallery.md", page({title: found for title, found in sections.items() if found}))


if __name__ == "__main__":
    main()
