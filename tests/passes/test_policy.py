import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.errors import PolicyError
from tvm_compress.passes.groups import find_coupled_sets
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy, fingerprint
from tvm_compress.passes.sites import Site, find_sites
from tvm_compress.schedules.target_rules import parse_target, rules_for

SITES = [
    Site("a", "conv2d", "a.weight", (64, 32, 3, 3), (1, 8, 8, 32), (1, 8, 8, 64), padding=(1, 1, 1, 1)),
    Site("b", "conv2d", "b.weight", (64, 1, 3, 3), (1, 8, 8, 64), (1, 6, 6, 64), groups=64),
    Site("c", "dense", "c.weight", (10, 64), (1, 64), (1, 10)),
]
RULES = rules_for(parse_target("raspberry-pi/4b-aarch64"))


def bits(weight_bits, activation_bits, **rest):
    return SitePolicy(scheme="bitserial", weight_bits=weight_bits, activation_bits=activation_bits, **rest)


SCHEME = st.one_of(
    st.just(("fp32", 32, 32)),
    st.just(("int8", 8, 8)),
    st.tuples(st.just("bitserial"), st.integers(1, 6), st.integers(1, 6)),
)
CHANNELS = st.one_of(
    st.just((None, None)),
    st.tuples(st.integers(1, 999), st.none()),
    st.sets(st.integers(0, 999), min_size=1).map(lambda kept: (len(kept), tuple(sorted(kept)))),
)


@st.composite
def site_policies(draw):
    scheme, weight_bits, activation_bits = draw(SCHEME)
    channels, kept = draw(CHANNELS)
    return SitePolicy(
        channels,
        kept,
        scheme,
        weight_bits,
        activation_bits,
        weight_pruning_ratio=draw(st.floats(0, 1, exclude_max=True)),
        group=draw(st.sampled_from(["element", "filter", "channel", "simd-4", "block-4x1"])),
        rank=draw(st.none() | st.integers(1, 99)),
        factorization=draw(st.sampled_from(["channel", "spatial"])),
        codebook_bits=draw(st.integers(0, 8)) if scheme == "fp32" else 0,
        note=draw(st.text(max_size=20)),
    )


POLICIES = st.builds(
    CompressionPolicy,
    sites=st.dictionaries(st.text(min_size=1, max_size=10), site_policies(), max_size=4),
    target=st.text(max_size=10),
    rounding=st.integers(1, 64),
    criterion=st.sampled_from(["tolerance", "l1", "l2"]),
    seed=st.integers(0, 2**40),
    found_by=st.text(max_size=10),
    metrics=st.dictionaries(
        st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3
    ),
    model=st.text(max_size=16),
)


@settings(max_examples=60, deadline=None)
@given(POLICIES)
def test_json_round_trip_and_same_text(policy):
    text = policy.to_json()
    again = CompressionPolicy.from_json(text)
    assert again == policy
    assert again.to_json() == text
    reordered = replace(policy, sites=dict(reversed(policy.sites.items())))
    assert reordered.to_json() == text


def test_defaults_are_left_out_and_mean_untouched():
    policy = CompressionPolicy(sites={"a": SitePolicy()})
    assert json.loads(policy.to_json())["sites"] == {"a": {}}
    assert json.loads(policy.to_json())["version"] == 1
    assert policy["not named"] == SitePolicy()
    assert not SitePolicy().quantized
    assert bits(1, 1).quantized


