"""Relax to Relax: what is done to a module."""

import inspect

import tvm_ffi

from tvm_compress import errors

# TVM carries an exception out of a pass by its class's name: without this, a user's mistake would arrive as a
# RuntimeError. (The hint then stands in the message.)
for _name, _class in inspect.getmembers(errors, inspect.isclass):
    tvm_ffi.register_error(_name, _class)
