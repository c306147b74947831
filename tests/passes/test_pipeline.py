import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.support import cc
from tvm.target import Target

from tests.passes.torch_networks import import_torch
from tvm_compress.errors import ModelError, PolicyError, TargetError
from tvm_compress.passes.canonicalize import Canonicalize
from tvm_compress.passes.groups import find_coupled_sets
from tvm_compress.passes.params import bind_params, get_params, get_stage, with_stage
from tvm_compress.passes.pipeline import build, compress, lower, register_pipelines
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites


def int8(**rest):
    return SitePolicy(scheme="int8", weight_bits=8, activation_bits=8, **rest)


class Ranges:
    """The same range for every tensor; remembers which module it was made from."""

    def __init__(self, module=None):
        self.module = module

    def range(self, site, bits):
        return -4.0, 4.0


def run(executable, x):
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def test_dense_network_computes_what_torch_does(residual, tmp_path):
    compiled = build(residual.module, "host")
    np.testing.assert_allclose(
        run(compiled.executable, residual.x), residual.expected(), rtol=1e-4, atol=1e-5
    )
    assert get_stage(compiled.module) == "kernels"
    assert isinstance(compiled.target, Target)
    kinds = [kernel.kind for kernel in compiled.kernels for _ in range(kernel.count)]
    assert (kinds.count("conv2d_fp32"), kinds.count("dense_fp32")) == (6, 1)
    path = compiled.export(tmp_path / "model.so")
    np.testing.assert_array_equal(
        run(tvm.runtime.load_module(str(path)), residual.x), run(compiled.executable, residual.x)
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model.so"]


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (2, 3, 8, 8), (1, 3, 8)])
@pytest.mark.parametrize("loaded", [False, True])
def test_network_checks_its_input_though_kernels_do_not(residual, tmp_path, shape, loaded):
    compiled = build(residual.module, "host")
    executable = compiled.executable
    if loaded:
        executable = tvm.runtime.load_module(str(compiled.export(tmp_path / "net.so")))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    with pytest.raises(Exception, match=r"shape|ndim"):
        machine["main"](tvm.runtime.tensor(np.zeros(shape, np.float32)))
    with pytest.raises(Exception, match="float32"):
        machine["main"](tvm.runtime.tensor(residual.x.astype(np.int8)))


def test_export_links_as_it_is_told(sequential, tmp_path):
    linked = []

    def link(output, objects, options=None, **rest):
        linked.append(output)
        cc.create_shared(output, objects, options, **rest)

    path = build(sequential.module, "host").export(tmp_path / "other.so", fcompile=link)
    assert path.exists()
    assert len(linked) == 1


def test_failed_export_leaves_nothing(sequential, tmp_path):
    def link(output, objects, options=None, **rest):
        raise OSError("no linker")

    with pytest.raises(OSError, match="no linker"):
        build(sequential.module, "host").export(tmp_path / "model.so", fcompile=link)
    assert list(tmp_path.iterdir()) == []


def test_pruned_int8_network_end_to_end(residual, tmp_path):
    sites = {site.name: int8() for site in find_sites(residual.module)}
    sites["layer1.conv1"] = int8(kept=(0, 2, 3, 6))
    modules = []

    def calibrate(module):
        modules.append(module)
        return Ranges()

    qdq = compress(residual.module, CompressionPolicy(sites), None, calibrate, dump=tmp_path / "dump")
    # Ranges come from the pruned network.
    assert get_params(modules[0])["layer1.conv1.weight"].shape == (4, 8, 3, 3)
    assert get_stage(modules[0]) == "float"
    assert get_stage(qdq) == "qdq"
    compiled = build(qdq, "host", dump=tmp_path / "dump")
    assert {kernel.kind for kernel in compiled.kernels} == {"conv2d_int8", "dense_int8", "elementwise"}
    float_result = run(build(modules[0], "host").executable, residual.x)
    error = np.abs(run(compiled.executable, residual.x) - float_result).max()
    assert 0 < error < 0.1 * np.abs(float_result).max()
    assert sorted(file.name for file in (tmp_path / "dump").iterdir()) == [
        "00_prune_channels.py",
        "01_annotate_quantization.py",
        "02_insert_qdq.py",
        "03_fold_batch_norm.py",
        "04_realize_integer.py",
        "05_bind_params.py",
        "06_kernels.py",
    ]
    assert "tvm_compress.conv2d" in (tmp_path / "dump" / "04_realize_integer.py").read_text()


