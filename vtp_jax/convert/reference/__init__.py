"""Forward passes of published nets in numpy, fp64: what every conversion is checked against.

They take tensors under the names that their authors published, in any float type, and read all
sizes off the arrays, except the number of heads, which no tensor shows. They are written from the
papers and from the outputs of the released code, and import nothing else of `vtp_jax` but the error
type: if both sides shared a mistake, no check could find it. They are slow and plain on purpose,
without dropout. A missing tensor is an error, never zeros; tensors that a pass does not name are
ignored, so names are checked by the caller. One module a family, as in `convert.families`.
"""
