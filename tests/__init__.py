"""The tests of anchorda."""
