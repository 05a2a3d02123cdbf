"""Builds dualblade._core from dualblade/_core.pyx and csrc/*.c; the rest is in pyproject.toml.

Options, from the environment:
    DUALBLADE_URING=auto|off             off builds without io_uring (and without liburing)
    DUALBLADE_SANITIZE=address|thread    adds AddressSanitizer with UBSan, or ThreadSanitizer
"""

import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from typing import NamedTuple

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class Library(NamedTuple):
    """A system library that csrc/ uses, and where a user gets it."""

    name: str
    header: str
    probe: str  # an expression that needs the library when it is linked
    debian: str
    fedora: str
    otherwise: str = ""


URING = Library(
    "uring",
    "liburing.h",
    "io_uring_queue_init(8, 0, 0)",
    "liburing-dev",
    "liburing-devel",
    " Or set DUALBLADE_URING=off to build without io_uring.",
)
# libaio.a gives io_getevents a symbol version, which a shared object of ours cannot define: where
# that is so, the probe fails and libaio.so is used.
AIO = Library("aio", "libaio.h", "io_getevents(0, 0, 0, 0, 0)", "libaio-dev", "libaio-devel")
XXHASH = Library("xxhash", "xxhash.h", "(int)XXH3_64bits(0, 0)", "libxxhash-dev", "xxhash-devel")

SANITIZERS = {"": [], "address": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread"]}


def option(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name) or default
    if value not in allowed:
        words = " or ".join(word for word in allowed if word)
        sys.exit(f"{name}={value} is not known; set it to {words}, or leave it unset.")
    return value


class BuildCore(build_ext):
    """Checks the system libraries, then translates and compiles with the options asked for."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # setuptools compares times only: it would take an extension built with other options.
        self.force = True

    def build_extension(self, ext: Extension) -> None:
        uring = option("DUALBLADE_URING", "auto", ("auto", "off"))
        sanitize = option("DUALBLADE_SANITIZE", "", tuple(SANITIZERS))
        libraries = [AIO, XXHASH] if uring == "off" else [URING, AIO, XXHASH]
        self.require_headers(libraries)
        for library in libraries:
            archive = self.static_archive(library)
            if archive:
                ext.extra_objects.append(archive)
            else:
                ext.libraries.append(library.name)
        if uring == "off":
            ext.define_macros.append(("DUALBLADE_NO_URING", "1"))
        if sanitize:
            flags = [*SANITIZERS[sanitize], "-fno-omit-frame-pointer"]
            ext.extra_compile_args += [*flags, "-O1"]
            ext.extra_link_args += flags
        pyx = [source for source in ext.sources if source.endswith(".pyx")]
        (translated,) = cythonize(
            Extension(ext.name, pyx),
            build_dir="build",  # no generated C in the tree
            compiler_directives={"language_level": 3},
        )
        ext.sources = translated.sources + [s for s in ext.sources if not s.endswith(".pyx")]
        with CompilerPool(self.compiler, len(ext.sources)):
            super().build_extension(ext)

    def compiler_command(self) -> list[str]:
        command = getattr(self.compiler, "compiler_so", None) or ["cc"]
        return shlex.split(os.environ["CC"]) if "CC" in os.environ else command[:1]

    def compiles(self, source: str, *arguments: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "probe.c")
            with open(path, "w", encoding="ascii") as file:
                file.write(source)
            command = [*self.compiler_command(), "-fPIC", path, "-o", path + ".out", *arguments]
            try:
                result = subprocess.run(command, capture_output=True, check=False)
            except OSError as error:
                raise CompileError(
                    f"The C compiler {command[0]} cannot be run ({error.strerror}). "
                    "Install it: apt install gcc (Debian), dnf install gcc (Fedora)."
                ) from error
            return result.returncode == 0

    def require_headers(self, libraries: list[Library]) -> None:
        missing = [
            library
            for library in libraries
            if not self.compiles(f"#include <{library.header}>\n", "-c")
        ]
        if missing:
            headers = ", ".join(library.header for library in missing)
            debian = " ".join(library.debian for library in missing)
            fedora = " ".join(library.fedora for library in missing)
            otherwise = "".join(library.otherwise for library in missing)
            raise CompileError(
                f"{headers} not found. Install it: apt install {debian} (Debian), "
                f"dnf install {fedora} (Fedora).{otherwise}"
            )

    def static_archive(self, library: Library) -> str | None:
        """The static library, when there is one that links into a shared object."""
        answer = subprocess.run(
            [*self.compiler_command(), f"-print-file-name=lib{library.name}.a"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        if not os.path.isabs(answer):
            return None
        source = f"#include <{library.header}>\nint probe(void) {{ return {library.probe}; }}\n"
        return answer if self.compiles(source, "-shared", answer) else None


class CompilerPool:
    """While it is open, the sources of one compile() call are compiled side by side."""

    def __init__(self, compiler, sources: int) -> None:
        self.compiler = compiler
        self.workers = min(sources, os.cpu_count() or 1)

    def __enter__(self) -> None:
        serial = self.compiler.compile

        def compile_all(sources, *arguments, **options):
            with ThreadPoolExecutor(self.workers) as pool:
                objects = pool.map(lambda one: serial([one], *arguments, **options), sources)
                return [path for group in objects for path in group]

        self.compiler.compile = compile_all

    def __exit__(self, *exc: object) -> None:
        del self.compiler.compile


setup(
    ext_modules=[
        Extension(
            "dualblade._core",
            sources=["dualblade/_core.pyx", *sorted(glob("csrc/*.c"))],
            # What is included, so that it goes into the source distribution.
            depends=sorted(glob("csrc/*.h") + glob("dualblade/*.px[di]")),
            include_dirs=["csrc"],
            libraries=["dl"],
            # Python's own flags define NDEBUG; the core's assertions stay in release builds.
            extra_compile_args=[
                *("-std=gnu11", "-O3", "-g", "-UNDEBUG", "-fvisibility=hidden"),
                *("-Wall", "-Wextra", "-pthread"),
            ],
            extra_link_args=["-pthread", "-Wl,--exclude-libs,ALL"],
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
