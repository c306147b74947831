import pytest

from tvm_compress.passes.pipeline import compress
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites, site_name


def test_names_and_shapes_of_a_residual_network(residual):
    sites = {site.name: site for site in find_sites(residual.module)}
    assert list(sites) == [
        "conv1",
        "layer1.conv1",
        "layer1.conv2",
        "layer2.conv1",
        "layer2.conv2",
        "layer2.shortcut.0",
        "fc",
    ]
    strided = sites["layer2.conv1"]
    assert (strided.kind, strided.weight) == ("conv2d", "layer2.conv1.weight")
    assert strided.weight_shape == (16, 8, 3, 3)
    assert (strided.in_shape, strided.out_shape) == ((1, 8, 8, 8), (1, 4, 4, 16))
    assert (strided.strides, strided.padding, strided.dilation, strided.groups) == (
        (2, 2),
        (1, 1, 1, 1),
        (1, 1),
        1,
    )
    assert (strided.in_channels, strided.out_channels, strided.kernel) == (8, 16, (3, 3))
    assert strided.macs == 4 * 4 * 16 * 8 * 3 * 3
    assert sites["fc"].kind == "dense"
    assert (sites["fc"].in_shape, sites["fc"].out_shape, sites["fc"].kernel) == ((1, 16), (1, 10), (1, 1))
    assert sites["fc"].macs == 160


def test_depthwise_macs(branches):
    site = next(site for site in find_sites(branches.module) if site.name == "depthwise")
    assert (site.groups, site.in_channels, site.macs) == (8, 8, 8 * 8 * 8 * 9)


def test_sites_stay_found_in_a_qdq_module(sequential):
    class Ranges:
        def range(self, site, bits):
            return -3.0, 3.0

    sites = find_sites(sequential.module)
    int8 = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    module = compress(
        sequential.module, CompressionPolicy({site.name: int8 for site in sites}), None, Ranges()
    )
    assert find_sites(module) == sites


@pytest.mark.parametrize(
    ("weight", "site"),
    [
        ("a.b.weight", "a.b"),
        ("p_a_b_weight", "p_a_b"),
        ("Conv_3", "Conv_3"),
        ("weight", "weight"),
        (".weight", ".weight"),
    ],
)
def test_site_name(weight, site):
    assert site_name(weight) == site
