"""Experiments: one file a question. They compose the library and hold no machinery."""
