"""Dense segments as TensorRT engines: built from ONNX files for a card that need not be there, kept, checked and run.

`tensorrt`, of NVIDIA's images, and `tensorrt_rtx`, a wheel for GeForce and RTX cards, have the same Python API; where
they differ, `library.py` says so, and nobody else asks.
"""
