"""What tests share: the reference, shapes, calls, devices."""
