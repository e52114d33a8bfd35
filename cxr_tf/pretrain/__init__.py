"""Self-supervised pre-training: pretext tasks on films without labels."""
