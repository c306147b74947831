import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.ir import assert_structural_equal

from tests.tvm_compress.twin_networks import Build, random_resnet8, resnet8_module
from tvm_compress.errors import DataError, ModelError, UnsupportedOperatorError
from tvm_compress.passes.params import get_params, get_stage
from tvm_compress.twin import Twin


@pytest.fixture(scope="module")
def net():
    return random_resnet8()


@pytest.fixture(scope="module")
def module(net):
    return resnet8_module(net)


def images(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 1, 28, 28)).astype(np.float32), rng.integers(0, 10, n)


@pytest.mark.parametrize("n", [1, 7])
def test_outputs_equal_torchs_for_any_batch(net, module, n):
    x, y = images(n)
    twin = Twin(module)
    logits = twin.predict(x, batch_size=3)
    with torch.no_grad():
        expected = net(torch.from_numpy(x))
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
    assert twin.accuracy(x, y) == np.mean(logits.argmax(1) == y)
    assert twin.loss(x, y) == pytest.approx(float(F.cross_entropy(expected, torch.from_numpy(y))), abs=1e-5)


def test_gradients_equal_torchs(net, module):
    x, y = images(6)
    gradients = Twin(module).gradients(x, y, batch_size=4)
    net = copy.deepcopy(net).eval()
    F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    expected = {name: p.grad.numpy() for name, p in net.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5 * max(1, np.abs(expected[name]).max()))


def test_training_equals_torchs_with_its_running_statistics(net, module):
    x, y = (torch.from_numpy(value) for value in images(8))
    twin, net = Twin(module).train(), copy.deepcopy(net).train()
    for network in (twin, net):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    state = net.state_dict()
    for name, value in twin.tensors.items():
        np.testing.assert_allclose(value.detach(), state[name], rtol=2e-3, atol=2e-4, err_msg=name)
    assert not twin.tensors["bn1.running_mean"].requires_grad


def test_frozen_batch_norms_keep_their_statistics(module):
    twin = Twin(module)
    twin.freeze_batch_norm()
    x = torch.from_numpy(images(4)[0])
    expected = twin(x)
    torch.testing.assert_close(twin.train()(x), expected)
    twin.freeze_batch_norm(False)
    assert not torch.allclose(twin(x), expected, atol=1e-3)


def test_reestimated_statistics_are_those_of_the_data(net, module):
    x, _ = images(12)
    twin = Twin(module)
    twin.reestimate_batch_norm(x * 3 + 1, batch_size=4)
    with torch.no_grad():
        first = net.conv1(torch.from_numpy(x * 3 + 1))
    mean = first.mean((0, 2, 3))
    np.testing.assert_allclose(twin.tensors["bn1.running_mean"], mean, atol=1e-4)
    expected = torch.stack([part.var((0, 2, 3)) for part in first.split(4)]).mean(0)
    np.testing.assert_allclose(twin.tensors["bn1.running_var"], expected, rtol=1e-4)
    assert not twin.training
    before = twin.predict(x)
    twin.predict(x)
    np.testing.assert_array_equal(twin.predict(x), before)


def test_parameters_are_written_back(module):
    twin = Twin(module)
    assert_structural_equal(twin.to_module(), module)
    with torch.no_grad():
        twin.tensors["fc.bias"].add_(1.0)
    written = twin.to_module()
    assert get_stage(written) == "float"
    np.testing.assert_allclose(get_params(written)["fc.bias"], get_params(module)["fc.bias"] + 1)
    x, _ = images(2)
    np.testing.assert_array_equal(Twin(written).predict(x), twin.predict(x))


def test_site_inputs(net, module):
    x, _ = images(5)
    twin = Twin(module)
    inputs = twin.site_inputs(x, ["conv1", "fc"], batch_size=2)
    np.testing.assert_array_equal(inputs["conv1"], x.transpose(0, 2, 3, 1))
    assert inputs.keys() == {"conv1", "fc"}
    np.testing.assert_allclose(
        inputs["fc"] @ get_params(module)["fc.weight"].T + get_params(module)["fc.bias"],
        twin.predict(x),
        atol=1e-5,
    )
    seen = []
    assert twin.site_inputs(x, callback=lambda sites, value: seen.append((sites, value.shape[0]))) == {}
    assert (("layer2.0.conv1", "layer2.0.short.0"), 5) in seen
    with pytest.raises(ModelError, match="nowhere"):
        twin.site_inputs(x, ["nowhere"])


