"""LAVT, VLT and LTS, re-implemented in the same framework."""
