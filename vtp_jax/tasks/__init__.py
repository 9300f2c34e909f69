"""What is done with a pretrained net: make(*, base: Method, ...) -> Method, on any method that has
the `encode` functions the task needs."""
