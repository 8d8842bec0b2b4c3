"""Models as files that run without us: ONNX and PyTorch's own programs, folded, read back and compared."""

from normfree.export.comparison import Difference
from normfree.export.exported import Exported, to_onnx, to_program

__all__ = ["Difference", "Exported", "to_onnx", "to_program"]
