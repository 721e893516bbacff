"""Recognizing faces with InsightFace: what ``register()`` adds to it, galleries of people, and ``doctor``."""
