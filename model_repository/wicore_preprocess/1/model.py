from wicore_backend.triton.preprocess import TritonPythonModel

__all__ = ["TritonPythonModel"]
