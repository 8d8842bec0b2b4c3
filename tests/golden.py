"""The authors' networks as numbers: golden files that lie beside the repository, and a loader for tests.

Keys of a golden file are the official tree, ``params/<haiku module path>/<name>``.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"


def golden_file(pattern: str) -> Path:
    """Return the one golden file of that pattern; skip the test where the folder is not at hand."""
    found = sorted(GOLDEN.glob(pattern))
    if not found:
        pytest.skip(f"no {pattern} in the folder ../shared/golden beside the repository")
    assert len(found) == 1, found
    return found[0]


def golden_case(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a golden case such as ``"case01"``."""
    with np.load(golden_file(f"{name}*.npz"), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def images(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return NHWC images as NCHW."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).to(dtype).contiguous()


def load_official(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Copy an official network's parameters into ours; every parameter of both must be used, once."""
    blocks = [block for stage in model.stages for block in stage]
    unused = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in unused.items()}
    for key, value in arrays.items():
        if key.startswith("params/"):
            _, _, _, path = key.split("/", 3)  # params/<network>/~/<path>
            parameter = _find(model, blocks, path)
            tensor = torch.from_numpy(_to_torch_layout(value))
            assert parameter.shape == tensor.shape, (key, parameter.shape, tensor.shape)
            with torch.no_grad():
                parameter.copy_(tensor)
            del unused[names[id(parameter)]]
    assert not unused, sorted(unused)


_OUTSIDE_BLOCKS = {"initial_conv": "stem.conv", "final_conv": "final.conv", "linear": "classifier"}
_INSIDE_BLOCKS = {
    "conv_shortcut": "shortcut",
    "squeeze_excite/~/linear": "squeeze_excite.linear0",
    "squeeze_excite/~/linear_1": "squeeze_excite.linear1",
}


def _find(model: nn.Module, blocks: list[nn.Module], path: str) -> torch.Tensor:
    path, leaf = path.rsplit("/", 1)
    leaf = {"w": "weight", "b": "bias"}.get(leaf, leaf)
    if path in _OUTSIDE_BLOCKS:
        return model.get_submodule(_OUTSIDE_BLOCKS[path]).get_parameter(leaf)
    match = re.fullmatch(r"(?:nf_res_block|nf_block)(?:_(\d+))?(?:/~/(.+))?", path)
    assert match, path
    block, inside = blocks[int(match[1] or 0)], match[2]
    if inside is None:  # the block's own scalar, which the layer that ends its branch holds here
        (scalar,) = (parameter for name, parameter in block.named_parameters() if name.endswith(f".{leaf}"))
        return scalar
    return block.get_submodule(_INSIDE_BLOCKS.get(inside, inside)).get_parameter(leaf)


def _to_torch_layout(value: np.ndarray) -> np.ndarray:
    """HWIO to OIHW for convolutions, [in, out] to [out, in] for linear layers."""
    if value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)
    elif value.ndim == 2:
        value = value.T
    return np.array(value, order="C")
