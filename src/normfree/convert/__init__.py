"""Take the normalizers out of someone else's model, guided by its recorded dataflow.

:mod:`~normfree.convert.pipeline` has the function :func:`convert`, and reads from top to bottom: record, plan, apply,
verify. The package can be called as that function: ``normfree.convert(model, x)``.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from normfree.convert.pipeline import ALPHA, BY_HAND, SKIP_GAIN, convert
from normfree.convert.record import (
    BETAS,
    STARTS,
    Beta,
    Change,
    Conversion,
    Converted,
    Kept,
    Start,
    conversion_of,
    stored_conversion,
)

__all__ = [
    "ALPHA",
    "BETAS",
    "BY_HAND",
    "SKIP_GAIN",
    "STARTS",
    "Beta",
    "Change",
    "Conversion",
    "Converted",
    "Kept",
    "Start",
    "conversion_of",
    "convert",
    "stored_conversion",
]


class CallablePackage(ModuleType):
    """A package whose call is a call of its function of the same name.

    ``normfree.convert`` is a function of the public interface and the package that holds it. Python makes a package
    that is imported an attribute of its parent, whatever that attribute was before; so the package is callable, and
    the two are one object. It is pickled by its name, as a function is.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        __tracebackhide__ = True
        return convert(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The function."""
        return convert

    @property
    def __signature__(self) -> inspect.Signature:
        """Its signature, for editors and ``help``."""
        return inspect.signature(convert)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = CallablePackage
