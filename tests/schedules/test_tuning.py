"""The tuning database: as written so read, other versions are ignored, damage is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm

from tests.schedules.test_threads import float_site
from tvm_compress.errors import TuningError
from tvm_compress.passes.params import with_stage
from tvm_compress.passes.pipeline import build, lower
from tvm_compress.schedules.choices import Choice
from tvm_compress.schedules.kernel_key import SCHEDULES_VERSION, target_digest
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.schedules.tuning import TunedLayer, Tuning, TuningWarning

HOST = parse_target("host")
KEY = (
    "conv2d scheme=fp32 activation_bits=32 weight_bits=32 N=1 H=12 W=12 IC=16 OC=24 KH=3 KW=3 strides=2,2 "
    "padding=1,1,1,1 dilation=1,1 groups=1"
)


def entry(**changes: Any) -> TunedLayer:
    values: dict[str, Any] = {
        "layer": KEY, "target": target_digest(HOST), "tvm": tvm.__version__, "schedules": SCHEDULES_VERSION,
        "choice": Choice("direct", (1, 1, 1)), "default": Choice("direct", (1, 4, 2)), "value": 1.5e-5,
        "default_value": 2e-5, "kernels": ("a-b",), "device": "local", "unit": "seconds", "threads": 1,
        "tried": 4,
    }  # fmt: skip
    return TunedLayer(**(values | changes))


def write(path: Path, *entries: TunedLayer) -> Path:
    path.write_text(Tuning().merged(entries).to_json(), encoding="utf-8")
    return path


def test_what_is_written_is_read_and_the_order_does_not_matter(tmp_path: Path) -> None:
    one, other = entry(), entry(layer="another")
    path = write(tmp_path / "db.json", one, other)
    assert set(Tuning.load(path).layers) == {one, other}
    assert path.read_text() == write(tmp_path / "again.json", other, one).read_text()
    assert Tuning.load(path).to_json() == path.read_text()


def test_a_newer_entry_takes_the_place_of_the_same() -> None:
    newer = entry(value=1e-5)
    assert Tuning((entry(),)).merged([newer]).layers == (newer,)
    assert len(Tuning((entry(),)).merged([entry(schedules=SCHEDULES_VERSION + 1)]).layers) == 2


def test_lower_and_build_follow_it(tmp_path: Path) -> None:
    module = with_stage(float_site((1, 12, 12, 16), 24, 3, 2), "integer")
    path = write(tmp_path / "db.json", entry())
    tuned = lower(module, HOST, tuning=path)
    assert '\\"tile\\": [1, 1]' in tuned.script()
    assert '\\"tile\\": [1, 1]' not in lower(module, HOST).script()
    tvm.ir.assert_structural_equal(build(module, HOST, tuning=Tuning.load(path)).module, tuned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedules": SCHEDULES_VERSION - 1}, "1 layers that were tuned with other versions"),
        ({"tvm": "0.1"}, "1 layers that were tuned with other versions"),
        ({"target": "another"}, "nothing for the target"),
    ],
)
def test_what_is_of_other_versions_or_targets_is_ignored_with_a_warning(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    module = with_stage(float_site((1, 12, 12, 16), 24, 3, 2), "integer")
    path = write(tmp_path / "db.json", replace(entry(), **changes))
    with pytest.warns(TuningWarning, match=message):
        tuned = lower(module, HOST, tuning=path)
    tvm.ir.assert_structural_equal(tuned, lower(module, HOST))


def test_a_kernel_that_there_is_not_is_an_error() -> None:
    module = with_stage(float_site((1, 12, 12, 16), 24, 3, 2), "integer")
    with pytest.raises(TuningError, match=r"chooses the kernel 'magic'.*there are F2"):
        lower(module, HOST, tuning=Tuning((entry(choice=Choice("magic", (1,))),)))


def damaged(**changes: Any) -> str:
    content = json.loads(Tuning((entry(),)).to_json())
    content["layers"][0] |= changes
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "its version is None"),
        ('{"version": 99, "layers": []}', "its version is 99"),
        ('{"version": 1}', "damaged entry"),
        ('{"version": 1, "layers": [7]}', "damaged entry"),
        (damaged(speed=3), "unknown or missing: speed"),
        (damaged(layer=3), "must be texts"),
        (damaged(value="fast"), "damaged entry"),
        (damaged(choice={"kernel": "direct"}), "damaged entry"),
        (damaged(choice="direct"), "damaged entry"),
    ],
)
def test_a_bad_database_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "db.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TuningError, match=message):
        Tuning.load(path)


def test_a_missing_database_is_told(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"cannot be read.*tvm-compress tune"):
        Tuning.load(tmp_path / "none.json")
