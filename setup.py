"""Builds the optional accelerator: `python3 setup.py build_ext --inplace`.  dfly.py itself needs no installation."""
from Cython.Build import cythonize
from setuptools import setup

setup(name="dfly", version="0.1.0", py_modules=["dfly"], ext_modules=cythonize("_fastpiece.pyx", language_level=3))
