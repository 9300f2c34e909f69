"""From files to batches; the only room that imports TensorFlow itself."""
