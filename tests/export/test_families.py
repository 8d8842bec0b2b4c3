"""Every family, padding, format, fixed and dynamic batches: files, opened without us, answer as the model."""

from __future__ import annotations

import copy
import itertools
import zipfile

import onnx
import pytest
import torch

from normfree.export import to_onnx, to_program
from normfree.nn import fold

# All pairs of padding, format and batch, each with every family; sizes at which SAME pads one side more, and odd ones.
ROUNDS = [
    ("symmetric", "onnx", True, (65, 47)),
    ("same", "onnx", False, (64, 48)),
    ("same", "pt2", True, (65, 47)),
    ("symmetric", "pt2", False, (33, 50)),
]
FAMILIES = ("nf_resnet50", "nf_regnet_b0", "nfnet_f0")
CASES = list(itertools.product(FAMILIES, range(len(ROUNDS))))

FEATURE_OPERATORS = {
    "nf_resnet50": {"Conv", "Relu", "Add", "MaxPool"},
    "nf_regnet_b0": {"Conv", "Sigmoid", "Mul", "Add", "AveragePool"},  # x * sigmoid(x) is the activation
    "nfnet_f0": {"Conv", "Gelu", "Mul", "Add", "AveragePool"},
}


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    done = {}

    def export(family, index):
        if (family, index) not in done:
            padding, suffix, dynamic, size = ROUNDS[index]
            write = to_onnx if suffix == "onnx" else to_program
            path = tmp_path_factory.mktemp("export") / f"model.{suffix}"
            example = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
            done[family, index] = write(network(family, padding), example, path, dynamic_batch=dynamic)
        return done[family, index]

    return export


def answer_of(path, x):
    """What a user's own program gets from a file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["output"], {"x": x.numpy()})[0])


@pytest.mark.parametrize(("family", "index"), CASES)
def test_a_file_answers_as_the_model(family, index, network, exported):
    padding, suffix, dynamic, size = ROUNDS[index]
    result = exported(family, index)
    model = copy.deepcopy(network(family, padding)).eval()
    for batch_size in (1, 2, 5) if dynamic else (2,):
        x = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(batch_size))
        expected = model(x).detach()
        assert expected.std() > 1e-2
        # Rounding in float32, of sums in another order; a padding on the wrong side is off by 1e-2.
        torch.testing.assert_close(answer_of(result.path, x), expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert result.path.suffix == f".{suffix}"
    assert result.batch_sizes == ((1, 2, 3) if dynamic else (2,))
    assert result.silent == ()
    assert result.rehearsal is None
    assert result.tolerance == pytest.approx(3.45e-4, rel=1e-2)
    assert result.folding.relative < 1e-5
    assert (0 < result.file.relative < 1e-5) if suffix == "onnx" else result.file.relative == 0


def tensors_of(path):
    """The nodes of a file, the rank of each of its tensors, and its weights by name."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    graph = model.graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in [*graph.value_info, *graph.input]}
    return graph.node, ranks, {weight.name: list(weight.dims) for weight in graph.initializer}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_feature_maps_meet_convolutions_activations_additions_and_gates_alone(family, index, exported):
    nodes, ranks, _ = tensors_of(exported(family, index).path)
    maps = {name for name, rank in ranks.items() if rank == 4}
    made_by = {name: node for node in nodes for name in node.output}
    gates = {name for name in maps if name in made_by and made_by[name].op_type == "Unsqueeze"}
    on_maps = [node for node in nodes if set(node.output) & (maps - gates)]
    assert {node.op_type for node in on_maps} - {"Pad"} == FEATURE_OPERATORS[family]
    for node in on_maps:
        if node.op_type == "Mul":
            by_its_sigmoid = [
                name for name in node.input if name in made_by and made_by[name].op_type == "Sigmoid" and name in maps
            ]
            assert set(node.input) & gates or by_its_sigmoid, node
        if node.op_type == "Add":
            assert set(node.input) <= maps, node
    blocks = 0 if family == "nf_resnet50" else 4
    assert sum(bool(set(node.input) & gates) for node in nodes) == blocks
    assert sum(node.op_type == "ReduceMean" for node in nodes) == blocks + 1  # gates, and the pooling: no weight's


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_used_as_they_are(family, exported):
    nodes, _, weights = tensors_of(exported(family, 0).path)
    users = {name: {node.op_type for node in nodes if name in node.input} for name in weights}
    assert all(users[name] == {"Conv"} for name, dims in weights.items() if len(dims) == 4)
    assert all(users[name] == {"Gemm"} for name, dims in weights.items() if len(dims) == 2)


def test_the_whole_graph_of_a_resnet(exported):
    result = exported("nf_resnet50", 0)
    expected = {"Conv": 17, "Relu": 13, "Add": 4, "MaxPool": 1, "ReduceMean": 1, "Mul": 1, "Gemm": 1}
    assert result.operators == expected  # the multiplication is gamma on the pooled features
    assert list(result.operators)[:2] == ["Conv", "Relu"]
    assert result.size == result.path.stat().st_size
    assert exported("nf_resnet50", 3).operators["conv2d"] == 17


def test_axes_names_and_opset(exported):
    result = exported("nf_resnet50", 0)
    file = onnx.load(result.path)
    assert result.opset == 20
    assert [(each.domain, each.version) for each in file.opset_import] == [("", 20)]
    (put,), (out,) = file.graph.input, file.graph.output
    axes = [axis.dim_param or axis.dim_value for axis in put.type.tensor_type.shape.dim]
    assert axes == ["batch", 3, 65, 47]
    assert [axis.dim_param or axis.dim_value for axis in out.type.tensor_type.shape.dim] == ["batch", 5]
    fixed = onnx.load(exported("nf_resnet50", 1).path).graph.input[0]
    assert [axis.dim_value for axis in fixed.type.tensor_type.shape.dim] == [2, 3, 64, 48]


def test_a_file_does_not_say_where_it_was_made(exported):
    onnx_bytes = exported("nf_resnet50", 0).path.read_bytes()
    with zipfile.ZipFile(exported("nf_resnet50", 2).path) as archive:
        program_bytes = b"".join(archive.read(name) for name in archive.namelist())
    for content in (onnx_bytes, program_bytes):
        assert b"stages.0.0.conv1" in content
        assert b".py" not in content.replace(b".pyt", b"")


def test_the_compiler_takes_a_folded_model_whole(network):
    folded = fold(network("nf_resnet50").stages[1]).requires_grad_(False)  # one block, for the compiler takes its time
    x = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = folded(x)
    actual = torch.compile(folded, fullgraph=True)(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
