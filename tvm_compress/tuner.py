"""Tunes a model's kernels on a device: measures the ways to compute each layer, and keeps the fastest.

The choices are those of the schedules themselves (schedules.candidates): which algorithm, which register
tile, which blocks. What they choose by default is always among those that are measured, and wins ties.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import tvm

from tvm_compress.compressor import realize
from tvm_compress.errors import DeviceError, SettingError, TuningError
from tvm_compress.files import write_text
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build, candidates, lower
from tvm_compress.rpc.device import Device
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.schedules.choices import Choice, Choices, choice_of, layer_key, round_robin
from tvm_compress.schedules.kernel_key import SCHEDULES_VERSION, target_digest
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.tuning import TunedLayer, Tuning
from tvm_compress.search.latency import LatencyMeter

# Choices of a layer, the fastest so far, that are measured once more beside its default.
FINALISTS = 3
# What a choice must gain on its default where times are of a clock: less may be chance.
LEAST_GAIN = 0.01

Progress = Callable[[str], None]


@dataclass
class _Layer:
    """A layer while it is tuned.

    Attributes
    ----------
    default
        What the schedules choose.
    choices
        What is tried, the default first.
    kernels
        By choice, the kernels that it gives; kernels differ in what is fused.
    """

    default: Choice
    choices: list[Choice]
    kernels: dict[Choice, list[KernelInfo]]

    def value(self, choice: Choice, times: Mapping[str, float]) -> float:
        """What all calls of the layer take by a choice; infinite where a kernel failed."""
        return sum(times.get(kernel.key, math.inf) * kernel.count for kernel in self.kernels[choice])


def tune_model(
    model: Model,
    target: str | tvm.target.Target,
    device: Device,
    path: str | Path,
    trials: int = 8,
    progress: Progress | None = None,
) -> list[TunedLayer]:
    """Tune the layers of a model for a target, and add what was found to the database at `path`.

    Layers that the database knows, for this target, device and versions, with as many trials, are left.

    Parameters
    ----------
    model
        Dense or compressed.
    device
        Where kernels are measured; its threads are theirs.
    trials
        Choices that are measured for each layer, beside its default.
    progress
        Called with a text when something begins.

    Returns
    -------
    The model's layers, whether found now or known before, in the order of the model.

    Raises
    ------
    SettingError
        If `trials` is less than 1.
    TuningError
        If the file is no tuning database, or the model has no layer to tune.
    DeviceError
        If the device fails on the kernels of the schedules' own choice.
    """
    if trials < 1:
        raise SettingError(f"trials is {trials}, but must be 1 or more.")
    tell = progress or (lambda text: None)
    parsed = parse_target(target)
    tuning = Tuning.load(path) if Path(path).exists() else Tuning(source=str(path))
    module = realize(model.module)
    layers = find_layers(module, parsed, trials)
    if not layers:
        raise TuningError("This model has no layer whose kernel leaves a choice.", "Compile it as it is.")
    known = {
        key: one
        for key, one in tuning.for_target(parsed).items()
        if key in layers and one.tried >= len(layers[key].choices) and one.device == device.name
        and (one.unit, one.threads) == (device.unit, device.threads)
    }  # fmt: skip
    wanted = {key: layer for key, layer in layers.items() if key not in known}
    found: list[TunedLayer] = []
    if wanted:
        with TemporaryDirectory(prefix="tvm-compress-") as folder:
            store = MeasurementStore(Path(folder) / "measurements.sqlite")
            with LatencyMeter(device, parsed, store, model.input_spec.shape) as meter:
                found = _tune(module, wanted, meter, tell)
        write_text(path, tuning.merged(found).to_json())
    by_layer = known | {one.layer: one for one in found}
    return [by_layer[key] for key in layers]


def find_layers(module: tvm.IRModule, target: tvm.target.Target, trials: int) -> dict[str, _Layer]:
    """Return the layers of a module that leave a choice, each with its default and `trials` others."""
    possible = candidates(module, target)
    lanes = rules_for(target).fp32_lanes
    layers: dict[str, _Layer] = {}
    for key, kernels in _by_layer(module, target, Choices()).items():
        if key not in possible:
            continue
        # Where the weights decide, layers of one key have different defaults, and keep them.
        default, *others = {choice_of(kernel.info, lanes) for kernel in kernels}
        if others or not any(default in choices for choices in possible[key]):
            continue
        # The default's kernel first.
        lists = sorted(possible[key], key=lambda each: bool(each) and each[0].kernel != default.kernel)
        tried = [choice for choice in round_robin(lists) if choice != default][:trials]
        if tried:
            layers[key] = _Layer(default, [default, *tried], {default: kernels})
    return layers


def _by_layer(
    module: tvm.IRModule, target: tvm.target.Target, choices: Choices
) -> dict[str, list[KernelInfo]]:
    """Lower a module, and return its kernels by layer."""
    found: dict[str, list[KernelInfo]] = {}
    for kernel in kernel_infos(lower(module, target, tuning=choices), target):
        if "backend" in kernel.info:
            found.setdefault(layer_key(kernel.info), []).append(kernel)
    return found


def _tune(
    module: tvm.IRModule, layers: Mapping[str, _Layer], meter: LatencyMeter, tell: Progress
) -> list[TunedLayer]:
    lanes = rules_for(meter.target).fp32_lanes
    rounds = max(len(layer.choices) for layer in layers.values())
    for place in range(1, rounds):
        tell(f"lower choice {place} of {rounds - 1}")
        # All layers take their next choice at once: a layer's kernels do not depend on other layers'.
        tried = {key: layer.choices[place] for key, layer in layers.items() if place < len(layer.choices)}
        made = _by_layer(module, meter.target, Choices.of(tried))
        for key, choice in tried.items():
            kernels = made.get(key, [])
            # A choice that some weights rule out leaves those layers as they are.
            if kernels and all(choice_of(kernel.info, lanes) == choice for kernel in kernels):
                layers[key].kernels[choice] = kernels
    every = [kernel for layer in layers.values() for kernels in layer.kernels.values() for kernel in kernels]
    tell(f"measure {len({kernel.key for kernel in every})} kernels of {len(layers)} layers")
    times = _measure(meter, every)
    finalists = {key: _fastest(layer, times) for key, layer in layers.items()}
    tell("measure the fastest once more")
    chosen = [kernel for key, layer in layers.items() for c in finalists[key] for kernel in layer.kernels[c]]
    times = _measure(meter, chosen, again=True)
    found = [_decide(key, layer, finalists[key], times, meter) for key, layer in layers.items()]
    if all(one.choice == one.default for one in found):
        return found
    tell("measure the network beside its default")
    if network_ratio(module, Choices.of({one.layer: one.choice for one in found}), meter) < 1:
        return found
    # Kernels in a network find other data in the caches than those that are timed alone.
    tell("the network is not faster: the defaults stay")
    return [_with_default(one, layers[one.layer]) for one in found]


def network_ratio(module: tvm.IRModule, choices: Choices, meter: LatencyMeter) -> float:
    """Latency of a network by some choices over its default, timed in turns; infinite where it fails."""
    default = meter.set_dense(module, "default")
    result = meter.measure(build(module, meter.target, tuning=choices), "tuned")
    return result.value / default.value if result.ok else math.inf


def _with_default(one: TunedLayer, layer: _Layer) -> TunedLayer:
    kernels = tuple(sorted({kernel.key for kernel in layer.kernels[layer.default]}))
    return replace(one, choice=one.default, value=one.default_value, kernels=kernels)


def _measure(meter: LatencyMeter, kernels: Sequence[KernelInfo], again: bool = False) -> dict[str, float]:
    return {key: result.value for key, result in meter.time_kernels(kernels, again).items()}


def _fastest(layer: _Layer, times: Mapping[str, float]) -> list[Choice]:
    """The default, and the choices that were the fastest."""
    others = [choice for choice in layer.kernels if choice != layer.default]
    others.sort(key=lambda choice: layer.value(choice, times))
    return [layer.default, *(c for c in others[:FINALISTS] if layer.value(c, times) < math.inf)]


def _decide(
    key: str, layer: _Layer, finalists: Sequence[Choice], times: Mapping[str, float], meter: LatencyMeter
) -> TunedLayer:
    """Choose among choices that were measured together; the default, unless another gains on it."""
    values = {choice: layer.value(choice, times) for choice in finalists}
    default = values[layer.default]
    if default == math.inf:
        raise DeviceError(
            f"{meter.device.name} fails on the kernels that the schedules choose for the layer {key!r}.",
            "`tvm-compress device check` says whether the device works.",
        )
    best = min(values, key=lambda choice: values[choice])
    margin = LEAST_GAIN if meter.device.unit == "seconds" else 0.0
    choice = best if values[best] < (1 - margin) * default else layer.default
    return TunedLayer(
        layer=key,
        target=target_digest(meter.target),
        tvm=tvm.__version__,
        schedules=SCHEDULES_VERSION,
        choice=choice,
        default=layer.default,
        value=values[choice],
        default_value=default,
        kernels=tuple(sorted({kernel.key for kernel in layer.kernels[choice]})),
        device=meter.device.name,
        unit=meter.device.unit,
        threads=meter.device.threads,
        tried=len(layer.choices),
    )
