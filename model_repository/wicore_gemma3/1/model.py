from wicore_backend.triton.gemma3 import TritonPythonModel

__all__ = ["TritonPythonModel"]
