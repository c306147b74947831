"""The twin of a Relax module: the same function, computed by torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from tvm import relax

from tvm_compress.errors import DataError, ModelError, UnsupportedOperatorError
from tvm_compress.passes.params import get_params, get_stage, set_params
from tvm_compress.passes.sites import site_name
from tvm_compress.twin.float_ops import FLOAT_OPERATORS, BatchNormMode, TensorFunction
from tvm_compress.twin.integer_ops import INTEGER_OPERATORS
from tvm_compress.twin.program import Node, Program, read_program
from tvm_compress.twin.quantized_ops import (
    FAKE_BINARIZE,
    FAKE_QUANTIZE,
    QUANTIZED_OPERATORS,
    fuse_fake_quantization,
)

OPERATORS = FLOAT_OPERATORS | QUANTIZED_OPERATORS | INTEGER_OPERATORS

_LAYERS = {"relax.nn.conv2d", "relax.matmul", "tvm_compress.conv2d", "tvm_compress.dense"}
# What may stand between a weight parameter and the layer that uses it.
_WEIGHT_CHAIN = {
    "relax.permute_dims",
    "relax.quantize",
    "relax.clip",
    "relax.dequantize",
    "tvm_compress.binarize",
    "tvm_compress.lookup",
    FAKE_QUANTIZE,
    FAKE_BINARIZE,
}


@dataclass(frozen=True)
class _Step:
    function: TensorFunction
    inputs: tuple[int, ...]
    output: int
    free: tuple[int, ...]


@dataclass(frozen=True)
class SiteRecord:
    """What one run of a batch showed of a layer with weights: its node, its input and its output."""

    node: Node
    input: torch.Tensor
    output: torch.Tensor


class Twin(torch.nn.Module):
    """Executes `main` of a module at stage float, annotated, qdq or integer with torch, for any batch size.

    The function is read once, at construction, into a list of torch calls. float32 parameters are
    `torch.nn.Parameter`s, except batch norms' running statistics, which are buffers; `tensors` holds them all
    by their dotted names. As with any torch module, `train()` makes batch norms use the statistics of the
    batch; a new twin is in evaluation mode.

    Attributes
    ----------
    stage
        The module's stage.
    tensors
        Every parameter and buffer by its name in the module (torch's own names forbid dots: "/" stands for
        them in `named_parameters`).
    sites
        Names of the layers with weights, in order of execution.

    Raises
    ------
    UnsupportedOperatorError
        If the module holds an operator that the twin lacks; names it and the layer.
    ModelError
        If `main` has several inputs or outputs, or parameters without values.
    """

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__()
        self.stage = get_stage(module) or "float"
        self._module = module
        program = read_program(module)
        fuse_fake_quantization(program)
        self._mode = BatchNormMode()
        self._batch_norm_frozen = False
        self._steps = _compile(program, self._mode)
        self._input_slot, self._output_slot = program.input_slots[0], program.output
        self._input_shape = _input_shape(module)
        self._layers = _find_layers(program)
        self._slots = program.variables
        self.sites = tuple(name for name, _ in self._layers.values())
        statistics = _statistics_slots(program)
        self._has_batch_norm = bool(statistics)
        self.tensors: dict[str, torch.Tensor] = {}
        self._initial: list[Any] = [None] * program.size
        for name, value in get_params(module).items():
            slot = program.parameters[name]
            self._initial[slot] = self.tensors[name] = self._hold(name, value, slot in statistics)
        for slot, value in program.constants.items():
            self._initial[slot] = _tensor(value)
        self.eval()

    def _hold(self, name: str, value: np.ndarray, buffer: bool) -> torch.Tensor:
        tensor = _tensor(value)
        key = name.replace(".", "/")
        if buffer or tensor.dtype != torch.float32:
            self.register_buffer(key, tensor)
            return tensor
        parameter = torch.nn.Parameter(tensor)
        self.register_parameter(key, parameter)
        return parameter

    def train(self, mode: bool = True) -> "Twin":
        """Switch batch norms to the statistics of the batch (unless they are frozen), or back."""
        super().train(mode)
        self._mode.batch_statistics = mode and not self._batch_norm_frozen
        return self

    def freeze_batch_norm(self, frozen: bool = True) -> None:
        """Keep the running statistics as they are, and in use, in training mode too."""
        self._batch_norm_frozen = frozen
        self.train(self.training)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that have gradients, by name."""
        return {name: t for name, t in self.tensors.items() if isinstance(t, torch.nn.Parameter)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output of a batch, float32 [N, C, H, W]."""
        return self._run(x, {})

    def _run(self, x: torch.Tensor, observers: Mapping[int, Callable[[torch.Tensor], None]]) -> torch.Tensor:
        values = list(self._initial)
        values[self._input_slot] = x
        if self._input_slot in observers:
            observers[self._input_slot](x)
        for step in self._steps:
            result = step.function(*[values[slot] for slot in step.inputs])
            values[step.output] = result
            if step.output in observers:
                observers[step.output](result)
            for slot in step.free:
                values[slot] = None
        return values[self._output_slot]

    def record(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, SiteRecord]]:
        """Compute the output of a batch, with what each site saw and gave, for derivatives at the sites.

        Raises
        ------
        ModelError
            Where a weight serves two layers: what it saw is then not one tensor.
        """
        inputs: dict[int, torch.Tensor] = {}
        outputs: dict[int, torch.Tensor] = {}
        observers: dict[int, Callable[[torch.Tensor], None]] = {
            node.inputs[0]: partial(inputs.__setitem__, node.inputs[0]) for _, node in self._layers.values()
        }
        # A layer's output may be another's input: both are kept.
        for slot in self._layers:
            taken = observers.get(slot)
            observers[slot] = partial(_keep_both, outputs, slot, taken)
        result = self._run(x, observers)
        records: dict[str, SiteRecord] = {}
        for slot, (name, node) in self._layers.items():
            if name in records:
                raise ModelError(f"The weights of {name!r} serve two layers.", "Give each its own copy.")
            records[name] = SiteRecord(node, inputs[node.inputs[0]], outputs[slot])
        return result, records

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def _batches(self, x: np.ndarray, batch_size: int) -> Iterator[torch.Tensor]:
        """Cut inputs into batches of near-equal sizes, none larger than `batch_size`."""
        if x.ndim != len(self._input_shape) or tuple(x.shape[1:]) != self._input_shape[1:]:
            raise DataError(
                f"The model's input is [N, {', '.join(map(str, self._input_shape[1:]))}], "
                f"the data's shape is {list(x.shape)}."
            )
        if len(x) == 0:
            raise DataError("There are no images to run the model on.")
        for part in np.array_split(x, -(-len(x) // max(1, batch_size))):
            yield torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))

    def predict(self, x: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Return the output (logits) of inputs `x` [N, C, H, W], in evaluation mode.

        Raises
        ------
        DataError
            If `x` does not fit the input, or is empty.
        """
        with self._evaluating(), torch.inference_mode():
            return np.concatenate([self(batch).numpy() for batch in self._batches(x, batch_size)])

    def accuracy(self, x: np.ndarray, y: np.ndarray, batch_size: int = 256) -> float:
        """Return the share of `x` [N, C, H, W] whose largest logit stands at its label `y` [N]."""
        return float(np.mean(self.predict(x, batch_size).argmax(axis=1) == y))

    def loss(self, x: np.ndarray, y: np.ndarray, batch_size: int = 256) -> float:
        """Return the mean cross-entropy of `x` [N, C, H, W] with labels `y` [N], in evaluation mode."""
        logits = torch.from_numpy(self.predict(x, batch_size))
        return float(F.cross_entropy(logits, torch.as_tensor(y, dtype=torch.int64)))

    def gradients(self, x: np.ndarray, y: np.ndarray, batch_size: int = 256) -> dict[str, np.ndarray]:
        """Return the gradient of the mean cross-entropy over `x` [N, C, H, W], `y` [N], by parameter name.

        Taken in evaluation mode (batch norms use their running statistics), for every float parameter but
        the running statistics.

        Raises
        ------
        ModelError
            At the integer stage, which has no gradients.
        """
        self._require_float_arithmetic()
        names, parameters = zip(*self.trainable().items(), strict=True)
        totals = [np.zeros(tuple(p.shape), np.float64) for p in parameters]
        labels = torch.as_tensor(y, dtype=torch.int64)
        start = 0
        with self._evaluating(), torch.enable_grad():
            for batch in self._batches(x, batch_size):
                target = labels[start : start + len(batch)]
                start += len(batch)
                loss = F.cross_entropy(self(batch), target, reduction="sum")
                for total, gradient in zip(
                    totals, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
                ):
                    if gradient is not None:
                        total += gradient.numpy()
        return {name: (total / len(x)).astype(np.float32) for name, total in zip(names, totals, strict=True)}

    def site_inputs(
        self,
        x: np.ndarray,
        names: Sequence[str] | None = None,
        callback: Callable[[tuple[str, ...], torch.Tensor], None] | None = None,
        batch_size: int = 256,
        others: Mapping[str, relax.Var] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the input [N, ...] (NHWC) of each named site (all by default), in evaluation mode.

        With a callback nothing is kept: it is called for each batch and each tensor with the names of all the
        sites that take this very tensor, and the result is empty. `others` are further variables of the
        module's `main` to give, by names of their own.
        """
        wanted = set(self.sites if names is None else names)
        if unknown := wanted - set(self.sites):
            raise ModelError(f"The module has no sites {sorted(unknown)}; it has {list(self.sites)}.")
        takers: dict[int, tuple[str, ...]] = {}
        for name, node in self._layers.values():
            if name in wanted:
                takers[node.inputs[0]] = (*takers.get(node.inputs[0], ()), name)
        for name, var in (others or {}).items():
            takers[self._slots[var]] = (*takers.get(self._slots[var], ()), name)
        kept: dict[str, list[np.ndarray]] = {}

        def keep(sites: tuple[str, ...], value: torch.Tensor) -> None:
            for site in sites:
                kept.setdefault(site, []).append(value.numpy())

        observers = {slot: partial(callback or keep, sites) for slot, sites in takers.items()}
        with self._evaluating(), torch.no_grad():
            for batch in self._batches(x, batch_size):
                self._run(batch, observers)
        return {name: np.concatenate(parts) for name, parts in kept.items()}

    def trace(self, x: np.ndarray, batch_size: int = 256) -> dict[str, np.ndarray]:
        """Return what each site computes before anything follows, by name; NHWC or [N, O].

        At the integer stage these are the int32 accumulators.
        """
        kept: dict[str, list[np.ndarray]] = {name: [] for name in self.sites}
        self.site_outputs(x, lambda name, value: kept[name].append(np.array(value)), batch_size)
        return {name: np.concatenate(parts) for name, parts in kept.items()}

    def site_outputs(
        self, x: np.ndarray, callback: Callable[[str, torch.Tensor], None], batch_size: int = 256
    ) -> None:
        """Call back for each batch with what each site computes, in order of execution.

        The callback may change the tensor in place: what follows then reads the changed values.
        """
        observers = {slot: partial(callback, name) for slot, (name, _) in self._layers.items()}
        with self._evaluating(), torch.no_grad():
            for batch in self._batches(x, batch_size):
                self._run(batch, observers)

    def reestimate_batch_norm(self, x: np.ndarray, batch_size: int = 256) -> None:
        """Recompute the running statistics from `x` [N, C, H, W], without labels, by cumulative averaging.

        The old statistics are forgotten. Without batch norms this does nothing.
        """
        if not self._has_batch_norm:
            return
        self._require_float_arithmetic()
        seen = 0
        was_training = self.training
        super().train(True)
        self._mode.batch_statistics = True
        try:
            with torch.no_grad():
                for batch in self._batches(x, batch_size):
                    seen += len(batch)
                    self._mode.momentum = len(batch) / seen
                    self(batch)
        finally:
            self._mode.momentum = None
            self.train(was_training)

    def to_module(self) -> tvm.IRModule:
        """Return the module, at its stage, with the twin's parameters in it."""
        return set_params(self._module, {name: t.detach().numpy().copy() for name, t in self.tensors.items()})

    def _require_float_arithmetic(self) -> None:
        if self.stage == "integer":
            raise ModelError(
                "An integer module has no gradients and no batch norms.",
                "Train the float or QDQ module it was made from.",
            )


def _keep_both(
    outputs: dict[int, torch.Tensor],
    slot: int,
    taken: Callable[[torch.Tensor], None] | None,
    value: torch.Tensor,
) -> None:
    outputs[slot] = value
    if taken is not None:
        taken(value)


def _tensor(value: np.ndarray) -> torch.Tensor:
    """Copy into a tensor; kernels of convolutions in the layout that makes torch compute in NHWC."""
    tensor = torch.from_numpy(np.array(value))
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _input_shape(module: tvm.IRModule) -> tuple[int, ...]:
    return tuple(int(extent) for extent in module["main"].params[0].ty.shape)


def _compile(program: Program, mode: BatchNormMode) -> list[_Step]:
    """Build the function of each node, and find after which one each value is dead."""
    permanent = {*program.parameters.values(), *program.constants, program.output}
    last_use: dict[int, int] = {}
    for position, node in enumerate(program.nodes):
        for slot in (*node.inputs, node.output):
            last_use[slot] = position
    dying: dict[int, list[int]] = {}
    for slot, position in last_use.items():
        if slot not in permanent:
            dying.setdefault(position, []).append(slot)
    steps = []
    for position, node in enumerate(program.nodes):
        if node.op not in OPERATORS:
            raise UnsupportedOperatorError(
                f"The twin cannot compute the operator {node.op} ({node.layer}).",
                "Rewrite the layer with supported operators before importing the model.",
            )
        function = OPERATORS[node.op](node, mode)
        steps.append(_Step(function, node.inputs, node.output, tuple(dying.get(position, ()))))
    return steps


def _statistics_slots(program: Program) -> set[int]:
    """Slots of the running statistics of batch norms."""
    return {slot for node in program.nodes if node.op == "relax.nn.batch_norm" for slot in node.inputs[3:5]}


def _find_layers(program: Program) -> dict[int, tuple[str, Node]]:
    """Return name and node of every layer with weights, by its output's slot, in order of execution."""
    names = {slot: name for name, slot in program.parameters.items()}
    makers = {node.output: node for node in program.nodes}
    layers: dict[int, tuple[str, Node]] = {}
    for node in program.nodes:
        if node.op not in _LAYERS:
            continue
        slot = node.inputs[1]
        while slot in makers and makers[slot].op in _WEIGHT_CHAIN:
            slot = makers[slot].inputs[0]
        name = node.attr("site")
        if name is not None:
            layers[node.output] = (str(name), node)
        elif slot in names:
            layers[node.output] = (site_name(names[slot]), node)
        elif slot in program.constants:
            layers[node.output] = (f"site{len(layers)}", node)
    return layers
