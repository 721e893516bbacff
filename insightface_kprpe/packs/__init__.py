"""Files as they lie: what packs and ONNX files are called, say of themselves, and are taken for."""
