"""A fuzzer that calls the operators with hostile arguments, and an oracle that knows what must come of each call."""
