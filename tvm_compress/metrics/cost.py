"""MACs, bit operations and bytes of a module."""

from collections.abc import Mapping, Sequence

import numpy as np
import tvm

from tvm_compress.metrics.esn import esn, esn_d_filters, signal_levels
from tvm_compress.passes.codebook_weights import site_weights
from tvm_compress.passes.params import get_params
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.quantization import weight_limit
from tvm_compress.passes.sites import Site, find_sites
from tvm_compress.schedules.codebook import stored_bits

# By how many bits float32 weights are counted in the effective signal norm, which knows integers only: those
# of the quantizer that costs no accuracy.
REFERENCE_BITS = 8


def macs(sites: Sequence[Site]) -> int:
    """Multiply-accumulates of one inference of one sample."""
    return sum(site.macs for site in sites)


def bops(sites: Sequence[Site], policy: CompressionPolicy) -> int:
    """Bit operations of one sample: MACs * activation_bits * weight_bits, float32 counting 32 bits."""
    return sum(s.macs * policy[s.name].activation_bits * policy[s.name].weight_bits for s in sites)


def parameter_bytes(sites: Sequence[Site], policy: CompressionPolicy, others: int = 0) -> int:
    """Bytes of the parameters as they are deployed.

    A site stores its weights, packed (the bytes of a site rounded up), and a 4-byte bias per output channel,
    which batch norm and bias are folded into; a quantized site stores 4 bytes of scale per output channel
    more. Indices into a codebook are stored in 1, 2, 4 or 8 bits. `others` is the number of further float32
    values.
    """
    total = 4 * others
    for site in sites:
        wanted = policy[site.name]
        values = int(np.prod(site.weight_shape))
        bits = stored_bits(2**wanted.codebook_bits) if wanted.codebook_bits else wanted.weight_bits
        if wanted.scheme == "int8":
            bits = 8  # a coarser grid is stored in bytes all the same
        total += -(-values * bits // 8)
        total += site.out_channels * (8 if wanted.quantized else 4)
    return total


def metrics(
    module: tvm.IRModule,
    policy: CompressionPolicy | None = None,
    sites: Sequence[Site] | None = None,
) -> dict[str, float]:
    """Return what one sample costs: `macs`, `bops`, `parameter_bytes`, `esn_a`, `esn_d`, `esn_d_filters`.

    Parameters
    ----------
    module
        A float, annotated or QDQ module, pruned already: widths are read from it.
    policy
        Gives the bits of each site; without it everything is float32.
    sites
        The module's sites, where they are known already.

    ESN is taken with c_l = 1 (memory), but for `esn_d_filters`, which is ESN'_d (MACs times bits); float32
    weights are counted as if quantized to 8 bits, INT8 weights with the bits that their integers need.
    """
    sites = list(find_sites(module) if sites is None else sites)
    policy = policy or CompressionPolicy()
    params = get_params(module)
    weights = {site.name: site_weights(module, site) for site in sites}
    bits = {s.name: signal_bits(s, policy[s.name], params) for s in sites}
    own = {site.weight for site in sites}
    # 1-D and scalar parameters are batch norms, biases and scales: counted with the sites.
    others = sum(value.size for name, value in params.items() if name not in own and value.ndim > 1)
    analog, digital = esn(weights, bits)
    return {
        "macs": float(macs(sites)),
        "bops": float(bops(sites, policy)),
        "parameter_bytes": float(parameter_bytes(sites, policy, others)),
        "esn_a": analog,
        "esn_d": digital,
        "esn_d_filters": sum(
            esn_d_filters(signal_levels(weights[site.name], bits[site.name]), site.macs) for site in sites
        ),
    }


def signal_bits(site: Site, wanted: SitePolicy, params: Mapping[str, np.ndarray]) -> int:
    """Bits that a site's weights are counted with in the signal norm.

    INT8 weights may stand on a coarser grid (see `prune_then_quantize`): at the QDQ stage the bits are those
    that the largest integer needs.
    """
    if not wanted.quantized:
        return REFERENCE_BITS
    scale = params.get(f"{site.name}.weight_scale")
    if wanted.scheme != "int8" or scale is None:
        return wanted.weight_bits
    column = scale.reshape(-1, *[1] * (len(site.weight_shape) - 1))
    integers = np.rint(np.abs(params[site.weight]) / column)
    largest = float(integers.max())
    if largest == integers.min() == 1:
        return 1
    return next((bits for bits in range(2, 8) if largest <= weight_limit(bits)), 8)
