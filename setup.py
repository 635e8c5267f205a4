"""The compiled parts. Optional: without a C compiler the installation goes on and Python takes over."""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(Path("src/foregate/native").glob("*.c"))

setup(
    ext_modules=[
        Extension(
            f"foregate.native._{source.stem}",
            [source.as_posix()],
            extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", "-Werror=vla"],
            extra_link_args=["-pthread"],
            depends=[header.as_posix() for header in source.parent.glob("*.h")],
            optional=True,
        )
        for source in SOURCES
    ]
)
