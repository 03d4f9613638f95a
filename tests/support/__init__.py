"""Helpers that several folders of tests share: the reference, shapes, arguments, recorded calls, devices."""
