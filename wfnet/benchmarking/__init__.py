"""Throughput of an untraining step, beside what others would write (`wfnet bench`)."""
