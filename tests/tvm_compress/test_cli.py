"""The command line: a user's mistake ends with exit code 2 and one paragraph; --json is one object."""

import json
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.cli.main import main
from tvm_compress.model import Model
from tvm_compress.samples.load import load_sample

SAMPLE = "sample:resnet8-fashion"


def images(path: Path, count: int = 40, classes: int = 10, shape: tuple[int, ...] = (28, 28)) -> Path:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, 1, *shape), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(count) % classes)
    return path


@pytest.fixture(scope="module")
def sample_model() -> Model:
    return load_sample("resnet8-fashion")


@pytest.fixture(scope="module")
def saved(sample_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "sample"
    sample_model.save(path)
    return path


def expect_error(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err


class TestBadInput:
    def test_missing_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        expect_error(capsys, ["inspect", "no/such/model"], "no/such/model")

    def test_unknown_sample(self, capsys: pytest.CaptureFixture[str]) -> None:
        expect_error(capsys, ["inspect", "sample:nothing"], "nothing", "resnet8-fashion")

    def test_corrupt_model(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        for name in ("broken.onnx", "broken.pt2"):
            (tmp_path / name).write_bytes(b"this is no model")
            expect_error(capsys, ["inspect", str(tmp_path / name)], name)

    def test_damaged_saved_model(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, sample_model: Model
    ) -> None:
        sample_model.save(tmp_path / "m")
        weights = tmp_path / "m" / "params.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        expect_error(capsys, ["inspect", str(tmp_path / "m")], "params.safetensors")

    def test_missing_data(self, capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
        compress = ["compress", str(saved), "-o", str(tmp_path / "out")]
        expect_error(capsys, compress, "--data")
        expect_error(capsys, [*compress, "--data", str(tmp_path / "nothing.npz")], "nothing.npz")
        assert not (tmp_path / "out").exists()

    def test_corrupt_data(self, capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 but no archive")
        arguments = ["compress", str(saved), "-o", str(tmp_path / "out"), "--data", str(tmp_path / "bad.npz")]
        expect_error(capsys, arguments, "bad.npz")

    def test_data_of_another_shape(
        self, capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
    ) -> None:
        data = images(tmp_path / "small.npz", shape=(20, 20))
        arguments = ["compress", str(saved), "-o", str(tmp_path / "out"), "--data", str(data)]
        expect_error(capsys, arguments, "20", "28")

    def test_more_labels_than_classes(
        self, capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
    ) -> None:
        data = images(tmp_path / "many.npz", classes=12)
        arguments = ["compress", str(saved), "-o", str(tmp_path / "out"), "--data", str(data)]
        expect_error(capsys, arguments, "11", "10")

    def test_unknown_target(self, capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
        for target in ("abacus", "llvm -mcpu"):
            arguments = ["compile", str(saved), "-o", str(tmp_path / "out"), "--target", target]
            expect_error(capsys, arguments, target.split(" ")[0])
            assert not (tmp_path / "out").exists()

    def test_policy_of_another_model(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        policy = {"version": 1, "sites": {"layer9.conv": {"channels": 4}}}
        (tmp_path / "policy.json").write_text(json.dumps(policy))
        arguments = [
            "compress",
            SAMPLE,
            "-o",
            str(tmp_path / "out"),
            "--policy",
            str(tmp_path / "policy.json"),
        ]
        expect_error(capsys, arguments, "layer9.conv")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--method", "magic"], ("magic", "toco, fastlc, esn")),
            (["--method", "toco", "--ratio", "2"], ("--ratio", "--method fastlc")),
            (["--method", "fastlc", "--scheme", "kmeans", "--weight-bits", "4"], ("--weight-bits", "policy")),
            (["--batches", "4"], ("--batches", "--method toco")),
            (["--policy", "p.json", "--weight-bits", "4"], ("--policy", "--weight-bits")),
            (["--method", "esn", "--mean-bits", "3", "--weight-bits", "4"], ("--mean-bits", "--weight-bits")),
        ],
    )
    def test_options_of_another_method(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], words: tuple[str, ...]
    ) -> None:
        expect_error(capsys, ["compress", SAMPLE, "-o", str(tmp_path / "out"), *options], *words)

    @pytest.mark.parametrize("budget", ["0", "-0.5", "1.01", "nan"])
    def test_budget(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, budget: str) -> None:
        arguments = ["search", SAMPLE, "--study", "s", "--budget", budget, "--studies", str(tmp_path)]
        expect_error(capsys, arguments, "budget")
        assert list(tmp_path.iterdir()) == []

    def test_unknown_device(self, capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
        artifact = tmp_path / "artifact"
        assert main(["compile", str(saved), "-o", str(artifact), "--json"]) == 0
        capsys.readouterr()
        expect_error(capsys, ["benchmark", str(artifact), "--device", "toaster"], "toaster", "local")

    def test_not_an_artifact(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        expect_error(capsys, ["benchmark", str(tmp_path)], "manifest.json")

    def test_unfinished_study(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        expect_error(capsys, ["report", "nothing", "--studies", str(tmp_path)], "nothing")

    def test_foreign_output_is_kept(
        self, capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        expect_error(capsys, ["compile", str(saved), "-o", str(tmp_path)], str(tmp_path))
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_error_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "no/such/model", "--json"]) == 2
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["type"] == "ModelError"
        assert "no/such/model" in error["message"]

    def test_usage_error_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compile", "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["type"] == "UsageError"


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", SAMPLE, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    names = [site["name"] for site in summary["sites"]]
    assert names[0] == "conv1"
    assert "layer2.0.short.0" in names
    assert summary["metrics"]["macs"] > 5e6
    assert main(["inspect", SAMPLE]) == 0
    assert "coupled sets" in capsys.readouterr().out


def test_compress_compile_verify_run_benchmark(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One model by hand through every command after the search, as a user would type them."""

    def call(*arguments: str) -> dict:
        assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    model, artifact, dense = str(tmp_path / "model"), str(tmp_path / "int8.tar"), str(tmp_path / "dense")
    bits = ["--weight-bits", "8", "--activation-bits", "8"]
    compressed = call("compress", SAMPLE, "-o", model, "--pruning-ratio", "0.25", *bits)
    assert compressed["metrics"]["macs"] < 0.9 * call("inspect", SAMPLE)["metrics"]["macs"]
    fast = call("compile", model, "-o", artifact)
    pi = ["compile", model, "--target", "raspberry-pi/4b-aarch64", "-o"]
    large, small = call(*pi, str(tmp_path / "pi")), call(*pi, str(tmp_path / "compact"), "--compact")
    # Transformed weights take two or more bytes for one.
    assert small["memory"]["constant_bytes"] < large["memory"]["constant_bytes"] - 20_000
    assert small["library_bytes"] < large["library_bytes"] - 20_000
    call("compile", SAMPLE, "-o", dense)
    checked = call("verify", artifact, "--model", model, "--data", SAMPLE, "--limit", "60")
    assert checked["agreement"] == 1.0
    assert call("verify", artifact, "--model", model, "--data", SAMPLE, "--limit", "60")[
        "manifest_accuracy_before"
    ] == pytest.approx(checked["accuracy"])
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (2, 1, 28, 28), dtype=np.uint8))
    ran = call("run", artifact, "--input", str(tmp_path / "x.npy"))
    assert np.asarray(ran["logits"]).shape == (2, 10)
    timed = call("benchmark", artifact, "--against", dense, "--repeat", "3", "--min-repeat-ms", "1")
    assert timed["ratio"] > 0
    assert timed["memory"]["this"] == fast["memory"]
    assert timed["memory"]["against"]["constant_bytes"] > fast["memory"]["constant_bytes"]
    assert {r["unit"] for r in timed["results"].values()} == {"seconds"}
    assert timed["ratio"] == pytest.approx(
        np.median(np.divide(*(timed["results"][name]["samples"] for name in ("this", "against"))))
    )
    quick = ["--repeat", "3", "--min-repeat-ms", "0", "--max-spread", "1e-9", "--max-repeat", "5"]
    timed = call("benchmark", artifact, "--against", dense, *quick, "--cache-flush-bytes", "1048576")
    for result in timed["results"].values():
        assert (len(result["samples"]), result["stopped_by"]) == (5, "limit")
        assert result["counters"]["cache_flush_bytes"] == 1 << 20
        assert result["settings"]["max_spread"] == 1e-9
        assert result["health"]["after"]["load_average"] >= 0
    assert main(["benchmark", artifact, "--against", artifact, *quick, "--cache-flush"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(" ms │") == 4
    for words in (
        "memory of",
        "MAD / median",
        "after 5 samples, the limit",
        "caches flushed before each call",
        "load",
    ):
        assert words in printed
