"""Shared by the tests: where things lie, small real vocabularies, and a writer of random models."""
