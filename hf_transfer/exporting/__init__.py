"""Exports of a saved model to ONNX and OpenVINO: the files, their verification, and the runtimes that run them."""
