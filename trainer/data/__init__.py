"""Bytes to batches: records, pairs, their order and the input pipeline."""
