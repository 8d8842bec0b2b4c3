"""Fault drill: what becomes of a run that is killed, of checkpoints that rot, of damaged images, and of attacks.

``python -m benchmarks.faults [--quick] [--only PART …] [--out results/faults]`` writes ``faults.json`` and
``README.md``.

1. Kills. One run (a small NF-ResNet on images decoded by two workers; RandAugment, MixUp and CutMix, dropout,
   weight averaging, clipping, two batches accumulated per step) is sent SIGKILL 20 times, each at a random step and
   a random moment of it, and started again with the same command. Its last checkpoint is compared, bit for bit, with
   that of a run nothing happened to.
2. Rot. A checkpoint's file, chosen at random, has one bit flipped or its end cut off, 200 times. The store must then
   find the damage and fall back on the checkpoint before; whatever it returns is compared with what was written.
3. Images. 50 files that no camera meant: truncated, empty, CMYK, 16-bit, a huge header, animated, no image. Those
   that are whole must decode; the others must be an error that names the file, or be counted and replaced.

4. Attacks. Every attack of ``benchmarks.attacks``: files that carry code, claim memory, never end, are damaged or
   forged, answers that would be silently wrong, and arguments of any kind.

With ``--only``, the other parts' results are kept as they are in ``faults.json``.

A *silent corruption* is a state other than the one written that is used without a word; a *lost run* one that
cannot go on though a sound checkpoint is there.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from normfree.benchmark import hardware
from normfree.signal import write_atomically

KILLS, DAMAGES, IMAGES = 20, 200, 50
MODEL = (
    "nf_resnet50:depths=(1,1,1,1),widths=(16,16,32,32),stem=cifar,alpha=0.5,skipinit_gain=1,"
    "drop_rate=0.25,stochdepth_rate=0.1"
)


def write_images(folder: Path) -> None:
    """The digits as 12×12 PNG files in class folders: decoded on the fly, by workers."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    for index in range(480):
        split = "test" if index % 4 == 0 else "train"
        file = folder / split / str(found.target[index]) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((found.images[index] * 255 / 16).astype("uint8")).resize((12, 12)).convert("RGB").save(file)


def command(data: Path, out: Path, epochs: int) -> list[str]:
    """The command line of the drill's run."""
    options = {
        "--model": MODEL,
        "--data.source": data,
        "--data.image-size": 12,
        "--data.in-memory": False,
        "--data.workers": 2,
        "--data.batch-size": 24,
        "--batch-size": 48,
        "--data.augmentation.crop": "shift",
        "--data.augmentation.randaugment-layers": 2,
        "--data.augmentation.mixup": 0.2,
        "--data.augmentation.cutmix": 1.0,
        "--optimizer.clip-factor": 0.05,
        "--average-decay": 0.99,
        "--epochs": epochs,
        "--checkpoint-every": 3,
        "--log-every": 1,
        "--evaluate-every": 10,
        "--keep": 3,
        "--out": out,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "normfree", "train", "digits", *words]


def rows(out: Path) -> int:
    """Steps noted in a run's curve."""
    file = out / "train.csv"
    return max(0, file.read_text().count("\n") - 1) if file.is_file() else 0


