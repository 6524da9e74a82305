"""Reading a pickle that can only be data.

Two locks: the opcodes are listed before anything is loaded, and only those that build numbers, texts, bytes, lists,
tuples and dictionaries pass; then an unpickler loads them for which every global is an error.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, NoReturn

from crd_fast.errors import CrdFastError

# Opcodes without a name in them, an object to be made, or a look-up outside of the pickle: no GLOBAL, STACK_GLOBAL,
# INST, OBJ, NEWOBJ, REDUCE, BUILD, EXT*, PERSID, and no buffers from outside.
_NUMBERS = "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT"
_TEXTS = "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
_CONTAINERS = (
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 MARK"
)
_MEMO = "MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET"
_ALLOWED = frozenset(f"PROTO FRAME STOP {_NUMBERS} {_TEXTS} {_CONTAINERS} {_MEMO}".split())
_SIZED = frozenset("FRAME PUT BINPUT LONG_BINPUT".split())  # an argument for which the unpickler makes room


class UnsafePickleError(CrdFastError, ValueError):
    """A pickle holds more than plain data, or is damaged."""


def load_plain(data: bytes) -> Any:
    """The numbers, texts, bytes, lists, tuples and dictionaries in a pickle. Raises UnsafePickleError.

    The caller bounds the size of `data`; what is made of it is a fixed multiple of that.
    """
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name not in _ALLOWED:
                raise UnsafePickleError(
                    f"the pickle has {opcode.name} at byte {position}: only plain numbers, texts, lists and "
                    "dictionaries are read, for anything else, numpy arrays too, can run code"
                )
            if opcode.name in _SIZED and argument is not None and argument > len(data):
                raise UnsafePickleError(
                    f"the pickle has {opcode.name} {argument} at byte {position}: damaged or a trap"
                )
        return _PlainUnpickler(io.BytesIO(data)).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # damaged data makes both readers raise anything
        raise UnsafePickleError(f"the pickle cannot be read: {type(error).__name__}: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise UnsafePickleError(f"the pickle names {module}.{name}: only plain data is read")

    def persistent_load(self, identity: Any) -> NoReturn:
        raise UnsafePickleError("the pickle refers to an object outside of it: only plain data is read")
