"""Official weights that do not fit, or are none: one line that says what, and a model left as it was."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from normfree import create_model, load_haiku_weights
from normfree.weights.haiku import haiku_names

REGNET = {"depths": (1, 2, 1, 1), "widths": (12, 16, 24, 32), "num_classes": 5, "padding": "same"}


def regnet(**overrides):
    return create_model("nf_regnet_b0", **REGNET | overrides)


def official_tree(model):
    """Return a model's parameters as the official tree; names and layouts are tested elsewhere."""
    tree = {}
    names = haiku_names(model).parameters
    for ours, parameter in model.named_parameters():
        path, _, leaf = names[ours].rpartition("/")
        array = parameter.detach().numpy()
        tree.setdefault(path, {})[leaf] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return tree


def broken(message, change, model=None):
    """Assert that weights changed so are refused with that message, and that the model stays as it was."""
    params = official_tree(regnet())
    model = model or regnet()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    changed = change(params)
    with pytest.raises(ValueError, match=message) as caught:
        load_haiku_weights(model, params if changed is None else changed)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_what_is_missing_is_named():
    def without_stem(params):
        del params["NF_RegNet/~/initial_conv"]

    def without_bias(params):
        del params["NF_RegNet/~/linear"]["b"]

    broken(r"3 of 90 arrays are missing \(NF_RegNet/~/initial_conv/w, .*gain\);", without_stem)
    broken(r"90 of 90 arrays are missing .* and 87 more\)", lambda p: {})
    broken(r"1 of 90 arrays are missing \(NF_RegNet/~/linear/b\)", without_bias)


def test_what_is_left_is_named():
    broken(
        r"has 6 blocks where nf_regnet_b0 has 5: 1 of 91 are left over \(NF_RegNet/~/nf_block_5/skip_gain\)",
        lambda p: p.update({"NF_RegNet/~/nf_block_5": {"skip_gain": 1.0}}),
    )
    broken(
        r"^source: is of another family than nf_regnet_b0: .*missing .*NF_RegNet.* left over \(NFNet",
        lambda p: {path.replace("NF_RegNet", "NFNet"): group for path, group in p.items()},
    )
    fewer = regnet(num_classes=0)
    broken(r"2 of 90 are left over \(NF_RegNet/~/linear/w", lambda p: None, fewer)


def test_both_shapes_are_named():
    other = regnet(num_classes=7)
    broken(
        r"linear/w has shape \[5, 93\] .* classifier.weight has \[7, 93\] \(and 1 more\); .*num_classes",
        lambda p: None,
        other,
    )
    broken(r"skip_gain has shape \[1\] .* has \[\]", lambda p: p["NF_RegNet/~/nf_block"].update(skip_gain=np.ones(1)))
    broken(
        r"conv1/w has shape \[12, 1, 3, 3\] .* has \[8, 8, 3, 3\]",
        lambda p: p["NF_RegNet/~/nf_block/~/conv1"].update(w=np.ones((3, 3, 1, 12))),
    )


def test_what_is_no_array_is_refused():
    broken("skip_gain'.* no real number", lambda p: p["NF_RegNet/~/nf_block"].update(skip_gain="one"))
    broken("dtype object", lambda p: p["NF_RegNet/~/nf_block"].update(skip_gain=[{}]))
    broken("dtype complex", lambda p: p["NF_RegNet/~/nf_block"].update(skip_gain=1j))
    broken("is no array", lambda p: p["NF_RegNet/~/nf_block"].update(skip_gain=[[1], [1, 2]]))
    broken("no module path", lambda p: {"NF_RegNet/~/linear/w": np.ones(1)})
    broken("no module path", lambda p: {1: {}})
    broken("no module path", lambda p: {"params": [1]})
    broken("comes twice", lambda p: {"params": p, "state": p})
    broken("neither a file nor a mapping", lambda p: [1])


def test_what_is_no_model_of_ours_is_refused():
    with pytest.raises(ValueError, match="model='Linear': has no official counterpart"):
        load_haiku_weights(nn.Linear(1, 1), {})
    model = regnet()
    model.stem.extra = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match=r"stem\.extra\.weight.*no such tensor"):
        load_haiku_weights(model, {})
    with torch.device("meta"):
        model = regnet()
    with pytest.raises(ValueError, match="meta device"):
        load_haiku_weights(model, official_tree(regnet()))


def test_archives_are_read_without_unpickling(tmp_path):
    np.savez(tmp_path / "objects.npz", **{"params/a/w": np.array([{}], dtype=object)})
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    whole = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name, reason in (("objects", "dtype object"), ("other", "begins with params/"), ("cut", "no sound archive")):
        with pytest.raises(ValueError, match=reason) as caught:
            load_haiku_weights(regnet(), tmp_path / f"{name}.npz")
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="is no file"):
        load_haiku_weights(regnet(), tmp_path / "none.npz")


def archive_of(path, *entries):
    """A zip of (name, shape that the header claims, bytes that follow)."""
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape, content in entries:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
            archive.writestr(f"params/{name}.npy", header.getvalue() + content)
    return path


ARCHIVES = {
    "a header that claims more": ([("a/w", (10**11,), b"abcd")], "claims 400,000,000,000 bytes and holds 4"),
    "a header that claims less": ([("a/w", (1,), b"abcdefgh")], "claims 4 bytes and holds 8"),
    "a size beyond any": ([("a/w", (2**60, 2**60), b"abcd")], "holds 4"),
    "a megabyte that is a gigabyte": ([("a/w", (2**28,), bytes(2**30))], "the model's far fewer"),
    "many that are a gigabyte": ([(f"a{i}/w", (2**22,), bytes(2**24)) for i in range(64)], "the model's far fewer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_take_no_more_memory_than_the_model(tmp_path, name):
    import tracemalloc

    entries, reason = ARCHIVES[name]
    path = archive_of(tmp_path / "weights.npz", *entries)
    model = regnet()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason) as caught:
            load_haiku_weights(model, path)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()
    assert "weights.npz" in str(caught.value) and len(str(caught.value)) <= 500
