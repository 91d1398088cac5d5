"""Compiles the CPU's kernels; pyproject.toml has everything else about the package."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "torch_sce.kernels._cpu",
            ["torch_sce/kernels/cpu.c"],
            depends=["torch_sce/kernels/cpu_rows.h"],
            # FOR_LANES asks for vectors; no code asks for errno or for floating-point traps.
            extra_compile_args=["-O3", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno",
                                "-fno-trapping-math", "-g0"],
            py_limited_api=True,
            optional=True,  # without a C compiler the package is installed without it
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for 3.11 and later
)  # fmt: skip
