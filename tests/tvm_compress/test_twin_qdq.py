import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tvm import relax

from tests.tvm_compress.twin_networks import Build, random_resnet8, resnet8_module
from tvm_compress.passes.params import get_params, get_stage
from tvm_compress.twin import Twin
from tvm_compress.twin.program import read_program
from tvm_compress.twin.quantized_ops import FAKE_BINARIZE, FAKE_QUANTIZE, fuse_fake_quantization


def one_layer(bits: int, shared: bool = False):
    """Input [1, 2, 4, 4] through one quantized convolution; `shared`: the integers are read twice."""
    rng = np.random.default_rng(bits)
    w = (rng.normal(size=(3, 2, 3, 3)) * 0.3).astype(np.float32)
    s = np.array([0.05, 0.07, 0.09], np.float32)
    b = Build((1, 2, 4, 4), "qdq")

    def make():
        x = b.nhwc(b.x)
        scale = b.param("c.input_scale", np.float32(0.03))
        if shared:
            z = relax.const(3, "int8")
            q = b.emit(
                relax.op.clip(b.emit(relax.op.quantize(x, scale, z, axis=-1, out_dtype="int8")), -100, 90)
            )
            x, other = (
                b.emit(relax.op.dequantize(q, scale, z, axis=-1, out_dtype="float32")) for _ in range(2)
            )
            x = b.emit(relax.op.maximum(x, other))
        else:
            x = b.fake_quantize(x, scale, 3, -100, 90)
        weight = b.param("c.weight", w)
        scales = b.param("c.weight_scale", s)
        top = 2 ** (bits - 1) - 1
        quantized = (
            b.fake_binarize(weight, scales)
            if bits == 1
            else b.fake_quantize(weight, scales, 0, -top, top, axis=0)
        )
        return b.conv(x, quantized, 1, 1)

    return b.finish(make), w, s, top_of(bits)


def top_of(bits: int) -> int:
    return 1 if bits == 1 else 2 ** (bits - 1) - 1


def fake(x, s, z, low, high):
    """The definition, with numpy."""
    return (np.clip(np.rint(x / s) + z, low, high) - z).astype(np.float32) * s


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_values_are_those_of_the_definition(bits, shared):
    module, w, s, top = one_layer(bits, shared)
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32) * 2
    column = s.reshape(-1, 1, 1, 1)
    weights = np.where(w >= 0, column, -column) if bits == 1 else fake(w, column, 0, -top, top)
    inputs = fake(x, np.float32(0.03), 3, -100, 90)
    expected = F.conv2d(torch.from_numpy(inputs), torch.from_numpy(weights.astype(np.float32)), padding=1)
    np.testing.assert_allclose(Twin(module).predict(x), expected.permute(0, 2, 3, 1), atol=1e-5)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def straight_through(x, s, z, low, high):
    """Fake quantization with torch's own derivatives but for the rounding; LSQ's factor comes apart."""
    units = x / s
    rounded = units + (units.round() - units).detach()
    return (torch.clamp(rounded + z, low, high) - z) * s


def test_gradients_are_those_of_straight_through_estimators():
    module, w, s, top = one_layer(4)
    x = (np.random.default_rng(0).normal(size=(2, 2, 4, 4)) * 2).astype(np.float32)
    twin = Twin(module)
    weight, scales, input_scale = (torch.tensor(v, requires_grad=True) for v in (w, s, np.float32(0.03)))
    leaf, twin_leaf = (torch.from_numpy(x).requires_grad_() for _ in range(2))
    inputs = straight_through(leaf, input_scale, 3, -100, 90)
    weights = straight_through(weight, scales.view(-1, 1, 1, 1), 0, -top, top)
    target = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32))
    (F.conv2d(inputs, weights, padding=1).permute(0, 2, 3, 1) * target).sum().backward()
    (twin(twin_leaf) * target).sum().backward()
    assert_close(twin_leaf.grad, leaf.grad)
    assert_close(twin.tensors["c.weight"].grad, weight.grad)
    factor = (18 * top) ** -0.5
    assert_close(twin.tensors["c.weight_scale"].grad, scales.grad * factor)
    factor = (32 * 103) ** -0.5
    assert_close(twin.tensors["c.input_scale"].grad, input_scale.grad * factor)


def test_gradients_of_binary_weights_pass_straight_through():
    module, w, s, _ = one_layer(1)
    twin = Twin(module)
    with torch.no_grad():
        twin.tensors["c.weight"][0, 0, 0, 0] = 1.5
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)
    twin(torch.from_numpy(x)).square().sum().backward()
    binary = torch.from_numpy(np.where(w >= 0, 1, -1) * s.reshape(-1, 1, 1, 1)).float()
    binary[0, 0, 0, 0] = float(s[0])
    binary.requires_grad_()
    inputs = torch.from_numpy(fake(x, np.float32(0.03), 3, -100, 90))
    F.conv2d(inputs, binary, padding=1).square().sum().backward()
    assert gradient_of(twin.tensors["c.weight"])[0, 0, 0, 0] == 0
    rest = torch.ones_like(binary, dtype=torch.bool)
    rest[0, 0, 0, 0] = False
    torch.testing.assert_close(
        gradient_of(twin.tensors["c.weight"])[rest], gradient_of(binary)[rest], rtol=1e-4, atol=1e-3
    )


def test_chains_become_one_node_only_where_nothing_else_reads_them():
    def operators(module):
        program = read_program(module)
        fuse_fake_quantization(program)
        return [node.op for node in program.nodes]

    assert operators(one_layer(4)[0]).count(FAKE_QUANTIZE) == 2
    assert FAKE_BINARIZE in operators(one_layer(1)[0])
    shared = operators(one_layer(4, shared=True)[0])
    assert shared.count(FAKE_QUANTIZE) == 1
    assert "relax.quantize" in shared


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_weights_of_quantized_sites_learn(bits):
    """In the search paper's own tool they never do: it makes each quantized tensor a new parameter."""
    module = resnet8_module(random_resnet8(), bits)
    twin = Twin(module)
    before = get_params(module)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(8, 1, 28, 28)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 10, 8))
    twin.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(twin(x), y)
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0]
    after = get_params(twin.to_module())
    assert get_stage(twin.to_module()) == "qdq"
    # A binary kernel's scale has no effect before a batch norm, so it has no reason to move.
    endings = (".weight",) if bits == 1 else (".weight", ".weight_scale")
    for name in (site + ending for site in twin.sites for ending in endings):
        assert gradient_of(twin.tensors[name]).abs().sum() > 0
        assert not np.array_equal(after[name], before[name]), name
    assert after["fc.weight_scale"].sum() != before["fc.weight_scale"].sum()
