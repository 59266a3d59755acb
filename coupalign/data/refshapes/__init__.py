"""RefShapes: a generated data set in the layout of RefCOCO. Only `cli` and `reproduce` import it."""
