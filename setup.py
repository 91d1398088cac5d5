"""Compiles the CPU's kernels; pyproject.toml has everything else about the package."""

import sysconfig

from setuptools import Extension, setup

# One wheel for 3.11 and later; free-threaded builds of Python have no stable ABI.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "torch_sce.kernels._cpu",
            ["torch_sce/kernels/cpu.c"],
            depends=["torch_sce/kernels/cpu_rows.h"],
            # FOR_LANES asks for vectors; no code asks for errno or for floating-point traps.
            # Python's own -fwrapv keeps compilers from making vectors of loops with int indices.
            extra_compile_args=["-O3", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno",
                                "-fno-trapping-math", "-fno-wrapv", "-g0"],
            define_macros=[("Py_LIMITED_API", "0x030b0000")] if ABI3 else [],
            py_limited_api=ABI3,
            optional=True,  # without a C compiler the package is installed without it
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"} if ABI3 else {}},
)  # fmt: skip
