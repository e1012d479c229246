"""Members of segments of any size, on a device: who is where, and arithmetic on it. torch alone."""
