"""A package that can be called as the function of its own name.

``normfree.convert`` is a function of the public interface and the package that holds it. Python makes a package that is
imported an attribute of its parent, whatever that attribute was before; so the package itself is callable, and the two
ways to write it are one object: ``normfree.convert(model, x)`` and ``import normfree.convert``.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package whose call is a call of its function of the same name.

    It is pickled by its name, as a function is.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The function."""
        return self.__dict__[self.__name__.rpartition(".")[2]]

    @property
    def __signature__(self) -> inspect.Signature:
        """Its signature, for editors and ``help``."""
        return inspect.signature(self.__wrapped__)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return import_module, (self.__name__,)


def make_callable(name: str) -> None:
    """Make a package callable; to be called by the package itself, once it has its function.

    Args:
        name: of the package: its ``__name__``.
    """
    sys.modules[name].__class__ = CallablePackage
