"""TensorFlow Serving: its messages, warm-up requests, settings and a client."""