@settings(max_examples=12, deadline=None)
@given(
    size=st.integers(5, 9),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    grouped=st.booleans(),
)
def test_any_convolution(size, kernel, stride, padding, grouped):
    rng = np.random.default_rng(size)
    groups = 4 if grouped else 1
    w = rng.normal(size=(8, 4 // groups, kernel, kernel)).astype(np.float32)
    b = Build((1, 4, size, size))
    module = b.finish(lambda: b.conv(b.nhwc(b.x), b.param("c.weight", w), stride, padding, groups=groups))
    x = rng.normal(size=(3, 4, size, size)).astype(np.float32)
    top, left, bottom, right = padding
    padded = F.pad(torch.from_numpy(x), (left, right, top, bottom))
    expected = F.conv2d(padded, torch.from_numpy(w), stride=stride, groups=groups).permute(0, 2, 3, 1)
    np.testing.assert_allclose(Twin(module).predict(x), expected, atol=1e-5)


def pool_setting(layer: str, x):
    settings = {"layout": "NHWC", "ceil_mode": False}
    if layer == "max":
        return relax.op.nn.max_pool2d(x, 3, 2, [1, 1, 1, 1], **settings)
    if layer == "max, uneven":
        return relax.op.nn.max_pool2d(x, 2, 2, [0, 0, 1, 1], **settings)
    if layer == "avg":
        return relax.op.nn.avg_pool2d(x, 2, 2, [1, 1, 1, 1], count_include_pad=True, **settings)
    return relax.op.nn.avg_pool2d(x, 2, 2, [0, 0, 1, 1], count_include_pad=False, **settings)


@pytest.mark.parametrize("layer", ["max", "max, uneven", "avg", "avg, uneven"])
def test_pooling(layer):
    b = Build((1, 3, 7, 7))
    module = b.finish(lambda: b.emit(pool_setting(layer, b.nhwc(b.x))))
    x = np.random.default_rng(1).normal(size=(2, 3, 7, 7)).astype(np.float32)
    t = torch.from_numpy(x)
    expected = {
        "max": lambda: F.max_pool2d(t, 3, 2, 1),
        "max, uneven": lambda: F.max_pool2d(F.pad(t, (0, 1, 0, 1), value=-torch.inf), 2, 2),
        "avg": lambda: F.avg_pool2d(t, 2, 2, 1),
        "avg, uneven": lambda: F.avg_pool2d(t, 2, 2, 0, ceil_mode=True, count_include_pad=False),
    }[layer]()
    np.testing.assert_allclose(Twin(module).predict(x), expected.permute(0, 2, 3, 1), atol=1e-6)


def test_the_other_operators():
    b = Build((1, 4, 3, 5))
    o = relax.op

    def make():
        x = b.nhwc(b.x)
        y = b.emit(o.multiply(b.emit(o.sigmoid(x)), b.emit(o.tanh(b.emit(o.nn.silu(x))))))
        y = b.emit(
            o.concat([b.emit(o.clip(y, 0, 0.5)), b.emit(o.maximum(x, b.emit(o.minimum(y, x))))], axis=3)
        )
        y = b.emit(o.subtract(y, b.emit(o.divide(y, relax.const(2.0)))))
        y = b.emit(o.nn.batch_flatten(b.emit(o.permute_dims(y, [0, 3, 1, 2]))))
        y = b.emit(o.add(b.emit(o.nn.softmax(y)), b.emit(o.nn.log_softmax(y))))
        y = b.emit(o.expand_dims(y, 1))
        return b.emit(o.reshape(y, (1, 8, 15)))

    x = np.random.default_rng(2).normal(size=(3, 4, 3, 5)).astype(np.float32)
    t = torch.from_numpy(x).permute(0, 2, 3, 1)
    y = torch.sigmoid(t) * torch.tanh(F.silu(t))
    y = torch.cat([y.clamp(0, 0.5), torch.maximum(t, torch.minimum(y, t))], 3)
    y = (y - y / 2).permute(0, 3, 1, 2).flatten(1)
    expected = (y.softmax(-1) + y.log_softmax(-1)).reshape(3, 8, 15)
    np.testing.assert_allclose(Twin(b.finish(make)).predict(x), expected, atol=1e-6)


def test_an_unknown_operator_is_named_with_its_layer():
    b = Build((1, 4, 3, 3))

    def make():
        x = b.conv(b.nhwc(b.x), b.param("stem.conv.weight", np.ones((4, 4, 1, 1), np.float32)))
        return b.emit(relax.op.erf(x))

    with pytest.raises(UnsupportedOperatorError, match=r"relax.erf \(after stem.conv\)"):
        Twin(b.finish(make))


def test_data_that_do_not_fit(module):
    twin = Twin(module)
    with pytest.raises(DataError, match="28"):
        twin.predict(np.zeros((2, 1, 27, 28), np.float32))
    with pytest.raises(DataError, match="no images"):
        twin.predict(np.zeros((0, 1, 28, 28), np.float32))


def test_running_changes_no_global_random_state(module):
    before = torch.random.get_rng_state()
    twin = Twin(module)
    twin.gradients(*images(2))
    assert torch.equal(torch.random.get_rng_state(), before)
