"""Choices of layers: each way computes the same, a kernel tells its choice, and what is none is refused."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.target import Target

from tests.schedules.test_int8 import make_site, random_site
from tests.schedules.test_threads import float_site
from tests.schedules.test_winograd_int8 import SAME
from tvm_compress.errors import KernelError
from tvm_compress.schedules import reference
from tvm_compress.schedules.apply import fold_transposed_weights, kernel_infos, lower_to_kernels
from tvm_compress.schedules.candidates import layer_candidates
from tvm_compress.schedules.choices import NO_CHOICES, Choice, Choices, choice_of, layer_key, round_robin
from tvm_compress.schedules.target_rules import parse_target, rules_for

HOST, RPI4 = parse_target("host"), parse_target("raspberry-pi/4b-aarch64")


def dense(rows: int) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((rows, 48), "float32"))
    weight = np.random.default_rng(0).standard_normal((48, 40)).astype(np.float32)
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.matmul(x, relax.const(weight)))
        builder.emit_func_output(out)
    return builder.get()


def integers(scheme: str, bits: int, dtype: str = "uint8") -> tvm.IRModule:
    x, w, b = random_site(np.random.default_rng(0), (1, 9, 9, 32), (16, 32, 3, 3), dtype)
    limit = 2 ** (bits - 1) - 1
    w = np.where(w > 0, 1, -1).astype(np.int8) if bits == 1 else np.clip(w, -limit, limit)
    attrs = {"activation_bits": bits if scheme == "bitserial" else 8, "weight_bits": bits}
    return make_site(x, w, b, scheme=scheme, padding=SAME, **attrs)


# Without VNNI bytes of few bits have a kernel of their own.
NARROW = {"narrow"} if rules_for(HOST).isa in ("avx2", "avx512") else set()
# By name: a module of one layer, and the kernels that can compute it here and on the Raspberry Pi.
LAYERS: dict[str, tuple[Callable[[], tvm.IRModule], set[str], set[str]]] = {
    "3x3": (lambda: float_site((1, 12, 12, 16), 24, 3, 1), {"direct", "F2", "F4"}, {"direct", "F2", "F4"}),
    "strided": (lambda: float_site((1, 12, 12, 16), 24, 3, 2), {"direct"}, {"direct"}),
    "depthwise": (lambda: float_site((1, 12, 12, 16), 16, 3, 1, groups=16), {"depthwise"}, {"depthwise"}),
    "dense": (lambda: dense(3), {"direct"}, {"direct"}),
    "int8": (lambda: integers("int8", 8, "int8"), {"direct", "F2", "F4"}, {"direct", "F2", "F4"}),
    "few bits": (
        lambda: integers("bitserial", 2),
        {"direct", "popcount", "F2", "F4", *NARROW},
        {"direct", "lookup", "popcount", "F2", "F4"},
    ),
}


def lower_one(module: tvm.IRModule, target: Target, choices: Choices) -> tuple[tvm.IRModule, Choice]:
    """Lower a module of one layer; also what was chosen for it."""
    lowered = lower_to_kernels(module, target, choices=choices)
    (info,) = (info.info for info in kernel_infos(lowered, target) if "backend" in info.info)
    return lowered, choice_of(info, rules_for(target).fp32_lanes)


def run(lowered: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(relax.build(lowered, target=HOST), tvm.cpu())
    result: np.ndarray = machine["main"](tvm.runtime.tensor(x)).numpy()
    return result


@pytest.mark.parametrize("name", LAYERS)
def test_every_kernel_is_taken_as_chosen_and_gives_the_same(name: str) -> None:
    make, here, there = LAYERS[name]
    module = make()
    given = module["main"].params[0].ty
    shape, dtype = tuple(int(extent) for extent in given.shape), str(given.dtype)
    rng = np.random.default_rng(1)
    x = (
        rng.integers(0, 4, shape).astype(dtype)
        if "int" in dtype
        else rng.standard_normal(shape).astype(dtype)
    )
    expected = run(lower_to_kernels(module, HOST), x)
    for target, kernels in ((HOST, here), (RPI4, there)):
        ((key, ways),) = layer_candidates(fold_transposed_weights(module), rules_for(target)).items()
        assert kernels <= {choices[0].kernel for choices in ways}
        for choices in ways:
            # The best and the worst way to cut it, by the kernel's own estimate; other tests run the best.
            for choice in {choices[0], choices[-1]}:
                lowered, taken = lower_one(module, target, Choices.of({key: choice}))
                assert taken == choice
                if target is HOST and choice == choices[-1]:
                    found = run(lowered, x)
                    if "int" in dtype:
                        np.testing.assert_array_equal(found, expected)
                    else:
                        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", [HOST, RPI4], ids=["host", "rpi4"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_default_is_a_candidate_and_chosen_it_gives_the_same_kernel(name: str, target: Target) -> None:
    module = LAYERS[name][0]()
    ((key, ways),) = layer_candidates(fold_transposed_weights(module), rules_for(target)).items()
    plain, default = lower_one(module, target, NO_CHOICES)
    assert any(choices[0] == default for choices in ways)
    chosen, taken = lower_one(module, target, Choices.of({key: default}))
    assert taken == default
    tvm.ir.assert_structural_equal(plain, chosen)


def test_other_layers_keep_their_kernels() -> None:
    module = float_site((1, 12, 12, 16), 24, 3, 2)
    other = kernel_infos(lower_to_kernels(float_site((1, 9, 9, 16), 24, 3, 2), HOST), HOST)[0]
    choices = Choices.of({layer_key(other.info): Choice("direct", (1, 1, 1))})
    tvm.ir.assert_structural_equal(
        lower_to_kernels(module, HOST), lower_to_kernels(module, HOST, choices=choices)
    )


def test_a_cut_that_does_not_exist_is_an_error() -> None:
    module = LAYERS["int8"][0]()
    key = next(iter(layer_candidates(module, rules_for(HOST))))
    with pytest.raises(KernelError, match=r"no way that this kernel can be cut.*Tune it again"):
        lower_to_kernels(module, HOST, choices=Choices.of({key: Choice("direct", (7, 7, 99))}))


def test_an_algorithm_that_the_weights_forbid_is_left_to_the_rules() -> None:
    """Largest weights in many channels: F4 could not be proven exact."""
    x = np.zeros((1, 8, 8, 256), np.int8)
    w, b = np.full((16, 256, 3, 3), 127, np.int8), np.zeros(16, np.int32)
    module = make_site(x, w, b, padding=SAME)
    ((key, ways),) = layer_candidates(module, rules_for(HOST)).items()
    assert "F4" not in {choices[0].kernel for choices in ways}
    _, taken = lower_one(module, HOST, Choices.of({key: Choice("F4", (1, 1, 1, 1))}))
    assert taken.kernel != "F4"
    np.testing.assert_array_equal(
        run(lower_to_kernels(module, HOST), x), reference.conv2d(x, w, b, 0, padding=SAME)
    )


def test_compact_takes_no_winograd_though_chosen() -> None:
    module = LAYERS["3x3"][0]()
    ((key, ways),) = layer_candidates(module, rules_for(HOST)).items()
    choice = next(choices[0] for choices in ways if choices[0].kernel == "F4")
    lowered = lower_to_kernels(module, HOST, compact=True, choices=Choices.of({key: choice}))
    assert kernel_infos(lowered, HOST)[0].features["backend_winograd"] == 0


def test_the_best_of_each_kernel_comes_first() -> None:
    first, second = ([Choice(name, (number,)) for number in range(3)] for name in ("a", "b"))
    assert round_robin([first, second[:1]]) == [first[0], second[0], *first[1:]]
