import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from tests.passes.torch_networks import example
from tvm_compress.errors import PolicyError
from tvm_compress.passes.codebook_weights import CodebookWeights, site_weights
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.pipeline import build, compress
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.twin import Twin


def few_values(module, bits, per_channel, seed=0):
    """Every weight becomes one of 2**bits values, of the tensor or of its channel."""
    rng = np.random.default_rng(seed)
    values = {}
    for site in find_sites(module):
        shape = site.weight_shape
        rows = shape[0] if per_channel else 1
        book = rng.normal(size=(rows, 2**bits)).astype(np.float32) * 0.3
        chosen = rng.integers(0, 2**bits, shape)
        values[site.weight] = book[np.arange(rows).reshape(-1, *(1,) * (len(shape) - 1)), chosen]
    return set_params(module, values)


def everywhere(module, bits):
    return CompressionPolicy({site.name: SitePolicy(codebook_bits=bits) for site in find_sites(module)})


class Ranges:
    def range(self, site, bits):
        return -4.0, 4.0


def run(compiled, x):
    return relax.VirtualMachine(compiled.executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


@pytest.mark.parametrize(
    ("name", "bits", "per_channel"),
    [
        ("sequential", 3, True),
        ("residual", 1, False),
        ("residual", 5, True),
        ("branches", 3, False),
        ("branches", 2, True),
    ],
)
def test_same_outputs_as_the_expanded_weights(name, bits, per_channel, request):
    made = request.getfixturevalue(name)
    module = few_values(made.module, bits, per_channel)
    stored = CodebookWeights(everywhere(module, bits))(module)
    assert [s.name for s in find_sites(stored)] == [s.name for s in find_sites(module)]
    for site in find_sites(stored):
        assert get_params(stored)[site.weight].dtype == np.uint8
        np.testing.assert_array_equal(site_weights(stored, site), get_params(module)[site.weight])
    expected = Twin(module).predict(made.x)
    np.testing.assert_allclose(Twin(stored).predict(made.x), expected, rtol=1e-5, atol=1e-5)
    found = run(build(stored, "host"), made.x)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_code_of_the_module(sequential):
    module = few_values(sequential.module, 2, False)
    stored = CodebookWeights(CompressionPolicy({"features.3": SitePolicy(codebook_bits=2)}))(module)
    params = get_params(stored)
    assert params["features.3.weight"].shape == get_params(module)["features.3.weight"].shape
    assert params["features.3.weight_codebook"].shape == (1, 4)
    lines = stored.script(show_meta=False).splitlines()
    assert sum("lookup" in line for line in lines) == 1
    # The others are as they were, and a second time nothing is done.
    assert params["classifier.1.weight"].dtype == np.float32
    policy = CompressionPolicy({"features.3": SitePolicy(codebook_bits=2)})
    assert CodebookWeights(policy)(stored).same_as(stored)
    assert CodebookWeights(CompressionPolicy())(module).same_as(module)


def test_batch_norm_becomes_factors_and_a_bias(residual):
    """Folding it into the weights would need a codebook for every channel."""
    from tvm_compress.passes.fold_batch_norm import FoldBatchNorm

    stored = CodebookWeights(everywhere(residual.module, 2))(few_values(residual.module, 2, False))
    folded = FoldBatchNorm()(stored)
    params = get_params(folded)
    assert params["conv1.scale"].shape == params["conv1.bias"].shape == (8,)
    assert not any("running" in name for name in params)
    np.testing.assert_allclose(
        Twin(folded).predict(residual.x), Twin(stored).predict(residual.x), rtol=1e-4, atol=1e-5
    )


def test_beside_quantized_sites(residual):
    """A policy may store one site by a codebook and quantize another."""
    policy = CompressionPolicy(
        {
            "layer1.conv1": SitePolicy(scheme="int8", weight_bits=8, activation_bits=8),
            "layer1.conv2": SitePolicy(codebook_bits=3),
        }
    )
    module = few_values(residual.module, 3, False)
    mixed = compress(module, policy, calibration=Ranges())
    assert get_params(mixed)["layer1.conv2.weight"].dtype == np.uint8
    found = run(build(mixed, "host"), residual.x)
    expected = Twin(module).predict(residual.x)
    np.testing.assert_allclose(Twin(mixed).predict(residual.x), found, atol=2e-2 * np.abs(found).max())
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_too_many_values(residual):
    with pytest.raises(PolicyError, match="16"):
        CodebookWeights(CompressionPolicy({"conv1": SitePolicy(codebook_bits=4)}))(residual.module)
    trained = few_values(residual.module, 4, False)
    CodebookWeights(CompressionPolicy({"conv1": SitePolicy(codebook_bits=4)}))(trained)


def test_gradients_reach_the_codebook(residual):
    stored = CodebookWeights(everywhere(residual.module, 2))(few_values(residual.module, 2, False))
    gradients = Twin(stored).gradients(residual.x, np.zeros(1, np.int64))
    plain = Twin(few_values(residual.module, 2, False)).gradients(residual.x, np.zeros(1, np.int64))
    indices = get_params(stored)["fc.weight"]
    expected = np.bincount(indices.ravel(), plain["fc.weight"].ravel(), minlength=4)
    np.testing.assert_allclose(gradients["fc.weight_codebook"][0], expected, rtol=1e-4, atol=1e-6)


class Wide(nn.Module):
    """Nearly all of it is one dense layer of a million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.fc1 = nn.Linear(1024, 1000)
        self.fc2 = nn.Linear(1000, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(torch.relu(self.conv(x)).flatten(1))))


def test_the_library_holds_the_indices(tmp_path):
    made = example(Wide())
    sizes = {}
    for bits in (0, 1, 4, 8):
        module = made.module
        if bits:
            module = CodebookWeights(everywhere(module, bits))(few_values(module, bits, False))
        sizes[bits] = build(module, "host").export(tmp_path / f"{bits}.so").stat().st_size
    weights = sum(int(np.prod(site.weight_shape)) for site in find_sites(made.module))
    for bits in (1, 4, 8):
        # What is saved is 32 - bits for each weight, up to the code and the channels that fill blocks up.
        saved = (sizes[0] - sizes[bits]) * 8 / weights
        assert saved == pytest.approx(32 - bits, abs=1.0)
