"""Cameras and other sources of frames, one address each; faults of their pictures."""
