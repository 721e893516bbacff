"""A model on a set of images: from any file, in batches, shared by ranks, resumable."""
