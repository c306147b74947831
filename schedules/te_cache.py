"""Reuses the PrimFuncs of te functions: a search legalises networks of mostly the same kernels."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tvm import relax, tirx
from tvm.relax.utils import gen_call_tir_inputs

# By what `_key` gives: the function and the type of what a call of it returns.
_MADE: dict[tuple[Any, ...], tuple[tirx.PrimFunc, Any]] = {}
_MOST_MADE = 4096

_PLAIN = (bool, int, str, bytes, type(None), types.BuiltinFunctionType, type)


@runtime_checkable
class TeFacts(Protocol):
    """Something that te functions refer to, of which they read these facts only."""

    def te_facts(self) -> tuple[Any, ...]:
        """All that the code of a te function can depend on, in plain values."""
        ...


class ReusingBuilder:
    """A BlockBuilder whose `call_te` gives the PrimFunc of an equal call before, in any module.

    Calls are equal if the te functions' code and all values that they refer to are, and the arguments' types
    and names; the values of constant arguments are of no matter. Where a function refers to what cannot be
    compared, its PrimFunc is made anew.
    """

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def call_te(self, compute: Callable[..., Any], *args: Any, **settings: Any) -> relax.Expr:
        """See `relax.BlockBuilder.call_te`."""
        try:
            key = _key(compute, args, settings)
        except (TypeError, ValueError, RecursionError):
            return self._builder.call_te(compute, *args, **settings)
        hint = settings.pop("primfunc_name_hint", compute.__name__)
        tensors = [arg for arg in args if isinstance(arg, relax.Expr)]
        if key not in _MADE:
            if len(_MADE) >= _MOST_MADE:
                _MADE.clear()
            func, _, out_type = gen_call_tir_inputs(compute, *args, **settings)
            _MADE[key] = func, out_type
        func, out_type = _MADE[key]
        return relax.call_tir(self._builder.add_func(func, hint), tensors, out_type)


def _key(compute: Callable[..., Any], args: tuple[Any, ...], settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Key of a call; raises one of the three where something cannot be compared (see `frozen`)."""
    return frozen(compute), tuple(_argument(arg) for arg in args), frozen(settings)


def _argument(arg: Any) -> Any:
    if not isinstance(arg, relax.Expr):
        return frozen(arg)
    shape = tuple(int(extent) for extent in arg.ty.shape)
    return shape, str(arg.ty.dtype), arg.name if isinstance(arg, relax.Var) else ""


def frozen(value: Any) -> Any:
    """Return a hashable value that equals another's only if te functions cannot tell the two apart.

    Raises
    ------
    TypeError
        Where nothing is known of the value's type.
    ValueError, RecursionError
        Where a function refers to what is not there yet, or to itself.
    """
    if isinstance(value, _PLAIN):
        # 1 and True are equal, but not the same constants.
        return type(value), value
    if isinstance(value, float):
        # Nor are 0.0 and -0.0.
        return type(value), value.hex()
    if isinstance(value, np.generic):
        return str(value.dtype), value.tobytes()
    if isinstance(value, (tuple, list)):
        return type(value), tuple(frozen(one) for one in value)
    if isinstance(value, Mapping):
        return type(value), tuple((frozen(key), frozen(one)) for key, one in value.items())
    if isinstance(value, np.ndarray):
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).digest()
        return value.shape, str(value.dtype), digest
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        given = (value.__defaults__, value.__kwdefaults__, cells)
        return value.__module__, value.__qualname__, value.__code__, frozen(given)
    if isinstance(value, functools.partial):
        return functools.partial, frozen((value.func, value.args, value.keywords))
    if isinstance(value, TeFacts):
        return type(value), frozen(value.te_facts())
    if dataclasses.is_dataclass(value):
        return type(value), frozen([getattr(value, field.name) for field in dataclasses.fields(value)])
    raise TypeError(f"What a te function sees of a {type(value).__name__} is not known.")