def test_mixed_network_keeps_fp32_sites(sequential):
    policy = CompressionPolicy({"features.3": int8()})
    qdq = compress(sequential.module, policy, calibration=Ranges())
    kinds = [kernel.kind for kernel in build(qdq, "host").kernels]
    assert kinds.count("conv2d_int8") == 1
    assert kinds.count("conv2d_fp32") == 1
    assert kinds.count("dense_fp32") == 2


def test_for_the_raspberry_pi(sequential):
    compiled = build(sequential.module, "raspberry-pi/4b-aarch64")
    assert len(compiled.kernels) == len(build(sequential.module, "host").kernels)
    assert "aarch64" in str(compiled.target)


def test_importer_output_is_canonicalised_first(residual):
    policy = CompressionPolicy({"layer1.conv1": SitePolicy(channels=4)}, criterion="l2")
    assert get_stage(compress(residual.imported, policy)) == "float"
    tvm.ir.assert_structural_equal(compress(residual.imported, policy), compress(residual.module, policy))


def test_same_policy_gives_the_same_bytes(residual):
    scores = {s.name: np.random.default_rng(0).random(s.channels) for s in find_coupled_sets(residual.module)}
    policy = CompressionPolicy({"conv1": int8(channels=5), "fc": int8()})
    first, second = (compress(residual.module, policy, scores, Ranges()) for _ in range(2))
    assert tvm.ir.save_json(first) == tvm.ir.save_json(second)


def test_batch_norm_without_a_layer_before_it(residual):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4))
    network.get_buffer("0.running_mean").fill_(0.3)
    module = Canonicalize()(import_torch(network))
    with torch.no_grad():
        expected = network(torch.from_numpy(residual.x)).numpy()
    np.testing.assert_allclose(
        run(build(module, "host").executable, residual.x), expected, rtol=1e-4, atol=1e-5
    )


def test_pipelines_are_known_to_relax(residual):
    register_pipelines()
    register_pipelines()
    policy = CompressionPolicy({"layer1.conv1": SitePolicy(kept=(0, 1))})
    passes = [
        relax.get_pipeline("tvm_compress.compress", policy=policy),
        relax.get_pipeline("tvm_compress.lower", target="host"),
    ]
    module = tvm.ir.transform.Sequential(passes)(residual.imported)
    assert get_stage(module) == "kernels"
    executable = relax.build(module, build(residual.module, "host").target)
    assert run(executable, residual.x).shape == (1, 10)


def test_what_does_not_fit_is_refused(residual):
    with pytest.raises(PolicyError, match="Site 'fc' is quantized, but there is no calibration"):
        compress(residual.module, CompressionPolicy({"fc": int8()}))
    with pytest.raises(PolicyError, match="names site 'other'"):
        compress(residual.module, CompressionPolicy({"other": int8()}), calibration=Ranges())
    with pytest.raises(ModelError, match="compress takes a module of stage 'float', not 'qdq'"):
        compress(with_stage(residual.module, "qdq"), CompressionPolicy())
    with pytest.raises(ModelError, match="lower takes"):
        lower(with_stage(residual.module, "annotated"), "host")
    with pytest.raises(ModelError, match="not canonical"):
        build(residual.imported, "host")
    with pytest.raises(TargetError):
        build(residual.module, "toaster")


def test_bound_float_module_builds_too(residual):
    compiled = build(bind_params(residual.module), "host")
    np.testing.assert_allclose(
        run(compiled.executable, residual.x), residual.expected(), rtol=1e-4, atol=1e-5
    )


def test_single_weights_are_pruned_before_the_channels(residual):
    sites = find_sites(residual.module)
    name = next(site.name for site in sites if site.kind == "conv2d")
    policy = CompressionPolicy(sites={name: SitePolicy(weight_pruning_ratio=0.5)})
    weight = get_params(compress(residual.module, policy))[f"{name}.weight"]
    before = get_params(residual.module)[f"{name}.weight"]
    assert np.count_nonzero(weight == 0) == weight.size // 2
    assert np.abs(before[weight == 0]).max() <= np.abs(before[weight != 0]).min()
