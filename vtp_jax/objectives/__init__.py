"""Losses as pure functions of arrays, and the state that some of them carry between steps."""
