"""The native CPU kernels, built where there is a compiler; everything else is in setup.cfg."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "vim.kernels.native._kernels",
            ["kernels/native/kernels.cpp"],
            depends=glob("kernels/native/*.h"),
            language="c++",
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++17",
                "-ffp-contract=fast",
                "-fvisibility=hidden",
                "-Wno-psabi",
                "-Wno-ignored-attributes",
            ],
            extra_link_args=["-pthread"],
            optional=True,
            py_limited_api=True,  # it knows nothing of Python, so that one build serves all versions
        )
    ]
)
