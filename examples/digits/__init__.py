"""Train a binary classifier of handwritten digits and its float32 twin, pack it, and compare what they cost."""
