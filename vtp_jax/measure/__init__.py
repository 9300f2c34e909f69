"""Measuring programs: FLOPs, compiled programs, input pipelines, synthetic batches."""
