"""The operators called with hostile arguments, and an oracle of the contract."""
