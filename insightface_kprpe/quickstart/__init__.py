"""The whole path once, on drawn faces."""
