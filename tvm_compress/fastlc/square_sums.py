"""Sums, over images, of the squared gradients of a layer's weights, without keeping any of them."""

import torch
import torch.nn.functional as F

from tvm_compress.twin.float_ops import split_padding, to_nchw
from tvm_compress.twin.program import Node

# What an element-wise pass over a gradient costs, in multiply-accumulates per element, roughly.
_PASS_COST = 8


def sum_of_squares(node: Node, x: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Sum the squares of the per-image weight gradients of a convolution or dense layer.

    The gradient of weight (o, k) is `Σ_l slope[o, l] u[k, l]` over the output's places l, u being the input's
    patches. Two ways give the sum of its squares over images and slopes, and the cheaper is taken: the
    gradient itself, squared; or, where there are few places, `Σ_l Σ_m (Σ_s slope[o, l] slope[o, m]) u[k, l]
    u[k, m]`, one product of matrices in which slopes of all kinds are summed first. A dense layer is the
    case of one place: `(Σ slope²) x²`.

    Parameters
    ----------
    x
        The layer's input, NHWC or [N, I].
    slopes
        Derivatives by the layer's output, [S, N, ...] for S functions of it.

    Returns
    -------
    float32, the shape of the weights (OIHW or [O, I]).
    """
    patches, outputs = _as_matrices(node, x, slopes)
    places, kinds = outputs.shape[-1], outputs.shape[0]
    if places * (places + 1) // 2 <= kinds * (places + _PASS_COST):
        total = _by_pairs_of_places(patches, outputs)
    else:
        total = _by_images(patches, outputs)
    info = node.info[1]
    assert info is not None
    if node.op == "relax.matmul":
        return total.reshape(total.shape[1], total.shape[2])
    return total.reshape(info.shape)


def _as_matrices(node: Node, x: torch.Tensor, slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give patches [N, G, K, L] and slopes [S, N, G, O, L]; G groups, L places."""
    if node.op == "relax.matmul":
        return x[:, None, :, None], slopes[:, :, None, :, None]
    groups = int(node.attr("groups", 1))
    info = node.info[1]
    assert info is not None
    out_channels, _, *kernel = info.shape
    padding, before = split_padding(node.ints("padding"))
    nchw = to_nchw(x) if before is None else F.pad(to_nchw(x), before)
    unfolded = F.unfold(nchw, (kernel[0], kernel[1]), node.ints("dilation"), padding, node.ints("strides"))
    count, rows, places = unfolded.shape
    patches = unfolded.reshape(count, groups, rows // groups, places)
    outputs = slopes.permute(0, 1, 4, 2, 3).reshape(
        len(slopes), count, groups, out_channels // groups, places
    )
    return patches, outputs


def _by_pairs_of_places(patches: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    first, second = torch.triu_indices(patches.shape[-1], patches.shape[-1])
    twice = torch.where(first == second, 1.0, 2.0)
    products = (outputs[..., first] * outputs[..., second]).sum(0) * twice  # [N, G, O, P]
    squares = patches[..., first] * patches[..., second]  # [N, G, K, P]
    return torch.einsum("ngop,ngkp->gok", products, squares)


def _by_images(patches: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    transposed = patches.transpose(-1, -2)  # [N, G, L, K]
    total = torch.zeros(outputs.shape[2], outputs.shape[3], patches.shape[2])
    for kind in outputs:
        for slope, columns in zip(kind, transposed, strict=True):
            total.add_(torch.bmm(slope, columns).square_())
    return total
