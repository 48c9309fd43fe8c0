"""Making Triton's interpreter faster where it repeats itself.

Entering a kernel, the interpreter replaces every builtin of the language by one that runs on NumPy. It does the
same again on every call of a device function from within a kernel, although nothing has changed: a third of
the time of a kernel made of small functions. `quicken` leaves that out where it has been done.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> bool:
    """Let device functions be called without replacing the language again; whether this version could be helped."""
    function: Any = getattr(interpreter, "InterpretedFunction", None)
    patch: Any = getattr(interpreter, "_patch_lang", None)
    if patch is None or not hasattr(function, "rewrite") or not hasattr(interpreter, "InterpreterError"):
        return False

    def call(self, *arguments, **named):
        modules = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if not modules or any(tl.core.is_builtin(module.arange) for module in modules):
            patch(self.fn)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    function.__call__ = call
    return True
