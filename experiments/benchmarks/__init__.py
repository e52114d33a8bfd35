"""Measurements of speed, each a script with its command and its result on top."""
