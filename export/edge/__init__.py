"""Prediction on small machines: NumPy, Pillow, pydicom and ai-edge-litert, and no TensorFlow."""
