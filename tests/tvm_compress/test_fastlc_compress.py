"""Fast LC on a trained network: every scheme, its policy, what is stored, and what it must refuse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm

from tvm_compress.data.dataset import Split
from tvm_compress.data.load import load_data
from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.fastlc.compress import fast_lc
from tvm_compress.fastlc.curvature import estimate_curvature
from tvm_compress.fastlc.ranks import Spectrum, choose_ranks
from tvm_compress.fastlc.settings import SCHEMES, FastLcSettings
from tvm_compress.method import MethodResult
from tvm_compress.model import Model
from tvm_compress.passes.codebook_weights import site_weights
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.sites import find_sites
from tvm_compress.samples.load import load_sample
from tvm_compress.twin import Twin


@pytest.fixture(scope="module")
def sample() -> Model:
    return load_sample("resnet8-fashion")


@pytest.fixture(scope="module")
def split(sample: Model) -> Split:
    return load_data("sample:resnet8-fashion", sample, 0)


@pytest.fixture(scope="module")
def curvature(sample: Model, split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("curvature") / "c.safetensors"
    some = split.train.subset(64, np.random.default_rng(0))
    estimate_curvature(sample.module, some.normalized(), some.y, draws=2).save(path)
    return path


def accuracy(module: tvm.IRModule, split: Split) -> float:
    some = split.test.subset(300, np.random.default_rng(1))
    return Twin(module).accuracy(some.normalized(), some.y)


def weights(module: tvm.IRModule) -> dict[str, np.ndarray]:
    return {site.name: site_weights(module, site) for site in find_sites(module)}


def run(sample: Model, curvature: Path, **settings) -> MethodResult:
    return fast_lc(sample.module, None, FastLcSettings(**settings), curvature)


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_pruning(sample: Model, split: Split, curvature: Path, scope: str) -> None:
    result = run(sample, curvature, scheme="prune", ratio=2.0, scope=scope)
    found = weights(result.module)
    total = sum(value.size for value in found.values())
    kept = sum(np.count_nonzero(value) for value in found.values())
    assert kept == pytest.approx(total / 2, abs=len(found))
    shares = {name: 1 - np.count_nonzero(value) / value.size for name, value in found.items()}
    for name, share in shares.items():
        assert result.policy[name].weight_pruning_ratio == pytest.approx(share)
    if scope == "layer":
        assert max(shares.values()) < 0.52
    else:
        assert max(shares.values()) - min(shares.values()) > 0.2
    assert result.summary["predicted_loss"] <= result.summary["predicted_direct"]
    assert accuracy(result.module, split) > accuracy(sample.module, split) - 0.15


def test_only_the_sites_weights_change(sample: Model, curvature: Path) -> None:
    before = get_params(sample.module)
    after = get_params(run(sample, curvature, scheme="prune", ratio=2.0, keep=("conv1",)).module)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {site.weight for site in find_sites(sample.module)} - {"conv1.weight"}


def test_pruned_groups_are_whole(sample: Model, curvature: Path) -> None:
    result = run(sample, curvature, scheme="prune", ratio=2.0, group="simd-4")
    value = weights(result.module)["layer2.0.conv1"]
    runs = (value.reshape(len(value) // 4, 4, -1) != 0).sum(axis=1)
    assert set(np.unique(runs)) == {0, 4}
    assert result.policy["layer2.0.conv1"].group == "simd-4"


@pytest.mark.parametrize(
    ("settings", "bits", "values"),
    [
        ({"scheme": "kmeans", "bits": 3}, 3, 8),
        ({"scheme": "kmeans", "bits": 2, "granularity": "channel"}, 2, 4),
        ({"scheme": "fixed", "bits": 4}, 4, 15),
        ({"scheme": "binary"}, 1, 2),
        ({"scheme": "ternary", "granularity": "channel"}, 2, 3),
    ],
)
def test_codebooks(sample: Model, curvature: Path, settings: dict, bits: int, values: int) -> None:
    result = run(sample, curvature, **settings)
    per_channel = settings.get("granularity") == "channel"
    params = get_params(result.module)
    for site in find_sites(result.module):
        assert result.policy[site.name].codebook_bits == bits
        assert params[site.weight].dtype == np.uint8
        value = site_weights(result.module, site)
        rows = value.reshape(len(value) if per_channel else 1, -1)
        assert max(len(np.unique(row)) for row in rows) <= values
    assert result.summary["compression"] > 0.5 * 32 / bits
    assert result.summary["predicted_loss"] <= result.summary["predicted_direct"]


def test_codebooks_of_more_bits_are_nearer(sample: Model, split: Split, curvature: Path) -> None:
    results = [run(sample, curvature, scheme="kmeans", bits=bits) for bits in (1, 2, 4, 6)]
    predicted = [result.summary["predicted_loss"] for result in results]
    assert predicted == sorted(predicted, reverse=True)
    dense = accuracy(sample.module, split)
    assert accuracy(results[-1].module, split) > dense - 0.03
    assert accuracy(results[0].module, split) < dense - 0.03


@pytest.mark.parametrize("factorization", ["channel", "spatial"])
def test_low_rank_sites_become_two(sample: Model, split: Split, curvature: Path, factorization: str) -> None:
    result = run(sample, curvature, scheme="low-rank", ratio=1.5, factorization=factorization)
    names = [site.name for site in find_sites(result.module)]
    split_sites = [name for name, site in result.policy.sites.items() if site.rank is not None]
    assert split_sites
    assert all(f"{name}.first" in names and f"{name}.second" in names for name in split_sites)
    stored = sum(int(np.prod(site.weight_shape)) for site in find_sites(result.module))
    assert stored <= result.summary["weights"] / 1.5
    assert accuracy(result.module, split) > 0.3
    one = run(sample, curvature, scheme="low-rank", rank=6, factorization=factorization)
    assert {site.rank for site in one.policy.sites.values()} == {None, 6}


def test_low_rank_and_sparse(sample: Model, curvature: Path) -> None:
    result = run(sample, curvature, scheme="low-rank+sparse", ratio=1.5)
    # The same ranks, three quarters of what may be stored, without the sparse part.
    alone = run(sample, curvature, scheme="low-rank", ratio=2.0)
    assert [s.name for s in find_sites(result.module)] == [s.name for s in find_sites(sample.module)]
    assert any("single weights" in site.note for site in result.policy.sites.values())
    assert result.summary["predicted_loss"] < 0.9 * alone.summary["predicted_loss"]


def test_statistics_can_be_taken_again(sample: Model, split: Split, curvature: Path) -> None:
    settings = FastLcSettings(scheme="prune", ratio=4.0, reestimate_batch_norm=True)
    corrected = fast_lc(sample.module, split, settings, curvature)
    plain = fast_lc(sample.module, split, replace(settings, reestimate_batch_norm=False), curvature)
    assert accuracy(corrected.module, split) > accuracy(plain.module, split)
    with pytest.raises(SettingError, match="without images"):
        fast_lc(sample.module, None, settings, curvature)


def test_from_data_and_from_the_file_that_it_saved(sample: Model, split: Split, tmp_path: Path) -> None:
    settings = FastLcSettings(scheme="kmeans", bits=2, images=16, draws=1)
    told: list[tuple[str, int, int]] = []
    path = tmp_path / "c.safetensors"
    first = fast_lc(sample.module, split, settings, None, lambda *event: told.append(event), path)
    again = fast_lc(sample.module, None, settings, path)
    for name, value in get_params(first.module).items():
        np.testing.assert_array_equal(value, get_params(again.module)[name])
    assert {event[0] for event in told} == {"curvature", "compression"}
    assert again.summary["curvature_images"] == 16


def test_nothing_to_go_by(sample: Model) -> None:
    with pytest.raises(DataError, match="--curvature"):
        fast_lc(sample.module, None, FastLcSettings("prune"))


def test_curvature_of_another_model(sample: Model, curvature: Path) -> None:
    value = get_params(sample.module)["fc.weight"] * 1.01
    other = set_params(sample.module, {"fc.weight": value})
    with pytest.raises(ModelError, match="another model"):
        fast_lc(other, None, FastLcSettings("prune"), curvature)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"scheme": "magic"}, "low-rank"),
        ({"scheme": "prune", "bits": 4}, "bits"),
        ({"scheme": "kmeans", "ratio": 4.0}, "ratio"),
        ({"scheme": "binary", "bits": 1}, "bits"),
        ({"scheme": "low-rank", "group": "filter"}, "group"),
        ({"scheme": "low-rank", "rank": 4, "ratio": 2.0}, "both"),
        ({"scheme": "low-rank", "sparse_share": 0.1}, "sparse_share"),
        ({"scheme": "low-rank+sparse", "sparse_share": 1.0}, "sparse_share"),
        ({"scheme": "kmeans", "bits": 9}, "1 to 8"),
        ({"scheme": "fixed", "bits": 1}, "2 to 8"),
        ({"scheme": "prune", "ratio": 1.0}, "above 1"),
        ({"scheme": "prune", "group": "channel"}, "toco"),
        ({"scheme": "prune", "group": "star"}, "star"),
        ({"scheme": "prune", "scope": "galaxy"}, "galaxy"),
        ({"scheme": "prune", "damping": -1.0}, "damping"),
        ({"scheme": "prune", "images": 0}, "images"),
        ({"scheme": "low-rank", "rank": 0}, "rank"),
    ],
)
def test_settings_that_cannot_be(settings: dict, word: str) -> None:
    with pytest.raises(SettingError, match=word):
        FastLcSettings(**settings)


def test_what_the_model_cannot_do(sample: Model, curvature: Path) -> None:
    with pytest.raises(SettingError, match="layer9"):
        run(sample, curvature, scheme="prune", keep=("layer9",))
    with pytest.raises(SettingError, match="smaller ratio"):
        run(sample, curvature, scheme="low-rank", ratio=500.0)
    with pytest.raises(SettingError, match="smaller rank"):
        run(sample, curvature, scheme="low-rank", rank=1000)
    assert set(SCHEMES) >= {"prune", "kmeans", "fixed", "binary", "ternary", "low-rank", "low-rank+sparse"}


def test_ranks_fit_the_budget_and_take_the_best() -> None:
    spectra = {
        "rich": Spectrum(np.array([9.0, 8.0, 7.0, 6.0]), 4, 8),
        "poor": Spectrum(np.array([5.0, 0.1, 0.01, 0.001]), 4, 8),
    }
    assert choose_ranks(spectra, 24) == {"rich": 1, "poor": 1}
    assert choose_ranks(spectra, 36) == {"rich": 2, "poor": 1}
    # Rank 3 would store 36 numbers, the whole matrix 32.
    assert choose_ranks(spectra, 44) == {"rich": None, "poor": 1}
    assert choose_ranks(spectra, 64) == {"rich": None, "poor": None}
    with pytest.raises(SettingError, match="24"):
        choose_ranks(spectra, 23)
