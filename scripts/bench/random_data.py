"""TOCO's Random data set: two classes of random vectors, and the single sigmoid layer trained on them.

The generator follows Guyon's "Design of experiments of the NIPS 2003 variable selection benchmark": clusters
at the corners of a hypercube in the informative features, each with a covariance of its own; redundant
features are combinations of them, the rest is noise; some labels are flipped. The paper gives the size
(100,000 x 1000) and the accuracy (95 %) only: what else stands here was chosen to reach that accuracy.
"""

import numpy as np
import torch
import tvm
from tvm import relax

from tvm_compress.passes.params import STAGE

SAMPLES, TEST_SAMPLES, FEATURES = 100_000, 20_000, 1000
INFORMATIVE, REDUNDANT = 100, 100
CLUSTERS_PER_CLASS = 2
SEPARATION = 2.4
FLIPPED = 0.01
EPOCHS, BATCH, RATE, L2 = 4, 256, 3e-3, 1e-3


def make_random(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return x float32 [N, 1000], y int64 [N] for training, and the same for the test."""
    rng = np.random.default_rng(seed)
    total = SAMPLES + TEST_SAMPLES
    x = rng.standard_normal((total, FEATURES), dtype=np.float32)
    clusters = 2 * CLUSTERS_PER_CLASS
    corners = rng.permutation(2 ** min(INFORMATIVE, 20))[:clusters]
    cluster = rng.permutation(np.arange(total) % clusters)
    for number in range(clusters):
        rows = np.flatnonzero(cluster == number)
        # Bits of the corner's number, those beyond its 20 drawn too.
        bits = np.array([corners[number] >> bit & 1 for bit in range(20)])
        bits = np.concatenate([bits, rng.integers(0, 2, INFORMATIVE - 20)])
        mixing = rng.uniform(-1, 1, (INFORMATIVE, INFORMATIVE)).astype(np.float32)
        centre = (SEPARATION * (2 * bits - 1)).astype(np.float32)
        x[rows, :INFORMATIVE] = x[rows, :INFORMATIVE] @ mixing + centre
    combination = rng.uniform(-1, 1, (INFORMATIVE, REDUNDANT)).astype(np.float32)
    x[:, INFORMATIVE : INFORMATIVE + REDUNDANT] = x[:, :INFORMATIVE] @ combination
    # Features in any order, rows in one piece.
    x = np.ascontiguousarray(x[:, rng.permutation(FEATURES)])
    y = (cluster % 2).astype(np.int64)
    flipped = rng.random(total) < FLIPPED
    y[flipped] = 1 - y[flipped]
    return x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:]


def sigmoid_layer(x: np.ndarray, y: np.ndarray, seed: int) -> tvm.IRModule:
    """Train `sigmoid(w x + b)` with Adam and L2; the module that is returned has logits -z / 2 and z / 2."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(x.shape[1], 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=RATE, weight_decay=L2)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y).float()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                layer(inputs[batch])[:, 0], labels[batch]
            )
            loss.backward()
            optimizer.step()
    return _module(layer.weight.detach().numpy(), layer.bias.detach().numpy())


def _module(weight: np.ndarray, bias: np.ndarray) -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType((1, weight.shape[1]), "float32"))
    params = [
        relax.Var("layer.weight", relax.TensorType(weight.shape, "float32")),
        relax.Var("layer.bias", relax.TensorType(bias.shape, "float32")),
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", [x, *params]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(params[0]))))
            z = builder.emit(relax.op.add(product, params[1]))
            halves = relax.const(np.array([[-0.5, 0.5]], np.float32))
            logits = builder.emit_output(relax.op.multiply(z, halves))
        builder.emit_func_output(logits)
    values = [tvm.runtime.tensor(np.ascontiguousarray(value)) for value in (weight, bias)]
    function = builder.finalize()["main"].with_attr("num_input", 1).with_attr("params", values)
    return tvm.IRModule({"main": function.with_attr(STAGE, "float")})
