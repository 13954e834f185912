"""The C++ self test, which needs no Python: under sanitizers, and for AArch64 under emulation.

Built without optimisation to save time; kernels/sanitize.sh runs the optimised code, and
UndefinedBehaviorSanitizer.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def tool(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs {' or '.join(names)}")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_selftest(folder: Path, *settings: str) -> Path:
    cmake = tool("cmake")
    options = ["PRUNE_LLM_PYTHON=OFF", "PRUNE_LLM_SELFTEST=ON", "CMAKE_BUILD_TYPE=Debug"]
    options += ["CMAKE_CXX_FLAGS_DEBUG=-O0", *settings]
    run(cmake, "-S", KERNELS, "-B", folder, *(f"-D{option}" for option in options))
    run(cmake, "--build", folder, "--parallel", "2")
    return folder / "selftest"


@pytest.fixture(scope="module")
def with_addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The self test under AddressSanitizer."""
    tool("c++", "g++", "clang++")
    return build_selftest(tmp_path_factory.mktemp("address"), "PRUNE_LLM_SANITIZE=address")


def test_memory_of_every_instruction_set(with_addresses: Path) -> None:
    output = run(with_addresses)
    assert "portable: done" in output and "all passed" in output


def test_no_wide_instruction_runs_where_it_was_not_asked_for(with_addresses: Path) -> None:
    """On a machine without AVX-512 the library must load, and use no function compiled for it.

    So a translation unit of an instruction set runs nothing when the library is loaded, and has no
    function that the linker may keep for others.
    """
    objects = [
        file
        for file in sorted(with_addresses.parent.rglob("*.o"))
        if re.search("isa_|avx512|avx2|neon", file.name) and "portable" not in file.name
    ]
    assert len(objects) >= 1
    for file in objects:
        symbols = run(tool("nm"), "--format=posix", file).splitlines()
        kinds = {line.split()[0]: line.split()[1] for line in symbols}
        runs = [name for name in kinds if "static_initialization" in name]
        weak = [name for name, kind in kinds.items() if kind in "WwVvu"]
        shared = [name for name in weak if not name.startswith("DW.ref.")]  # a pointer, no code
        assert not runs and not shared, file.name
        assert any(kind in "Tt" for kind in kinds.values())


def test_threads(tmp_path: Path) -> None:
    """The pool, under ThreadSanitizer; a processor without a name gets the portable code only."""
    tool("c++", "g++", "clang++")
    portable = ("CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=any")
    output = run(build_selftest(tmp_path, "PRUNE_LLM_SANITIZE=thread", *portable))
    assert "portable: done, own threads" in output and "all passed" in output


def test_neon_under_emulation(tmp_path: Path) -> None:
    compiler = tool("aarch64-linux-gnu-g++")
    emulator = tool("qemu-aarch64-static", "qemu-aarch64")
    selftest = build_selftest(
        tmp_path,
        "CMAKE_SYSTEM_NAME=Linux",
        "CMAKE_SYSTEM_PROCESSOR=aarch64",
        f"CMAKE_CXX_COMPILER={compiler}",
        "CMAKE_EXE_LINKER_FLAGS=-static",
    )
    output = run(emulator, selftest)
    assert "neon: done" in output and "all passed" in output
