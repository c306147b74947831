"""Which kernel computes an integer convolution or dense layer: its scheme fixes the integers, not the way."""

from tvm import relax

from tvm_compress.schedules import bitserial, depthwise, int8, lookup, narrow, packing, winograd
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import TargetRules


def legalize(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace a call of tvm_compress.conv2d or tvm_compress.dense by the kernel measured as the fastest.

    The integers are the same from each: products of bytes, directly or by Winograd's algorithm, table lookup,
    counted bits. What `rules.choices` says of the layer goes before the rules.

    Raises
    ------
    KernelError
        Where weights are no constants or out of range, the sums may overflow int32, or a layer of scheme
        "bitserial" breaks a rule of it (bitserial.check_legal).
    """
    layer = packing.read_layer(call)
    few_bits = layer.scheme == "bitserial"
    if few_bits:
        bitserial.check_legal(layer, rules)
    if depthwise.is_depthwise(layer.groups, layer.in_channels):
        return depthwise.legalize_integer(bb, call, layer, rules)
    chosen = _legalize_chosen(bb, call, layer, rules)
    return _legalize_by_rules(bb, call, layer, rules) if chosen is None else chosen


def _legalize_chosen(
    bb: relax.BlockBuilder, call: relax.Call, layer: IntegerLayer, rules: TargetRules
) -> relax.Expr | None:
    """Take the kernel that was chosen for the layer, if one was and its weights allow it."""
    choice = rules.choices.find(
        layer.info(), "direct", "narrow", "lookup", "popcount", *winograd.INTEGER_ALGORITHMS
    )
    if choice is None:
        return None
    if choice.kernel == "popcount" and layer.scheme == "bitserial":
        return bitserial.legalize(bb, call, layer, rules)
    if choice.kernel == "lookup" and lookup.applies(layer) and rules.is_arm:
        return lookup.legalize(bb, call, layer, rules)
    if choice.kernel == "narrow":
        return narrow.legalize_layer(bb, call, layer, rules)
    if choice.kernel == "direct":
        return int8.legalize(bb, call, layer, rules)
    return winograd.legalize_layer(bb, call, layer, rules)


def _legalize_by_rules(
    bb: relax.BlockBuilder, call: relax.Call, layer: IntegerLayer, rules: TargetRules
) -> relax.Expr:
    few_bits = layer.scheme == "bitserial"
    speedup = winograd.speedup(layer, rules)
    if lookup.applies(layer) and lookup.pays(layer, rules, speedup):
        return lookup.legalize(bb, call, layer, rules)
    # What counting bits was compared with: on x86 the narrow kernel.
    products = speedup if rules.is_arm else max(1.0, speedup / narrow.SPEEDUP)
    if few_bits and rules.popcount_pays(layer.activation_bits, layer.weight_bits, products):
        return bitserial.legalize(bb, call, layer, rules)
    if few_bits and speedup < narrow.SPEEDUP:
        site = narrow.legalize_layer(bb, call, layer, rules)
        if site is not None:
            return site
    site = winograd.legalize_layer(bb, call, layer, rules)
    return int8.legalize(bb, call, layer, rules) if site is None else site
