"""Score a model on evaluation splits and publish the result: `coupalign eval`."""
