"""Compress a network by Fast LC: from gradient and curvature to weights, module and policy."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_compress.data.dataset import Split
from tvm_compress.errors import DataError, SettingError
from tvm_compress.fastlc.curvature import Curvature, estimate_curvature
from tvm_compress.fastlc.quadratic import QuadraticModel
from tvm_compress.fastlc.schemes import Compression, compress_weights
from tvm_compress.fastlc.settings import FastLcSettings
from tvm_compress.method import MethodResult
from tvm_compress.passes.codebook_weights import CodebookWeights
from tvm_compress.passes.factorize import Factorize
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.policy import CompressionPolicy, fingerprint
from tvm_compress.passes.sites import Site, find_sites
from tvm_compress.twin import Twin

# What is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

_STATISTICS_IMAGES = 1024


def fast_lc(
    module: tvm.IRModule,
    split: Split | None,
    settings: FastLcSettings,
    curvature: Path | None = None,
    progress: Progress | None = None,
    save_curvature: Path | None = None,
) -> MethodResult:
    """Compress the sites' weights of a float module; batch norms and biases stay as they are.

    Parameters
    ----------
    split
        Its training images give the curvature; not needed with a curvature file.
    curvature
        File that `save_curvature` wrote for this very model.

    Returns
    -------
    The module as it is deployed: low-rank sites are two layers, weights of few values are indices into a
    codebook. In the summary, `predicted_loss` is how much the quadratic model expects the loss to grow, and
    `predicted_direct` the same for compressing the trained weights directly.

    Raises
    ------
    SettingError
        On a site to keep that does not exist, and on what needs data where there are none.
    ModelError
        If the curvature is that of another model, or the module is not a float one.
    DataError
        If there are neither data nor a curvature.
    """
    sites = find_sites(module)
    unknown = sorted(set(settings.keep) - {site.name for site in sites})
    if unknown:
        raise SettingError(
            f"There is no site {unknown[0]!r} to keep.", f"The sites are: {', '.join(s.name for s in sites)}."
        )
    if settings.reestimate_batch_norm and split is None:
        raise SettingError(
            "Batch-norm statistics cannot be taken again without images.", "Give --data, or leave them."
        )
    start = time.perf_counter()
    derivatives = _derivatives(module, split, settings, curvature, progress)
    if save_curvature is not None:
        derivatives.save(save_curvature)
    between = time.perf_counter()
    chosen = [site for site in sites if site.name not in settings.keep]
    compression = compress_weights(_models(module, chosen, derivatives, settings), chosen, settings, progress)
    done = time.perf_counter()
    policy = CompressionPolicy(
        sites=compression.policies,
        target=settings.target,
        seed=settings.seed,
        found_by="fastlc",
        model=fingerprint(sites),
    )
    result = _apply(module, chosen, compression, policy)
    if settings.reestimate_batch_norm and split is not None:
        result = _reestimated(result, split, settings.seed)
    summary = {
        "scheme": settings.scheme,
        "seconds_curvature": between - start,
        "seconds_compression": done - between,
        "curvature_images": derivatives.images,
        "curvature_labels": derivatives.labels,
        **_summary(chosen, compression),
    }
    return MethodResult(result, policy, summary)


def _derivatives(
    module: tvm.IRModule,
    split: Split | None,
    settings: FastLcSettings,
    path: Path | None,
    progress: Progress | None,
) -> Curvature:
    if path is not None:
        found = Curvature.load(path)
        found.check(module)
        return found
    if split is None:
        raise DataError(
            "Fast LC needs the curvature of the loss, and there is neither data nor a curvature file.",
            "Give --data, or --curvature FILE that --save-curvature wrote.",
        )
    some = split.train.subset(settings.images, np.random.default_rng(settings.seed))

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("curvature", done, total)

    y = some.y if split.labels == "data" else None
    return estimate_curvature(
        module, some.normalized(), y, draws=settings.draws, seed=settings.seed, progress=tell
    )


def _models(
    module: tvm.IRModule, sites: list[Site], derivatives: Curvature, settings: FastLcSettings
) -> dict[str, QuadraticModel]:
    """Quadratic model of each site."""
    params = get_params(module)
    models = {}
    for site in sites:
        gradient = derivatives.gradient[site.name]
        models[site.name] = QuadraticModel.damped(
            params[site.weight],
            gradient if settings.use_gradient else np.zeros_like(gradient),
            derivatives.diagonal[site.name],
            settings.damping,
        )
    return models


def _apply(
    module: tvm.IRModule, sites: list[Site], compression: Compression, policy: CompressionPolicy
) -> tvm.IRModule:
    weights = {site.weight: compression.weights[site.name].astype(np.float32) for site in sites}
    passes = [Factorize(policy), CodebookWeights(policy)]
    return tvm.ir.transform.Sequential(passes)(set_params(module, weights))


def _reestimated(module: tvm.IRModule, split: Split, seed: int) -> tvm.IRModule:
    twin = Twin(module)
    some = split.train.subset(_STATISTICS_IMAGES, np.random.default_rng(seed))
    twin.reestimate_batch_norm(some.normalized())
    return twin.to_module()


def _summary(sites: list[Site], compression: Compression) -> dict[str, Any]:
    total = sum(int(np.prod(site.weight_shape)) for site in sites)
    zeros = sum(int(np.count_nonzero(value == 0)) for value in compression.weights.values())
    return {
        "weights": total,
        "share_of_zeros": zeros / total,
        "compression": 32 * total / sum(compression.bits.values()),
        "predicted_loss": compression.loss,
        "predicted_direct": compression.direct_loss,
    }
