"""Runs canonical modules at the stages float, QDQ and integer in numpy: slow, and obvious."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.passes.annotate_quantization import site_calls
from tvm_compress.passes.graph import bindings, operator, weight_parameter
from tvm_compress.passes.params import get_params
from tvm_compress.passes.sites import site_name

Watch = Callable[[relax.Var, np.ndarray], np.ndarray]


def windows(x: np.ndarray, kernel, strides, padding, dilation, fill: float) -> np.ndarray:
    """Patches [N, OH, OW, C, KH, KW] of NHWC data padded with `fill`."""
    top, left, bottom, right = padding
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    patches = np.lib.stride_tricks.sliding_window_view(x, extent, axis=(1, 2))
    return patches[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]


def conv2d(x, w, attrs) -> np.ndarray:
    groups = int(attrs["groups"])
    strides, padding, dilation = ([int(v) for v in attrs[key]] for key in ("strides", "padding", "dilation"))
    patches = windows(x, w.shape[2:], strides, padding, dilation, 0)
    pieces = zip(np.split(patches, groups, axis=3), np.split(w, groups, axis=0), strict=True)
    return np.concatenate([np.einsum("nhwcij,ocij->nhwo", p, f) for p, f in pieces], axis=-1)


def max_pool(x, attrs) -> np.ndarray:
    assert attrs["layout"] == "NHWC"
    keys = ("pool_size", "strides", "padding", "dilation")
    kernel, strides, padding, dilation = ([int(v) for v in attrs[key]] for key in keys)
    low = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    return windows(x, kernel, strides, padding, dilation, low).max(axis=(-1, -2))


def window_sum(x, attrs) -> np.ndarray:
    kernel, strides, padding = ([int(v) for v in attrs[key]] for key in ("pool_size", "strides", "padding"))
    return windows(x, kernel, strides, padding, (1, 1), 0).sum(axis=(-1, -2))


def avg_pool(x, attrs) -> np.ndarray:
    total, ones = window_sum(x, attrs), window_sum(np.ones_like(x), attrs)
    return total / (np.prod([int(v) for v in attrs["pool_size"]]) if attrs["count_include_pad"] else ones)


def along(values, axis: int, ndim: int) -> np.ndarray:
    values = np.asarray(values)
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def quantize(x, scale, zero_point, attrs) -> np.ndarray:
    axis, dtype = int(attrs["axis"]), str(attrs["out_dtype"])
    q = np.rint(x.astype(np.float32) / along(scale, axis, x.ndim).astype(np.float32)) + along(
        zero_point, axis, x.ndim
    )
    return np.clip(q, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


def dequantize(q, scale, zero_point, attrs) -> np.ndarray:
    axis = int(attrs["axis"])
    return (q.astype(np.float64) - along(zero_point, axis, q.ndim)) * along(scale, axis, q.ndim).astype(
        np.float64
    )


def batch_norm(x, gamma, beta, mean, variance, attrs) -> tuple[np.ndarray]:
    return ((x - mean) / np.sqrt(variance + attrs["epsilon"]) * gamma + beta,)


def integers_quantize(x, attrs) -> np.ndarray:
    q = np.rint(x.astype(np.float32) / np.float32(attrs["scale"])) + attrs["zero_point"]
    return np.clip(q, attrs["qmin"], attrs["qmax"]).astype(str(attrs["dtype"]))


def requantize(x, multiplier, attrs) -> np.ndarray:
    assert x.dtype == np.int32
    assert multiplier.dtype == np.int32
    exact = x.astype(object) * multiplier.astype(object)  # Python's integers
    shift = int(attrs["shift"])
    half = 2 ** (shift - 1) if shift else 0
    rounded = np.where(exact < 0, -((-exact + half) // 2**shift), (exact + half) // 2**shift)
    clipped = np.clip(rounded + int(attrs["zero_point"]), int(attrs["qmin"]), int(attrs["qmax"]))
    return clipped.astype(str(attrs["dtype"]))


def check_int32(x: np.ndarray) -> np.ndarray:
    assert np.abs(x).max() < 2**31
    return x.astype(np.int32)


def integer_conv2d(x, w, b, attrs) -> np.ndarray:
    return check_int32(conv2d(x.astype(np.int64) - attrs["zero_point"], w.astype(np.int64), attrs) + b)


def integer_dense(x, w, b, attrs) -> np.ndarray:
    return check_int32((x.astype(np.int64) - attrs["zero_point"]) @ w.astype(np.int64).T + b)


OPERATORS: dict[str, Callable[..., Any]] = {
    "relax.nn.conv2d": conv2d,
    "relax.matmul": lambda x, w, _: x @ w,
    "relax.permute_dims": lambda x, a: np.transpose(x, a["axes"] and [int(v) for v in a["axes"]]),
    "relax.add": lambda x, y, _: check_int32(x.astype(np.int64) + y) if x.dtype == np.int32 else x + y,
    "relax.subtract": lambda x, y, _: x - y,
    "relax.multiply": lambda x, y, _: x * y,
    "relax.nn.relu": lambda x, _: np.maximum(x, 0),
    "relax.sigmoid": lambda x, _: 1 / (1 + np.exp(-x)),
    "relax.clip": lambda x, low, high, _: np.clip(x, low, high).astype(x.dtype),
    "relax.nn.batch_norm": batch_norm,
    "relax.nn.max_pool2d": max_pool,
    "relax.nn.avg_pool2d": avg_pool,
    "relax.nn.batch_flatten": lambda x, _: x.reshape(x.shape[0], -1),
    "relax.concat": lambda parts, a: np.concatenate(parts, axis=int(a["axis"])),
    "relax.mean": lambda x, a: x.mean(axis=tuple(int(v) for v in a["axis"]), keepdims=bool(a["keepdims"])),
    "relax.divide": lambda x, y, _: x / y,
    "relax.tanh": lambda x, _: np.tanh(x),
    "relax.nn.silu": lambda x, _: x / (1 + np.exp(-x)),
    "relax.sum": lambda x, a: check_int32(
        x.sum(axis=tuple(int(v) for v in a["axis"]), keepdims=bool(a["keepdims"]), dtype=np.int64)
    ),
    "relax.astype": lambda x, a: x.astype(str(a["dtype"])),
    "relax.quantize": quantize,
    "relax.dequantize": dequantize,
    "tvm_compress.binarize": lambda w, _: np.where(w >= 0, 1, -1).astype(np.int8),
    "tvm_compress.quantize": integers_quantize,
    "tvm_compress.dequantize": lambda x, s, a: (x.astype(np.float64) - a["zero_point"]) * s,
    "tvm_compress.requantize": requantize,
    "tvm_compress.window_sum": lambda x, a: check_int32(window_sum(x.astype(np.int64), a)),
    "tvm_compress.table": lambda x, values, _: values[x.astype(int) - np.iinfo(x.dtype).min],
    "tvm_compress.conv2d": integer_conv2d,
    "tvm_compress.dense": integer_dense,
}


def run(module: IRModule, x: np.ndarray, watch: Watch | None = None) -> np.ndarray:
    """Run `main` on one input of any batch; `watch(var, value)` sees each value and may replace it."""
    function = module["main"]
    params = get_params(module) if function.attrs and "params" in function.attrs else {}
    env: dict[relax.Var, Any] = {function.params[0]: x.astype(np.float64)}
    env |= {var: params[var.name] for var in list(function.params)[1:]}

    def value_of(expr: relax.Expr) -> Any:
        if isinstance(expr, relax.Var):
            return env[expr]
        if isinstance(expr, relax.Tuple):
            return [value_of(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return value_of(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.Call):
            return OPERATORS[expr.op.name](*[value_of(arg) for arg in expr.args], expr.attrs)
        if isinstance(expr, tvm.ir.GenericConst):
            return expr.value.numpy()
        return float(expr.value)

    for var, expr in bindings(function):
        value = value_of(expr)
        env[var] = value if watch is None else watch(var, value)
    return env[function.body.body]


def calls(module: IRModule, name: str) -> list[relax.Call]:
    """All calls of an operator, in order."""
    return [value for _, value in bindings(module["main"]) if operator(value) == name]


def operators(module: IRModule) -> list[str]:
    """Names of all operators, in order."""
    names = [operator(value) for _, value in bindings(module["main"])]
    return [name.removeprefix("relax.") for name in names if name]


def calibrate(module: IRModule, x: np.ndarray) -> dict[str, tuple[float, float]]:
    """Smallest and largest value that each site of a float module reads."""
    tensors: dict[relax.Var, list[float]] = {call.tensor: [] for call in site_calls(module["main"])}
    names = {call.name: call.tensor for call in site_calls(module["main"])}

    def watch(var: relax.Var, value: np.ndarray) -> np.ndarray:
        if var in tensors:
            tensors[var] = [float(value.min()), float(value.max())]
        return value

    run(module, x, watch)
    return {name: (tensors[var][0], tensors[var][1]) for name, var in names.items()}


def site_inputs(module: IRModule, x: np.ndarray) -> dict[str, np.ndarray]:
    """Integers that each site of an integer module reads; under "SITE stored" what it requantizes from."""
    values: dict[relax.Var, np.ndarray] = {}

    def watch(var: relax.Var, value: np.ndarray) -> np.ndarray:
        values[var] = value
        return value

    run(module, x, watch)
    sites = calls(module, "tvm_compress.conv2d") + calls(module, "tvm_compress.dense")
    found = {str(call.attrs["site"]): values[call.args[0]] for call in sites}
    defined = dict(bindings(module["main"]))
    for call in sites:
        expr = call.args[0]
        while operator(defined.get(expr)) in ("tvm_compress.requantize", "relax.subtract"):
            expr = defined[expr].args[0]
        if operator(defined.get(expr)) == "relax.astype":
            found[f"{call.attrs['site']} stored"] = values[defined[expr].args[0]]
    return found


def run_forced(
    qdq: IRModule, x: np.ndarray, integers: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, int]]:
    """Run a QDQ module with given integers at its sites' inputs.

    Returns its result, and for each site by how many steps its own integers differ at most. So each layer is
    compared on the same input, and differences do not add up over the layers.
    """
    defined = dict(bindings(qdq["main"]))
    # Dequantized tensor -> the sites that read it, and those that quantize it a second time.
    sites: dict[relax.Var, list[str]] = {}
    for value in defined.values():
        if operator(value) in ("relax.nn.conv2d", "relax.matmul"):
            weight = weight_parameter(value.args[1], defined, qdq["main"])
            assert weight is not None
            name = site_name(weight.name)
            sites.setdefault(value.args[0], []).append(name)
            expr = value.args[0]
            for wanted in ("relax.dequantize", "relax.clip", "relax.quantize"):
                expr = defined[expr].args[0] if operator(defined.get(expr)) == wanted else None
            if expr is not None:
                sites.setdefault(expr, []).append(f"{name} stored")
    params = get_params(qdq)
    differences: dict[str, int] = {}
    values: dict[relax.Var, np.ndarray] = {}

    def watch(var: relax.Var, value: np.ndarray) -> np.ndarray:
        values[var] = value
        names = [name for name in sites.get(var, []) if name in integers]
        if not names:
            return value
        call = defined[var]
        own, wanted = values[call.args[0]].astype(int), integers[names[0]].astype(int)
        for name in names:
            differences[name] = int(np.abs(own - integers[name]).max())
        return dequantize(wanted, params[call.args[1].name], call.args[2].value.numpy(), call.attrs)

    return run(qdq, x, watch), differences
