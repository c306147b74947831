from typing import Any

import numpy as np
import pytest
import torch
from tvm import relax

from tests.tvm_compress.twin_networks import Build
from tvm_compress.data.dataset import Dataset, Normalization
from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.finetune import _Answers, _augmented, _shift, finetune
from tvm_compress.passes.params import get_params, get_stage
from tvm_compress.twin import Twin


def shapes_data(n: int, seed: int) -> Dataset:
    """Bars, upright, lying or both, somewhere in noise: three classes that are learnt in a second."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 120, (n, 1, 8, 8)).astype(np.uint8)
    y = rng.integers(0, 3, n)
    for image, label in zip(x[:, 0], y, strict=True):
        if label != 0:
            image[rng.integers(8)] = 255
        if label != 1:
            image[:, rng.integers(8)] = 255
    return Dataset(x, y, ("upright", "lying", "both"), Normalization((0.3,), (0.3,)))


def small_network(bits: int = 0):
    """Convolution, batch norm, ReLU, mean, dense; with `bits`, its weights and inputs quantized."""
    torch.manual_seed(0)
    conv, norm, dense = torch.nn.Conv2d(1, 8, 5, bias=False), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 3)
    b = Build((1, 1, 8, 8), "qdq" if bits else "float")

    def quantized(name, w):
        variable = b.param(f"{name}.weight", w)
        if not bits:
            return variable
        flat = np.abs(w.detach().numpy()).reshape(len(w), -1)
        if bits == 1:
            return b.fake_binarize(variable, b.param(f"{name}.weight_scale", flat.mean(1)))
        top = 2 ** (bits - 1) - 1
        return b.fake_quantize(
            variable, b.param(f"{name}.weight_scale", flat.max(1) / top), 0, -top, top, axis=0
        )

    def make():
        x = b.nhwc(b.x)
        if bits:
            x = b.fake_quantize(x, b.param("c.input_scale", np.float32(0.02)), -60, -128, 127)
        x = b.emit(relax.op.nn.relu(b.batch_norm(b.conv(x, quantized("c", conv.weight)), "n", norm)))
        return b.dense(
            b.emit(relax.op.mean(x, [1, 2])), quantized("d", dense.weight), b.param("d.bias", dense.bias)
        )

    return b.finish(make)


@pytest.fixture(scope="module")
def train():
    return shapes_data(600, 0)


@pytest.fixture(scope="module")
def test():
    return shapes_data(300, 1)


@pytest.fixture(scope="module")
def trained(train):
    return finetune(small_network(), train, 6, learning_rate=0.2, batch_size=32)


def accuracy(module, data):
    return Twin(module).accuracy(data.normalized(), data.y)


def test_a_float_network_learns(trained, test):
    assert accuracy(small_network(), test) < 0.6
    assert accuracy(trained, test) > 0.85
    assert get_stage(trained) == "float"


@pytest.mark.parametrize("bits", [1, 4])
def test_a_quantized_network_learns_from_its_teacher(trained, train, test, bits):
    teacher = Twin(trained)
    module = small_network(bits)
    seen = []
    result = finetune(
        module,
        train,
        6,
        0.2,
        batch_size=32,
        teacher=teacher,
        progress=lambda epoch, means: seen.append((epoch, means)),
    )
    assert get_stage(result) == "qdq"
    assert accuracy(result, test) > 0.8
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1][1]["loss"] < seen[0][1]["loss"]
    assert seen[0][1].keys() == {"loss", "accuracy", "learning_rate"}
    before, after = get_params(module), get_params(result)
    assert all(
        not np.array_equal(before[name], after[name]) for name in ("c.weight", "c.input_scale", "d.weight")
    )
    assert all((value > 0).all() for name, value in after.items() if name.endswith("_scale"))
    # The caller's module is as it was.
    assert np.array_equal(before["c.weight"], get_params(small_network(bits))["c.weight"])


def test_the_step_is_that_of_torchs_optimizer(train):
    """Two epochs of one batch each: the second at half the rate, as the cosine says."""
    twin = Twin(small_network())
    twin.train()
    x, y = torch.from_numpy(train.normalized()), torch.from_numpy(train.y)
    parameters = twin.trainable().values()
    decayed, plain = ([p for p in parameters if (p.dim() > 1) is kernel] for kernel in (True, False))
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 1e-4}, {"params": plain}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for rate in (0.1, 0.05):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(x), y).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
    result = get_params(finetune(small_network(), train, 2, learning_rate=0.1, batch_size=600))
    for name, value in twin.tensors.items():
        np.testing.assert_allclose(result[name], value.detach(), rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("augment", ["none", "shift+mirror"])
def test_one_seed_gives_one_result(trained, train, augment):
    def run(seed):
        arguments = {"teacher": Twin(trained), "augment": augment}
        return get_params(
            finetune(small_network(4), train.take(slice(0, 100)), 1, 0.05, seed, 16, **arguments)
        )

    first, again, other = run(1), run(1), run(2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["c.weight"], other["c.weight"])


def test_augmentation_moves_images_by_up_to_two_pixels():
    x = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6)
    moved = _shift(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    for image, original in zip(moved, x, strict=True):
        matches = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(image[:, 2:4, 2:4], original[:, 2 + dy : 4 + dy, 2 + dx : 4 + dx])
        ]
        assert len(matches) == 1


def test_mirroring_turns_about_half_of_the_images():
    x = torch.arange(64 * 3 * 4 * 5, dtype=torch.float32).reshape(64, 3, 4, 5)
    made, mirrored = _augmented(x, "mirror", torch.Generator().manual_seed(0))
    turned = [torch.equal(image, original.flip(-1)) for image, original in zip(made, x, strict=True)]
    kept = [torch.equal(image, original) for image, original in zip(made, x, strict=True)]
    assert all(a != b for a, b in zip(turned, kept, strict=True))
    assert 20 <= sum(turned) <= 44
    assert mirrored.tolist() == turned
    same, mirrored = _augmented(x, "none", torch.Generator())
    assert torch.equal(same, x)
    assert not mirrored.any()


@pytest.mark.parametrize(("augment", "epochs"), [("none", 1), ("mirror", 1), ("mirror", 2), ("shift", 2)])
def test_a_teacher_answers_for_the_images_that_are_seen(trained, train, augment, epochs):
    teacher = Twin(trained)
    answers = _Answers(teacher, train, augment, epochs)
    indices = np.array([5, 3, 8, 13, 21, 34])
    x = torch.from_numpy(train.normalized(indices))
    seen, mirrored = _augmented(x, augment, torch.Generator().manual_seed(1))
    assert mirrored.any() == (augment == "mirror")
    with torch.no_grad():
        np.testing.assert_allclose(answers.to(seen, indices, mirrored), teacher(seen), rtol=1e-4, atol=1e-5)


def test_an_unknown_augmentation_is_refused(train):
    with pytest.raises(SettingError, match="upside-down"):
        finetune(small_network(), train, 1, augment="upside-down")


def test_an_observer_sees_every_step_and_may_hold_weights(train):
    class Hold:
        calls: list[str] = []

        def begin_epoch(self, tensors):
            self.calls.append("begin")

        def after_step(self, tensors):
            self.calls.append("step")
            tensors["c.weight"][0] = 0.0

        def end_epoch(self, epoch, means):
            self.calls.append(f"end {epoch} {sorted(means)}")

    observer = Hold()
    module = finetune(small_network(), train.take(slice(0, 96)), 2, 0.05, batch_size=32, observer=observer)
    end = "['accuracy', 'learning_rate', 'loss']"
    assert observer.calls == [
        word for epoch in (1, 2) for word in ("begin", "step", "step", "step", f"end {epoch} {end}")
    ]
    weight = get_params(module)["c.weight"]
    assert not weight[0].any()
    assert weight[1].any()


def test_no_epochs_change_nothing(train):
    module = small_network(4)
    after = get_params(finetune(module, train, 0))
    assert all(
        np.array_equal(value.ravel(), after[name].ravel()) for name, value in get_params(module).items()
    )


@pytest.mark.filterwarnings("ignore:overflow")
def test_impossible_settings(trained, train):
    for settings in ({"epochs": -1}, {"epochs": 1, "learning_rate": 0.0}, {"epochs": 1, "batch_size": 1}):
        with pytest.raises(SettingError, match="Cannot train"):
            finetune(trained, train, **settings)
    with pytest.raises(DataError, match="at least two"):
        finetune(trained, train.take([0]), 1)
    with pytest.raises(ModelError, match="diverged"):
        finetune(small_network(), train, 4, learning_rate=1e30)
