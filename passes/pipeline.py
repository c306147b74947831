"""The order of the passes: the only place that knows it."""

import functools
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tvm
from tvm import IRModule, relax
from tvm.target import Target

from tvm_compress.errors import ModelError, PolicyError
from tvm_compress.passes.annotate_quantization import ActivationRanges, AnnotateQuantization
from tvm_compress.passes.canonicalize import Canonicalize
from tvm_compress.passes.codebook_weights import CodebookWeights
from tvm_compress.passes.factorize import Factorize
from tvm_compress.passes.fold_batch_norm import FoldBatchNorm
from tvm_compress.passes.graph import bindings, operator
from tvm_compress.passes.insert_qdq import InsertQDQ
from tvm_compress.passes.machine_code import build_executable
from tvm_compress.passes.params import bind_params, get_stage, require_stage, with_stage
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.prune_channels import PruneChannels
from tvm_compress.passes.prune_weights import PruneWeights, find_masks
from tvm_compress.passes.realize_integer import RealizeInteger
from tvm_compress.passes.sites import find_sites
from tvm_compress.schedules.apply import (
    KernelInfo,
    fold_transposed_weights,
    kernel_infos,
    lower_to_kernels,
)
from tvm_compress.schedules.candidates import check_kernels, layer_candidates
from tvm_compress.schedules.choices import NO_CHOICES, Choice, Choices
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.tuning import Tuning

TargetLike: TypeAlias = str | Mapping[str, Any] | Target
Calibrate: TypeAlias = Callable[[IRModule], ActivationRanges]
Folder: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Compiled:
    """A module built for a target.

    Attributes
    ----------
    executable
        Takes the inputs, NCHW float32, and gives the outputs: the VM function `main`.
    kernels
        What it is made of.
    module
        The lowered module that it was built from.
    target
        The target it was built for.
    """

    executable: relax.VMExecutable
    kernels: list[KernelInfo]
    module: IRModule
    target: Target

    def export(self, path: Folder, fcompile: Callable[..., None] | None = None) -> Path:
        """Write the library to a file, which is never seen half-written.

        `fcompile(output, objects, options=None, **kw)` links for another machine than this one; None takes
        the host's compiler.
        """
        path = Path(path)
        link = fcompile and _with_triple(fcompile, self.target)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
            unfinished = Path(folder) / path.name
            self.executable.export_library(str(unfinished), fcompile=link)
            os.replace(unfinished, path)
        return path


def _with_triple(fcompile: Callable[..., None], target: Target) -> Callable[..., None]:
    """Let a linking function say what it links for.

    `export_library` asks it, to make the constants' object by LLVM: without, it writes them as C, which takes
    seconds to compile and minutes where they are large.
    """
    link = functools.wraps(fcompile)(lambda *objects, **options: fcompile(*objects, **options))
    triple = str(target.attrs.get("mtriple", "")) or f"{platform.machine()}-linux-gnu"
    link.get_target_triple = lambda: triple  # type: ignore[attr-defined]
    return link


class _Phases:
    """Applies passes, and writes the module's script after each into a folder, if there is one."""

    def __init__(self, folder: Folder | None) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, phase: str, change: Any, module: IRModule) -> IRModule:
        """Give the module after a pass (or function); files are numbered on from those in the folder."""
        module = change(module)
        if self._folder is not None:
            number = len(list(self._folder.glob("[0-9][0-9]_*.py")))
            (self._folder / f"{number:02d}_{phase}.py").write_text(module.script(show_meta=False) + "\n")
        return module


def compress(
    module: IRModule,
    policy: CompressionPolicy,
    scores: Mapping[str, np.ndarray] | None = None,
    calibration: ActivationRanges | Calibrate | None = None,
    dump: Folder | None = None,
) -> IRModule:
    """Apply a policy: float -> pruned float -> QDQ, or float where nothing is quantized.

    Parameters
    ----------
    module
        A float module, unpruned (what an importer gives is canonicalised first).
    scores
        See `PruneChannels`.
    calibration
        Ranges of the *pruned* module's activations, or a function that gives them for the pruned module.
    dump
        Folder for the module's script after each phase.

    Raises
    ------
    PolicyError
        Where the policy does not fit the module, or sites are quantized without calibration.
    """
    run = _Phases(dump)
    if not get_stage(module):
        module = run("canonicalize", Canonicalize(), module)
    require_stage(module, "float", what="compress")
    sites = find_sites(module)
    policy.check(sites)
    quantized = [site.name for site in sites if policy[site.name].quantized]
    if quantized and calibration is None:
        raise PolicyError(
            f"Site {quantized[0]!r} is quantized, but there is no calibration.",
            "Give the ranges of its input (tvm_compress.calibration.calibrate).",
        )
    masks = find_masks(module, policy)
    if masks:
        module = run("prune_weights", PruneWeights(masks), module)
    module = run("prune_channels", PruneChannels(policy, scores), module)
    if any(site.rank is not None for site in policy.sites.values()):
        module = run("factorize", Factorize(policy), module)
    stored = any(site.codebook_bits for site in policy.sites.values())
    if not quantized:
        return run("codebook_weights", CodebookWeights(policy), module) if stored else module
    ranges = calibration(module) if callable(calibration) else calibration
    assert ranges is not None
    module = run("annotate_quantization", AnnotateQuantization(policy, ranges), module)
    module = run("insert_qdq", InsertQDQ(), module)
    return run("codebook_weights", CodebookWeights(policy), module) if stored else module


