"""Packs and ONNX files on disk: their names, their metadata, and how they are loaded."""
