"""Models as files that run without us: ONNX and PyTorch's own programs, folded, read back and compared."""

from normfree.export.agreement import Difference
from normfree.export.exported import Exported
from normfree.export.onnx_file import to_onnx
from normfree.export.program_file import to_program

__all__ = ["Difference", "Exported", "to_onnx", "to_program"]
