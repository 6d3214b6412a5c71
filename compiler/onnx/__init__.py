"""ONNX files as modules: read and checked, then captured like any other network."""
