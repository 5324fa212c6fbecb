"""A stage that is done in a moment, for tests of everything around stages."""