def lower(
    module: IRModule,
    target: TargetLike,
    dump: Folder | None = None,
    compact: bool = False,
    tuning: Folder | Tuning | Choices | None = None,
) -> IRModule:
    """Choose and schedule the kernels: float, qdq or integer -> kernels; parameters become constants.

    Parameters
    ----------
    compact
        Rule out kernels that are faster for keeping weights in a larger form.
    tuning
        What was measured to be the fastest for single layers: a tuning database, or the path of one. What it
        has not, the rules decide. A `TuningWarning` tells where it has nothing for this target and version.

    Raises
    ------
    TargetError
        Where the target is unknown.
    KernelError
        Where a site has no kernel.
    TuningError
        Where the tuning database cannot be read, or names a kernel that there is not.
    """
    run = _Phases(dump)
    parsed = parse_target(target)
    bound = _bind(module, run)
    choices = _choices(tuning, parsed)

    def to_kernels(one: IRModule) -> IRModule:
        return with_stage(lower_to_kernels(one, parsed, compact, choices), "kernels")

    return run("kernels", to_kernels, bound)


def _choices(tuning: Folder | Tuning | Choices | None, target: Target) -> Choices:
    if tuning is None:
        return NO_CHOICES
    if isinstance(tuning, Choices):
        return tuning
    choices = (tuning if isinstance(tuning, Tuning) else Tuning.load(Path(tuning))).choices(target)
    check_kernels(choices)
    return choices


def candidates(module: IRModule, target: TargetLike) -> dict[str, list[list[Choice]]]:
    """Return what `lower` can choose from for each layer, see `schedules.candidates.layer_candidates`."""
    bound = fold_transposed_weights(_bind(module, _Phases(None)))
    return layer_candidates(bound, rules_for(parse_target(target)))


def _bind(module: IRModule, run: _Phases) -> IRModule:
    """Bring a module of any stage to constants for parameters, as the kernels need it."""
    require_stage(module, "float", "qdq", "integer", what="lower")
    if get_stage(module) != "integer":
        # In a QDQ module only the fp32 sites' batch norms: the quantized sites' go with their realisation.
        module = run("fold_batch_norm", FoldBatchNorm(), module)
    if get_stage(module) == "qdq":
        module = run("realize_integer", RealizeInteger(), module)
    module = run("bind_params", bind_params, module)
    if any(operator(value) == "relax.nn.batch_norm" for _, value in bindings(module["main"])):
        module = run("decompose_batch_norm", relax.transform.DecomposeOpsForInference(), module)
    return module


def build(
    module: IRModule,
    target: TargetLike,
    dump: Folder | None = None,
    compact: bool = False,
    tuning: Folder | Tuning | Choices | None = None,
) -> Compiled:
    """Compile a module of any stage from float on; see `lower` for the arguments and what it raises."""
    parsed = parse_target(target)
    if not get_stage(module):
        raise ModelError("The module is not canonical.", "Apply Canonicalize to what an importer gives.")
    lowered = module if get_stage(module) == "kernels" else lower(module, parsed, dump, compact, tuning)
    kernels = kernel_infos(lowered, parsed)
    return Compiled(build_executable(lowered, parsed), kernels, lowered, parsed)


@functools.cache
def register_pipelines() -> None:
    """Make `compress` and `lower` known to Relax: `relax.get_pipeline("tvm_compress.compress", policy=...)`.

    Each takes the function's arguments but the module, and gives a pass. Any further call does nothing.
    """

    @relax.register_pipeline("tvm_compress.compress")
    def compress_pipeline(policy: CompressionPolicy, **settings: Any) -> tvm.ir.transform.Pass:
        return _as_pass("tvm_compress.compress", lambda module: compress(module, policy, **settings))

    @relax.register_pipeline("tvm_compress.lower")
    def lower_pipeline(target: TargetLike, **settings: Any) -> tvm.ir.transform.Pass:
        return _as_pass("tvm_compress.lower", lambda module: lower(module, target, **settings))


def _as_pass(name: str, function: Callable[[IRModule], IRModule]) -> tvm.ir.transform.Pass:
    def run(module: IRModule, context: tvm.transform.PassContext) -> IRModule:
        del context
        return function(module)

    return tvm.transform.module_pass(run, opt_level=0, name=name)
