"""Builds the optional accelerator: `python3 setup.py build_ext --inplace`.  dfly.py itself needs no installation."""
import os

from Cython.Build import cythonize
from setuptools import Extension, setup

FLAGS = os.environ.get("DFLY_CFLAGS", "-O3").split()  # the lanes want all that a compiler can do
setup(name="dfly", version="0.1.0", py_modules=["dfly"],
      ext_modules=cythonize(Extension("_fastpiece", ["_fastpiece.pyx"], extra_compile_args=FLAGS), language_level=3))
