"""Take the normalizers out of someone else's model, guided by its recorded dataflow.

The package can be called as its function :func:`convert`: ``normfree.convert(model, x)``.
"""

from normfree.convert.callable_package import make_callable
from normfree.convert.files import stored_conversion
from normfree.convert.pipeline import ALPHA, BETAS, SKIP_GAIN, conversion_of, convert
from normfree.convert.record import STARTS, Change, Conversion, Kept

__all__ = [
    "ALPHA",
    "BETAS",
    "SKIP_GAIN",
    "STARTS",
    "Change",
    "Conversion",
    "Kept",
    "conversion_of",
    "convert",
    "stored_conversion",
]

make_callable(__name__)
