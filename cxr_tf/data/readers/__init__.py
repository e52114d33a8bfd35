"""One data set a file: a folder as published becomes a manifest."""
