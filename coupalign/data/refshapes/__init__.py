"""RefShapes, the generated data set. Nothing else imports it."""
