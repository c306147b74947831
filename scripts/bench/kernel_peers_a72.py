"""Other runtimes on the emulated Cortex-A72, for `kernels.py`, counted as our kernels are.

Their aarch64 wheels run in Debian's aarch64 Python, both fetched on first use (130 MB) and without root. Like
of our kernels, only the code of the library itself counts, not libc's and not Python's; unlike them it holds
the runtime's own dispatch. All memory that this code touches is seen through the caches.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from bench_data import cache_folder
from kernel_peer_run import MODULES
from kernel_peers import PEERS, installed, versions
from torch import nn

from tvm_compress.rpc.block_model import BlockModel
from tvm_compress.rpc.cost_a72 import KernelCost, estimate, read_counts
from tvm_compress.rpc.elf import read_code
from tvm_compress.rpc.emulation_kit import SYSROOT, EmulationKit, prepare

# Debian packages of an aarch64 Python; libc and libstdc++ are those of the emulation kit.
_DEBIAN = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
    *("libexpat1", "zlib1g", "libffi8", "libbz2-1.0", "liblzma5"),
)
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
_NUMPY = "2.2.6"
_LIMIT_S = 1200


@dataclass(frozen=True)
class PeerCost:
    """What one inference of a peer costs: its library as one kernel, and by layer where that is known."""

    whole: KernelCost
    layers: tuple[KernelCost, ...]

    def to_dict(self) -> dict[str, float]:
        """All figures of the whole, and the sum of the layers' cycles."""
        by_layer = (
            {"cycles_by_layer": float(sum(layer.cycles for layer in self.layers))} if self.layers else {}
        )
        return self.whole.to_dict() | by_layer


@dataclass(frozen=True)
class Guest:
    """An emulated Python: where it is, and the kit that runs it."""

    kit: EmulationKit
    root: Path

    def count(self, peer: str, path: Path, x: np.ndarray) -> PeerCost:
        """Cost of one inference of a peer's file."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.save(folder / "x.npy", x)
            said = folder / "said.json"
            script = (Path(__file__).with_name("kernel_peer_run.py"), peer, path, folder / "x.npy", said)
            command = [
                *(self.kit.qemu, "-cpu", "cortex-a72", "-L", str(SYSROOT)),
                *("-plugin", f"{self.kit.plugin},out={folder / 'counts'}"),
                *map(str, (self.root / "usr/bin/python3.11", *script)),
            ]
            done = subprocess.run(
                command,
                env=self._environment(),
                capture_output=True,
                text=True,
                timeout=_LIMIT_S,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{peer} under emulation: {done.stderr.strip()[-500:]}")
            loaded = json.loads(said.read_text())
            code = read_code(Path(loaded["library"]))
            model = BlockModel(self.kit.mc, self.kit.mca, self.kit.cache)
            costs = []
            for index in range(loaded["layers"] + 1):
                counts = read_counts(folder / f"counts.{index}", code, loaded["base"])
                costs += estimate(code, counts, model).kernels.values()
        return PeerCost(costs[0], tuple(costs[1:]))

    def _environment(self) -> dict[str, str]:
        """Nothing of our own: what is meant for this machine's programs would reach the emulated one."""
        libraries = (self.root / "usr/lib/aarch64-linux-gnu", self.root / "lib/aarch64-linux-gnu")
        return {
            "PATH": os.defpath,
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONHOME": str(self.root / "usr"),
            "PYTHONPATH": str(self.root / "site"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }


def prepare_guest(packages: list[str]) -> Guest:
    """Fetch what is missing of Python and of packages' aarch64 wheels, in the versions installed here."""
    wheels = [f"numpy=={_NUMPY}", *(f"{name}=={version(name)}" for name in packages)]
    root = cache_folder(None) / ("aarch64-" + "-".join(wheel.split("==")[1] for wheel in wheels))
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as name:
            made = Path(name) / "made"
            made.mkdir()
            _fetch_python(made)
            _fetch_wheels(made, wheels)
            made.rename(root)
    return Guest(prepare(), root)


def _fetch_python(root: Path) -> None:
    """Unpack Debian's packages, by an apt of our own that leaves the system's as it is."""
    apt = root / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    options = {
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "root",
    }
    command = ["apt-get", "-qq", *(part for o in options.items() for part in ("-o", f"{o[0]}={o[1]}"))]
    subprocess.run([*command, "update"], check=True)
    subprocess.run([*command, "download", *_DEBIAN], check=True, cwd=apt)
    for package in sorted(apt.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    shutil.rmtree(apt)


def _fetch_wheels(root: Path, wheels: list[str]) -> None:
    platforms = [part for p in _PLATFORMS for part in ("--platform", f"{p}_aarch64")]
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", *platforms]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, "--python-version", "3.11", "-d", folder, *wheels], check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(root / "site")


def count_peers(network: nn.Module, x: np.ndarray, scheme: str) -> dict[str, PeerCost]:
    """Cost of one inference of each peer that is installed here and has an aarch64 wheel."""
    peers = {name: peer for name, peer in installed(scheme).items() if name in MODULES}
    if not peers:
        return {}
    guest = prepare_guest([PEERS[name].packages[0] for name in MODULES if versions(name)])
    found = {}
    for name, peer in peers.items():
        with tempfile.TemporaryDirectory() as folder:
            path = peer.write(network, x, scheme, "emulated-a72", Path(folder))
            found[name] = guest.count(name, path, x)
    return found
