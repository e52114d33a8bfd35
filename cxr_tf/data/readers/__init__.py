"""One data set a file: a folder as published becomes a manifest."""

# `read_<name>` in the file <name>.py reads each of them; "table" reads any other.
DATASETS = ("siim", "rsna", "chexpert", "nih", "covid19", "table")
