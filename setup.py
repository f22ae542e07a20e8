"""Builds the optional native CPU library; everything else about the package is in pyproject.toml.

The library has a plain C ABI and is loaded with ctypes, so it needs a C++17 compiler but no Python or torch
headers. Sources are compiled once each, in parallel; files named after an instruction set get its flags and are
chosen between at run time. Without a compiler the package installs all the same and runs on torch operations.
"""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("aphrodite/kernels/cpu/native")
COMMON_FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    # Rows must not change in a bit with the batch: every fused multiply-add is written out.
    "-ffp-contract=off",
    "-w",  # warnings are for whoever works on the sources, not for an installation
]
ISA_FLAGS = {
    "avx512": [
        *["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
        "-mprefer-vector-width=512",
    ],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}


COMPILERS = ("c++", "g++", "clang++")


def isa_of(source: str) -> str:
    """The instruction set that a source file is compiled for, `*_avx512.cpp` and `*_avx2.cpp`; "" for any."""
    name = Path(source).stem.rpartition("_")[2]
    return name if name in ISA_FLAGS and platform.machine().lower() in ("x86_64", "amd64") else ""


def compiler_beside_pythons_own() -> str | None:
    """A compiler to name by CXX where nobody named one and the one that Python was built with is not here."""
    own = (sysconfig.get_config_var("CXX") or COMPILERS[0]).split()[0]
    return None if "CXX" in os.environ or shutil.which(own) else next(filter(shutil.which, COMPILERS), None)


class BuildNative(build_ext):
    """Compiles the sources of the native library in parallel and never fails the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library is no Python module, so its file name carries no interpreter tag."""
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols

    def run(self) -> None:
        found = compiler_beside_pythons_own()
        if found is not None:
            os.environ["CXX"] = found
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            self.warn(
                f"the native CPU library was not built ({error}); Aphrodite installs and works without it, "
                "several times slower on CPUs. Install a C++17 compiler (g++ or clang++) and reinstall to get it."
            )

    def _build(self, ext: Extension) -> None:
        compiler: Any = self.compiler
        left_out: dict[str, Exception] = {}
        headers = [str(path) for path in sorted(NATIVE.glob("*.h"))]

        def compile_with(source: str, flags: list[str]) -> list[str]:
            objects: list[str] = compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=COMMON_FLAGS + flags, depends=headers
            )
            return objects

        def compile_one(source: str) -> list[str]:
            isa = isa_of(source)
            try:
                return compile_with(source, ISA_FLAGS.get(isa, []))
            except Exception as error:
                if not isa:
                    raise
                # A compiler that does not know the instruction set leaves it out of the library.
                left_out[isa] = error
                return compile_with(source, [])

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [name for names in pool.map(compile_one, sorted(ext.sources)) for name in names]
        compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread"], target_lang="c++"
        )
        for isa, error in left_out.items():
            self.warn(
                f"the native CPU library was built without {isa.upper()}, which the compiler failed on ({error}): "
                "processors that have it run slower kernels. Reinstall with a newer compiler to get it."
            )


setup(
    ext_modules=[
        Extension(
            "aphrodite.kernels.cpu._native",
            sources=[str(path) for path in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
