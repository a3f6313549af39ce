"""MXFP4 checkpoints: names and layouts on disk, a file a convention, and statistics of their blocks."""