def killed(data: Path, out: Path, epochs: int, kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """Start, kill and start again; the steps at which it was killed."""
    history = []
    steps = epochs * 7
    for number in range(kills):
        process = subprocess.Popen(command(data, out, epochs), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started = False
        begun = rows(out)
        goal = draw.randint(1, max(1, (steps - begun) // (kills - number)))
        while process.poll() is None:
            now = rows(out)
            started = started or now < begun or now > begun or begun == 0
            if started and now >= begun + goal:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))  # any moment of a step, of an evaluation or of a checkpoint's writing
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        history.append({"step": rows(out), "alive": alive})
    return history


def drill_kills(kills: int, folder: Path, draw: random.Random) -> dict[str, Any]:
    """Part 1."""
    from safetensors.torch import load_file

    from normfree.train import CheckpointStore

    data, whole, out = folder / "images", folder / "whole", folder / "killed"
    write_images(data)
    epochs = max(2, kills)
    subprocess.run(command(data, whole, epochs), check=True, stdout=subprocess.DEVNULL)
    history = killed(data, out, epochs, kills, draw)
    last = subprocess.run(command(data, out, epochs), capture_output=True, text=True, check=False)
    same = {}
    if last.returncode == 0:
        mine, theirs = (CheckpointStore(run / "checkpoints").newest() for run in (out, whole))
        assert mine is not None and theirs is not None
        for name in ("model.safetensors", "averaged.safetensors"):
            a, b = load_file(mine.folder / name), load_file(theirs.folder / name)
            same[name] = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        momenta = [state.state()["optimizer"]["state"] for state in (mine, theirs)]
        same["momentum"] = all(
            torch.equal(momenta[0][key]["momentum_buffer"], momenta[1][key]["momentum_buffer"]) for key in momenta[1]
        )
    return {
        "kills": history,
        "killed_while_running": sum(one["alive"] for one in history),
        "steps": epochs * 7,
        "finished": last.returncode == 0,
        "told": last.stderr.splitlines()[-1:] if last.returncode else [],
        "identical": same,
        "silent_corruptions": sum(not one for one in same.values()),
        "lost_runs": int(last.returncode != 0),
    }


def drill_rot(damages: int, run: Path, folder: Path, draw: random.Random) -> dict[str, Any]:
    """Part 2."""
    from normfree.train import CheckpointStore

    outcomes: Counter[str] = Counter()
    original = CheckpointStore(run / "checkpoints")
    steps = [path.name for path in original.folders()]
    content = {name: _content(original.folder / name) for name in steps}
    for _ in range(damages):
        store = CheckpointStore(folder / "rot")
        shutil.rmtree(store.folder, ignore_errors=True)
        shutil.copytree(original.folder, store.folder)
        file = draw.choice(sorted((store.folder / steps[-1]).iterdir()))
        kind = _damage(file, draw)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = store.newest()
            except ValueError:
                outcomes[f"{kind}: lost"] += 1
                continue
        assert found is not None
        if _content(found.folder) != content[found.folder.name]:
            outcomes[f"{kind}: silent corruption"] += 1
        elif found.folder.name == steps[-1]:
            outcomes[f"{kind}: without effect"] += 1
        else:
            outcomes[f"{kind}: found, {'told, ' if told else ''}the one before used"] += 1
    return {
        "damages": damages,
        "outcomes": dict(sorted(outcomes.items())),
        "silent_corruptions": sum(n for what, n in outcomes.items() if "silent" in what or "told" not in what),
        "lost_runs": sum(n for what, n in outcomes.items() if what.endswith("lost")),
    }


def _damage(file: Path, draw: random.Random) -> str:
    data = bytearray(file.read_bytes())
    if draw.random() < 0.5:
        position = draw.randrange(len(data))
        data[position] ^= 1 << draw.randrange(8)
        kind = "bit flip"
    else:
        del data[draw.randrange(len(data)) :]
        kind = "truncation"
    file.write_bytes(bytes(data))
    return kind


def _content(folder: Path) -> dict[str, bytes]:
    """Everything in a checkpoint that is used: all files, the manifest as what it says."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    try:
        files["manifest.json"] = json.dumps(json.loads(files["manifest.json"]), sort_keys=True).encode()
    except (ValueError, KeyError):
        files["manifest.json"] = b"unreadable"
    return files


def damaged_images(count: int, draw: random.Random) -> list[tuple[str, str, bytes, bool]]:
    """(kind, suffix, bytes, whether it is a whole image) of damaged and of merely unusual files."""
    from PIL import Image

    def encoded(mode: str, form: str, **options: Any) -> bytes:
        size = (24, 20)
        if mode == "I;16":
            image = Image.frombytes(mode, size, bytes(draw.randrange(256) for _ in range(2 * 24 * 20)))
        else:
            image = Image.effect_noise(size, 60).convert(mode)
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    def huge() -> bytes:
        data = bytearray(encoded("RGB", "BMP"))
        data[18:26] = (60000).to_bytes(4, "little") + (60000).to_bytes(4, "little")
        return bytes(data)

    def cut(data: bytes) -> bytes:
        return data[: draw.randrange(20, len(data) - len(data) // 4)]

    makers = [
        ("truncated JPEG", ".jpg", lambda: cut(encoded("RGB", "JPEG")), False),
        ("truncated PNG", ".png", lambda: cut(encoded("RGB", "PNG")), False),
        ("empty file", ".jpg", lambda: b"", False),
        ("no image", ".png", lambda: b"<html>404 not found</html>" * 5, False),
        ("huge header", ".bmp", huge, False),
        (
            "animation",
            ".gif",
            lambda: encoded("P", "GIF", save_all=True, append_images=[Image.new("P", (24, 20), 9)]),
            False,
        ),
        ("CMYK", ".jpg", lambda: encoded("CMYK", "JPEG"), True),
        ("16-bit", ".png", lambda: encoded("I;16", "PNG"), True),
        ("palette", ".png", lambda: encoded("P", "PNG"), True),
        ("transparent", ".png", lambda: encoded("LA", "PNG"), True),
    ]
    return [(kind, suffix, make(), whole) for kind, suffix, make, whole in (makers * 5)[:count]]


def drill_images(count: int, folder: Path, draw: random.Random) -> dict[str, Any]:
    """Part 3."""
    from PIL import Image

    from normfree.data import AugmentationConfig, DataConfig, open_training

    outcomes: Counter[str] = Counter()
    for number, (kind, suffix, data, whole) in enumerate(damaged_images(count, draw)):
        place = folder / f"damaged{number}"
        for index in range(8):
            file = place / "train" / str(index % 2) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((16, 16), 50).save(file)
        bad = place / "train" / "0" / f"bad{suffix}"
        bad.write_bytes(data)
        strict = DataConfig(
            source=str(place),
            image_size=16,
            batch_size=9,
            in_memory=False,
            augmentation=AugmentationConfig(crop="none"),
        )
        outcomes[f"{kind}: {_outcome(strict, bad, whole, open_training)}"] += 1
    good = sum(n for what, n in outcomes.items() if what.endswith(("counted and replaced", "decoded")))
    return {"images": count, "outcomes": dict(sorted(outcomes.items())), "failures": count - good}


def _outcome(strict: Any, bad: Path, whole: bool, open_training: Any) -> str:
    """What becomes of a file: decoded, or an error that names it and, where it is to be skipped, a count."""
    from dataclasses import replace

    try:
        batches = list(open_training(strict))
    except ValueError as error:
        if whole or bad.name not in str(error):
            return f"WRONG: {error}"
    else:
        return "decoded" if whole and len(batches) == 1 else "WRONG: taken as sound"
    data = open_training(replace(strict, on_bad_image="skip"))
    ((images, _),) = list(data)
    counted = len(data.bad_images) == 1 and bad.name in next(iter(data.bad_images)) and len(images) == 9
    return "error names the file; counted and replaced" if counted else "WRONG: not counted"


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where, kills, rot, images, attacks = (result[name] for name in ("hardware", "kills", "rot", "images", "attacks"))
    identical = ", ".join(f"{name} {'identical' if same else 'DIFFERENT'}" for name, same in kills["identical"].items())
    steps = ", ".join(str(one["step"]) for one in kills["kills"])
    lines = [
        "# Fault drill",
        "",
        f"{where['cpu']}, {where['cores']} cores, Python {where['python']}, torch {where['torch']}; "
        f"seed {result['seed']}.",
        "",
        "| drill | outcome | silent corruptions | lost runs |",
        "|---|---|---|---|",
        f"| {len(kills['kills'])} × SIGKILL in one run of {kills['steps']} steps | "
        f"{'finished' if kills['finished'] else 'NOT finished'}; {identical} | {kills['silent_corruptions']} | "
        f"{kills['lost_runs']} |",
        f"| {rot['damages']} damaged checkpoints | below | {rot['silent_corruptions']} | {rot['lost_runs']} |",
        f"| {images['images']} damaged or unusual images | below; {images['failures']} failures | 0 | 0 |",
        f"| {attacks['attacks']} attacks | {attacks['held']} held; below | "
        f"{attacks['outcomes'].get('silently wrong', 0)} | 0 |",
        "",
        f"Attacks: {attacks['hardware']}; {attacks['seconds']:.0f} s.",
        "",
        "| attacks on | tried | held |",
        "|---|---|---|",
        *(f"| {KINDS[kind]} | {of['tried']} | {of['held']} |" for kind, of in attacks["kinds"].items()),
        "",
        f"Killed after step {steps}; the reference is the same command, left alone.",
        "",
        "| what happened to a checkpoint or an image, and what came of it | times |",
        "|---|---|",
    ]
    lines += [f"| {what} | {count} |" for drill in (rot, images) for what, count in drill["outcomes"].items()]
    return "\n".join(lines) + "\n"


KINDS = {
    "code": "code: nothing that a file holds or names is run",
    "bomb": "memory and time: nothing is taken that a file only claims",
    "hang": "special files: pipes, devices, sockets and folders in the place of files",
    "damage": "damaged and forged files: one line that names the file",
    "wrong": "answers: right, or refused",
    "state": "state: a model and the process are given back as they were, also in threads",
    "argument": "arguments and factories: one line, whatever they are",
}


def drill_attacks(folder: Path) -> dict[str, Any]:
    """Part 4."""
    from benchmarks.attacks import prepare, tried

    ground = folder / "ground"
    ground.mkdir()
    began = time.monotonic()
    prepare(ground)
    results = tried(folder)
    where = hardware()
    kinds = {kind: [one for one in results if one["kind"] == kind] for kind in KINDS}
    return {
        "attacks": len(results),
        "held": sum(one["outcome"] == "held" for one in results),
        "outcomes": dict(Counter(one["outcome"] for one in results)),
        "kinds": {
            kind: {"tried": len(some), "held": sum(one["outcome"] == "held" for one in some)}
            for kind, some in kinds.items()
        },
        "seconds": time.monotonic() - began,
        "hardware": f"{where['cpu']}, {where['cores']} cores, Python {where['python']}, torch {where['torch']}",
        "each": results,
    }


PARTS = ("kills", "rot", "images", "attacks")


def main() -> None:
    """Run the drills, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few of each: does it run at all?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="leave the other parts as they are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/faults"))
    options = parser.parse_args()
    draw = random.Random(options.seed)
    kills, damages, images = (2, 10, 10) if options.quick else (KILLS, DAMAGES, IMAGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {"seed": options.seed, "quick": options.quick, "hardware": hardware()}
        if set(options.only) != set(PARTS):
            result = json.loads((options.out / "faults.json").read_text())
        if "kills" in options.only or "rot" in options.only:  # the second damages the first one's checkpoints
            result["kills"] = drill_kills(kills, folder, draw)
            result["rot"] = drill_rot(damages, folder / "whole", folder, draw)
        if "images" in options.only:
            result["images"] = drill_images(images, folder, draw)
        if "attacks" in options.only:
            result["attacks"] = drill_attacks(folder)
    write_atomically(options.out / "faults.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
