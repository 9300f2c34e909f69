"""From files to batches; the only room that may import TensorFlow."""
