"""RefShapes, a generated data set in the layout of RefCOCO. `cli` and `reproduce` use it."""
