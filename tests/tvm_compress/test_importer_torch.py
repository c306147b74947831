"""Torch modules and exported programs as canonical Relax modules."""

from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from tvm_compress.errors import ModelError, UnsupportedOperatorError
from tvm_compress.model import Model, load_model
from tvm_compress.passes.params import bind_params, get_params, get_stage
from tvm_compress.passes.sites import find_sites


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6())
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in self.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.rand(value.shape, generator=generator) + 0.5 * name.endswith("var"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.pool(torch.relu(x + self.branch(x))))


def run(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    executable = relax.build(bind_params(module), "llvm")
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


EXAMPLE = (torch.zeros(1, 2, 8, 8),)
SITES = ["stem.0", "branch.0", "head.1", "head.3"]


def test_module_is_canonical_and_computes_the_same() -> None:
    network = Residual()
    model = Model.from_torch(network, EXAMPLE, mean=(0.1, 0.2), std=(0.3, 0.4), metadata={"note": "here"})
    assert get_stage(model.module) == "float"
    assert [site.name for site in find_sites(model.module)] == SITES
    state = {k: v.numpy() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    params = get_params(model.module)
    assert params.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(params[name], value)
    assert model.input_spec.shape == (1, 2, 8, 8)
    assert (model.input_spec.mean, model.input_spec.std) == ((0.1, 0.2), (0.3, 0.4))
    assert model.class_names == ("0", "1", "2")
    assert model.metadata == {"source": "torch:Residual", "note": "here"}
    x = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.eval()(x).numpy()
    np.testing.assert_allclose(run(model.module, x.numpy()), expected, rtol=1e-5, atol=1e-5)


def test_mode_is_given_back_and_values_are_copied() -> None:
    network = Residual().train()
    network.branch.eval()
    model = Model.from_torch(network, (torch.zeros(5, 2, 8, 8),))
    assert network.training
    assert network.stem.training
    assert not network.branch.training
    before = get_params(model.module)["head.3.bias"].copy()
    with torch.no_grad():
        network.get_parameter("head.3.bias").add_(1)
    np.testing.assert_array_equal(get_params(model.module)["head.3.bias"], before)


def test_dynamic_batch_becomes_one() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Residual().eval(), (torch.zeros(3, 2, 8, 8),), dynamic_shapes=({0: batch},))
    module = Model.from_exported_program(program).module
    tvm.ir.assert_structural_equal(module, Model.from_torch(Residual(), EXAMPLE).module)


def test_pt2_file(tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    torch.export.save(torch.export.export(Residual().eval(), EXAMPLE), path)
    model = load_model(path, class_names=("a", "b", "c"), mean=(0.5,), std=(2.0,))
    assert [site.name for site in find_sites(model.module)] == SITES
    assert (model.class_names, model.input_spec.std) == (("a", "b", "c"), (2.0,))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a readable exported program"):
        load_model(path)


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_operator_that_the_importer_lacks() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(128, 3), Bessel()))
    with pytest.raises(UnsupportedOperatorError, match=r"'special_bessel_j0\.default' of layer '1\.1'"):
        Model.from_torch(network, EXAMPLE)


def test_operator_that_the_tool_lacks() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(UnsupportedOperatorError, match=r"relax\."):
        Model.from_torch(network, EXAMPLE)


@pytest.mark.parametrize("name", ["branch.0.weight", "stem.1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_cannot_be_used(name: str, value: float) -> None:
    network = Residual()
    network.state_dict()[name].view(-1)[1] = value
    with pytest.raises(ModelError, match=f"'{name}' holds 1 values"):
        Model.from_torch(network, EXAMPLE)


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) + y.flatten(1)


class TwoOutputs(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.flatten(1), x.flatten(1) + 1


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


@pytest.mark.parametrize(
    ("network", "inputs", "message"),
    [
        (TwoInputs(), (*EXAMPLE, *EXAMPLE), r"2 inputs \(x, y\)"),
        (TwoOutputs(), EXAMPLE, "not one tensor of logits"),
        (nn.Conv2d(2, 3, 3), EXAMPLE, "not one tensor of logits"),
        (nn.Linear(4, 3), (torch.zeros(1, 4),), r"not float32 \[N, C, H, W\]"),
        (
            Residual().double(),
            (torch.zeros(1, 2, 8, 8, dtype=torch.float64),),
            "is torch.float64, not float32",
        ),
        (Residual(), (torch.zeros(1, 3, 8, 8),), "torch.export cannot export Residual"),
        (DataDependent(), EXAMPLE, "torch.export cannot export DataDependent"),
    ],
)
def test_modules_that_do_not_fit(network: nn.Module, inputs: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Model.from_torch(network, inputs)


def test_fixed_batch_is_refused() -> None:
    program = torch.export.export(Residual().eval(), (torch.zeros(4, 2, 8, 8),))
    with pytest.raises(ModelError, match="fixed to batches of 4 images"):
        Model.from_exported_program(program)
