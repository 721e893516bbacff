"""Deployment: published weights in, ONNX files and model packs out."""
