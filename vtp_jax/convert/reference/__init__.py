"""Forward passes of published nets in numpy, fp64: what every conversion is checked against.

They take tensors under their published names, in any float type, and infer all sizes from the
arrays, except the number of heads, which tensors do not show. They are written from the papers and
from the outputs of the released code, and import only the error type from `vtp_jax`: a mistake
shared by both sides could not be detected. They are deliberately simple and slow, without dropout.
A missing tensor is an error, never zeros; tensors that a pass does not use are ignored, so the
caller checks names. One module per family, as in `convert.families`.
"""
