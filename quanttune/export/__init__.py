"""Export to ONNX: the walk of the sites once more, and what is quantized as integers.

:func:`export_onnx` writes the file, :mod:`.runtime` opens it. Needs the packages of the extra ``onnx``.
"""
