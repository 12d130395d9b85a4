"""What pyproject.toml has no lasting words for: the interpreter of recorded graphs, in C.

Without a compiler the package is installed without it, and everything works by torch alone.
"""

from setuptools import Extension, setup

# exp() and its kind have no error codes and raise no flags here, so that a compiler may compute several at once.
FLAGS = ["-O3", "-fno-unswitch-loops", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11"]

setup(
    ext_modules=[
        Extension(
            "pyro_flows.model.graphs._interpreter",
            ["pyro_flows/model/graphs/interpreter.c"],
            extra_compile_args=FLAGS,
            libraries=["m"],
            optional=True,
        )
    ]
)
