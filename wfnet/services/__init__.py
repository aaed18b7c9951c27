"""Small shared services that stand below everything: they know nothing of networks or data."""
