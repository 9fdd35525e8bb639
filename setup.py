"""Packaging: installs `leap_dist`, and the folder kernels/ under the name `leap_kernels`.

A top-level package called `kernels` would collide with the one that transformers and diffusers look for.
"""

from setuptools import find_packages, setup

kernel_packages = ["leap_kernels", *(f"leap_kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["leap_dist", "leap_dist.*"]), *kernel_packages],
    package_data={"leap_dist.data": ["*.txt"], "leap_dist.report": ["*.html", "*.css"]},
    package_dir={"leap_kernels": "kernels"},
)
