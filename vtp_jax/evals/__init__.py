"""Evaluators: make(*, encode, streams, mesh, **cfg) -> Evaluator. They never see a method."""
