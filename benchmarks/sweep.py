"""Measure every architecture at hand, and hold what the recorder found against the authors' structure.

``python -m benchmarks.sweep [--only PATTERN] [--out results/sweep] [--fresh]`` writes ``models.json`` and a
table, ``README.md``. Models already in ``models.json`` are kept, so that an interrupted sweep goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.rows import one_line
from benchmarks.sweep_structure import stated_additions
from normfree.benchmark import hardware
from normfree.signal import SignalPropagation, spp, write_atomically

LARGEST = 150e6
"""Parameters; the biggest variants add minutes and no structure."""

# The smallest of each family timm has, and more where a family's members differ in how they add.
TIMM = """
beit_base_patch16_224 botnet26t_256 eca_botnext26ts_256 halonet26t sehalonet33ts haloregnetz_b lambda_resnet26t
lambda_resnet26rpt_256 mobileone_s0 mobileone_s1 gernet_s repvgg_a0 repvgg_b0 regnetz_b16 regnetz_b16_evos
resnext26ts gcresnext26ts bat_resnext26ts resnet33ts seresnet33ts resnet50_clip cait_xxs24_224 coat_tiny
coat_lite_tiny convit_tiny convmixer_768_32 convnext_atto convnext_atto_rms convnext_tiny_hnf convnextv2_atto
convnextv2_tiny cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cs3darknet_s darknet17 darknetaa53
cspresnext50 cspresnet50 cspdarknet53 cs3sedarknet_xdw cs3edgenet_x cspnext_tiny davit_tiny deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 densenetblur121d dla34 dla46x_c dla60_res2next
dpn48b dpn68 edgenext_xx_small edgenext_small efficientformer_l1 efficientformerv2_s0 test_efficientnet
efficientnet_b0 efficientnet_es tf_efficientnetv2_b0 mobilenetv1_100 mobilenetv2_050 mixnet_s mnasnet_small
tinynet_e mobilenet_edgetpu_v2_xs efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0
eva02_tiny_patch14_224 vit_tiny_patch16_dinov3_qkvb vit_pe_core_tiny_patch16_384 fasternet_t0 fastvit_t8 fastvit_sa12
fastvit_mci0 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnetv2_b0
hgnet_tiny hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small hrnet_w18_small_v2 hrnet_w18 iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s levit_conv_128s lowformer_b0 mambaout_femto
coatnet_pico_rw_224 coatnet_0_224 coatnet_0_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxvit_tiny_tf_224
maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18
gmlp_ti16_224 gmixer_12_224 resmlp_12_224 mixer_s32_224 mobilenetv3_small_050 mobilenetv3_large_100 lcnet_050
fbnetv3_b mobilenetv4_conv_small_035 mobilenetv4_conv_medium mobilenetv4_hybrid_medium mobilenetv5_base
mobilevit_xxs mobilevitv2_050 mvitv2_tiny mvitv2_small_cls naflexvit_base_patch16_gap nasnetalarge pnasnet5large
nest_tiny nextvit_small nf_regnet_b0 nf_resnet26 nf_seresnet26 nf_ecaresnet26 nf_resnet50 nfnet_l0 eca_nfnet_l0
nfnet_f0 dm_nfnet_f0 pit_ti_224 pit_ti_distilled_224 pvt_v2_b0 pvt_v2_b2_li qwen3_vit_88m rdnet_tiny regnetx_002
regnety_002 regnetv_040 regnetz_040 repghostnet_050 repvit_m1 repvit_m0_9 res2next50 res2net50_14w_8s
res2net50_26w_4s res2net50d resnest14d resnest50d_1s4x24d resnest50d resnet10t resnet18 resnet18d resnetblur18
seresnet18 ecaresnext26t_32x4d resnet50 resnet50d resnet50_gn resnetrs50 resnetv2_18 resnetv2_50 resnetv2_50d_gn
resnetv2_50d_evos resnetv2_50x1_bit rexnet_100 rexnetr_100 selecsls42b legacy_seresnet18 legacy_seresnext26_32x4d
sequencer2d_s shvit_s1 skresnet18 skresnet50 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 swin_s3_tiny_224
swinv2_tiny_window8_256 swinv2_cr_tiny_224 swinv2_cr_tiny_ns_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m
twins_svt_small twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224 vit_base_patch32_clip_224
vit_wee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_dpwee_patch16_reg1_gap_256
vit_small_patch16_18x2_224 vit_small_patch14_reg4_dinov2 vit_base_patch16_siglip_224 vit_tiny_r_s16_p8_224
vit_small_r26_s32_224 vit_srelpos_small_patch16_224 vit_relpos_small_patch16_rpn_224 samvit_base_patch16_224
vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw ese_vovnet39b vovnet39a legacy_xception xception41 xception41p
xcit_nano_12_p16_224 xcit_tiny_12_p16_224
"""

CLIPS = [(3, 8, 64, 64), (3, 16, 224, 224)]
"""Channels, frames and sizes tried with video models."""


def names() -> list[str]:
    """Every model of the sweep, as ``library:name``."""
    models = [f"torchvision:{name}" for name in torchvision.models.list_models()]
    return models + [f"timm:{name}" for name in TIMM.split()]


def build(name: str) -> nn.Module:
    """A model by its ``library:name``, at random initialisation; of a detector, its backbone."""
    torch.manual_seed(0)
    library, name = name.split(":")
    if library == "timm":
        import timm

        return timm.create_model(name)
    options: dict[str, Any] = {"weights": None}
    described = torchvision.models.get_model_builder(name)
    if described.__module__.split(".")[-2] in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if name.startswith("quantized_"):
        options["quantize"] = False
    model = torchvision.models.get_model(name, **options)
    return model.backbone if ".detection." in described.__module__ else model


def inputs(name: str, model: nn.Module) -> Iterator[Any]:
    """Inputs to try, the smallest first: two gaussian images, clips or pairs of frames."""
    described = getattr(model, "pretrained_cfg", None)
    library, name = name.split(":")
    if library == "timm":
        own = described["input_size"]
        smaller = [] if described.get("fixed_input_size") else [(own[0], 96, 96)]
        shapes = [*smaller, own]
    elif torchvision.models.get_model_builder(name).__module__.split(".")[-2] == "video":
        shapes = CLIPS
    elif name.startswith("raft"):
        yield torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128)
        return
    else:
        shapes = [(3, size, size) for size in (64, 224, 299)]
    for shape in shapes:
        yield torch.randn(2, *shape)


def measured(name: str) -> dict[str, Any]:
    """One row: what was found in a model and what it should be; or the one-line reason why not."""
    start = time.perf_counter()
    try:
        model = build(name)
    except Exception as error:
        return {"model": name, "failure": one_line(error)}
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    if millions > LARGEST / 1e6:
        return {"model": name, "skipped": f"{millions:.0f} million parameters"}
    built = time.perf_counter()
    failure = ""
    for batch in inputs(name, model):
        try:
            signal = spp(model, batch, name=name, gradient=False)
        except ValueError as error:
            failure = one_line(error)
            continue
        seconds = {"build": round(built - start, 2), "spp": round(time.perf_counter() - built, 2)}
        return {"model": name, "millions": round(millions, 1), **_row(model, signal), "seconds": seconds}
    return {"model": name, "failure": failure}


def _row(model: nn.Module, signal: SignalPropagation) -> dict[str, Any]:
    residual = [block for block in signal.blocks if block.kind == "residual"]
    axes = sorted({(block.channel_axis, len(block.shape)) for block in signal.blocks})
    odd = [block.name for block in signal.blocks if not _is_width(model, block.name, block.shape[block.channel_axis])]
    return {
        "input": signal.input["shape"],
        "points": len(signal.blocks),
        "kind": signal.blocks[0].kind,
        "residual": len(residual),
        "stated": stated_additions(model),
        "transitions": sum(block.transition for block in residual),
        "enclosing": sum(block.encloses > 0 for block in residual),
        "entry": signal.entry.name,
        "entry_shape": list(signal.entry.shape),
        "entry_axis": signal.entry.channel_axis,
        "first": signal.blocks[0].name,
        "last": signal.blocks[-1].name,
        "axes": [f"{axis} of {dims}" for axis, dims in axes],
        "odd_axes": odd,
        "silent": sum(block.residual_avg_channel_var in (None, 0.0) for block in residual),
        "woken": sum(bool(block.woken) for block in residual),
        "findings": sorted({finding.kind for finding in signal.findings}),
    }


def _is_width(model: nn.Module, name: str, size: int) -> bool:
    """Whether some layer of the module that adds, or of the one around it, has that many channels."""
    path = name.split("#")[0]
    while True:
        module = model.get_submodule(path)
        widths = {
            getattr(layer, attribute)
            for layer in module.modules()
            for attribute in ("in_channels", "out_channels", "in_features", "out_features", "num_features")
            if isinstance(getattr(layer, attribute, None), int)
        }
        if size in widths:
            return True
        if not path:
            return False
        path = path.rpartition(".")[0]


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The Markdown page: totals, then one line a model."""
    good = [row for row in rows if "points" in row]
    residual = [row for row in good if row["residual"]]
    stated = [row for row in good if row["stated"] is not None]
    differing = [row for row in stated if row["residual"] != row["stated"]]
    named = ", ".join(f"{row['model']} ({row['residual']} for {row['stated']})" for row in differing) or "none"
    lines = [
        "# Every architecture, measured",
        "",
        "`python -m benchmarks.sweep` runs `normfree.spp` on two gaussian images per model, at random "
        "initialisation, and compares the residual additions found in the recorded dataflow with those that the "
        "authors' modules state (`benchmarks/sweep_structure.py`).",
        "",
        ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
        "",
        "| total | |",
        "|---|---|",
        f"| models measured | {len(good)} |",
        f"| of these with residual additions / per layer | {len(residual)} / {len(good) - len(residual)} |",
        f"| failed | {sum('failure' in row for row in rows)} |",
        f"| skipped for size | {sum('skipped' in row for row in rows)} |",
        f"| residual additions found | {sum(row['residual'] for row in good)} |",
        f"| models with as many as stated | {len(stated) - len(differing)} of {len(stated)} |",
        f"| those that differ | {named} |",
        f"| points whose channel axis is no width of the block | {sum(len(row['odd_axes']) for row in good)} |",
        f"| seconds in `spp` | {sum(row['seconds']['spp'] for row in good):.0f} |",
        "",
        "| model | M param. | input | points | residual | stated | transitions | entry | channel axis | woken | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "points" not in row:
            lines.append(f"| {row['model']} | {row.get('failure') or 'skipped: ' + row['skipped']} |" + " |" * 9)
            continue
        count = str(row["residual"]) if row["residual"] == row["stated"] else f"**{row['residual']}**"
        stated_count = "–" if row["stated"] is None else row["stated"]
        shape = row["input"][0] if isinstance(row["input"][0], list) else row["input"]
        cells = [row["model"], row["millions"], "×".join(map(str, shape[1:])), row["points"], count, stated_count]
        cells += [row["transitions"], f"`{row['entry']}`", ", ".join(row["axes"]), row["woken"], row["seconds"]["spp"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def page(rows: list[dict[str, Any]]) -> str:
    """The results as JSON, a model a line."""
    models = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"machine": {json.dumps(hardware())}, "models": [\n{models}\n]}}\n'


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Run the sweep from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--only", default="*", help="shell pattern of names, such as 'timm:res*'")
    parser.add_argument("--out", type=Path, default=Path("results/sweep"))
    parser.add_argument("--fresh", action="store_true", help="measure again what models.json already has")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    path = options.out / "models.json"
    before = json.loads(path.read_text()) if path.exists() and not options.fresh else {}
    if before.get("machine", hardware()) != hardware():
        raise SystemExit(f"{path} was measured elsewhere or with other versions; give --fresh or another --out")
    rows = {row["model"]: row for row in before.get("models", [])}
    for name in names():
        if not fnmatch.fnmatch(name, options.only) or name in rows:
            continue
        rows[name] = row = measured(name)
        say(f"{name}: {row.get('failure') or row.get('skipped') or (row['residual'], row['stated'])}")
        ordered = [rows[each] for each in names() if each in rows]
        write_atomically(path, page(ordered))
        gc.collect()
    ordered = [rows[each] for each in names() if each in rows]
    write_atomically(options.out / "README.md", table(ordered, hardware()))


if __name__ == "__main__":
    main()