def test_kept_says_how_many():
    assert SitePolicy(kept=[1, 4]).channels == 2  # type: ignore[arg-type]
    assert SitePolicy(kept=[1, 4]).kept == (1, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"channels": 0}, "whole number from 1, not 0"),
        ({"channels": 2.5}, "not 2.5"),
        ({"channels": True}, "not True"),
        ({"kept": ()}, "at least one"),
        ({"kept": (2, 1)}, "ascending"),
        ({"kept": (1, 1)}, "ascending"),
        ({"kept": (-1,)}, "channel numbers from 0"),
        ({"kept": "01"}, "list of channels"),
        ({"kept": 3}, "list of channels"),
        ({"channels": 3, "kept": (0, 1)}, "channels is 3, but kept holds 2"),
        ({"scheme": "int4"}, "fp32, int8, bitserial, not 'int4'"),
        ({"scheme": "int8"}, "weight_bits must be 1 to 8"),
        ({"scheme": "int8", "weight_bits": 4, "activation_bits": 4}, "activation_bits must be 8"),
        ({"weight_bits": 8}, "must be 32 with scheme 'fp32', not 8"),
        ({"scheme": "bitserial", "weight_bits": 7, "activation_bits": 2}, "1 to 6"),
        ({"scheme": "bitserial", "weight_bits": 2, "activation_bits": 0}, "activation_bits"),
        ({"weight_pruning_ratio": 1.0}, r"weight_pruning_ratio must be in \[0, 1\), not 1.0"),
        ({"weight_pruning_ratio": "half"}, "weight_pruning_ratio"),
        ({"group": "simd-0"}, "simd-N, filter, channel or block-MxN, not 'simd-0'"),
        ({"group": "block-4"}, "not 'block-4'"),
        ({"rank": 0}, "rank must be a whole number from 1, not 0"),
        ({"factorization": "tucker"}, "channel, spatial, not 'tucker'"),
        ({"codebook_bits": 9}, "0 to 8, not 9"),
        ({"scheme": "int8", "weight_bits": 8, "activation_bits": 8, "codebook_bits": 4}, "scheme 'fp32'"),
        ({"note": 3}, "note"),
    ],
)
def test_impossible_values_name_site_and_value(values, said):
    with pytest.raises(PolicyError, match=said):
        SitePolicy(**values)
    text = json.dumps({"version": 1, "sites": {"layer1.conv": values}})
    with pytest.raises(PolicyError, match=f"Site 'layer1.conv'.*{said}"):
        CompressionPolicy.from_json(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "version None"),
        ('{"version": 2}', "version 2; this tool reads version 1"),
        ('{"version": true}', "version True"),
        ('{"version": 1, "sitse": {}}', "unknown keys: sitse"),
        ('{"version": 1, "sites": {"a": {"bits": 3}}}', "Site 'a' has unknown keys: bits"),
        ('{"version": 1, "sites": {"a": 3}}', "Site 'a' must be"),
        ('{"version": 1, "sites": []}', "sites must be"),
        ('{"version": 1, "metrics": {"accuracy": NaN}}', "metric 'accuracy'"),
        ('{"version": 1, "metrics": {"accuracy": "high"}}', "metric 'accuracy'"),
        ('{"version": 1, "rounding": 0}', "rounding"),
        ('{"version": 1, "criterion": "luck"}', "criterion"),
        ('{"version": 1, "seed": -1}', "seed"),
        ('{"version": 1, "target": {"kind": "llvm"}}', "target must be text"),
    ],
)
def test_malformed_text_is_refused(text, said):
    with pytest.raises(PolicyError, match=said):
        CompressionPolicy.from_json(text)


def test_save_and_load(tmp_path):
    policy = CompressionPolicy(sites={"a": SitePolicy(kept=(0, 2))}, metrics={"accuracy": 0.5})
    path = tmp_path / "policy.json"
    path.write_text("old")
    policy.save(path)
    assert CompressionPolicy.load(path) == policy
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]
    with pytest.raises(PolicyError, match=r"none\.json cannot be read"):
        CompressionPolicy.load(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="cannot be read"):
        CompressionPolicy.load(tmp_path / "binary")


def test_check_names_the_site():
    CompressionPolicy(sites={"a": SitePolicy(channels=64)}, model=fingerprint(SITES)).check(SITES)
    with pytest.raises(PolicyError, match="names site 'd', which the model has not"):
        CompressionPolicy(sites={"d": SitePolicy()}).check(SITES)
    with pytest.raises(PolicyError, match="Site 'a' has 64 output channels; 65"):
        CompressionPolicy(sites={"a": SitePolicy(channels=65)}).check(SITES)
    with pytest.raises(PolicyError, match="Site 'c' has 10 output channels; there is no channel 10"):
        CompressionPolicy(sites={"c": SitePolicy(kept=(0, 10))}).check(SITES)
    with pytest.raises(PolicyError, match="policy for another model"):
        CompressionPolicy(model=fingerprint(SITES[:2])).check(SITES)


def test_fingerprint_sees_names_and_shapes():
    assert fingerprint(SITES) == fingerprint(list(SITES))
    others = [replace(SITES[0], name="x"), replace(SITES[0], strides=(2, 2))]
    assert len({fingerprint(SITES), *(fingerprint([other, *SITES[1:]]) for other in others)}) == 3


def test_legalize_falls_back_to_int8_with_the_reason():
    policy = CompressionPolicy(sites={"a": bits(2, 3, channels=8), "b": bits(1, 1), "c": bits(2, 2)})
    legal = policy.legalize(SITES, RULES)
    assert legal["a"] == policy["a"]
    for name, reason in (("b", "1 group"), ("c", "output channels in multiples of 8, not 10")):
        assert (legal[name].scheme, legal[name].weight_bits, legal[name].activation_bits) == ("int8", 8, 8)
        assert reason in legal[name].note
    assert "1x1" in legal["b"].note
    assert legal.legalize(SITES, RULES) == legal


def test_legalize_sees_pruned_channels(residual):
    sites, sets = find_sites(residual.module), find_coupled_sets(residual.module)
    policy = CompressionPolicy(sites={"layer1.conv2": bits(2, 2), "fc": bits(2, 2)})
    assert (
        "input channels in multiples of 32, not 8" in policy.legalize(sites, RULES, sets)["layer1.conv2"].note
    )
    pruned = replace(policy, sites={**policy.sites, "layer1.conv1": SitePolicy(channels=3)})
    assert "not 3" in pruned.legalize(sites, RULES, sets)["layer1.conv2"].note
    rounded = replace(pruned, rounding=4)
    assert "not 4" in rounded.legalize(sites, RULES, sets)["layer1.conv2"].note
    # The shortcut's channels are those of conv2: naming one is enough.
    pruned = replace(policy, sites={**policy.sites, "layer2.shortcut.0": SitePolicy(channels=5)})
    assert "not 5" in pruned.legalize(sites, RULES, sets)["fc"].note
