"""Bring what importers produce into the canonical form of docs/architecture.md."""

# Every operator that a float module may hold: what the twin computes and the kernels lower.
# `expand_dims` and `reshape` keep the batch: axis 0 stays what it is.
SUPPORTED_OPERATORS = frozenset(
    "relax." + name
    for name in (
        "nn.conv2d matmul permute_dims add subtract multiply divide maximum minimum nn.batch_norm nn.relu clip "
        "sigmoid tanh nn.silu nn.softmax nn.log_softmax nn.max_pool2d nn.avg_pool2d mean concat reshape "
        "expand_dims nn.batch_flatten"
    ).split()
)
